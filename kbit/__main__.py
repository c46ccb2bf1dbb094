"""`python -m kbit` is `kbit`."""

from kbit.cli import main

main()
