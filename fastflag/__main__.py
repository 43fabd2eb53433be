"""Where the commands `fastflag` and `python -m fastflag` begin."""

import os
import signal


def main() -> None:
    """Runs the command line. Importing it takes a tenth of a second; Ctrl-C ends that quietly."""
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        # Not by an exception: one in 60 fell into Python's import locks, was shown and ignored.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from fastflag import cli

    signal.signal(signal.SIGINT, interrupt)
    cli.main()


if __name__ == "__main__":
    main()
