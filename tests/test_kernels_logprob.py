"""A token's log-probability and the vocabulary's entropy in Triton against their formulas in fp64,
beside PyTorch's own rounding."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton", reason="Triton exists for Linux only")

from precision import DEVICE, DTYPES, assert_no_worse, poisoned

from fastflag.kernels import logprob
from fastflag.kernels.logprob import (
    token_log_probability,
    token_log_probability_backward,
    token_log_probability_forward,
    token_log_probability_reference,
)


def inputs(
    rows: int, width: int, columns: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and token, with logits of deviation 3 round 0."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    token = torch.randint(columns, (rows,), generator=generator)
    return (
        hidden.to(DEVICE, dtype).requires_grad_(),
        (weight * 3 / width**0.5).to(DEVICE, dtype).requires_grad_(),
        token.to(DEVICE),
    )


def truth(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    temperature: float = 1.0,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """By the definition, over the whole vocabulary; what is not allowed has a logit of -inf."""
    logits = hidden @ weight.T / temperature
    if allowed is not None:
        forbidden = torch.ones(len(weight), dtype=torch.bool, device=DEVICE)
        forbidden[allowed] = False
        logits = logits.masked_fill(forbidden, -torch.inf)
    log_probability = logits.log_softmax(-1)
    finite = log_probability.masked_fill(log_probability.isneginf(), 0)
    entropy = -(log_probability.exp() * finite).sum(-1)
    return log_probability.take_along_dim(token[..., None], -1)[..., 0], entropy


def results(
    op: Callable, hidden: Tensor, weight: Tensor, token: Tensor, *options: float | Tensor
) -> list[Tensor]:
    """Both outputs of `op`, and the gradients of both together for hidden and weight."""
    outputs = op(hidden, weight, token, *options)
    generator = torch.Generator().manual_seed(1)
    gradients = [
        torch.randn(token.shape, generator=generator).to(DEVICE, output.dtype) for output in outputs
    ]
    return [*outputs, *torch.autograd.grad(outputs, (hidden, weight), gradients)]


def exact_results(
    hidden: Tensor, weight: Tensor, token: Tensor, *options: float | Tensor
) -> list[Tensor]:
    wide = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    return results(truth, *wide, token, *options)


def assert_right(*arguments: Tensor | float) -> None:
    """Every output and gradient is as exact as PyTorch's own."""
    exact = exact_results(*arguments)
    torchs = results(token_log_probability_reference, *arguments)
    with poisoned():
        ours = results(token_log_probability, *arguments)
    for values in zip(ours, torchs, exact, strict=True):
        assert_no_worse(*values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "columns"),
    [(1, 1, 1), (3, 63, 123), (1, 128, 507), (63, 123, 128), (150, 40, 129), (300, 17, 63)],
)
def test_outputs_and_gradients(rows, width, columns, dtype):
    assert_right(*inputs(rows, width, columns, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.7, 3.0])
