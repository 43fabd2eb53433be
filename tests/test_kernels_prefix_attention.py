"""Shared-prefix attention in Triton against a softmax written token by token in fp64."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton exists for Linux only")

from precision import DEVICE, DTYPES, assert_no_worse, poisoned

from fastflag.kernels import prefix_attention as module
from fastflag.kernels.prefix_attention import prefix_attention, prefix_attention_reference

TRAINED = (0, 1, 2, 5, 6)  # query, key, value, own_key, own_value


def inputs(
    lengths: Sequence[int],
    counts: Sequence[int],
    heads: int,
    groups: int,
    size: int,
    own: int,
    first: Sequence[int] | None = None,
    queries: int = 1,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The arguments, as views of what a linear layer gives, [N, T, heads * E]. With `first`, of
    `queries` tokens from there on; else of all. Padding behind a prefix's length is NaN."""
    generator = torch.Generator().manual_seed(0)
    suffixes, keys = sum(counts), max(lengths) + 1

    def normal(rows: int, tokens: int, heads: int) -> Tensor:
        flat = torch.randn(rows, tokens, heads * size, generator=generator)
        return flat.to(DEVICE, dtype).unflatten(-1, (heads, size)).transpose(1, 2)

    def integers(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)

    query = normal(suffixes, own if first is None else queries, heads)
    key, value = (normal(len(lengths), keys, groups) for _ in range(2))
    own_key, own_value = (normal(suffixes, own, groups) for _ in range(2))
    for tensor in (key, value):
        for row, length in zip(tensor, lengths, strict=True):
            row[:, length:] = torch.nan
    return [
        query.requires_grad_(),
        key.requires_grad_(),
        value.requires_grad_(),
        integers(lengths),
        integers([0, *accumulate(counts)]),
        own_key.requires_grad_(),
        own_value.requires_grad_(),
        integers([0] * suffixes if first is None else first),
    ]


def attend(query, key, value, lengths, starts, own_key, own_value, first) -> Tensor:
    """Each query's softmax over a list of what it sees."""
    group = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    for prefix, (start, end) in enumerate(pairwise(starts.tolist())):
        for suffix in range(start, end):
            for head in range(query.shape[1]):
                for number in range(query.shape[2]):
                    shared = prefix, head // group, slice(int(lengths[prefix]))
                    alone = suffix, head // group, slice(int(first[suffix]) + number + 1)
                    keys = torch.cat((key[shared], own_key[alone]))
                    values = torch.cat((value[shared], own_value[alone]))
                    place = suffix, head, number
                    weights = (keys @ query[place] / query.shape[-1] ** 0.5).softmax(0)
                    output[place] = weights @ values
    return output


def exact(arguments: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in arguments]


def without_padding(arguments: list[Tensor]) -> list[Tensor]:
    """For the reference, which multiplies what it does not see by 0."""
    return [
        x.detach().nan_to_num().requires_grad_() if x.is_floating_point() else x for x in arguments
    ]


def results(attention, arguments: list[Tensor], d_output: Tensor) -> list[Tensor]:
    """The output and the gradients of all tensors."""
    output = attention(*arguments)
    trained = [arguments[number] for number in TRAINED]
    return [output, *torch.autograd.grad(output, trained, d_output.to(output.dtype))]


def gradient(query: Tensor) -> Tensor:
    return torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(query)


def check(arguments: list[Tensor]) -> None:
    d_output = gradient(arguments[0])
    truths = results(attend, exact(arguments), d_output)
    torchs = results(prefix_attention_reference, without_padding(arguments), d_output)
    with poisoned():
        ours = results(prefix_attention, arguments, d_output)
    for our, their, truth in zip(ours, torchs, truths, strict=True):
        assert_no_worse(our, their, truth)


CASES = {
    "ragged": {"lengths": (17, 3, 0, 40), "counts": (3, 0, 5, 1), "heads": 6, "groups": 2},
    "last tokens": {
        "lengths": (17, 3, 40),
        "counts": (30, 1, 0),
        "heads": 3,
        "groups": 1,
        "first": [number % 9 for number in range(31)],  # own keys end at 6
    },
    # Levels 0 and 1 of a tree of pieces of 8 tokens, of two depths each.
    "pieces of depth 0 and 1": {
        "lengths": (17, 3, 40),
        "counts": (3, 0, 4),
        "heads": 6,
        "groups": 2,
        "own": 16,
        "first": [0, 8, 8, 0, 0, 8, 8],
        "queries": 8,
    },
    "pieces of depth 2 and 3": {
        "lengths": (33, 5),
        "counts": (1, 3),
        "heads": 3,
        "groups": 1,
        "own": 32,
        "first": [16, 16, 24, 24],
        "queries": 8,
    },
    "one head to one": {"lengths": (63,), "counts": (11,), "heads": 2, "groups": 2, "size": 64},
    "no power of 2": {"lengths": (5, 33), "counts": (2, 3), "heads": 2, "groups": 1, "size": 80},
    "large head": {"lengths": (18,), "counts": (2,), "heads": 4, "groups": 1, "size": 128},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_gradients(case, dtype):
    check(inputs(**{"size": 16, "own": 7, "dtype": dtype} | case))


def test_scores_far_below_those_of_padding():
    """A key that is not there has a score of 0, which must not be the highest."""
    arguments = inputs((33, 0), (3, 2), heads=4, groups=1, size=16, own=7)
    query, key, _, _, _, own_key, *_ = (x.detach() for x in arguments)
    query.abs_().mul_(10)
    key.abs_().neg_()
    own_key.abs_().neg_()
    check(arguments)


@settings(max_examples=8)
@given(data=st.data())
def test_whatever_the_counts_and_lengths(data):
    lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=4))
    counts = [data.draw(st.integers(0, 9)) for _ in lengths]
    assume(sum(counts))
    own = data.draw(st.integers(1, 20))
    first = st.lists(st.integers(0, own - 1), min_size=sum(counts), max_size=sum(counts))
    arguments = inputs(
        lengths,
        counts,
        heads=data.draw(st.sampled_from((1, 3))),
        groups=1,
        size=16,
        own=own,
        first=data.draw(st.none() | first),
        dtype=torch.float64,
    )
    d_output = gradient(arguments[0])
    truths = results(attend, exact(arguments), d_output)
    with poisoned():
        ours = results(prefix_attention, arguments, d_output)
    torch.testing.assert_close(ours, truths, rtol=0.0, atol=1e-12)


