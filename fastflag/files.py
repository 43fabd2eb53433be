"""How files are written and refused: atomically, and with one line that says what and where."""

import fcntl
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_PART = ".part"
"""Ends the name of a file that is being written."""


class InputError(Exception):
    """What the user gave is wrong. Its text is one line, `WHAT, WHERE`; commands exit with 2.

    It may quote what the user gave, of any length: what can't be printed is written as an escape,
    and of a text that fills more than a screen the middle is left out.
    """

    def __init__(self, text: str):
        super().__init__(_shortened(printable(_shortened(text))))


def _shortened(text: str) -> str:
    """WHAT at its beginning and WHERE at its end, if there are more than 1,000 characters."""
    return text if len(text) <= 1000 else f"{text[:600]} ... {text[-395:]}"


def printable(text: str) -> str:
    """`text` in one line: line ends and tabs as spaces, other control characters and halves of
    characters, which no terminal prints, as escapes."""
    return "".join(
        " "
        if letter.isspace()
        else letter
        if letter.isprintable()
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def one_line(value: object) -> str:
    """At most 200 characters of what it says in one line; of a bare error its kind."""
    text = " ".join(str(value).split())[:200]
    return text or (type(value).__name__ if isinstance(value, Exception) else "")


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes `path` whole or not at all: a reader sees the old file or the new one, never a part.

    Raises OSError where the folder can't be written or the disk is full; `path` is then as it was.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        handle, temporary = _locked_beside(path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        # A full disk's error names no file, others name the temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from error
    _clear_abandoned(path)


def _locked_beside(path: Path) -> tuple[int, str]:
    """A new file beside `path` and its name. It is locked for as long as it is open, by which
    `_clear_abandoned` of other processes knows that it is being written."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # another process cleared it in the moment before it was locked


def _clear_abandoned(path: Path) -> None:
    """Removes what writers of `path` left beside it that were killed: what nobody has locked."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_PART}"):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Inside, an OSError becomes an InputError with `path`: a file that can't be read is the user's
    to mend, whereas writing raises OSError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.strerror or error}, {path}") from None


def read_text(path: str | os.PathLike, errors: str = "strict") -> str:
    """The text in `path`, with or without a byte-order mark. Raises InputError for a missing or
    unreadable file and, unless `errors` is replace, for bytes that are not UTF-8."""
    with reading(path):
        content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error}), {path}") from None


def read_json(path: str | os.PathLike) -> Any:
    """The JSON document in `path`, with or without a byte-order mark.

    Raises InputError for a missing, unreadable, empty or malformed file.
    """
    with reading(path):
        content = Path(path).read_bytes()
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error}), {path}") from None


def digest_of_sources(folder: Path) -> str:
    """A name, 16 characters, for the Python files of a folder and all below it, by content."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(source)} ".encode() + source)
    return digest.hexdigest()
