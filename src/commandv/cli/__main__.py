"""`python -m commandv.cli`."""

from commandv.cli import main

main()
