"""The header of a GGUF file: settings, tokenizer, and where each tensor lies. Data only.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastflag.files import InputError, reading

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4  # a tensor's most


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple[int, ...]
    """Outermost axis first, as NumPy has it; GGUF writes it the other way round."""
    kind: int
    """GGML type, not checked."""
    offset: int
    """From the file's first byte after the header and its padding; not checked."""


class GGUFHeader:
    """What stands before the tensors of a GGUF file of version 2 or 3.

    SmolLM2's 98,000 strings take a thirtieth of the time that `gguf.GGUFReader` takes, which makes
    NumPy views of each; and a wrong count makes that run for ever. Raises InputError for a missing,
    truncated or foreign file.

    data: the file, mapped.
    metadata: scalars, strings and lists of them by key.
    tensors: StoredTensor by stored name.
    end: first byte after the header.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.end = 0
        try:
            with reading(path), open(path, "rb") as file:
                start = file.read(16)
                if not start.startswith(b"GGUF"):
                    raise InputError(f"{_what(start)}, {path}")
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._parse()
        except struct.error:
            raise InputError(f"GGUF file ends early, {path}") from None
        except UnicodeDecodeError:
            raise InputError(f"broken GGUF file, {path}") from None

    def _parse(self) -> None:
        _, version = self._take("4sI")
        if version not in (2, 3):
            raise InputError(f"GGUF version {version} is not supported, {self.path}")
        tensors, settings = self._take("QQ")
        for _ in range(settings):
            key = self._string()
            if key in self.metadata:
                raise InputError(f"broken GGUF file: {key!r} is there twice, {self.path}")
            self.metadata[key] = self._value(*self._take("I"))
        for _ in range(tensors):
            name = self._string()
            (dimensions,) = self._take("I")
            if name in self.tensors or dimensions > _DIMENSIONS:
                raise InputError(f"broken GGUF file: tensor {name!r}, {self.path}")
            shape = self._take(f"{dimensions}Q")[::-1]
            self.tensors[name] = StoredTensor(shape, *self._take("IQ"))

    def _take(self, layout: str) -> tuple:
        values = struct.unpack_from(f"<{layout}", self.data, self.end)
        self.end += struct.calcsize(f"<{layout}")
        return values

    def _string(self) -> str:
        (size,) = struct.unpack_from("<Q", self.data, self.end)
        start = self.end + 8
        self.end = start + size
        if self.end > len(self.data):
            raise InputError(f"GGUF file ends early, {self.path}")
        return self.data[start : self.end].decode()

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise InputError(f"broken GGUF file: value of type {kind}, {self.path}")
        item, count = self._take("IQ")
        if item in _SCALARS:
            return list(self._take(f"{count}{_SCALARS[item]}"))
        if item != _STRING:
            raise InputError(f"broken GGUF file: array of type {item}, {self.path}")
        return [self._string() for _ in range(count)]


def _what(start: bytes) -> str:
    """What a file is that begins so and is no GGUF file, where downloads often are that."""
    if start.startswith(b"\x1f\x8b"):
        return "compressed, not a GGUF file: unpack it first (gunzip)"
    if start.lstrip().startswith(b"<"):
        return "a web page, not a GGUF file: download the file that the page links to"
    if start.startswith(b"version https:/"):
        return "a pointer of Git LFS, not a GGUF file: fetch the file itself (git lfs pull)"
    return "not a GGUF file"


def read_gguf_metadata(path: Path, prefix: str) -> dict[str, Any]:
    """The settings of a GGUF file whose key begins with `prefix`. Raises as `GGUFHeader` does."""
    metadata = GGUFHeader(path).metadata
    return {key: value for key, value in metadata.items() if key.startswith(prefix)}
