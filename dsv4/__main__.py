"""`python -m dsv4` is `dsv4`: listens for Ctrl-C first, then imports the command line."""

from dsv4 import interrupts

interrupts.install()


def main() -> None:
    """Entry point."""
    from dsv4.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
