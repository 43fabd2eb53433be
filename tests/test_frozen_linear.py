"""A frozen matrix laid out for one product after another, and the memory that products reuse."""

import platform
import resource

import pytest
import torch

from bench.measure.anatomy import operations_of
from fastflag.model import ops, products
from fastflag.model.arithmetic import keep_freed_memory
from fastflag.model.linear import FrozenLinear
from fastflag.model.quant import NF4Weight


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("laid_out", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("stored", ["fp32", "nf4"])
def test_it_is_the_product(stored, biased, laid_out, monkeypatch):
    """Against the product in fp64, in the shapes that come: also where PyTorch has no layout."""
    if not laid_out:
        monkeypatch.setattr(products, "HAS_ONEDNN", False)
    matrix, bias = random(96, 64, seed=0), random(96, seed=1) if biased else None
    weight = NF4Weight.quantise(matrix) if stored == "nf4" else matrix
    layer = FrozenLinear(weight, bias, torch.float32)
    exact = layer.matrix(torch.float32).double()
    with torch.no_grad(), layer.unpacked(), layer.unpacked():
        for shape in ((1,), (8,), (3, 8), (2, 5, 16)):
            x = random(*shape, 64, seed=2)
            expected = x.double() @ exact.T + (0 if bias is None else bias.double())
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert layer._ready is None


@pytest.mark.skipif(not products.HAS_ONEDNN, reason="this PyTorch has no layout")
def test_its_operations_are_counted():
    weight, x = random(48, 32, seed=0), random(8, 8, 32, seed=1)
    multiply = ops.frozen_linear(weight, None, torch.float32)
    with torch.no_grad():
        assert operations_of(lambda: multiply(x)) == 2 * (8 * 8) * 32 * 48  # or 0: not laid out


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back")
def test_freed_memory_is_not_faulted_in_again():
    keep_freed_memory()
    for _ in range(4):  # where blocks are aligned they do not lie in one place at first
        torch.ones(2**22).sum()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**22).sum()
    pages = 8 * 2**24 // 4096
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages / 8
