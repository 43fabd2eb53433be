"""CUDA graphs judged on a whole update, with the kernels that would be taken with and without them.

What is timed is what a run does: the evaluation and the gradient step are a graph each, learning
rates fall, and the optimiser steps inside of the second. It has never run on a GPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastflag.config import AlgorithmConfig, from_dict
from fastflag.learn.update import make_optimizer, set_learning_rates, update
from fastflag.learn.whole_lesson import whole_lesson
from fastflag.model.arithmetic import name_of
from fastflag.model.ops import Choice
from fastflag.model.proof.child import Request, Tell, added_up
from fastflag.model.proof.choice import written
from fastflag.model.proof.clock import Sample, Times
from fastflag.model.proof.devices import Device
from fastflag.model.proof.layer import CHOSEN, LAYER, chosen_by, random_weights
from fastflag.model.proof.speed import FASTER, faster
from fastflag.model.proof.verdicts import GRAPHS, Found, Outcome, Verdict, refused, today
from fastflag.policy.table import Policy

_VOCABULARY = 1024
_BOUND = 0.05  # of the gradient's norm after some updates, whose kernels may round otherwise
# Of how far the parameters move until then: a step that is left out, taken twice, or at another
# rate. Not of where to: AdamW's first steps are of about one size, whatever a gradient's rounding.
_MOVED = 0.2
_WARM_UP = 4  # updates: the trunk is read, kernels compiled, and at the second one graphs captured


def prove_graphs(request: Request, device: Device, tell: Tell) -> Verdict:
    """On where an update is clearly faster with them; rounds of both, in turn."""
    updates, policies, starts = {}, {}, {}
    for way in ("off", "on"):
        tell({"begin": GRAPHS, "implementation": way, "case": "capture"})
        policies[way] = _policy(request, device, way)
        starts[way] = _place(policies[way])
        updates[way] = _update(request, policies[way])
    norms, moved = (dict.fromkeys(updates, 0.0) for _ in range(2))
    samples: dict[str, list[Sample]] = {way: [] for way in updates}
    for number in range(_WARM_UP + request.rounds):
        tell({"begin": GRAPHS, "implementation": "on", "case": f"update {number + 1}"})
        for way, one in updates.items():
            if number < _WARM_UP:
                norms[way] = float(one()["grad_norm"])
                moved[way] = float((_place(policies[way]) - starts[way]).norm())
            else:
                samples[way].append(device.clock.sample(partial(_itself, one)))
    captured = policies["on"].graphs
    if captured is not None and captured.problem:
        return _refused("failed", f"a capture fails: {captured.problem}")
    if not abs(norms["on"] - norms["off"]) <= _BOUND * norms["off"]:  # NaN is not
        why = f"the gradient's norm is {norms['on']:.3g}, not {norms['off']:.3g}"
        return _refused("wrong", why)
    if not abs(moved["on"] - moved["off"]) <= _MOVED * moved["off"]:
        why = f"the parameters move by {moved['on']:.3g}, not {moved['off']:.3g}"
        return _refused("wrong", why)
    timed = {way: added_up([Times(tuple(some))]) for way, some in samples.items()}
    # An update waits for the device at its end, and for the host all along.
    gain = faster(timed["on"], timed["off"], replayed=False)
    taken = "on" if gain >= FASTER else "off"
    reason = f"an update is {gain:.2f} times as fast" if gain else "an update is no faster"
    found = {
        way: Found("right", "", None, float(sorted(one.device)[len(one.device) // 2]))
        for way, one in timed.items()
    }
    return Verdict(GRAPHS, taken, taken, reason, found, today())


def _refused(outcome: Outcome, why: str) -> Verdict:
    return refused(GRAPHS, {"off": Found("right"), "on": Found(outcome, why)})


def _itself(work: Callable[[], Any]) -> Callable[[], Any]:
    return work


def _policy(request: Request, device: Device, way: str) -> Policy:
    """Of random weights."""
    subject = request.subject
    settings = {
        "top_layers": subject.top_layers,
        "trunk_weights": subject.trunk_weights,
        "dtype": subject.dtype,
        "adaptation": subject.adaptation,
        "lora_rank": subject.lora_rank,
        "trunk_disk_mb": 0,
        "device": name_of(device.torch),
        "kernels": _kernels(request, way == "on"),
        "graphs": way,
    }
    config = from_dict({"policy": settings}, "proof").policy
    weights = random_weights(subject, subject.top_layers + 1, _VOCABULARY)
    return Policy(weights, config, range(subject.actions), seed=0)


def _update(request: Request, policy: Policy) -> Callable[[], Any]:
    """One evaluation and gradient step."""
    algorithm = AlgorithmConfig()
    optimizer = make_optimizer(policy, algorithm)
    actions = request.subject.actions
    lesson = whole_lesson(request.batch, _VOCABULARY, policy.device, actions)
    updates = _WARM_UP + request.rounds
    numbers = iter(range(updates))

    def one() -> Any:
        set_learning_rates(optimizer, algorithm, next(numbers), updates)
        table = policy.evaluate(lesson.prompts)
        return update(policy, optimizer, table, lesson, algorithm, 0)

    return one


def _place(policy: Policy) -> Tensor:
    """All parameters, one after another."""
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def _kernels(request: Request, replayed: bool) -> str:
    """What would be taken: nothing where no layer has confirmed it."""
    layer = next((one for one in request.verdicts if one.op == LAYER), None)
    confirmed = layer is not None and (layer.replayed if replayed else layer.launched) == CHOSEN
    chosen = chosen_by(request.verdicts, replayed) if confirmed else {}
    return written({op: Choice(taken, "") for op, taken in chosen.items()})
