"""Linear layers of the model: frozen, trained in full, or frozen with a low-rank adapter."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from fastflag.model import ops
from fastflag.model.quant import NF4Weight


class FrozenLinear(nn.Module):
    """y = x W^T + b with W kept as a tensor or in NF4; neither is trained. [..., I] -> [..., O]

    `dtype` is that of the product's factors. x is fp32 on a CPU, of that dtype elsewhere.
    """

    def __init__(self, weight: Tensor | NF4Weight, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.dtype = dtype
        self.is_part = False
        self._ready: Callable[[Tensor], Tensor] | None = None

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Inside, the matrix lies ready; else each forward makes it anew. No gradient comes
        through it there. A part's does not, the whole's does."""
        if self._ready is not None or self.is_part:
            yield
            return
        self._ready = ops.frozen_linear(self.matrix(self.dtype), self.bias, self.dtype)
        try:
            yield
        finally:
            self._ready = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def become_part_of(self, whole: "FrozenLinear", first: int) -> None:
        """From now on the matrix and the bias are views of `whole`'s, from row `first` on."""
        rows = slice(first, first + self.shape[0])
        self.weight = whole.weight[rows]
        self.bias = None if whole.bias is None else whole.bias[rows]
        self.is_part = True

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W, [O, I]"""
        stored = self.weight
        return stored.dequantise(dtype) if isinstance(stored, NF4Weight) else stored.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self._ready is not None:
            return self._ready(x)
        stored = self.weight
        if isinstance(stored, NF4Weight):
            y = ops.nf4_linear(x, stored.packed, stored.absmax, stored.shape[0], self.dtype)
            return y if self.bias is None else y + self.bias
        return ops.linear(x, stored, self.bias, self.dtype)

    def adapted(self, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """forward(x) + scale (x a^T) b^T, with a [R, I] and b [O, R]."""
        stored = self.weight
        if isinstance(stored, NF4Weight):
            y = ops.lora_linear(x, stored.packed, stored.absmax, a, b, scale, self.dtype)
        else:
            y = ops.lora_linear(x, stored.to(self.dtype), None, a, b, scale, self.dtype)
        return y if self.bias is None else y + self.bias


@contextmanager
def unpacked(layer: nn.Module) -> Iterator[None]:
    """Inside, every frozen matrix of `layer` lies ready."""
    with ExitStack() as stack:
        for module in layer.modules():
            if isinstance(module, FrozenLinear):
                stack.enter_context(module.unpacked())
        yield


def matrix_numbers(layer: nn.Module) -> int:
    """How many numbers the frozen matrices of `layer` hold."""
    return sum(
        math.prod(module.shape)
        for module in layer.modules()
        if isinstance(module, FrozenLinear) and not module.is_part
    )


class TrainedLinear(nn.Module):
    """y = x W^T + b with W (and b) trained. The master copy is fp32: bf16 would lose updates below
    1/256 of a weight. [..., I] -> [..., O], `dtype` as FrozenLinear's."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(weight.float())
        self.bias = None if bias is None else nn.Parameter(bias.float())

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self.dtype)


class LoRALinear(nn.Module):
    """y = base(x) + alpha / rank * (x A^T) B^T (LoRA, arXiv 2106.09685, eq. 3).

    [..., I] -> [..., O]. A [rank, I] starts uniform as in PEFT, B [O, rank] at zero, so training
    starts at the base model.
    """

    def __init__(self, base: FrozenLinear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        outputs, inputs = base.shape
        self.base = base
        self.scale = alpha / rank
        bound = 1 / math.sqrt(inputs)
        self.lora_a = nn.Parameter(
            torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        )
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank))

        self._ready: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._ready is not None:
            return self.base.adapted(x, *self._ready, 1.0)
        return self.base.adapted(x, self.lora_a, self.lora_b, self.scale)

    @property
    def adapters(self) -> list["LoRALinear"]:
        return [self]

    def lay_ready(self, a: Tensor, b: Tensor) -> None:
        """What is multiplied with until `clear`: A, and B with its scale."""
        self._ready = a, b

    def clear(self) -> None:
        self._ready = None
