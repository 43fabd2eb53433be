"""Verdicts on disk: one file an op and a key, written whole or not at all, and never changed after.

So any number of processes may read and write them: of two that prove the same, the last one's stay.
What can't be read counts as not there. What failed is kept as well, and shown.
"""

import dataclasses
import datetime
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastflag import caches
from fastflag.files import InputError, read_json, write_atomic
from fastflag.model.proof.key import Subject, Surroundings, facts, key

Outcome = Literal["right", "wrong", "failed", "faulted", "silent"]
"""right; wrong numbers; it raised an error; its process died; its process said nothing for long."""

GRAPHS = "graphs"
NONE = ("torch", "off")
"""What is taken where nothing else is: PyTorch's implementations, and no graphs."""

_LOG = logging.getLogger(__name__)
_RETRY_SECONDS = 0.5


@dataclass(frozen=True)
class Found:
    """What was found of one implementation of an op."""

    outcome: Outcome
    why: str = ""
    """What is wrong, in words; empty where it is right."""
    error: float | None = None
    """Largest error of a row or a column, in units of PyTorch's own."""
    device: float | None = None
    """Seconds on the device, inputs not in its cache."""
    host: float | None = None
    """Seconds until the host had launched it."""


@dataclass(frozen=True)
class Verdict:
    """Which implementation an op takes, and what was found of each."""

    op: str
    launched: str
    """Taken where each op is launched by itself: the host's time counts too."""
    replayed: str
    """Taken where CUDA graphs replay an evaluation: the device's time alone counts."""
    reason: str
    found: Mapping[str, Found] = field(default_factory=dict)
    when: str = ""
    """The day, 2026-11-29."""


def refused(op: str, found: Mapping[str, Found]) -> Verdict:
    """An op of which everything that was tried is refused."""
    plain, off = NONE
    taken = off if op == GRAPHS else plain
    reason = ", ".join(f"{name} {one.outcome}" for name, one in found.items() if one.why)
    return Verdict(op, taken, taken, reason or "alone", found, today())


def today() -> str:
    return datetime.date.today().isoformat()


class Verdicts:
    """Those of one subject in these surroundings, in a folder of the user's cache."""

    def __init__(self, subject: Subject, surroundings: Surroundings, folder: Path | None = None):
        self.subject, self.surroundings = subject, surroundings
        self.folder = folder or place()
        self._unwritten: dict[str, Verdict] = {}

    def read(self, op: str) -> Verdict | None:
        """None where there is none, or none that can be read."""
        if op in self._unwritten:
            return self._unwritten[op]
        document = _document(self._path(op))
        return None if document is None else _verdict(document, op)

    def keep(self, verdict: Verdict) -> bool:
        """Writes a verdict. Where the disk does not take it, this object has it all the same: says
        so, and returns False."""
        document = {
            "verdict": dataclasses.asdict(verdict),
            "facts": facts(self.subject, self.surroundings),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path(verdict.op), json.dumps(document, indent=1))
        except OSError as error:
            _LOG.warning("the proof is not kept: %s, %s", error.strerror or error, self.folder)
            self._unwritten[verdict.op] = verdict
            return False
        self._unwritten.pop(verdict.op, None)
        return True

    def stale(self, op: str) -> str:
        """What is another than it was when the op was last proved, for the same model: the names of
        the facts that changed. Empty where it never was."""
        nearest: list[str] = []
        subject = dataclasses.asdict(self.subject)
        now = json.loads(json.dumps(facts(self.subject, self.surroundings)))
        for path in sorted(self.folder.glob(f"{op}-*.json")):
            document = _document(path)
            then = document["facts"] if document else {}
            if document is None or any(then.get(name) != subject[name] for name in subject):
                continue
            changed = [name for name in now if then.get(name) != now[name]]
            nearest = min(nearest or changed, changed, key=len)
        return ", ".join(nearest)

    def _path(self, op: str) -> Path:
        return self.folder / f"{op}-{key(op, self.subject, self.surroundings)}.json"


def place() -> Path:
    return caches.own("verdicts").folder


def forget(folder: Path | None = None) -> int:
    """Removes every verdict, and says how many there were. Raises OSError where one can't be."""
    paths = [*(folder or place()).glob("*.json")]
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


@contextmanager
def locked(uuid: str, waiting: Callable[[], None], folder: Path | None = None) -> Iterator[None]:
    """Inside, no other process proves on the GPU of that name: two at a time would measure each
    other. `waiting` is called when it has to wait. A process that is killed leaves no lock; where
    none can be made, as on a read-only disk, there is none."""
    folder = folder or place()
    handle = None
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / f"{uuid}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    if handle is None:
        yield
        return
    try:
        told = False
        while not _took(handle):
            if not told:
                waiting()
            told = True
            time.sleep(_RETRY_SECONDS)
        yield
    finally:
        os.close(handle)


def _took(handle: int) -> bool:
    """Whether the lock is this process's now; also where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _document(path: Path) -> dict[str, Any] | None:
    """A verdict's file; None where it is not there or damaged, which is told."""
    if not path.exists():
        return None
    try:
        document = read_json(path)
    except InputError as error:
        _LOG.warning("a verdict is not read: %s", error)
        return None
    if isinstance(document, dict) and isinstance(document.get("facts"), dict):
        return document
    _LOG.warning("a verdict is not read: it is of another form, %s", path)
    return None


def verdict_of(values: Mapping[str, Any]) -> Verdict:
    """Of `dataclasses.asdict`. Raises KeyError, TypeError, ValueError or AttributeError for what is
    of another form."""
    found = {str(name): Found(**one) for name, one in values["found"].items()}
    rest = {name: value for name, value in values.items() if name != "found"}
    return Verdict(**rest, found=found)


def _is_of_form(verdict: Verdict) -> bool:
    """Whether texts are texts and figures numbers, and nothing is taken that was found wrong."""
    texts = [verdict.launched, verdict.replayed, verdict.reason, verdict.when]
    figures = []
    for found in verdict.found.values():
        texts += [found.outcome, found.why]
        figures += [found.error, found.device, found.host]
    numbers = (one is None or type(one) in (int, float) for one in figures)
    refused = {name for name, found in verdict.found.items() if found.outcome != "right"}
    return (
        all(isinstance(text, str) for text in texts)
        and all(numbers)
        and not refused & {verdict.launched, verdict.replayed}
    )


def _verdict(document: dict[str, Any], op: str) -> Verdict | None:
    try:
        verdict = verdict_of(document["verdict"])
    except (KeyError, TypeError, AttributeError, ValueError):
        verdict = None
    if verdict is None or verdict.op != op or not _is_of_form(verdict):
        _LOG.warning("a verdict of %s is not read: it is of another form", op)
        return None
    return verdict
