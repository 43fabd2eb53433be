"""stdout and stderr as a command has them: they never fail, and a refusal is one line."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

REFUSED = 2
"""Exit status of a command that is given something wrong."""


class Stream:
    """stdout or stderr that never fails, since a training must not end for its progress: what is
    written after the first error is lost. `before` is called before anything is written."""

    def __init__(self, stream: TextIO | None, before: Callable[[], None] = lambda: None):
        # Python has none where the caller closed it (`>&-`).
        self._stream = stream or open(os.devnull)  # noqa: SIM115 (until the process ends)
        self.error: OSError | None = None
        self._before = before

    def write(self, text: str) -> int:
        self._before()
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, act: Callable[..., object], *arguments: str) -> None:
        if self.error is not None:
            return
        try:
            try:
                act(*arguments)
            except UnicodeEncodeError as error:  # of which nothing has been written
                (text,) = arguments
                act(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except OSError as error:
            self.error = error
            # Else Python complains once more when it flushes at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Held(logging.Handler):
    """Warnings, kept until `tell` and from then on printed at once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[logging.LogRecord] | None = []

    def emit(self, record: logging.LogRecord) -> None:
        if self._kept is not None:
            self._kept.append(record)
        elif logging.lastResort is not None:
            logging.lastResort.handle(record)  # on stderr, as without a handler

    def tell(self) -> None:
        kept, self._kept = self._kept, None
        for record in kept or ():
            self.emit(record)


@contextmanager
def warnings_held() -> Iterator[Callable[[], None]]:
    """Keeps this package's warnings back until what it gives is called, or the context is left
    otherwise than by a refusal, which is one line alone."""
    held, log = _Held(), logging.getLogger("fastflag")
    log.addHandler(held)
    try:
        yield held.tell
        held.tell()
    except BaseException as end:
        if not isinstance(end, SystemExit) or end.code != REFUSED:
            held.tell()
        raise
    finally:
        log.removeHandler(held)
