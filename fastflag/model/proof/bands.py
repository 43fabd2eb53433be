"""Memory in which a read or a write outside of a tensor shows: NaN before it, after it and, until
it is written, in it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

# Numbers on each side: a tile of 64 rows of 576 numbers beyond an end lies within. A multiple of 16
# bytes in every type, so that a tensor is aligned as PyTorch's allocator does.
_BAND = 40_960
_make = torch.empty


class Bands:
    """Those of the tensors that were made through it."""

    def __init__(self) -> None:
        self._bands: list[Tensor] = []

    def made(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A tensor that nobody has written, no view of another."""
        steps = zip(shape, strides, strict=True)
        extent = 1 + sum((n - 1) * step for n, step in steps) if 0 not in shape else 0
        memory = _make(extent + 2 * _BAND, dtype=dtype, device=device).fill_(_poison(dtype))
        self._bands += [memory[:_BAND], memory[_BAND + extent :]]
        storage = memory.untyped_storage()
        return _make(0, dtype=dtype, device=device).set_(storage, _BAND, (*shape,), (*strides,))

    def copy(self, x: Tensor) -> Tensor:
        """A copy of `x`, laid out like it, which its gradient goes through."""
        return _Copied.apply(x, self)

    @contextmanager
    def around_outputs(self) -> Iterator[None]:
        """Inside, memory that PyTorch hands out without values is made here."""

        def banded(make: Any) -> Any:
            def made(*arguments: Any, **options: Any) -> Tensor:
                like = make(*arguments, **options)
                return self.made(like.shape, like.stride(), like.dtype, like.device)

            return made

        with ExitStack() as stack:
            for owner, name in (torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"):
                make = banded(getattr(owner, name))
                stack.enter_context(patch.object(owner, name, make))
            yield

    @property
    def written(self) -> bool:
        """Whether something was stored outside of a tensor."""
        return not all(bool(_untouched(band).all()) for band in self._bands)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bands: Bands) -> Tensor:
        return bands.made(x.shape, x.stride(), x.dtype, x.device).copy_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def _untouched(band: Tensor) -> Tensor:
    poison = _poison(band.dtype)
    return band.isnan() if band.dtype.is_floating_point else band == poison
