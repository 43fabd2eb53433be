"""NF4 in Triton: the weight bit for bit as bitsandbytes gives it, products beside PyTorch's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton exists for Linux only")

from bitsandbytes import functional as bitsandbytes
from precision import DEVICE, DTYPES, assert_no_worse, poisoned

from fastflag.kernels.nf4 import (
    nf4_dequantise,
    nf4_dequantise_reference,
    nf4_linear,
    nf4_linear_reference,
)

# Whole blocks, blocks across rows, rows that end within a byte, one number, more than one nested
# block of 256 * 64 numbers.
SHAPES = [(64, 64), (2, 130), (3, 100), (7, 9), (1, 1), (131, 127), (200, 130)]


def quantised(shape, dtype=torch.float32, nested=False):
    """A random weight as bitsandbytes keeps it."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return bitsandbytes.quantize_4bit(
        weight.to(DEVICE, dtype), blocksize=64, compress_statistics=nested, quant_type="nf4"
    )


def dequantised(packed, state):
    """By bitsandbytes, as one row of whole bytes: for rows that end within one it compiles code."""
    shape, state.shape = state.shape, (1, 2 * packed.numel())
    row = bitsandbytes.dequantize_4bit(packed, state)
    return row[0, : math.prod(shape)].view(shape)


def nesting(state):
    """What only a nested absmax has, by the parameters' names."""
    if not state.nested:
        return {}
    nested = state.state2
    assert nested.blocksize == 256
    return {
        "nested_code": nested.code,
        "nested_absmax": nested.absmax,
        "offset": state.offset,
    }


def test_what_is_nested_may_be_strided():
    packed, state = quantised((40, 500), torch.float32, True)
    apart = {
        name: torch.stack([tensor, tensor], dim=-1)[..., 0] if tensor.dim() else tensor
        for name, tensor in nesting(state).items()
    }
    ours = nf4_dequantise(packed, state.absmax, (40, 500), torch.float32, **apart)
    assert torch.equal(ours, dequantised(packed, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantised_as_bitsandbytes_bit_for_bit(shape, nested, dtype):
    packed, state = quantised(shape, dtype, nested)
    truth = dequantised(packed, state)
    arguments = (packed.flatten(), state.absmax, shape, dtype)
    with poisoned():
        ours = nf4_dequantise(*arguments, **nesting(state))
    assert ours.dtype == dtype and torch.equal(ours, truth)
    assert torch.equal(nf4_dequantise_reference(*arguments, **nesting(state)), truth)


@given(
    st.binary(min_size=1, max_size=200),
    st.lists(st.floats(0, 2.0**100, width=32), min_size=7, max_size=7),
)
def test_any_bytes_and_scales(numbers, scales):
    packed = torch.tensor(list(numbers), dtype=torch.uint8, device=DEVICE)
    count = 2 * len(packed)
    absmax = torch.tensor(scales, device=DEVICE)[: math.ceil(count / 64)]
    truth = torch.ops.bitsandbytes.dequantize_4bit(
        packed, absmax, 64, "nf4", (1, count), torch.float32
    )
    assert torch.equal(nf4_dequantise(packed, absmax, (1, count), torch.float32), truth)


# Outputs beyond a tile, a program's share of blocks that is not all of them, and what is not
# fused: rows of the weight that are not whole blocks, or that end within a byte.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [(70, 192), (129, 64), (5, 33 * 64), (17, 100), (33, 65)])
@pytest.mark.parametrize("rows", [0, 1, 17, 64, 65])
def test_linear_and_its_gradient(rows, weight, dtype):
    outputs, inputs = weight
    packed, state = quantised(weight)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(inputs, rows, generator=generator).to(DEVICE, dtype).T.requires_grad_()
    dy = torch.randn(rows, outputs, generator=generator).to(DEVICE, dtype)
    matrix = dequantised(packed, state).double()
    truth, truth_dx = x.detach().double() @ matrix.T, dy.double() @ matrix
    arguments = (x, packed.flatten(), state.absmax, outputs)
    torchs = nf4_linear_reference(*arguments)
    (torchs_dx,) = torch.autograd.grad(torchs, x, dy)
    with poisoned():
        ours = nf4_linear(*arguments)
        (ours_dx,) = torch.autograd.grad(ours, x, dy)
    if rows:
        assert_no_worse(ours, torchs, truth)
        assert_no_worse(ours_dx, torchs_dx, truth_dx)
    assert ours.shape == truth.shape and ours_dx.shape == truth_dx.shape


def test_linear_keeps_leading_dimensions():
    packed, state = quantised((6, 64))
    x = torch.randn(2, 3, 64, device=DEVICE, dtype=torch.float16)
    ours = nf4_linear(x, packed.flatten(), state.absmax, 6)
    rows = nf4_linear(x.view(6, 64), packed.flatten(), state.absmax, 6)
    assert torch.equal(ours, rows.view(2, 3, 6))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_dequantise_is_a_well_formed_operator(nested):
    packed, state = quantised((3, 65), nested=nested)
    arguments = (packed.flatten(), state.absmax, (3, 65), torch.float16)
    torch.library.opcheck(nf4_dequantise, arguments, nesting(state))


@pytest.mark.parametrize("inputs", [65, 128])
def test_linear_is_a_well_formed_operator(inputs):
    packed, state = quantised((5, inputs))
    x = torch.randn(2, inputs, device=DEVICE, dtype=torch.float16, requires_grad=True)
    torch.library.opcheck(nf4_linear, (x, packed.flatten(), state.absmax, 5))
