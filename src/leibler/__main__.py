"""``python -m leibler``: the command line."""

from leibler.cli import main

main()
