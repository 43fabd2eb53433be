"""Work in parts, in one results file: what is done is not done again, and the time is kept.

A file is of one device and commit. Each part is written when it ends, so a run that is cut off
loses one part, and the next run begins with those that have not been tried and ends with those that
failed. A part counts as done only for the code that it was done with.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure.results import ROOT, document, write_document
from fastflag.files import digest_of_sources

_CODE = ("bench", "fastflag", "kernels", "tests")

Found = dict[str, Any]
"""What a part gives: "rows", and whatever else is worth keeping; "red" where something is wrong."""


@dataclass(frozen=True)
class Part:
    name: str
    seconds: float  # it is not begun with less time left
    run: Callable[[float, dict[str, Found]], Found]
    """Takes the seconds left and what other parts have found; what it raises is recorded."""


def code_digest(root: Path = ROOT) -> str:
    """Of every source that a figure may depend on."""
    return " ".join(digest_of_sources(root / folder) for folder in _CODE)


class Record:
    """The parts of a results file that were done with this code; those of other code go with the
    next write."""

    def __init__(self, file: Path, code: str):
        self._file, self._code = file, code
        kept = json.loads(file.read_text()) if file.exists() else {}
        self.parts: dict[str, Found] = kept["parts"] if kept.get("code") == code else {}

    def found(self) -> dict[str, Found]:
        """Of the parts that are done."""
        return {name: part for name, part in self.parts.items() if "error" not in part}

    def write(self, name: str, part: Found) -> None:
        self.parts[name] = part
        write_document(self._file, self.document())

    def document(self) -> dict[str, Any]:
        rows = [row for part in self.parts.values() for row in part.get("rows", [])]
        return document(rows) | {"code": self._code, "parts": self.parts}


def run_parts(
    parts: Sequence[Part],
    record: Record,
    seconds: float,
    now: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Runs what is not done, within `seconds`; returns the names of the parts that are left."""
    end, left = now() + seconds, []
    for part in _pending(parts, record):
        if end - now() < part.seconds:
            left.append(part.name)
            _tell(f"{part.name}: not begun, {end - now():.0f} s left of {part.seconds:.0f} s")
            continue
        began = now()
        try:
            found = part.run(end - began, record.found())
        except Exception as error:  # the other parts go on
            found = {"error": f"{type(error).__name__}: {error}"}
            left.append(part.name)
        record.write(part.name, found | {"seconds": round(now() - began, 1)})
        _tell(f"{part.name}: {_outcome(found)}, {now() - began:.0f} s")
    return left


def _pending(parts: Sequence[Part], record: Record) -> Iterator[Part]:
    """Those not tried yet, and then those that failed."""
    failed = [part for part in parts if "error" in record.parts.get(part.name, {})]
    yield from (part for part in parts if part.name not in record.parts)
    yield from failed


def _outcome(found: Found) -> str:
    if "error" in found:
        return f"failed, {found['error'].strip().splitlines()[-1][:200]}"
    return found.get("summary") or f"{len(found.get('rows', []))} rows"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
