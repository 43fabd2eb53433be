"""How far a result is from the exact one, by row and by column, beside how far PyTorch's own is.

One number for a whole tensor hides a few wrong rows: of 24,576 rows in bf16, 11 may be anything
before the tensor's relative error reaches 0.03. Kernels that a compiler gets wrong are wrong so.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers that are compared at a time: in fp64 they take 128 MB.
_PIECE = 2**24
_NOTHING = 2.0**-126  # fp32's least number with all its bits


@dataclass(frozen=True)
class Errors:
    """The largest relative error of a row and of a column, of which NaN is the largest."""

    row: float
    column: float


def errors_of(result: Tensor, exact: Tensor) -> Errors:
    """Of [..., C] rows, or of [R] numbers as rows of one. An error is |result - exact| / |exact|
    over the row or column (Euclidean), where a row of less than the rows' root mean square counts
    as one of that: a sum that cancels has no relative precision.

    Raises ValueError where the shapes differ.
    """
    if result.shape != exact.shape:
        raise ValueError(f"the result is {[*result.shape]}, not {[*exact.shape]}")
    if not exact.numel():
        return Errors(0.0, 0.0)
    result, exact = (
        x.detach().reshape(-1, x.shape[-1] if x.dim() > 1 else 1) for x in (result, exact)
    )
    off, size = _squares(result, exact)
    return Errors(*(_largest(*pair) for pair in zip(off, size, strict=True)))


def _squares(result: Tensor, exact: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Sums of squares of result - exact and of exact, [R] by row and [C] by column each."""
    rows: list[list[Tensor]] = [[], []]
    columns = [exact.new_zeros(exact.shape[1], dtype=torch.float64) for _ in range(2)]
    step = max(_PIECE // exact.shape[1], 1)
    for some, right in zip(result.split(step), exact.split(step), strict=True):
        wide = right.double()
        for number, x in enumerate((some.double() - wide, wide)):
            square = x.square()
            rows[number].append(square.sum(1))
            columns[number] += square.sum(0)
    off, size = ((torch.cat(rows[number]), columns[number]) for number in range(2))
    return off, size


def _largest(off: Tensor, size: Tensor) -> float:
    ratio = (off / size.clamp_min(float(size.mean()) or 1.0)).sqrt()
    return float(ratio.max())


def refusal(result: Tensor, torchs: Tensor, exact: Tensor) -> str:
    """What is wrong with a result beside PyTorch's own of the same type and the exact one in fp64,
    of the same rounded inputs; empty where nothing. Allowed is twice PyTorch's largest error of a
    row, and of a column, and one rounding more (of fp32 and fp64 numbers, which are sums of many,
    16): a result that is exact but for its own rounding is always right."""
    if result.shape != exact.shape:
        return f"is {[*result.shape]}, not {[*exact.shape]}"
    own, theirs = errors_of(result, exact), errors_of(torchs, exact)
    roundings = 0.5 if result.dtype.itemsize <= 2 else 16
    slack = roundings * torch.finfo(result.dtype).eps
    for what in ("row", "column"):
        error, allowed = getattr(own, what), 2 * getattr(theirs, what) + slack
        if not error <= allowed:  # NaN is not
            return f"is off by {error:.2g} in a {what}, more than {allowed:.2g}"
    return ""


def missed(result: Tensor, exact: Tensor) -> str:
    """Which numbers differ from the exact ones where those are whole; empty where none.

    Of inputs that are small whole numbers, products and sums are exact in any order: what is
    otherwise was computed otherwise. Whole numbers are rounded once, to the result's type.
    """
    if result.shape != exact.shape:
        return f"is {[*result.shape]}, not {[*exact.shape]}"
    whole = whole_numbers(exact)
    equal = (result.detach() - exact.to(result.dtype)).abs() <= _NOTHING
    wrong = whole & ~equal  # as NaN is
    count = int(wrong.sum())
    if not count:
        return ""
    first = [int(place) for place in wrong.nonzero()[0]]
    return f"differs in {count} of {int(whole.sum())} whole numbers, first at {first}"


def whole_numbers(exact: Tensor) -> Tensor:
    """Which numbers are whole and small enough for fp32; one of nearly nothing is 0, as what a
    softmax gives to a key far below the highest."""
    return (exact.abs() < 2**24) & ((exact - exact.round()).abs() <= _NOTHING)
