"""A policy's layers, frozen or trained, and other parameters in the place of theirs for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastflag.config import PolicyConfig
from fastflag.model.arithmetic import DTYPES
from fastflag.model.linear import FrozenLinear, LoRALinear, TrainedLinear
from fastflag.model.llama import Block
from fastflag.model.quant import NF4Weight
from fastflag.model.weights import Weights


def frozen(
    weights: Weights, indices: Iterable[int], config: PolicyConfig, device: torch.device
) -> list[Block]:
    """Layers of the trunk."""

    def make(weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        return _stored(config, device, weight, bias, config.trunk_weights)

    dtype = DTYPES[config.dtype]
    return [Block(weights, index, dtype, device, make) for index in indices]


def trained(
    weights: Weights,
    indices: Iterable[int],
    config: PolicyConfig,
    device: torch.device,
    generator: torch.Generator,
) -> Any:  # an nn.ModuleList, which can't tell that it holds Blocks
    """Layers of the top: trained in full, or by adapters over what stays frozen."""
    dtype = DTYPES[config.dtype]

    def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
        if config.adaptation == "full":
            return TrainedLinear(weight, bias, dtype).to(device)
        as_ = "nf4" if config.adaptation == "qlora" else config.dtype
        base = _stored(config, device, weight, bias, as_)
        return LoRALinear(base, config.lora_rank, config.lora_alpha, generator).to(device)

    return nn.ModuleList(Block(weights, index, dtype, device, make) for index in indices)


def _stored(
    config: PolicyConfig, device: torch.device, weight: Tensor, bias: Tensor | None, as_: str
) -> FrozenLinear:
    weight, bias = weight.to(device), None if bias is None else bias.to(device)
    kept = NF4Weight.quantise(weight) if as_ == "nf4" else weight.to(DTYPES[as_])
    return FrozenLinear(kept, bias, DTYPES[config.dtype])


@contextmanager
def with_parameters(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters of `module` are `values`, by name.

    Their storage is swapped, not written to: a forward that waits for its backward pass keeps the
    values that it saved.
    """
    before = {name: parameter.data for name, parameter in module.named_parameters()}
    _point_to(module, values)
    try:
        yield
    finally:
        _point_to(module, before)


def _point_to(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.data = values[name]
