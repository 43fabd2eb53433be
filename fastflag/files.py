"""How files are written and refused: atomically, and with one line that says what and where."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


class InputError(Exception):
    """What the user gave is wrong. Its text is one line, `WHAT, WHERE`; commands exit with 2.

    It may quote what the user gave: what can't be printed is written as an escape.
    """

    def __init__(self, text: str):
        super().__init__(printable(text))


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


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes `path` whole or not at all: a reader sees the old file or the new one, never a part.

    Raises OSError where the folder can't be written or the disk is full; `path` is then as it was.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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


def read_json(path: str | os.PathLike) -> Any:
    """The JSON document in `path`, with or without a byte-order mark.

    Raises InputError for a missing, unreadable, empty or malformed file.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{error.strerror or error}, {path}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error}), {path}") from None


def digest_of_sources(folder: Path) -> str:
    """A name, 16 characters, for the Python files of a folder and all below it, by content."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(source)} ".encode() + source)
    return digest.hexdigest()
