"""Adapters on a GPU: cast together, and added in place to what they adapt. It runs on a CPU too."""

import pytest
import torch
from torch import nn
from torch.autograd.profiler import profile

from fastflag.model import ops
from fastflag.model.joined import adapters_cast
from fastflag.model.linear import FrozenLinear, LoRALinear
from fastflag.model.quant import NF4Weight


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapted(stored, dtype, sizes=((24, 64), (40, 24))):
    """A chain of adapted layers that have been trained, of sizes (outputs, inputs)."""
    layers = []
    for seed, (outputs, inputs) in enumerate(sizes):
        matrix = random(outputs, inputs, seed=seed).to(dtype)
        weight = NF4Weight.quantise(matrix) if stored == "nf4" else matrix
        bias = random(outputs, seed=seed + 5).to(dtype)
        base = FrozenLinear(weight, bias, dtype)
        layers.append(LoRALinear(base, 4, 6.0, torch.Generator().manual_seed(seed)))
        layers[-1].lora_b.data = 0.3 * random(outputs, 4, seed=seed + 9)
    return nn.Sequential(*layers)


def by_formula(layers, x):
    """In fp64, of the numbers that the products are given: adapters, rounded."""
    for layer in layers:
        dtype = layer.base.dtype
        matrix, bias = layer.base.matrix(dtype).double(), layer.base.bias.double()
        a, b = layer.lora_a.to(dtype).double(), (layer.scale * layer.lora_b).to(dtype).double()
        x = x @ matrix.T + (x @ a.T) @ b.T + bias
    return x


@pytest.mark.parametrize("stored", ["plain", "nf4"])
@pytest.mark.parametrize("together", [True, False])
def test_it_is_the_formula_and_its_gradients_in_bf16(stored, together):
    """Up to the roundings between products; x has a gradient too."""
    layers, x = adapted(stored, torch.bfloat16), random(3, 7, 64, seed=3)
    leaves = [x.bfloat16().requires_grad_(), *layers.parameters()]
    weight = random(3, 7, 40, seed=4)
    found = []
    for wide in (False, True):
        if wide:
            y = by_formula(layers, leaves[0].double())
        elif together:
            with adapters_cast(layers, torch.bfloat16):
                y = layers(leaves[0])
        else:
            y = layers(leaves[0])
        found.append((y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)))
    for ours, exact in zip(*found, strict=True):
        assert ours.shape == exact.shape
        assert (ours.double() - exact).norm() <= 0.012 * exact.norm()


def test_casts_are_as_many_for_any_number_of_adapters():
    counts = set()
    for layers in (1, 4):
        chain = adapted("plain", torch.bfloat16, ((24, 24),) * layers)
        x = random(5, 24, seed=1).bfloat16()
        with profile() as profiled, adapters_cast(chain, torch.bfloat16):
            chain(x)
        names = [event.name for event in profiled.function_events]
        assert names.count("aten::addmm_") == layers
        counts.add(names.count("aten::copy_"))
    assert len(counts) == 1


def test_what_lay_ready_is_gone_afterwards():
    chain = adapted("plain", torch.bfloat16)
    with pytest.raises(KeyError), adapters_cast(chain, torch.bfloat16):
        assert all(layer._ready is not None for layer in chain)
        raise KeyError
    assert all(layer._ready is None for layer in chain)
    with adapters_cast(nn.Linear(2, 2), torch.bfloat16):
        pass
    chain[1].scale = 3.0
    with pytest.raises(ValueError, match="several scales"), adapters_cast(chain, torch.bfloat16):
        pass


def test_a_cpus_gradient_is_summed_as_ever():
    """In fp32 on a CPU, where bits are kept: x has the gradients of what was multiplied last first,
    for several adapters in one order."""
    x, weight, a = (random(*shape, seed=2) for shape in ((2, 35, 64), (24, 64), (4, 64)))
    x, b, slopes = x.requires_grad_(), random(24, 4, seed=3), []

    def apart(b):
        product = ops.linear(x, weight, None, torch.float32)
        low = ops.linear(x, a, None, torch.float32)
        return product + ops.linear(low, 1.5 * b, None, torch.float32)

    def together(b):
        return ops.lora_linear(x, weight, None, a, b, 1.5, torch.float32)

    for multiply in (apart, together):
        y = multiply(b).square().sum() + multiply(2 * b).sum() + multiply(-b).sin().sum()
        slopes.append(torch.autograd.grad(y, x)[0])
    assert torch.equal(*slopes)
