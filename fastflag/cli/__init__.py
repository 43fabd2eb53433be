"""The command line.

What is wrong is told in one line on stderr, with --json too: stdout is then empty, and warnings
that came before are not told.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from fastflag import caches
from fastflag.cli.arguments import command_of
from fastflag.cli.commands import COMMANDS, Report, Train
from fastflag.cli.streams import REFUSED, Stream, warnings_held
from fastflag.files import InputError

__all__ = ["COMMANDS", "Report", "Train", "main"]

_NO_MEMORY = "not enough memory: lower --num-steps, --num-envs or --backtest-episodes, here"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line. Exits with 2 and one line on stderr for what the user gave wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with (
        redirect_stderr(Stream(sys.stderr)),
        warnings_held() as tell,
        redirect_stdout(Stream(sys.stdout, before=tell)) as out,
    ):
        command = _guard(words)
        out.flush()
        if out.error is not None:
            _tell_lost_output(out.error, is_result=not isinstance(command, Train | Report))


def _guard(words: list[str]) -> Any:
    """Runs a command line as `_run`; what goes wrong becomes one line and an exit status."""
    try:
        return _run(words)
    except InputError as error:
        _refuse(str(error))
    except OSError as error:
        _refuse(f"{error.strerror or error}, {error.filename or 'while writing'}")
    except UnicodeEncodeError as error:
        _refuse(f"{error.object[:80]!r} has no form in {error.encoding}, in a name or a text")
    except (MemoryError, RuntimeError) as error:
        from fastflag.api import ran_out

        if not ran_out(error):
            raise
        _refuse(_NO_MEMORY)
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last checkpoint" if words[:1] == ["train"] else ""
        print(f"\nfastflag: interrupted{hint}", file=sys.stderr)
        raise SystemExit(130) from None


def _run(words: list[str]) -> Any:
    """Runs a command line. Returns the command that ran; None where it was help or the version."""
    command = command_of(words)
    if command is not None:
        caches.settle(os.environ)
        command.run()
    return command


def _refuse(message: str) -> None:
    print(f"fastflag: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(REFUSED)


def _tell_lost_output(error: OSError, is_result: bool) -> None:
    """Of a command that writes files, what it prints is not its result."""
    told = f"{error.strerror or error}, standard output"
    if not is_result:
        print(f"fastflag: {told}", file=sys.stderr)
    elif isinstance(error, BrokenPipeError):  # nobody reads on (`| head`)
        raise SystemExit(141)
    else:
        _refuse(told)
