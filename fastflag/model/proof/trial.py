"""One implementation of an op tried on one case: what is wrong with it, if anything."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflag.model.exactness import Compared, compared, missed
from fastflag.model.proof.bands import Bands
from fastflag.model.proof.cases import Case, Function, Tensors
from fastflag.model.proof.devices import Device, Work


class Trial:
    """A case with the exact results and PyTorch's: outputs, then gradients."""

    def __init__(self, case: Case, torchs: Function, device: Device):
        self.case, self._device = case, device
        with torch.no_grad():
            outputs = case.outputs(torchs, _copies(case.tensors))
        self._upstream = [_upstream(output, case.whole) for output in outputs]
        self._exact = self.passed(case.exact, prepare=_wide)()
        self._torchs = [result.clone() for result in self.passed(torchs)()]
        names = [f"output {number}" for number in range(len(outputs))]
        self._names = [*names, *(f"gradient of {name}" for name in case.trained)]

    def judged(self, function: Function, replays: int) -> Compared:
        """Values and gradients beside the exact ones, memory beside the tensors, and replays."""
        bands = Bands()
        with bands.around_outputs():
            made = self.passed(function, prepare=bands.copy)()
        worst = self._compared(made)
        if worst.why:
            return worst
        if bands.written:
            return Compared(worst.error, "something is stored outside of its tensors")
        return Compared(worst.error, self._unsteady(function, made, replays))

    def passed(self, function: Function, prepare: Callable[[Tensor], Tensor] = torch.clone) -> Work:
        """A call of `function` and its backward pass, on copies of the case's tensors that
        `prepare` makes each time, since some implementations write over theirs."""
        return lambda: self._pass(function, *self._given(prepare))

    def prepared(self, function: Function) -> Work:
        """The same once, its tensors copied already."""
        given = self._given(torch.clone)
        return lambda: self._pass(function, *given)

    def _pass(self, function: Function, leaves: list[Tensor], given: Tensors) -> list[Tensor]:
        with torch.enable_grad():
            outputs = self.case.outputs(function, given)
        if not leaves:
            return outputs
        pairs = [(y, dy) for y, dy in zip(outputs, self._upstream, strict=True) if y.requires_grad]
        asked, upstream = zip(*((y, dy.to(y.dtype)) for y, dy in pairs), strict=True)
        gradients = torch.autograd.grad(asked, leaves, upstream)
        return [*(output.detach() for output in outputs), *gradients]

    def _given(self, prepare: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], Tensors]:
        """The leaves, and the tensors made of them."""
        tensors = {name: tensor.detach() for name, tensor in self.case.tensors.items()}
        wide = prepare is _wide
        with torch.enable_grad():
            for name in self.case.trained:
                tensors[name] = (_wide(tensors[name]) if wide else tensors[name]).requires_grad_()
            return [tensors[name] for name in self.case.trained], {
                name: prepare(tensor) for name, tensor in tensors.items()
            }

    def _compared(self, made: list[Tensor]) -> Compared:
        if len(made) != len(self._exact):
            return Compared(float("inf"), f"{len(made)} results, not {len(self._exact)}")
        worst = Compared(0.0, "")
        for name, ours, torchs, exact in zip(
            self._names, made, self._torchs, self._exact, strict=True
        ):
            told = compared(ours, torchs, exact)
            why = told.why
            if self.case.whole and not why:
                why = missed(ours, exact)
            if why:
                return Compared(told.error, f"{name} {why}")
            worst = max(worst, told, key=lambda one: one.error)
        return worst

    def _unsteady(self, function: Function, made: list[Tensor], replays: int) -> str:
        """Which of so many replays have other bits than the first pass; empty where none has."""
        first = [_bits(result).clone() for result in made]
        work = self._device.replayed(self.passed(function))
        other = []
        with self._device.busy():
            for _ in range(replays):
                differ = [(_bits(y) != bits).any() for y, bits in zip(work(), first, strict=True)]
                other.append(torch.stack(differ).any())
        if not other:
            return ""
        numbers = torch.stack(other).nonzero().flatten().tolist()
        if not numbers:
            return ""
        return f"{len(numbers)} of {replays} replays have other bits, the first is {numbers[0] + 1}"


def _copies(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _upstream(output: Tensor, whole: bool) -> Tensor:
    """A gradient from above, laid out plainly."""
    random = torch.Generator(output.device).manual_seed(output.numel())
    like: dict[str, Any] = {"device": output.device, "generator": random}
    if not whole:
        return torch.randn(output.shape, **like).to(output.dtype)
    # Of the largest ones, sums over all rows stay small.
    made = torch.randint(3, output.shape, **like) - 1
    kept = torch.rand(output.shape, **like) < min(64 / max(output.shape[0], 1), 1.0)
    return (made * kept).to(output.dtype)


def _bits(x: Tensor) -> Tensor:
    """A tensor's bits as whole numbers: NaN is then equal to itself."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(whole[x.element_size()])
