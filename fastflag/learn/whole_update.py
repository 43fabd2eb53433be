"""CUDA graphs judged on a whole update, with the kernels that would be taken with and without them.

It has never run on a GPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from fastflag.config import AlgorithmConfig, from_dict
from fastflag.learn.update import make_optimizer, update
from fastflag.learn.whole_lesson import whole_lesson
from fastflag.model.arithmetic import name_of
from fastflag.model.ops import Choice
from fastflag.model.proof.child import Request, Tell, added_up, today
from fastflag.model.proof.choice import GRAPHS, written
from fastflag.model.proof.clock import Sample, Times
from fastflag.model.proof.devices import Device
from fastflag.model.proof.layer import CHOSEN, LAYER, chosen_by, random_weights
from fastflag.model.proof.speed import FASTER, faster
from fastflag.model.proof.verdicts import Found, Outcome, Verdict
from fastflag.policy.table import Policy

_VOCABULARY = 1024
_BOUND = 0.05  # of the gradient's norm after some updates, whose kernels may round otherwise
_WARM_UP = 4  # updates: the trunk is read, kernels compiled, and at the second one graphs captured


def prove_graphs(request: Request, device: Device, tell: Tell) -> Verdict:
    """On where an update is clearly faster with them; rounds of both, in turn."""
    updates, policies = {}, {}
    for way in ("off", "on"):
        tell({"begin": GRAPHS, "implementation": way, "case": "capture"})
        policies[way] = _policy(request, device, way)
        updates[way] = _update(request, policies[way])
    norms = dict.fromkeys(updates, 0.0)
    samples: dict[str, list[Sample]] = {way: [] for way in updates}
    for number in range(_WARM_UP + request.rounds):
        tell({"begin": GRAPHS, "implementation": "on", "case": f"update {number + 1}"})
        for way, one in updates.items():
            if number < _WARM_UP:
                norms[way] = float(one()["grad_norm"])
            else:
                samples[way].append(device.clock.sample(partial(_itself, one)))
    captured = policies["on"].graphs
    if captured is not None and captured.problem:
        return _refused("failed", f"a capture fails: {captured.problem}")
    if not abs(norms["on"] - norms["off"]) <= _BOUND * norms["off"]:  # NaN is not
        why = f"the gradient's norm is {norms['on']:.3g}, not {norms['off']:.3g}"
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
    found = {"off": Found("right"), "on": Found(outcome, why)}
    return Verdict(GRAPHS, "off", "off", f"on {outcome}", found, today())


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

    def one() -> Any:
        table = policy.evaluate(lesson.prompts)
        return update(policy, optimizer, table, lesson, algorithm, 0)

    return one


def _kernels(request: Request, replayed: bool) -> str:
    """What would be taken: nothing where no layer has confirmed it."""
    layer = next((one for one in request.verdicts if one.op == LAYER), None)
    confirmed = layer is not None and (layer.replayed if replayed else layer.launched) == CHOSEN
    chosen = chosen_by(request.verdicts, replayed) if confirmed else {}
    return written({op: Choice(taken, "") for op, taken in chosen.items()})