def test_more_prefixes_than_are_searched_at_once():
    counts = [number % 3 % 2 for number in range(300)]
    lengths = [number % 5 for number in range(300)]
    arguments = inputs(lengths, counts, heads=1, groups=1, size=16, own=2, dtype=torch.float64)
    with poisoned():
        ours = prefix_attention(*arguments)
    torch.testing.assert_close(ours, attend(*exact(arguments)), rtol=0.0, atol=1e-12)


def test_no_suffix_at_all():
    arguments = inputs((4, 9), (0, 0), heads=2, groups=1, size=16, own=3)
    with poisoned():
        output, d_query, *gradients = results(prefix_attention, arguments, arguments[0])
    assert output.shape == d_query.shape == (0, 2, 3, 16)
    assert [float(x.abs().sum()) for x in gradients] == [0.0] * 4


def test_counts_may_be_strided():
    query, key, value, lengths, starts, *own, first = inputs([5, 9], [2, 3], 4, 2, 16, 4)
    apart = [torch.stack([x, x + 100], dim=-1)[..., 0] for x in (lengths, starts, first)]
    right = prefix_attention(query, key, value, lengths, starts, *own, first)
    ours = prefix_attention(query, key, value, apart[0], apart[1], *own, apart[2])
    assert torch.equal(ours, right)


def test_layouts_are_kept_and_any_is_read():
    arguments = inputs((4, 9), (2, 3), heads=4, groups=2, size=16, own=3)
    trained = [arguments[number] for number in TRAINED]
    output = prefix_attention(*arguments)
    # As the linear layer behind it wants them: no copy.
    assert output.transpose(1, 2).flatten(2)._base is not None
    expected = torch.autograd.grad(output, trained, torch.ones_like(output))
    for tensor, gradient in zip(trained, expected, strict=True):
        assert tensor.stride() == gradient.stride()
    for number in TRAINED:
        turned = arguments[number].detach().transpose(0, 3).contiguous().transpose(0, 3)
        arguments[number] = turned.requires_grad_()
    trained = [arguments[number] for number in TRAINED]
    # The gradient of a sum is one number, expanded.
    gradients = torch.autograd.grad(prefix_attention(*arguments).sum(), trained)
    assert torch.equal(prefix_attention(*arguments), output)
    assert all(map(torch.equal, gradients, expected))


def test_frozen_keys_cost_no_backward(monkeypatch):
    arguments = inputs((4, 9), (2, 3), heads=2, groups=1, size=16, own=3)
    expected = results(prefix_attention, arguments, arguments[0].detach())[1]
    for name in ("prefix_key_backward_kernel", "own_key_backward_kernel"):
        monkeypatch.setattr(module, name, None)
    for number in TRAINED[1:]:
        arguments[number].requires_grad_(False)
    output = prefix_attention(*arguments)
    output.backward(arguments[0].detach())
    assert torch.equal(arguments[0].grad, expected)


def test_launching_asks_nothing_of_the_device(monkeypatch):
    """Counts and lengths on the device are no numbers of the host's."""

    class Launched:
        def __getitem__(self, grid):
            assert all(type(number) is int for number in grid)
            return lambda *arguments, **constants: None

    def refuse(*_):
        raise AssertionError("a synchronisation")

    arguments = inputs((4, 9), (2, 3), heads=2, groups=1, size=16, own=3)
    for name in dir(module):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, Launched())
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    results(prefix_attention, arguments, arguments[0].detach())


def test_gradients_are_the_derivatives():
    arguments = inputs((9, 2), (2, 1), heads=2, groups=1, size=16, own=3, dtype=torch.float64)
    arguments = without_padding(arguments)
    assert torch.autograd.gradcheck(prefix_attention, arguments, fast_mode=True)


def test_they_are_well_formed_operators():
    arguments = without_padding(inputs((9, 2), (2, 1), heads=2, groups=1, size=16, own=3))
    torch.library.opcheck(module._attention, arguments)
    frozen = [x.detach() for x in arguments]
    output, normaliser = module._attention(*frozen)
    d_output = torch.randn(output.shape, device=DEVICE)
    torch.library.opcheck(module._query_backward, (*frozen, output, normaliser, d_output))
    _, delta = module._query_backward(*frozen, output, normaliser, d_output)
    torch.library.opcheck(module._key_backward, (*frozen, normaliser, d_output, delta))