def test_temperature(temperature, dtype):
    assert_right(*inputs(20, 33, 200, dtype), temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_backward_pass_in_pieces(dtype, monkeypatch):
    monkeypatch.setattr(logprob, "_GRADIENT_SIZE", 21 * 256)
    assert_right(*inputs(21, 63, 1000, dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_pieces_are_not_rounded_before_they_are_added(dtype, monkeypatch):
    arguments = inputs(21, 63, 2000, dtype)
    whole = results(token_log_probability, *arguments)[2]
    monkeypatch.setattr(logprob, "_GRADIENT_SIZE", 1)
    pieces = results(token_log_probability, *arguments)[2]
    assert (whole != pieces).double().mean() < 0.01


def test_groups_of_row_tiles(monkeypatch):
    """Five row tiles, of which two pass over the vocabulary together: the last group has one."""
    monkeypatch.setattr(logprob, "_ROW_TILES", 2)
    assert_right(*inputs(515, 16, 130, torch.float32))


@pytest.fixture
def wide_tile(monkeypatch):
    """Columns enough to a program that the interpreter gets through a real vocabulary."""
    tile = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 8192, "num_warps": 8, "num_stages": 1}
    if DEVICE == "cpu":
        monkeypatch.setattr(logprob, "_TILES", {0: tile})


@pytest.mark.usefixtures("wide_tile")
@pytest.mark.parametrize("columns", [49152, 50000, 129920])
def test_padded_columns_never_count(columns):
    """All logits are near -40: a column too many, whose logit is 0, would have all probability."""
    hidden, weight, token = inputs(5, 16, columns, torch.float32)
    with torch.no_grad():
        hidden[:, 0], weight[:, 0] = -40, 1
    token[0] = columns - 1
    exact = exact_results(hidden, weight, token)
    with poisoned():
        ours = results(token_log_probability, hidden, weight, token)
    # Logits this far from 0 leave 1e-5 of their differences, by this product or any other.
    for values, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(values.double(), right, rtol=3e-4, atol=3e-4)
    loss = functional.linear_cross_entropy(hidden, weight, token, reduction="none")
    ours, _ = token_log_probability(hidden, weight, token)
    torch.testing.assert_close(ours, -loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_logits_far_from_zero(level):
    """Their differences alone count, and are exact: each logit is a whole number in fp32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, (300, 2), generator=generator).float()
    weight[:, 0] = level
    hidden = torch.ones(9, 2)
    token = torch.randint(300, (9,), generator=generator)
    hidden, weight = (x.to(DEVICE).requires_grad_() for x in (hidden, weight))
    assert_right(hidden, weight, token.to(DEVICE))


@given(st.data())
def test_allowed_tokens(data):
    columns = data.draw(st.integers(1, 300))
    hidden, weight, _ = inputs(4, 20, columns, torch.float32, data.draw(st.integers(0, 99)))
    allowed = data.draw(st.lists(st.integers(0, columns - 1), min_size=1, unique=True))
    token = data.draw(st.lists(st.sampled_from(allowed), min_size=4, max_size=4))
    token, allowed = (torch.tensor(numbers, device=DEVICE) for numbers in (token, allowed))
    arguments = hidden, weight, token, data.draw(st.sampled_from([1.0, 0.7])), allowed
    with poisoned():
        ours = results(token_log_probability, *arguments)
    torchs = results(token_log_probability_reference, *arguments)
    for one, other, exact in zip(ours, torchs, exact_results(*arguments), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.double(), exact, rtol=1e-5, atol=1e-5)


def test_one_allowed_token_is_certain():
    hidden, weight, _ = inputs(3, 20, 50, torch.float32)
    token = torch.full((3,), 7, device=DEVICE)
    outputs = token_log_probability(hidden, weight, token, 1.0, token[:1])
    (gradient,) = torch.autograd.grad([x.sum() for x in outputs], hidden)
    for tensor in (*outputs, gradient):
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_inputs_of_any_shape_and_stride():
    hidden, weight, token = inputs(6, 40, 150, torch.float32)
    expected = token_log_probability(hidden, weight, token)
    strided = (
        hidden.view(2, 3, 40).transpose(0, 1),
        weight.T.contiguous().T,
        token.view(2, 3).T,
    )
    outputs = token_log_probability(*strided)
    for ours, flat in zip(outputs, expected, strict=True):
        assert torch.equal(ours, flat.view(2, 3).T)
    assert_right(*(x.detach().requires_grad_() for x in strided[:2]), strided[2])


def test_no_rows():
    hidden, weight, token = inputs(0, 16, 100, torch.float32)
    outputs = token_log_probability(hidden, weight, token)
    assert [x.shape for x in outputs] == [(0,), (0,)]
    dhidden, dweight = torch.autograd.grad([x.sum() for x in outputs], (hidden, weight))
    assert dhidden.shape == hidden.shape and torch.equal(dweight, torch.zeros_like(weight))


def test_a_row_has_the_same_bits_in_every_batch():
    """Whole numbers, because NumPy's products, the interpreter's, depend on a row's place."""
    hidden, weight, token = inputs(140, 64, 300, torch.float32)
    hidden, weight = hidden.round(), weight.round()
    together = token_log_probability(hidden, weight, token)
    for rows in (slice(131, 132), slice(5, 40)):
        apart = token_log_probability(hidden[rows], weight, token[rows])
        for ours, whole in zip(apart, together, strict=True):
            assert torch.equal(ours, whole[rows])


def test_memory_is_never_that_of_all_logits(monkeypatch):
    hidden, weight, token = inputs(40, 8, 2000, torch.float32)
    weight.requires_grad_(False)
    limit = 40 * 256
    monkeypatch.setattr(logprob, "_GRADIENT_SIZE", limit)
    largest = 0

    def watched(make):
        def made(*arguments, **options):
            nonlocal largest
            tensor = make(*arguments, **options)
            largest = max(largest, tensor.numel())
            return tensor

        return made

    with monkeypatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, watched(getattr(owner, name)))
        outputs = token_log_probability(hidden, weight, token)
        assert 0 < largest <= 40 * 16
        torch.autograd.grad([x.sum() for x in outputs], hidden)
    assert largest == limit


@pytest.mark.parametrize("asked", [(True, False), (False, True)])
def test_only_gradients_that_are_asked_for(asked, monkeypatch):
    computed = []

    def watched(*arguments):
        computed.extend(token_log_probability_backward(*arguments))
        return computed

    monkeypatch.setattr(logprob, "token_log_probability_backward", watched)
    hidden, weight, token = inputs(4, 30, 140, torch.float32)
    both = torch.autograd.grad(
        token_log_probability(hidden, weight, token)[0].sum(), (hidden, weight)
    )
    computed.clear()
    for tensor, wanted in zip((hidden, weight), asked, strict=True):
        tensor.requires_grad_(wanted)
    token_log_probability(hidden, weight, token)[0].sum().backward()
    for tensor, wanted, gradient, result in zip(
        (hidden, weight), asked, both, computed, strict=True
    ):
        assert (tensor.grad is not None) == wanted == (result.numel() > 0)
        assert not wanted or torch.equal(tensor.grad, gradient)


def test_gradients_by_finite_differences(monkeypatch):
    monkeypatch.setattr(logprob, "_GRADIENT_SIZE", 5 * 128)
    hidden, weight, token = inputs(5, 9, 140, torch.float64)

    def both(hidden, weight):
        return token_log_probability(hidden, weight, token, 0.7)

    assert torch.autograd.gradcheck(both, (hidden, weight), fast_mode=True)


def test_they_are_well_formed_operators():
    hidden, weight, token = inputs(3, 20, 150, torch.float32)
    torch.library.opcheck(token_log_probability_forward, (hidden, weight, token, 0.7))
    detached = hidden.detach(), weight.detach(), token, 0.7
    outputs = token_log_probability_forward(*detached)
    gradients = torch.randn(2, 3, device=DEVICE)
    for asked in ((True, True), (True, False), (False, True)):
        arguments = (*detached, *outputs[1:], *gradients, *asked)
        torch.library.opcheck(token_log_probability_backward, arguments)
