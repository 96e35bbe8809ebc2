"""`python -m dsv4` is `dsv4`."""

from dsv4.cli import main

main()
