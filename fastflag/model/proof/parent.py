"""Starts the child, reads its lines, and starts it again without what ended it.

What the child writes is text, and all that is believed of it is a whole line of the right form.
"""

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fastflag
from fastflag.model.proof.child import Request
from fastflag.model.proof.verdicts import NONE, Found, Verdict, refused, verdict_of

SILENCE = 60.0
"""Seconds without a line, after which the child counts as hanging."""
DEATHS = 3
"""Children that may die before the rest is given up."""
_LAST_SECONDS = 5.0  # of a child that has said all, to end by itself
_TAIL = 300  # characters of what a dead child said last


@dataclass(frozen=True)
class Begun:
    """What the child does now."""

    op: str
    implementation: str = ""
    case: str = ""


@dataclass(frozen=True)
class GivenUp:
    """Ops that no verdict was found of, and why."""

    ops: tuple[str, ...]
    why: str


class _Hangs(Exception):
    pass


def prove(
    command: Sequence[str], request: Request, silence: float = SILENCE
) -> Iterator[Begun | Verdict | GivenUp]:
    """What comes out of each op, as it does. `command` is the child's; nothing of it is left when
    the iterator ends or is closed."""
    deaths, left, failed = 0, list(request.ops), {op: dict(f) for op, f in request.failed.items()}
    verdicts = list(request.verdicts)
    while left:
        asked = replace(request, ops=(*left,), failed=failed, verdicts=(*verdicts,))
        child, begun, why = _Child(command, asked), None, ""
        try:
            for told in child.lines(silence):
                if isinstance(told, Verdict):
                    if told.op in left:
                        left.remove(told.op)
                        verdicts.append(told)
                        yield told
                elif told.op in left:
                    begun = told
                    yield told
        except _Hangs:
            why = f"said nothing for {silence:g} s"
        finally:
            child.end()
        if not left:
            return
        why = why or child.death()
        deaths += 1
        if begun is None or begun.op not in left:  # it never came so far
            yield GivenUp((*left,), f"the child {why}")
            return
        # PyTorch's own, or the preparation: there is nothing to leave out another time.
        if begun.implementation in ("", *NONE):
            left.remove(begun.op)
            yield GivenUp((begun.op,), f"the child {why} in PyTorch's own part")
        else:
            outcome = "silent" if "said nothing" in why else "faulted"
            told = f"{begun.case}: its process {why}".removeprefix(": ")
            failed.setdefault(begun.op, {})[begun.implementation] = Found(outcome, told)
        if deaths >= DEATHS and left:
            yield from _condemned(failed, left)
            yield GivenUp((*left,), f"{deaths} children died, the last one {why}")
            return


def _condemned(failed: dict[str, dict[str, Found]], left: list[str]) -> Iterator[Verdict]:
    """Ops that ended a child and are not begun again take PyTorch's."""
    for op in [op for op in left if failed.get(op)]:
        left.remove(op)
        yield refused(op, failed[op])


def _environment() -> dict[str, str]:
    """This process's, but for what it asks for: a proof compares all there is. Nor is the package
    looked for in the working folder, where another version may lie."""
    asked = ("FASTFLAG_KERNELS", "FASTFLAG_GRAPHS")
    kept = {name: value for name, value in os.environ.items() if name not in asked}
    return kept | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, _places()))}


class _Child:
    def __init__(self, command: Sequence[str], request: Request):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
        )
        self._said = b""
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(request.to_json().encode() + b"\n")
            self._process.stdin.close()
        except OSError:  # it died before it read
            pass

    def lines(self, silence: float) -> Iterator[Begun | Verdict]:
        """Raises _Hangs where it says nothing for so many seconds; words that mean nothing are no
        sign of life."""
        out, err = self._process.stdout, self._process.stderr
        assert out is not None and err is not None
        part, last = b"", time.monotonic()
        with selectors.DefaultSelector() as ready:
            for stream in (out, err):
                ready.register(stream, selectors.EVENT_READ)
            while ready.get_map():
                if time.monotonic() - last > silence:
                    raise _Hangs
                heard = ready.select(timeout=min(silence, 1.0))
                if not heard and self._process.poll() is not None:
                    break  # what it has started holds its pipes
                for key, _ in heard:
                    data = os.read(key.fd, 2**16)
                    if not data:
                        ready.unregister(key.fileobj)
                    elif key.fileobj is err:
                        self._said = (self._said + data)[-_TAIL:]
                    else:
                        *whole, part = (part + data).split(b"\n")
                        for told in filter(None, map(_meaning, whole)):
                            yield told
                            # What is done with it is not the child's time.
                            last = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_SECONDS)

    def end(self) -> None:
        """With all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def death(self) -> str:
        """How it ended, in words."""
        status = self._process.returncode
        said = self._said.decode(errors="replace").strip().splitlines()[-1:]
        if status < 0:
            return f"died by {signal.Signals(-status).name}"
        if status == 0:
            return "ended without a verdict"
        return f"died: {said[0]}" if said else f"died with status {status}"


def _places() -> tuple[str, str]:
    """Where the child finds this package, as this process did, and all else."""
    return str(Path(fastflag.__file__).parents[1]), os.environ.get("PYTHONPATH", "")


def _meaning(line: bytes) -> Begun | Verdict | None:
    """None for a line of no meaning."""
    try:
        document: Any = json.loads(line)
        if "verdict" in document:
            verdict = verdict_of(document["verdict"])
            taken = (verdict.op, verdict.launched, verdict.replayed, verdict.reason, verdict.when)
            return verdict if all(isinstance(word, str) for word in taken) else None
        words = [document.get(name, "") for name in ("implementation", "case")]
        return Begun(document["begin"], *words)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
