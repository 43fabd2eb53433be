"""SwiGLU in Triton against its formula in fp64, beside PyTorch's own rounding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton exists for Linux only")

from precision import DEVICE, DTYPES, assert_no_worse, poisoned
from torch import Tensor

from fastflag.kernels import swiglu as module
from fastflag.kernels.swiglu import swiglu, swiglu_backward, swiglu_reference


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def check(gate: Tensor, up: Tensor, dy: Tensor) -> None:
    """The truth by formula; silu's derivative is s + g s (1 - s)."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    wide, wide_up, wide_dy = (tensor.detach().double() for tensor in (gate, up, dy))
    s = torch.sigmoid(wide)
    truths = wide * s * wide_up, wide_dy * wide_up * (s + wide * s * (1 - s)), wide_dy * wide * s
    torchs = swiglu_reference(gate, up)
    torchs = torchs, *torch.autograd.grad(torchs, (gate, up), dy)
    with poisoned():
        ours = swiglu(gate, up)
        ours = ours, *torch.autograd.grad(ours, (gate, up), dy)
    for our, torch_s, truth in zip(ours, torchs, truths, strict=True):
        assert_no_worse(our, torch_s, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1,), (63,), (2, 5, 123), (3, 1024), (4, 1536), (2, 1, 2049)], ids=str
)
def test_forward_and_gradients(shape, dtype):
    check(*(random(*shape, dtype=dtype, seed=seed) for seed in (1, 2, 3)))


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 1100),
    size=st.sampled_from([1e-3, 1.0, 1e2]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_rows_of_any_size(rows, columns, size, dtype):
    gate, up, dy = (random(rows, columns, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    check(size * gate, up, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_the_exponential_overflows_or_vanishes(dtype):
    ends = [-6e4, -1e3, -89.0, -88.0, -17.0, -1e-7, -0.0, 0.0, 1e-7, 17.0, 88.0, 89.0, 1e3, 6e4]
    gate = torch.tensor(ends, device=DEVICE, dtype=dtype)
    for factor in (1.0, -1.0, 0.5):
        check(gate, torch.full_like(gate, factor), torch.ones_like(gate))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_is_rounded_before_the_product(dtype):
    """PyTorch's own exponential may round the other way once in a thousand."""
    gate, up = (random(20, 500, dtype=dtype, seed=seed) for seed in (1, 2))
    differs = (swiglu(gate, up) != swiglu_reference(gate, up)).double().mean()
    assert dtype == torch.float32 or differs < 0.01


def test_halves_of_one_tensor_are_read_where_they_lie(monkeypatch):
    both = random(3, 7, 80).requires_grad_()
    gate, up = both.chunk(2, dim=-1)
    check(gate, up, random(3, 7, 40, seed=1))
    (ours,) = torch.autograd.grad(swiglu(gate, up), both, random(3, 7, 40, seed=1))
    (torchs,) = torch.autograd.grad(swiglu_reference(gate, up), both, random(3, 7, 40, seed=1))
    torch.testing.assert_close(ours, torchs)

    launched = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **tile: launched.extend(arguments[:2])

    monkeypatch.setattr(module, "_forward_kernel", Recorder())
    swiglu(gate, up)
    assert [tensor.data_ptr() for tensor in launched] == [gate.data_ptr(), up.data_ptr()]


def test_of_other_layouts():
    gate, up, dy = (random(33, 6, 5, seed=seed) for seed in (1, 2, 3))
    check(gate.mT, up.mT, dy.mT)
    check(gate.transpose(0, 1), up.transpose(0, 1).contiguous(), dy.transpose(0, 1))
    check(gate[..., ::2], up[..., :3], dy[..., 1:4])
    check(gate, up, dy[:1, :1, :1].expand_as(gate))


def test_of_no_rows():
    gate = random(4, 0, 64).requires_grad_()
    y = swiglu(gate, gate)
    y.backward(y)
    assert y.shape == gate.grad.shape == gate.shape


def test_they_are_well_formed_operators():
    gate, up = (random(3, 10, seed=seed).T.requires_grad_() for seed in (1, 2))
    torch.library.opcheck(swiglu, (gate, up))
    torch.library.opcheck(swiglu_backward, (gate.detach(), up.detach(), up.detach()))


def test_nothing_is_broadcast():
    for other in (torch.randn(1, 8), torch.randn(3, 8).half()):
        with pytest.raises(ValueError, match="one shape and type"):
            swiglu(torch.randn(3, 8, device=DEVICE), other.to(DEVICE))
