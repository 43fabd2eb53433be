"""The linear layer with an adapter in Triton against its formula in fp64, beside PyTorch's own
rounding."""

from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton exists for Linux only")

from precision import DEVICE, DTYPES, assert_no_worse, poisoned

from fastflag.kernels import lora, tiles
from fastflag.kernels.lora import lora_linear, lora_linear_reference
from fastflag.model.quant import NF4Weight

NARROW = [dtype for dtype in DTYPES if dtype.itemsize == 2]
SCALE = 1.7


def make(shape, rank, dtype) -> tuple[Tensor, ...]:
    """x [M, K], W [N, K], a, b and dy, of which each term of y and of dx gets a like share."""
    rows, outputs, inputs = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b, dy = (
        torch.randn(shape, generator=generator).to(DEVICE)
        for shape in ((rows, inputs), (outputs, inputs), (rank, inputs), (outputs, rank), shape[:2])
    )
    weight, a, b = weight * inputs**-0.5, a * inputs**-0.5, b * rank**-0.5
    return x.to(dtype), weight.to(dtype), a, b, dy.to(dtype)


def by_hand(x, weight, a, b, dy) -> tuple[Tensor, ...]:
    """y and the gradients for x, a and b in fp64, of a and b in x's type."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    x, weight, a, b, dy = (tensor.double() for tensor in (x, weight, a, b, dy))
    low, dlow = x @ a.T, SCALE * dy @ b
    return x @ weight.T + SCALE * low @ b.T, dy @ weight + dlow @ a, dlow.T @ x, SCALE * dy.T @ low


def output_and_gradients(linear, x, weight, absmax, a, b, dy) -> tuple[Tensor, ...]:
    trained = x, a, b = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    y = linear(x, weight, absmax, a, b, SCALE)
    return y, *torch.autograd.grad(y, trained, dy)


def assert_right(x, weight, absmax, matrix, a, b, dy) -> None:
    """That y and all gradients are the formula's for W = matrix."""
    torchs = output_and_gradients(lora_linear_reference, x, weight, absmax, a, b, dy)
    with poisoned():
        ours = output_and_gradients(lora_linear, x, weight, absmax, a, b, dy)
    assert [tensor.dtype for tensor in ours] == [x.dtype, x.dtype, a.dtype, b.dtype]
    for got, beside, truth in zip(ours, torchs, by_hand(x, matrix, a, b, dy), strict=True):
        # Exact to x's type, which is what the gradients for a and b are made of.
        assert_no_worse(got.to(x.dtype), beside.to(x.dtype), truth)


def assert_right_in_nf4(shape, dtype) -> None:
    x, weight, a, b, dy = make(shape, 16, dtype)
    stored = NF4Weight.quantise(weight)
    assert_right(x, stored.packed, stored.absmax, stored.dequantise(dtype), a, b, dy)


@pytest.fixture
def never_dequantised(monkeypatch):
    monkeypatch.setattr(lora, "nf4_dequantise", None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((1, 123, 63), 4), ((63, 65, 507), 16), ((150, 300, 64), 10), ((290, 129, 200), 64)],
    ids=str,
)
def test_output_and_gradients(shape, rank, dtype):
    x, weight, a, b, dy = make(shape, rank, dtype)
    assert_right(x, weight, None, weight, a, b, dy)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_weight_of_another_type_is_cast(dtype):
    x, _, a, b, _ = make((30, 65, 63), 16, dtype)
    _, weight, *_ = make((30, 65, 63), 16, torch.float32)
    y = lora_linear(x, weight, None, a, b, SCALE)
    assert torch.equal(y, lora_linear(x, weight.to(dtype), None, a, b, SCALE))


@given(st.tuples(st.integers(0, 130), st.integers(1, 130), st.integers(1, 130)), st.integers(4, 64))
def test_any_shape(shape, rank):
    x, weight, a, b, dy = make(shape, rank, torch.float32)
    for got, truth in zip(
        output_and_gradients(lora_linear, x, weight, None, a, b, dy),
        by_hand(x, weight, a, b, dy),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has the tiles of its own architecture alone")
@pytest.mark.parametrize("architecture", [89, 90, 100, 121])
@pytest.mark.parametrize("rows", [60, 150])
def test_every_architectures_tiles(rows, architecture, monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: architecture)
    x, weight, a, b, dy = make((rows, 300, 128), 16, torch.float16)
    assert_right(x, weight, None, weight, a, b, dy)
    assert_right_in_nf4((rows, 300, 128), torch.float16)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", [(1, 123, 64), (50, 65, 192)])
def test_nf4_decoded_on_the_way(shape, dtype, never_dequantised):
    assert_right_in_nf4(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(290, 65, 192), (3, 129, 100), (3, 7, 63)])
