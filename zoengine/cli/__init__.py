"""The command line: train, eval, sweep, compare, meta-train, tasks, methods and doctor of ``zoengine``."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = {"typer": "typer", "rich": "rich", "pydantic": "pydantic", "yaml": "pyyaml"}


def main() -> None:
    """Entry point of the ``zoengine`` command."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f"zoengine: the command line needs {', '.join(missing)}: pip install 'zoengine[hf]'")
    from zoengine.cli.app import app

    app(prog_name="zoengine")
