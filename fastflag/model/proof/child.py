"""The process in which kernels are tried: a fault or a hang there harms nobody.

It reads one JSON document, the request, and writes one a line: what it begins, and a verdict an op.
Whatever else writes to its stdout goes to stderr.
"""

import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastflag.config import PlanConfig
from fastflag.model import ops
from fastflag.model.proof.cases import Function, cases, fitting
from fastflag.model.proof.clock import Times, interleaved
from fastflag.model.proof.devices import Cpu, Cuda, Device
from fastflag.model.proof.key import Subject
from fastflag.model.proof.speed import Timed, fastest
from fastflag.model.proof.trial import Trial
from fastflag.model.proof.verdicts import Found, Verdict, refused, today, verdict_of
from fastflag.model.recompute import ran_out

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    subject: Subject
    ops: tuple[str, ...]
    """To be proved, in this order."""
    batch: PlanConfig = field(default_factory=PlanConfig)
    device: str = "cuda"
    replays: int = 200
    rounds: int = 30
    seconds: float = 1.0
    """For the rounds of a case, at most."""
    failed: Mapping[str, Mapping[str, Found]] = field(default_factory=dict)
    """Implementations of an op that have ended a child: not tried again."""
    verdicts: tuple[Verdict, ...] = ()
    """Those that are there."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "Request":
        values = json.loads(text)
        failed = {
            op: {name: Found(**found) for name, found in some.items()}
            for op, some in values.pop("failed").items()
        }
        return Request(
            subject=Subject(**values.pop("subject")),
            batch=PlanConfig(**values.pop("batch")),
            ops=tuple(values.pop("ops")),
            verdicts=tuple(verdict_of(one) for one in values.pop("verdicts")),
            failed=failed,
            **values,
        )


Prove = Callable[[Request, Device, Tell], Verdict]


def main(others: Mapping[str, Prove]) -> None:
    """`others` prove what is no op of one layer, by name."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no line of ours

    def tell(document: dict[str, Any]) -> None:
        lines.write(json.dumps(document) + "\n")
        lines.flush()

    serve(Request.from_json(sys.stdin.readline()), tell, others)


def serve(request: Request, tell: Tell, others: Mapping[str, Prove]) -> None:
    device: Device = Cuda() if request.device == "cuda" else Cpu()
    for op in request.ops:
        tell({"begin": op, "implementation": ""})
        if op in others and (ended := request.failed.get(op)):
            verdict = refused(op, ended)
        else:
            verdict = others.get(op, partial(prove_op, op))(request, device, tell)
        request = dataclasses.replace(request, verdicts=(*request.verdicts, verdict))
        tell({"verdict": dataclasses.asdict(verdict)})


def prove_op(op: str, request: Request, device: Device, tell: Tell) -> Verdict:
    """Each implementation on each case until one finds it wrong; then the right ones' times."""
    functions = getattr(ops, op).candidates(device.torch)
    found = dict(request.failed.get(op, {}))
    others = {name: one for name, one in functions.items() if name not in ("torch", *found)}
    errors = dict.fromkeys(others, 0.0)
    samples: dict[str, list[Times]] = {name: [] for name in functions}
    batch = fitting(request.batch, request.subject, device.memory)
    for case in cases(op, request.subject, batch, device.torch, device.memory):
        tell({"begin": op, "implementation": "torch", "case": case.what})
        trial = Trial(case, functions["torch"], device)
        for name in [name for name in others if name not in found]:
            tell({"begin": op, "implementation": name, "case": case.what})
            judged = _judged(trial, others[name], request.replays)
            errors[name] = max(errors[name], judged.error or 0.0)
            if judged.outcome != "right":
                found[name] = dataclasses.replace(judged, why=f"{case.what}: {judged.why}")
        right = {name: one for name, one in functions.items() if name not in found}
        if case.timed and len(right) > 1:
            for name, times in _times(trial, right, request, device).items():
                samples[name].append(times)
        del trial
        gc.collect()
    timed = {name: added_up(samples[name]) for name in functions if name not in found}
    return _verdict(op, timed, found, errors)


def _judged(trial: Trial, function: Function, replays: int) -> Found:
    try:
        judged = trial.judged(function, replays)
    except Exception as error:  # of a compiler, a driver or the op: any of them refuses it
        if device_is_lost(error):
            raise
        return Found("failed", _one_line(error))
    return Found("wrong" if judged.why else "right", judged.why, min(judged.error, 1e9))


def device_is_lost(error: Exception) -> bool:
    """Whether nothing more can be done on the GPU in this process."""
    return "CUDA error" in str(error) and not ran_out(error)


def _times(
    trial: Trial, functions: Mapping[str, Function], request: Request, device: Device
) -> dict[str, Times]:
    works = {name: partial(trial.prepared, one) for name, one in functions.items()}
    return interleaved(works, device.clock, request.rounds, request.seconds)


def added_up(samples: list[Times]) -> Timed:
    """An op's whole work in an update: round by round, all cases together."""
    rounds = min((len(times.samples) for times in samples), default=0)
    totals = [
        [sum(getattr(times.samples[n], name) for times in samples) for n in range(rounds)]
        for name in ("seconds", "launch")
    ]
    return Timed(*map(torch.tensor(totals, dtype=torch.float64).numpy().__getitem__, (0, 1)))


def _verdict(
    op: str, timed: dict[str, Timed], found: dict[str, Found], errors: dict[str, float]
) -> Verdict:
    for name, one in timed.items():
        measured = len(one.device) > 0
        device, host = (
            (sorted(side)[len(side) // 2] if measured else None) for side in (one.device, one.host)
        )
        error = errors.get(name, 1.0)
        found[name] = Found("right", "", error, device and float(device), host and float(host))
    if len(timed) < 2:
        return refused(op, found)
    (launched, gain), (replayed, alone) = (fastest(timed, way) for way in (False, True))
    if launched == replayed == "torch":
        reason = "none is faster"
    elif launched == "torch":
        reason = f"{replayed} is {alone:.2f} times as fast on the device, not on the host"
    else:
        reason = f"{launched} is {gain:.2f} times as fast"
    return Verdict(op, launched, replayed, reason, found, today())


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
