"""What counts as right, and what as faster: of tensors and samples alone.

Right is by row and by column. One norm over a tensor would let 11 of 24,576 rows be entirely wrong
at a bound of 3%, and what breaks a kernel on one machine (an assembler's fault, a race) looks like
that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WORST = 2.0
"""Times PyTorch's own error that a row or a column may be off."""
FASTER = 1.05
"""Times as fast as PyTorch's that an implementation has to be."""
_LEAST = 20  # percentile of the rounds in which it is no slower
# Of a row's size, what counts as no error: 16 roundings in fp32, a quarter of one in 16 bits. A sum
# may be added up in another order.
_ROUNDINGS = {
    torch.float64: 4e-15,
    torch.float32: 2e-6,
    torch.float16: 2.5e-4,
    torch.bfloat16: 2e-3,
}


_NOTHING = 2.0**-126  # fp32's least number with all its bits


@dataclass(frozen=True)
class Compared:
    error: float
    """The largest of a line's, in units of PyTorch's own."""
    why: str
    """Empty where it is right."""


def compared(name: str, ours: Tensor, torchs: Tensor, exact: Tensor) -> Compared:
    """How far a result is from the exact one, which is in fp64 and of the same rounded inputs, as
    [R, C]: the norm of the error by row and by column."""
    if (ours.shape, ours.dtype) != (torchs.shape, torchs.dtype):
        told = f"{ours.dtype} {list(ours.shape)}, not {torchs.dtype} {list(torchs.shape)}"
        return Compared(float("inf"), f"{name} is {told}")
    rounding = _ROUNDINGS[ours.dtype]
    lines = [_lines(tensor.detach().double()) for tensor in (ours, torchs, exact)]
    worst = Compared(0.0, "")
    for axis, line in ((1, "row"), (0, "column")):
        errors = _errors(lines, axis, rounding)
        if not len(errors):
            continue
        place = int(errors.argmax())
        error = float(errors[place])
        if error > worst.error:
            told = f"{name}: {line} {place} is off by {error:.3g} times PyTorch's own error"
            worst = Compared(error, told if error > WORST else "")
    return worst


def differing(name: str, ours: Tensor, exact: Tensor) -> str:
    """Of whole numbers in and out: where a result is another than the exact one, which is in fp64;
    empty where nowhere. What its type can't hold is not compared, since it may be rounded."""
    whole = exact.round()
    # What a softmax gives to a key far below the highest is 0 in every type but fp64.
    held = (whole.abs() <= 2 / torch.finfo(ours.dtype).eps) & ((exact - whole).abs() < _NOTHING)
    wrong = _lines((ours.detach().double() != whole) & held)
    count = int(wrong.sum())
    if not count:
        return ""
    row, column = wrong.nonzero()[0].tolist()
    return f"{name}: {count} of whole numbers differ, the first in row {row}, column {column}"


@dataclass(frozen=True)
class Timed:
    """An implementation's samples of an op's whole work, a number a round."""

    device: np.ndarray  # seconds
    host: np.ndarray  # seconds until the host had launched it; 0 on a CPU

    def cost(self, replayed: bool) -> np.ndarray:
        """What an update waits for: the device alone where a graph is replayed."""
        return self.device if replayed else np.maximum(self.device, self.host)


def faster(ours: Timed, base: Timed, replayed: bool) -> float:
    """How many times as fast as `base`: the median over rounds, in each of which both ran, so that
    a slow moment slows both. 0 where a fifth of the rounds say otherwise: that is noise."""
    rounds = min(len(ours.device), len(base.device))
    ratios = base.cost(replayed)[:rounds] / ours.cost(replayed)[:rounds]
    return float(np.median(ratios)) if np.percentile(ratios, _LEAST) > 1.0 else 0.0


def fastest(timed: Mapping[str, Timed], replayed: bool) -> tuple[str, float]:
    """Which implementation is taken, and how many times as fast as the first one it is: the first,
    PyTorch's, unless another is clearly faster."""
    base, *others = timed
    gains = {name: faster(timed[name], timed[base], replayed) for name in others}
    best = max(gains, key=lambda name: gains[name], default=base)
    return (best, gains[best]) if gains.get(best, 0.0) >= FASTER else (base, 1.0)


def _lines(x: Tensor) -> Tensor:
    """[..., C] -> [R, C]; a tensor of one axis is rows of one number."""
    return x.reshape(-1, 1) if x.dim() < 2 else x.reshape(-1, x.shape[-1])


def _errors(lines: Sequence[Tensor], axis: int, rounding: float) -> Tensor:
    """Each line's error in units of PyTorch's own; infinite where it is not finite.

    PyTorch's own error of a line is the line's, or that of its worst line for the line's size: of
    24,576 rows of 64 numbers some are off by half as much again as most, and one of a few numbers
    by nothing, all by luck.
    """
    ours, torchs, exact = lines
    size = exact.norm(dim=axis)
    typical = float(size.square().mean().sqrt())
    size = size.clamp_min(typical)
    own = (torchs - exact).norm(dim=axis)
    relative = own / size.clamp_min(torch.finfo(torch.float64).tiny)
    if not len(relative):
        return relative
    unit = torch.maximum(own, size * max(float(relative.max()), rounding / WORST))
    error = (ours - exact).norm(dim=axis)
    # Where nothing is to be off, 0 / 0: of a gradient that is 0 everywhere.
    ratio = torch.where(error == 0, 0.0, error / unit)
    return ratio.nan_to_num(nan=float("inf"), posinf=float("inf"))