def test_nf4_of_many_rows_or_with_blocks_that_cross_rows(shape, dtype):
    assert_right_in_nf4(shape, dtype)


def test_fp32_weights_alone_are_fused_in_fp32(monkeypatch):
    monkeypatch.setattr(lora, "_product_kernel", None)
    assert_right_in_nf4((5, 65, 64), torch.float32)
    x, weight, a, b, dy = make((5, 65, 64), 16, torch.float32)
    weight = weight.half()
    assert_right(x, weight, None, weight, a, b, dy)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_float_weight_beyond_a_recorded_bound(dtype, monkeypatch):
    monkeypatch.setattr(lora, "_FLOAT_TILES", {80: {32: lora._SMALL}})
    monkeypatch.setattr(lora, "_product_kernel", None)
    x, weight, a, b, dy = make((33, 65, 63), 16, dtype)
    assert_right(x, weight, None, weight, a, b, dy)


def test_bounds_are_of_rows():
    bounded = [entry for table in (lora._FLOAT_TILES, lora._NF4_TILES) for entry in table.values()]
    assert all(list(entry) == sorted(entry) for entry in bounded)
    assert all(inf in entry for entry in lora._FLOAT_TILES.values())


def test_strided_inputs_of_any_leading_shape():
    x, weight, a, b, dy = make((30, 65, 63), 16, torch.float32)
    truth = by_hand(x, weight, a, b, dy)
    x, dy = (tensor.view(2, 3, 5, -1).transpose(0, 2) for tensor in (x, dy))
    weight, a, b = (tensor.T.contiguous().T for tensor in (weight, a, b))
    y, dx, da, db = output_and_gradients(lora_linear, x, weight, None, a, b, dy)
    y, dx = (tensor.transpose(0, 2).reshape(30, -1) for tensor in (y, dx))
    for got, exact in zip((y, dx, da, db), truth, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


def test_no_gradient_for_inputs_that_ask_for_none(monkeypatch):
    monkeypatch.setattr(lora, "lora_input_gradient", None)
    x, weight, a, b, dy = make((5, 65, 63), 16, torch.float32)
    y = lora_linear(x, weight, None, a.requires_grad_(), b.requires_grad_(), SCALE)
    da, db = torch.autograd.grad(y, (a, b), dy)
    _, _, truth_da, truth_db = by_hand(x, weight, a.detach(), b.detach(), dy)
    torch.testing.assert_close(da.double(), truth_da, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(db.double(), truth_db, rtol=1e-5, atol=1e-4)


def test_gradients_of_its_own_output():
    x, weight, a, b, _ = (tensor.double() for tensor in make((5, 20, 18), 4, torch.float64))
    trained = [tensor.requires_grad_() for tensor in (x, a, b)]

    def y(x, a, b):
        return lora_linear(x, weight, None, a, b, SCALE)

    assert torch.autograd.gradcheck(y, trained, fast_mode=True)


def test_no_gradient_comes_by_what_is_kept_for_the_backward():
    x, weight, a, b, _ = make((5, 65, 63), 16, torch.float32)
    y, low = lora._lora_linear(x.requires_grad_(), weight, None, a, b, SCALE)
    assert y.requires_grad and not low.requires_grad


def test_they_are_well_formed_operators():
    x, weight, a, b, dy = make((3, 65, 64), 16, torch.float32)
    stored = NF4Weight.quantise(weight)
    low = x @ a.T
    torch.library.opcheck(lora.lora_low_gradients, (dy, low, b, SCALE))
    for matrix, absmax in ((weight, None), (stored.packed, stored.absmax)):
        torch.library.opcheck(lora.lora_input_gradient, (dy, matrix, absmax, low, a))
        trained_x, *trained = (tensor.clone().requires_grad_() for tensor in (x, a, b))
        torch.library.opcheck(lora._lora_linear, (trained_x, matrix, absmax, *trained, SCALE))


def test_a_rank_that_fits_no_kernel_is_the_references(monkeypatch):
    monkeypatch.setattr(lora, "_product", None)
    x, weight, a, b = (torch.randn(shape) for shape in ((5, 20), (12, 20), (65, 20), (12, 65)))
    ours = lora.lora_linear(x, weight, None, a, b, 0.5)
    torch.testing.assert_close(ours, x @ weight.T + 0.5 * x @ a.T @ b.T)
