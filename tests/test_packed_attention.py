"""Prefix attention in two merged parts, as a GPU takes it. Its flash attention has a stand-in on a
CPU, which is what computes here; the calls of the real one are checked by its fake."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import relative
from torch._subclasses.fake_tensor import FakeTensorMode

from fastflag.model import attention, packed_attention
from fastflag.model.packed_attention import Sequences, packed
from fastflag.model.shared_prefix import Prefixes, SuffixLayout


def reference(query, own_key, own_value, first, prefixes, lengths, counts):
    """A suffix at a time, by a softmax over the keys that each query sees, in the inputs' dtype."""
    shared = query.shape[1] // own_key.shape[1]
    of_prefix = [day for day, n in enumerate(counts) for _ in range(n)]
    rows = []
    for u, day in enumerate(of_prefix):
        key, value = (
            torch.cat((side[day, :, : lengths[day]], own[u]), 1).repeat_interleave(shared, 0)
            for side, own in zip(prefixes, (own_key, own_value), strict=True)
        )
        last = lengths[day] + first[u] + torch.arange(query.shape[2])
        hidden = torch.arange(key.shape[1]) > last[:, None]
        scores = query[u] @ key.mT / math.sqrt(query.shape[-1])
        rows.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value)
    return torch.stack(rows)


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(1, 21), min_size=1, max_size=4))
    counts = [draw(st.integers(0, 4)) for _ in lengths]
    counts[draw(st.integers(0, len(counts) - 1))] += 1
    tokens = draw(st.integers(1, 6))
    queries = draw(st.integers(1, tokens))
    groups, shared = draw(st.sampled_from([(1, 1), (2, 1), (2, 3), (3, 3)]))
    spare = draw(st.integers(0, 5))  # places that no prefix fills
    return lengths, counts, tokens, queries, groups, shared, spare, draw(st.integers(0, 2**31))


def made(case, dtype):
    lengths, counts, tokens, queries, groups, shared, spare, seed = case
    generator, suffixes, size = torch.Generator().manual_seed(seed), sum(counts), 8

    def random(*shape):
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return numbers.to(dtype).requires_grad_()

    query = random(suffixes, groups * shared, queries, size)
    own = random(suffixes, groups, tokens, size), random(suffixes, groups, tokens, size)
    places = max(lengths) + spare
    prefixes = [random(len(lengths), groups, places, size) for _ in range(2)]
    first = torch.randint(0, tokens - queries + 1, (suffixes,), generator=generator)
    layout = SuffixLayout.build(counts, lengths, torch.full((suffixes,), tokens), tokens)
    return [query, *own, *prefixes], first, layout


@given(cases(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_shapes_give_the_softmax_over_both_parts_and_its_gradients(case, host_counts):
    """In fp64: ragged prefixes, some without a suffix, shared heads, queries that begin anywhere.
    A graph's layout has no counts on the host."""
    lengths, counts = case[:2]
    leaves, first, layout = made(case, torch.float64)
    query, own_key, own_value, *prefixes = leaves
    layout = layout if host_counts else replace(layout, counts=())
    ours = packed(query, own_key, own_value, first, Prefixes([tuple(prefixes)], lengths), layout)
    right = reference(query, own_key, own_value, first, prefixes, lengths, counts)
    weight = torch.randn(query.shape, generator=torch.Generator().manual_seed(0)).double()
    slopes, expected = (
        torch.autograd.grad((some * weight).sum(), leaves, materialize_grads=True)
        for some in (ours, right)
    )
    assert relative(ours, right) < 1e-10
    for slope, exact in zip(slopes, expected, strict=True):
        assert (slope - exact).abs().max() <= 1e-10 * max(exact.abs().max(), 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_exact_as_pytorchs_own(dtype):
    """Values and gradients against fp64 of the same rounded inputs, beside attention with a mask
    over copies. A part's result is rounded before it is merged: once more than there."""
    case = ([21, 5, 13], [6, 0, 9], 8, 8, 3, 3, 3, 0)
    errors = {}
    for form in (packed, attention.padded):
        leaves, first, layout = made(case, dtype)
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        attended = form(*leaves[:3], first, Prefixes([tuple(leaves[3:])], case[0]), layout)
        right = reference(*wide[:3], first, wide[3:], *case[:2])
        weight = torch.randn(right.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = attended, *torch.autograd.grad((attended * weight).sum(), leaves)
        exact = right, *torch.autograd.grad((right * weight.double()).sum(), wide)
        errors[form] = [relative(*pair) for pair in zip(found, exact, strict=True)]
    one_rounding = torch.finfo(dtype).eps / 2
    for ours, theirs in zip(*errors.values(), strict=True):
        assert ours <= theirs + one_rounding


def test_sequences_are_prefixes_and_the_places_they_leave_empty():
    layout = SuffixLayout.build([2, 0, 3], [5, 8, 1], torch.full((5,), 4), 4)
    sequences = Sequences.of(layout, 4, 8)
    assert sequences.queries.tolist() == [0, 8, 8, 8, 8, 20, 20]
    assert sequences.keys.tolist() == [0, 5, 8, 16, 16, 17, 24]
    assert (sequences.most_queries, sequences.most_keys) == (12, 8)
    assert Sequences.of(replace(layout, counts=()), 4, 8).most_queries == 20
    unread = packed_attention._unread(layout, 8).flatten()
    assert (~unread).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 16]


def test_pytorchs_flash_attention_takes_what_it_is_given():
    """By its fakes, which check names, shapes and order; nothing is computed."""
    with FakeTensorMode(), torch.device("cuda"):
        query = torch.empty(20, 6, 8, dtype=torch.bfloat16)
        key, value = (torch.empty(48, 2, 8, dtype=torch.bfloat16) for _ in range(2))
        starts = [torch.empty(7, dtype=torch.int32) for _ in range(2)]
        sequences = Sequences(*starts, 12, 16)
        attended = packed_attention._attend(query, key, value, sequences)
        slopes = packed_attention._differentiate(query, query, key, value, attended, sequences)
        pairs = [(attended.out, query), *zip(slopes, (query, key, value), strict=True)]
    assert all(made.shape == like.shape and made.dtype == like.dtype for made, like in pairs)
    assert (attended.lse.shape, attended.lse.dtype) == ((6, 20), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "built", "taken"),
    [
        (torch.bfloat16, 64, (8, 0), True, True),
        (torch.float16, 256, (12, 0), True, True),
        (torch.float32, 64, (9, 0), True, False),
        (torch.bfloat16, 64, (7, 5), True, False),
        (torch.bfloat16, 60, (9, 0), True, False),
        (torch.bfloat16, 264, (9, 0), True, False),
        (torch.bfloat16, 64, (9, 0), False, False),
    ],
)
def test_what_flash_attention_does_not_take_has_copies(
    dtype, size, capability, built, taken, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(packed_attention, "packed", lambda *_: "packed")
    monkeypatch.setattr(attention, "padded", lambda *_: "padded")
    with FakeTensorMode():
        query = torch.empty(1, 2, 3, size, dtype=dtype, device="cuda")
    assert attention.on_cuda(query) == ("packed" if taken else "padded")
