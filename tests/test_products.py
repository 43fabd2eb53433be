"""A CPU's products of fp32 numbers, exact or with factors rounded to bf16."""

import os

import pytest
import torch
from torch.nn import functional

from fastflag.model import products

FP32, BF16 = torch.float32, torch.bfloat16
# SmolLM2's: down and up, keys, an adapter's first side.
SHAPES = [(1536, 576), (576, 1536), (576, 192), (576, 8)]


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x):
    return x.to(BF16).double()


def near(made, expected):
    return float((made.double() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("stored", [FP32, BF16])
@pytest.mark.parametrize("rows", [(1,), (3, 5), (7, 64)])
def test_fp32_is_the_product_with_its_gradient(rows, stored, onednn, monkeypatch):
    """Against autograd in fp64. One row and more than are padded."""
    monkeypatch.setattr(products, "HAS_ONEDNN", onednn and products.HAS_ONEDNN)
    given = random(*rows, 40, seed=0), random(24, 40, seed=1).to(stored), random(24, seed=2)
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in given)
    made = products.product(x, weight, bias, FP32)
    exact = [tensor.double().requires_grad_() for tensor in given]
    expected = functional.linear(*exact)
    assert made.shape == expected.shape and near(made.detach(), expected.detach())
    slope = random(*rows, 24, seed=3)
    made.backward(slope)
    expected.backward(slope.double())
    for ours, truth in zip((x, weight, bias), exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        tolerance = 1e-5 if ours.dtype == FP32 else 5e-3  # a gradient is of its tensor's dtype
        torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_bf16_rounds_the_factors_and_nothing_else(inputs, outputs):
    """Against fp64 products of the rounded factors. A CPU without bf16 units rounds nothing."""
    x, weight = random(96, inputs, seed=0).requires_grad_(), random(outputs, inputs, seed=1)
    weight.requires_grad_()
    made = products.product(x, weight, None, BF16)
    slope = random(96, outputs, seed=2)
    made.backward(slope)
    found = [made.detach(), x.grad, weight.grad]
    forms = []
    for form in (rounded, torch.Tensor.double):
        one, two, back = (form(tensor.detach()) for tensor in (x, weight, slope))
        forms.append([one @ two.T, back @ two, back.T @ one])
    pairs = [[near(one, truth) for one, truth in zip(found, form, strict=True)] for form in forms]
    # oneDNN leaves the thin gradients of an adapter's side as they are.
    if torch.cpu._is_amx_tile_supported() and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        assert pairs[0][0] and (all(pairs[0]) or outputs == 8)
    assert all(map(any, zip(*pairs, strict=True)))


@pytest.mark.skipif(not products.HAS_ONEDNN, reason="this PyTorch's oneDNN is not there")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_row_has_the_same_bits_beside_any_others(inputs, outputs, dtype, threads):
    """Laid out or not. MKL's have not on Intel's CPUs, nor have oneDNN's of bf16 tensors."""
    x, weight = random(1032, inputs, seed=0), random(outputs, inputs, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = products.product(x, weight, None, dtype)
        laid_out = products.laid_out(weight, None, dtype)
        for count in (1, 8, 16, 40, 64, 72, 136, 200, 520, 1032):
            few = x[:count]
            assert torch.equal(products.product(few, weight, None, dtype), whole[:count]), count
            assert torch.equal(laid_out(few), whole[:count]), count
    finally:
        torch.set_num_threads(before)


def test_the_setting_of_the_process_is_as_before():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    with pytest.raises(RuntimeError):
        products.product(random(70, 4, seed=0), random(3, 5, seed=1), None, BF16)
    products.product(random(70, 4, seed=0), random(3, 4, seed=1), None, BF16)
    assert settings.fp32_precision == before
