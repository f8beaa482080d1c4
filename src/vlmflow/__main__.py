"""``python -m vlmflow``."""

from vlmflow.cli import main

main()
