"""RMSNorm in Triton, alone and after an addition, against its formula in fp64, beside PyTorch's own
rounding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton exists for Linux only")

from precision import DEVICE, DTYPES, assert_no_worse, poisoned
from torch import Tensor

from fastflag.kernels.rmsnorm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_backward,
    rms_norm_reference,
)

EPSILON = 1e-5
# One row a program, several, and several with a tail, as [2, 70, 64] in programs of 32 rows.
SHAPES = [(1, 1), (3, 63), (2, 5, 123), (7, 507), (4, 576), (2, 2048), (2, 70, 64), (17, 3, 128)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight.double() * x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()


def check_norm(x: Tensor, weight: Tensor, dy: Tensor) -> None:
    x = x.detach().requires_grad_()
    exact = x.detach().double().requires_grad_()
    truth = exact_norm(exact, weight)
    (truth_dx,) = torch.autograd.grad(truth, exact, dy.double())
    torchs = rms_norm_reference(x, weight, EPSILON)
    (torchs_dx,) = torch.autograd.grad(torchs, x, dy)
    with poisoned():
        ours = rms_norm(x, weight, EPSILON)
        (ours_dx,) = torch.autograd.grad(ours, x, dy)
    assert_no_worse(ours, torchs, truth)
    assert_no_worse(ours_dx, torchs_dx, truth_dx)


def check_sum(x: Tensor, residual: Tensor, weight: Tensor, *dy: Tensor | None) -> None:
    """`dy` are the gradients of total and normed; one that is None is not there."""
    addends = x.detach().requires_grad_(), residual.detach().requires_grad_()
    exact = tuple(addend.detach().double().requires_grad_() for addend in addends)
    total = sum(exact)
    truths = total, exact_norm(total, weight)
    torchs = add_rms_norm_reference(*addends, weight, EPSILON)
    with poisoned():
        ours = add_rms_norm(*addends, weight, EPSILON)
        ours_dx = gradients(ours, addends, dy)
    for our, torch_s, truth in zip(
        (*ours, *ours_dx),
        (*torchs, *gradients(torchs, addends, dy)),
        (*truths, *gradients(truths, exact, dy)),
        strict=True,
    ):
        assert_no_worse(our, torch_s, truth)


def gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], dy) -> tuple[Tensor, ...]:
    pairs = [pair for pair in zip(outputs, dy, strict=True) if pair[1] is not None]
    return torch.autograd.grad([y for y, _ in pairs], inputs, [d.to(y.dtype) for y, d in pairs])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(shape, dtype):
    x, dy = (random(*shape, dtype=dtype, seed=seed) for seed in (1, 2))
    check_norm(x, random(shape[-1], dtype=dtype), dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum(shape, dtype):
    x, residual, *dy = (random(*shape, dtype=dtype, seed=seed) for seed in (1, 2, 3, 4))
    check_sum(x, residual, random(shape[-1], dtype=dtype), *dy)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(2, 300),  # of one column's gradient, cancellation leaves a rounding
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    used=st.sampled_from([(True, True), (True, False), (False, True)]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_rows_of_any_size_with_either_gradient(rows, columns, size, used, dtype):
    x, residual, *dy = (random(rows, columns, dtype=dtype, seed=seed) for seed in (1, 2, 3, 4))
    weight = random(columns, dtype=dtype)
    check_norm(size * x, weight, dy[0])
    dy = (d if is_used else None for d, is_used in zip(dy, used, strict=True))
    check_sum(size * x, size * residual, weight, *dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_rounded_before_it_is_normed(dtype):
    x, residual = (random(40, 123, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = random(123, dtype=dtype)
    total, normed = add_rms_norm(x, residual, weight, EPSILON)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight, EPSILON))


def test_of_other_layouts():
    x, residual, dy, other = (random(5, 63, 33, seed=seed).mT for seed in (1, 2, 3, 4))
    weight = random(63, 2)[:, 0]
    check_norm(x, weight, dy)
    check_sum(x, residual, weight, dy, other)
    check_sum(x, residual.contiguous(), weight, dy.contiguous(), other)
    check_norm(x, weight, dy[:1, :1].expand_as(x))


def test_of_extreme_rows():
    x = torch.stack([random(65) * size for size in (0.0, 1e-30, 1e-4, 1e4, 1e12)])
    check_norm(x, random(65), random(5, 65))
    half = torch.stack([random(65) * size for size in (0.0, 1e-7, 1e4)]).to(torch.float16)
    check_sum(half, half, *(random(*s, dtype=torch.float16) for s in ((65,), (3, 65), (3, 65))))


def test_of_no_rows():
    x = random(4, 0, 64).requires_grad_()
    outputs = rms_norm(x, random(64), EPSILON), *add_rms_norm(x, x, random(64), EPSILON)
    assert [output.shape for output in outputs] == [x.shape] * 3
    torch.autograd.backward(outputs, outputs)
    assert x.grad.shape == x.shape


def test_nothing_is_broadcast():
    x, weight = random(3, 8), random(8)
    with pytest.raises(ValueError, match="one shape are needed"):
        add_rms_norm(x, random(1, 8), weight, EPSILON)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_a_stream_of_its_own_type(shape):
    """A stream in fp32 beside a branch and a weight in fp16: rounded nowhere but in the norm."""
    branch, weight = random(*shape, dtype=torch.float16), random(shape[-1], dtype=torch.float16)
    residual, dtotal = random(*shape, seed=1), random(*shape, seed=2)
    dnormed = random(*shape, dtype=torch.float16, seed=3)
    check_sum(branch, residual, weight, dtotal, dnormed)
    check_norm(residual, weight, dnormed)
    total, normed = add_rms_norm(branch, residual, weight, EPSILON)
    assert (total.dtype, normed.dtype) == (torch.float32, torch.float16)
    assert torch.equal(total, branch.float() + residual)
    assert torch.equal(normed, rms_norm(total, weight, EPSILON))


def test_they_are_well_formed_operators():
    x = random(3, 40, 65).mT.requires_grad_()
    weight = random(40)
    torch.library.opcheck(rms_norm, (x, weight, EPSILON))
    torch.library.opcheck(add_rms_norm, (x, x.detach(), weight, EPSILON))
    for dtotal in (None, x.detach()):
        torch.library.opcheck(rms_norm_backward, (x.detach(), weight, x.detach(), dtotal, EPSILON))
