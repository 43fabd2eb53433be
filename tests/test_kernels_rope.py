"""Rotation in Triton against complex multiplication in fp64, beside PyTorch's own rounding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton", reason="Triton exists for Linux only")

from precision import DEVICE, DTYPES, assert_no_worse, poisoned

from fastflag.kernels.rope import rotate_, rotate_back, rotate_in_place, rotate_reference


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def heads(x: Tensor, count: int) -> Tensor:
    """A linear layer's output [N, T, count E] as the model's blocks view it: [N, count, T, E]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def angles(rows: int, tokens: int, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = 3 * random(rows, 1, tokens, half)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def in_order(x: Tensor, order: list[int]) -> Tensor:
    """x [N, heads, T, E], its first three axes in memory in `order`."""
    back = [order.index(axis) for axis in range(3)]
    return x.permute(*order, 3).contiguous().permute(*back, 3)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Halves are real and imaginary parts; the angles may not lie on the circle, for rounding."""
    left, right = x.detach().double().chunk(2, dim=-1)
    product = torch.complex(left, right) * torch.complex(cos.double(), sin.double())
    return torch.cat((product.real, product.imag), dim=-1)


def check(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    """That they are rotated where they lie; the gradient is the conjugate's product."""
    inputs = [x.detach().requires_grad_() for x in (query, key) if x is not None]
    arguments = *(*inputs, None)[:2], cos, sin
    dy = [random(*x.shape, dtype=x.dtype, seed=9) for x in inputs]
    truths = [turned(x, cos, sin) for x in inputs] + [turned(d, cos, -sin) for d in dy]
    torchs = [y for y in rotate_reference(*arguments) if y is not None]
    torchs += torch.autograd.grad(torchs, inputs, dy)
    with poisoned():
        ours = [y for y in rotate_(*arguments) if y is not None]
        ours += torch.autograd.grad(ours, inputs, dy)
    assert [y.data_ptr() for y in ours[: len(inputs)]] == [x.data_ptr() for x in inputs]
    for our, torch_s, truth in zip(ours, torchs, truths, strict=True):
        assert_no_worse(our, torch_s, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize(
    ("heads_and_groups", "size"),
    [((9, 3), 64), ((4, 4), 64), ((5, 1), 128), ((1, 1), 2), ((3, 2), 96)],
)
def test_forward_and_gradient(heads_and_groups, size, shared, dtype):
    query, key = (
        heads(random(3, 7, count * size, dtype=dtype), count) for count in heads_and_groups
    )
    cos, sin = angles(1 if shared else 3, 7, size // 2, dtype)
    check(query.clone(), key.clone(), cos, sin)
    check(query.clone(), None, cos, sin)


@given(
    rows=st.integers(1, 4),
    tokens=st.integers(1, 6),
    head_counts=st.tuples(st.integers(1, 12), st.integers(1, 5)),
    half=st.integers(1, 70),
    shared=st.booleans(),
    order=st.permutations([0, 1, 2]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_in_any_order(rows, tokens, head_counts, half, shared, order, dtype):
    """N, H and T lie in memory in any order, with gaps between heads."""
    query, key = (
        in_order(random(rows, count, tokens, 2 * half + 3, dtype=dtype), order)[..., 1:-2]
        for count in head_counts
    )
    check(query, key, *angles(1 if shared else rows, tokens, half, dtype))


def test_what_lies_between_is_left_alone():
    """Queries and keys in the output of one layer, before the values."""
    output = random(2, 5, 8 * 16).requires_grad_()
    cos, sin = angles(2, 5, 8, torch.float32)
    query, key, value = (heads(x, x.shape[-1] // 16) for x in output.split((64, 32, 32), dim=-1))
    before = value.detach().clone()
    expected = rotate_reference(query, key, cos, sin)
    dy = [random(*x.shape, seed=9) for x in expected]
    (torchs,) = torch.autograd.grad(expected, output, dy)
    rotated = rotate_(query, key, cos, sin)
    (ours,) = torch.autograd.grad(rotated, output, dy)
    torch.testing.assert_close(rotated, expected)
    torch.testing.assert_close(ours, torchs)
    assert torch.equal(value, before)


def test_inside_a_layer():
    """Linear layers, heads, rotation, attention: as the functional form, for x and every matrix."""
    torch.manual_seed(0)
    x, dy = random(2, 7, 24), random(2, 4, 7, 16, seed=1)
    layers = [nn.Linear(24, count * 16, device=DEVICE) for count in (4, 2, 2)]
    cos, sin = angles(1, 7, 8, torch.float32)

    def run(dtype: torch.dtype, rotate) -> tuple[Tensor, ...]:
        for layer in layers:
            layer.to(dtype)
        inputs = x.detach().to(dtype).requires_grad_()
        query, key, value = (heads(layer(inputs), layer.out_features // 16) for layer in layers)
        query, key = rotate(query, key, cos.to(dtype), sin.to(dtype))
        attended = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        trained = [inputs, *(weight for layer in layers for weight in layer.parameters())]
        return attended, *torch.autograd.grad(attended, trained, dy.to(dtype))

    ours, torchs, truths = (
        run(dtype, rotate)
        for dtype, rotate in (
            (torch.float32, rotate_),
            (torch.float32, rotate_reference),
            (torch.float64, rotate_reference),
        )
    )
    for our, torch_s, truth in zip(ours, torchs, truths, strict=True):
        assert_no_worse(our, torch_s, truth)


def test_a_gradient_of_others_is_not_written():
    """An addition hands one tensor to both of its addends."""
    query, other = (random(2, 3, 4, 8, seed=seed).requires_grad_() for seed in (1, 2))
    dy = random(2, 3, 4, 8, seed=3)
    cos, sin = angles(1, 4, 4, torch.float32)
    rotated, _ = rotate_(query, None, cos, sin)
    gradients = torch.autograd.grad(rotated + other, (query, other), dy)
    torch.testing.assert_close(gradients[0].double(), turned(dy, cos, -sin), atol=1e-6, rtol=0)
    assert torch.equal(gradients[1], random(2, 3, 4, 8, seed=3))
    assert torch.equal(dy, random(2, 3, 4, 8, seed=3))


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1], [2, 1, 0]], ids=str)
def test_gradients_lie_as_linear_layers_read_them(order):
    gradient, table = in_order(random(2, 3, 4, 8), order), angles(2, 4, 4, torch.float32)
    (back,) = rotate_back([gradient], *table)
    assert back.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(back, turned(gradient, table[0], -table[1]).float())


def test_a_backward_that_needs_what_was_rotated_is_refused():
    x = random(2, 3, 32).requires_grad_()
    output = x * 1.0
    squares = output.square()
    rotate_(heads(output, 4), None, *angles(1, 3, 4, torch.float32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()


def test_strided_elements_are_refused():
    query = random(2, 3, 4, 8).mT
    before = query.clone()
    for pair in ((query, None), (before, query)):
        with pytest.raises(ValueError, match="unit stride"):
            rotate_(*pair, *angles(1, 8, 2, torch.float32))
    assert torch.equal(query, before)


def test_memory_that_would_be_rotated_twice_is_refused():
    x, angle = torch.randn(1, 2, 3, 4), torch.ones(1, 1, 3, 2)
    for query, key in ((x.expand(2, -1, -1, -1), None), (x, x)):
        with pytest.raises(ValueError, match="memory of its own"):
            rotate_(query.to(DEVICE), None if key is None else query, angle, angle)


def test_of_no_tokens():
    query = random(2, 3, 0, 8).requires_grad_()
    rotated, _ = rotate_(query, None, *angles(1, 0, 4, torch.float32))
    assert torch.autograd.grad(rotated, query, rotated)[0].shape == query.shape


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with keys"])
def test_they_are_well_formed_operators(alone):
    query, key = (heads(random(2, 3, count * 8), count) for count in (3, 2))
    table = angles(1, 3, 4, torch.float32)
    torch.library.opcheck(rotate_in_place, (query, None if alone else key, *table))
    torch.library.opcheck(rotate_back, ([query] if alone else [query, key], *table))
