"""What the verdicts come to: which implementation each op takes, with the reason."""

from collections.abc import Mapping

from fastflag.files import InputError
from fastflag.model import ops
from fastflag.model.ops import Choice
from fastflag.model.proof.layer import CHOSEN, LAYER
from fastflag.model.proof.verdicts import GRAPHS, Found, Verdict, Verdicts

KEPT = "as the run began"
_PROVE = "`fastflag doctor --prove` does it"


def to_prove() -> tuple[str, ...]:
    """Everything that a verdict is wanted of, in order: each op that has a choice, then a whole
    layer of what was chosen, then graphs."""
    of_choice = [op.name for op in ops.OPS if len(op.implementations) > 1]
    return (*of_choice, LAYER, GRAPHS) if of_choice else (GRAPHS,)


def choices(verdicts: Verdicts | None, replayed: bool | None = None) -> dict[str, Choice]:
    """By op, and of graphs: on or off. `replayed`: whether graphs are on, whatever is found of
    them. Without verdicts everything is PyTorch's."""
    graphs = _graphs(verdicts)
    by_graphs = graphs.implementation == "on" if replayed is None else replayed
    layer = verdicts.read(LAYER) if verdicts else None
    made = {op.name: _choice(op.name, verdicts, layer, by_graphs) for op in ops.OPS}
    return {**made, GRAPHS: graphs}


def _graphs(verdicts: Verdicts | None) -> Choice:
    verdict = verdicts.read(GRAPHS) if verdicts else None
    if verdict is None:
        return Choice("off", _missing(verdicts, GRAPHS))
    return Choice(verdict.launched, verdict.reason, evidence(verdict))


def _choice(op: str, verdicts: Verdicts | None, layer: Verdict | None, replayed: bool) -> Choice:
    verdict = verdicts.read(op) if verdicts else None
    if verdict is None:
        return Choice("torch", _missing(verdicts, op))
    told = evidence(verdict)
    taken = verdict.replayed if replayed else verdict.launched
    if taken == "torch":
        return Choice("torch", verdict.reason, told)
    if layer is None:
        return Choice("torch", f"a whole layer with it {_missing(verdicts, LAYER)}", told)
    if (layer.replayed if replayed else layer.launched) != CHOSEN:
        return Choice("torch", f"a whole layer is no faster with it: {layer.reason}", told)
    return Choice(taken, verdict.reason, told)


def _missing(verdicts: Verdicts | None, op: str) -> str:
    changed = verdicts.stale(op) if verdicts else ""
    return f"is proved of another {changed}: {_PROVE}" if changed else f"not proved: {_PROVE}"


def evidence(verdict: Verdict) -> str:
    """What was found of each implementation, and when."""
    told = [f"{name} {_figures(found)}" for name, found in verdict.found.items()]
    return "; ".join([*told, verdict.when])


def _figures(found: Found) -> str:
    if found.outcome != "right":
        return f"{found.outcome} ({found.why})"
    figures = [f"{1e6 * found.device:.3g} us" if found.device is not None else ""]
    figures += [f"{1e6 * found.host:.3g} us to launch" if found.host else ""]
    figures += [f"error {found.error:.2g} of PyTorch's" if found.error is not None else ""]
    return ", ".join(filter(None, figures)) or "right"


def written(chosen: Mapping[str, Choice]) -> str:
    """The ops that take another implementation than PyTorch's, as `parsed` reads it: torch, or
    lists such as triton:rms_norm,swiglu."""
    by: dict[str, list[str]] = {}
    for op in ops.OPS:
        taken = chosen[op.name].implementation if op.name in chosen else "torch"
        if taken in op.implementations and taken != "torch":
            by.setdefault(taken, []).append(op.name)
    return " ".join(f"{one}:{','.join(names)}" for one, names in by.items()) or "torch"


def parsed(text: str, there: bool = True) -> dict[str, Choice]:
    """Of `written`; of auto there is none. Raises InputError for what is not so written, for ops
    that there are not, and for implementations that are not here, where they must be `there`: a
    CPU takes none of them."""
    if text in ("auto", "torch"):
        return {op.name: Choice("torch", KEPT) for op in ops.OPS} if text == "torch" else {}
    known = {op.name: op for op in ops.OPS}
    made = parsed("torch")
    for part in text.split():
        taken, _, names = part.partition(":")
        for name in names.split(","):
            missing = there and taken not in known.get(name, ops.linear).implementations
            if name not in known or missing:
                raise InputError(
                    f"there is no {taken!r} implementation of {name!r} here: auto, torch or a list "
                    f"such as triton:rms_norm,swiglu is expected, --kernels {text}"
                )
            made[name] = Choice(taken, KEPT)
    return made
