"""Market files -> frames: CSV text, Parquet and JSON, compressed or not, as they are found.

A frame's index numbers the file's lines or rows and is named "line" or "row".
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from pathlib import Path
from typing import Any

import pandas as pd

from fastflag.files import InputError, one_line

# By their first bytes, whatever the file's name ends in.
_GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
_PARQUET, _ZIP, _OLD_EXCEL = b"PAR1", (b"PK\x03\x04", b"PK\x05\x06"), b"\xd0\xcf\x11\xe0\xa1\xb1"
_WORKBOOKS = (b"xl/workbook", b"opendocument.spreadsheet")  # inside a zip, never compressed
_TAR, _TAR_AT = b"ustar", 257
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_SEPARATORS = ",;\t|"


def path_of(name: str) -> Path:
    """The file that is named, ~ and ~user being home folders."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise InputError(f"no such user's home folder, {name}") from None


def stem_of(path: Path) -> str:
    """AAPL of AAPL.csv and AAPL.csv.gz."""
    return _unpacked(path).stem


def _unpacked(path: Path) -> Path:
    """The name without what says how the file is compressed."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def read_table(path: Path, kind: str = "") -> pd.DataFrame:
    """The frame of a file of `kind`, csv or parquet; "": as its name ends. Names are the file's.
    What is Parquet by its first bytes is read as Parquet in either.

    Raises InputError, with the line where there is one, for a file that is neither.
    """
    content = _read_bytes(path)
    if not kind:
        kind = "parquet" if _unpacked(path).suffix.lower() == ".parquet" else "csv"
    is_parquet = kind == "parquet" or content.startswith(_PARQUET)
    return _parquet_table(content, path) if is_parquet else _csv_table(content, path)


def named(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """`frame` with its names in lower case, spaces as underscores. Raises InputError for one that
    is there twice."""
    names = [str(name).strip().lower().replace(" ", "_") for name in frame.columns]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"more than one column {name!r}, {path}")
    return frame.set_axis(names, axis=1)


def read_json(path: Path) -> Any:
    """JSON with all numbers as floats; repeated keys, which `json` would drop, are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"repeated key {next(key for key in keys if keys.count(key) > 1)!r}")
        return dict(pairs)

    content = _read_bytes(path)
    try:
        document = json.loads(_text(content), parse_int=float, object_pairs_hook=unique)
        if rb"\u" in content:  # "\ud800" is half a character, which no text can hold
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({one_line(error)}), {path}") from None
    return document


def _csv_table(content: bytes, path: Path) -> pd.DataFrame:
    """Every cell as text. A short row is refused, not padded: so does a truncated file look.

    Cells are separated by whichever of comma, semicolon, tab and bar is most often in the names'
    line; `attrs["decimal_comma"]`: it is no comma.
    """
    csv.field_size_limit(2**31 - 1)  # news may be long
    try:
        text = _text(content)
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise InputError(f"not CSV text ({error}), {path} line {line}") from None
    separator, skipped = _separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise InputError(f"not CSV text ({error}), {path} line {reader.line_num + 1}") from None
    if len(rows) < 2 + skipped:
        raise InputError(f"no rows, {path}")
    _, header = rows[skipped]
    del rows[: skipped + 1]
    for line, row in rows:
        if len(row) != len(header):
            raise InputError(f"{len(row)} cells under {len(header)} names, {path} line {line}")
    lines = pd.Index([line for line, _ in rows], name="line")
    frame = pd.DataFrame([row for _, row in rows], lines, header, dtype=object)
    frame.attrs["decimal_comma"] = separator != ","
    return frame


def _separator(text: str) -> tuple[str, int]:
    """What separates cells, and how many lines say so before the names (Excel's `sep=;`)."""
    lines = (line for line in re.split(r"[\r\n]+", text[:100_000]) if line)
    first = next(lines, "")
    if told := re.fullmatch(rf'"?sep=([{re.escape(_SEPARATORS)}])"?', first.strip(" ")):
        return told[1], 1
    bare = re.sub(r'"[^"]*"', "", first)
    return max(_SEPARATORS, key=bare.count), 0


def _parquet_table(content: bytes, path: Path) -> pd.DataFrame:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"Parquet needs the package pyarrow, {path}") from None
    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(content)).read()
        table.validate(full=True)  # reading does not look whether texts are UTF-8
        # An unknown time zone is a LookupError.
        # Without the metadata a date that pandas had as its index is a column like any other.
        frame = table.to_pandas(ignore_metadata=True)
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        raise InputError(f"not Parquet ({one_line(error)}), {path}") from None
    if frame.empty:
        raise InputError(f"no rows, {path}")
    frame.index = pd.RangeIndex(1, len(frame) + 1, name="row")
    return frame


def _text(content: bytes) -> str:
    """As the mark at its beginning says or, without one, where the first character's zeros lie: it
    is an ASCII one in JSON (RFC 4627), and in CSV whose columns we know."""
    return content.decode(json.detect_encoding(content))


def _read_bytes(path: Path) -> bytes:
    """The file's content, undone where it is compressed.

    Raises InputError for what can't be read, is empty or damaged, and for archives and workbooks.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{getattr(error, 'strerror', None) or error}, {path}") from None
    try:
        content = _decompressed(content)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"compressed, but damaged ({one_line(error)}), {path}") from None
    if not content:
        raise InputError(f"empty file, {path}")
    if told := _other_format(content):
        raise InputError(f"{told}, {path}")
    return content


def _other_format(content: bytes) -> str:
    """What holds tables in files of its own, and what to do then; "" for anything else."""
    zipped = content.startswith(_ZIP)
    if content.startswith(_OLD_EXCEL) or (zipped and any(name in content for name in _WORKBOOKS)):
        return "a workbook, as Excel writes: save its sheet as CSV"
    if zipped:
        return "a zip archive: unpack it and name the file inside"
    if content[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR:
        return "a tar archive: unpack it and name the file inside"
    return ""


def _decompressed(content: bytes) -> bytes:
    if content.startswith(_GZIP):
        return gzip.decompress(content)
    if content.startswith(_BZIP2):
        return bz2.decompress(content)
    if content.startswith(_XZ):
        return lzma.decompress(content)
    if content.startswith(_ZSTD):
        import pyarrow

        return pyarrow.input_stream(pyarrow.BufferReader(content), compression="zstd").read()
    return content
