"""``python -m zoengine``: the command line."""

from zoengine.cli import main

main()
