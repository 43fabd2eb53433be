"""Projections of one input as one product on a GPU: queries, keys and values; gate and up.

Their matrices lie one under another from when they are loaded, and each layer's own is a view of
its rows: nothing is held twice. Their adapters (LoRA) are put together for each step, as

    y = x W^T + (x A^T) B^T,    A [R, I], one under another;    B [O, R], a block of each layer's

with I inputs, O outputs and R ranks of all layers together. B's zeros cost little: its product
takes as long as reading and writing y does. A CPU multiplies one by one (RESULTS.md).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastflag.model.bnb import BLOCKSIZE
from fastflag.model.linear import FrozenLinear, LoRALinear
from fastflag.model.quant import NF4Weight

# Of adapters together: the most that a kernel takes. Beyond it, the zeros would show as well.
HIGHEST_RANK = 64


def taken(device: torch.device) -> bool:
    """Whether a device multiplies with joined matrices."""
    return device.type == "cuda"


def can_be(layers: int, rank: int, inputs: int, packed: bool) -> bool:
    """Whether so many layers can be one product, with adapters of `rank` each, 0 without; in NF4
    (`packed`) rows must be whole blocks."""
    return layers * rank <= HIGHEST_RANK and not (packed and inputs % BLOCKSIZE)


def fit(layers: Sequence[nn.Module]) -> bool:
    """Whether these layers are of one kind, frozen or adapted, and can be one product."""
    kinds = {_kind(layer) for layer in layers}
    if len(kinds) > 1 or None in kinds:
        return False
    layer, frozen = layers[0], _frozen(layers[0])
    assert frozen is not None
    rank = len(layer.lora_a) if isinstance(layer, LoRALinear) else 0
    return can_be(len(layers), rank, frozen.shape[1], isinstance(frozen.weight, NF4Weight))


class JoinedLinear(nn.Module):
    """[..., I] -> each layer's [..., O], which are views of one result.

    The layers stay their owner's, with their parameters: here they have no names.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        """The layers `fit`; their frozen weights become views."""
        super().__init__()
        self._layers = (*layers,)  # in a tuple they are not registered
        frozen = [part for layer in layers if (part := _frozen(layer)) is not None]
        self.outputs = [part.shape[0] for part in frozen]
        biases = [part.bias for part in frozen if part.bias is not None]
        bias = torch.cat(biases) if biases else None
        self.whole = FrozenLinear(_stacked(frozen), bias, frozen[0].dtype)
        first = 0
        for part in frozen:
            part.become_part_of(self.whole, first)
            first += part.shape[0]
        # Which of the layers each row of the result is of, [O, layers].
        each = torch.tensor(self.outputs, device=self.whole.device)
        places = torch.arange(len(each), device=each.device)
        self._blocks = places.repeat_interleave(each)[:, None] == places
        self._ready: tuple[Tensor, Tensor] | None = None

    @property
    def adapters(self) -> list[LoRALinear]:
        return [layer for layer in self._layers if isinstance(layer, LoRALinear)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self._ready is not None:
            return _Parts.apply(self.whole.adapted(x, *self._ready, 1.0), self.outputs)
        if self.adapters:
            with adapters_cast(self, self.adapters[0].lora_a.dtype):  # the product casts
                return self(x)
        return _Parts.apply(self.whole(x), self.outputs)

    def lay_ready(self, a: Tensor, b: Tensor) -> None:
        """a [R, I] of all adapters, and b [O, rank], their B's one under another."""
        self._ready = a, (b[:, None] * self._blocks[..., None]).flatten(1)

    def clear(self) -> None:
        self._ready = None


class _Parts(torch.autograd.Function):
    """[..., O] -> parts of the last axis, in its memory but each by itself: of views that are made
    together autograd lets none be used after another was rotated in place (kernels/rope.py)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        parts = y.split(sizes, -1)
        storage = y.untyped_storage()
        places = [(part.storage_offset(), part.shape, part.stride()) for part in parts]
        return tuple(y.new_empty(0).set_(storage, *place) for place in places)

    @staticmethod
    # pyrefly: ignore[bad-override] (torch's own has any number of gradients)
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.cat(gradients, -1), None


@contextmanager
def adapters_cast(layers: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, A and scaled B of every adapter of `layers` lie ready in `dtype`, with gradient: all
    of them cast in two launches each way, not one by one in every product, and those of joined
    layers put together."""
    owners = _owners(layers)
    adapters = [adapter for owner in owners for adapter in owner.adapters]
    if not adapters:
        yield
        return
    scale, rank = adapters[0].scale, len(adapters[0].lora_a)
    if any((adapter.scale, len(adapter.lora_a)) != (scale, rank) for adapter in adapters):
        raise ValueError("adapters of several scales")
    flat = torch.cat([adapter.lora_a.flatten() for adapter in adapters]).to(dtype)
    sizes = [sum(adapter.lora_a.numel() for adapter in owner.adapters) for owner in owners]
    tall = (scale * torch.cat([adapter.lora_b for adapter in adapters])).to(dtype)
    outputs = [sum(len(adapter.lora_b) for adapter in owner.adapters) for owner in owners]
    try:
        for owner, a, b in zip(owners, flat.split(sizes), tall.split(outputs), strict=True):
            owner.lay_ready(a.view(-1, owner.adapters[0].lora_a.shape[1]), b)
        yield
    finally:
        for owner in owners:
            owner.clear()


def _owners(layers: nn.Module) -> list[JoinedLinear | LoRALinear]:
    """Who multiplies with adapters: joined layers, and others by themselves."""
    joined = [m for m in layers.modules() if isinstance(m, JoinedLinear) and m.adapters]
    together = {id(adapter) for owner in joined for adapter in owner.adapters}
    alone = [m for m in layers.modules() if isinstance(m, LoRALinear) and id(m) not in together]
    return [*joined, *alone]


def _frozen(layer: nn.Module) -> FrozenLinear | None:
    layer = layer.base if isinstance(layer, LoRALinear) else layer
    return layer if isinstance(layer, FrozenLinear) else None


def _kind(layer: nn.Module) -> tuple[object, ...] | None:
    """What layers of one product have in common; None for others than frozen and adapted ones."""
    frozen = _frozen(layer)
    if frozen is None:
        return None
    stored = "nf4" if isinstance(frozen.weight, NF4Weight) else frozen.weight.dtype
    adapter = (layer.scale, len(layer.lora_a)) if isinstance(layer, LoRALinear) else None
    return stored, frozen.shape[1], frozen.dtype, frozen.bias is None, adapter


def _stacked(parts: Sequence[FrozenLinear]) -> Tensor | NF4Weight:
    """Their matrices one under another."""
    weights = [part.weight for part in parts]
    packed = [weight for weight in weights if isinstance(weight, NF4Weight)]
    if packed:
        return NF4Weight.stacked(packed)
    return torch.cat([weight for weight in weights if isinstance(weight, Tensor)])
