"""``python -m simulated_gpu MODULE ARGUMENTS``: see the package."""

import runpy
import sys

from simulated_gpu.install import install

install()
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
