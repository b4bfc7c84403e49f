"""Puts the repository root on the path, so that ``pytest bench`` finds the package ``bench``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
