"""``python -m corewise.cli``."""

from corewise.cli import main

main()
