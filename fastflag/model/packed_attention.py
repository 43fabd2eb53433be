"""Attention of suffixes on shared prefixes in two parts, merged: a prefix's keys are never copied.

A query sees all of its prefix and its suffix's own tokens so far, in one softmax. The softmax of
each part comes with the log of its sum of exponentials, lse; then

    lse = log(exp lse_prefix + exp lse_own)
    out = exp(lse_prefix - lse) out_prefix + exp(lse_own - lse) out_own

and the backward pass of a part, given the merged out and lse, is that part of the whole's: the
weights exp(score - lse) are the whole softmax's, and a score's gradient
weight (dout . value - dout . out) reads nothing of the other part.

The prefix part takes all queries of a prefix as one sequence against its keys, by PyTorch's flash
attention of packed sequences on CUDA: no mask, keys read once for all suffixes, their gradients
added up in fp32 inside the kernel. The own part is a few tokens a suffix: products and a softmax
in fp32. That kernel's backward pass, as it is reported, has 128 places of scratch for a sequence
however short, 1 GB for 500 suffixes of an 8B model.

Shapes: D prefixes of P tokens, U suffixes of S tokens, Q queries a suffix, H query heads, G
key/value heads, E head size. Packed: T = U Q queries, K = D P keys.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflag.model.shared_prefix import Prefixes, SuffixLayout

# Heads of PyTorch's flash attention: of up to so many numbers, in whole vectors of 16 bytes.
_LARGEST_HEAD, _HEAD_MULTIPLE = 256, 8


class Sequences(NamedTuple):
    """N sequences: the queries of each see all keys of the same one. Every query has keys; keys
    may have no query, as the padding of a prefix has none."""

    queries: Tensor  # [N + 1] int32, where each begins among the packed queries
    keys: Tensor  # [N + 1] int32, likewise
    most_queries: int  # of a sequence, at most
    most_keys: int

    @staticmethod
    def of(layout: SuffixLayout, queries: int, size: int) -> "Sequences":
        """Each prefix in `size` places, with `queries` of each of its suffixes, and between them
        sequences without a query: the places that it leaves empty. Never waits for the device."""
        starts, lengths = layout.starts, layout.prefix_lengths
        places = size * torch.arange(len(starts), device=starts.device, dtype=torch.int32)
        ends = torch.cat((places[:-1] + lengths, places[-1:]))
        suffixes = max(layout.counts, default=len(layout.last))
        return Sequences(
            (queries * starts).repeat_interleave(2)[1:],
            torch.stack((places, ends), 1).flatten()[:-1],
            # For a single query PyTorch's takes a short cut that wants one a sequence.
            max(queries * suffixes, 2),
            size,
        )


class Attended(NamedTuple):
    """What a part's softmax gives, and what its backward pass wants back."""

    out: Tensor  # [T, H, E]
    lse: Tensor  # [H, T], fp32 or wider
    state: tuple[Tensor, ...] = ()


def takes(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether PyTorch's flash attention takes heads of this size there; a CPU's stand-in takes all.
    Of its other kernels those that are fast take no query heads that share keys."""
    if device.type != "cuda":
        return True
    return (
        dtype in (torch.bfloat16, torch.float16)
        and head_size <= _LARGEST_HEAD
        and head_size % _HEAD_MULTIPLE == 0
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    )


def packed(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    first: Tensor,
    prefixes: Prefixes,
    layout: SuffixLayout,
) -> Tensor:
    """Prefix attention as model/attention.py has it; every prefix has a token.

    query [U, H, Q, E], own_key and own_value [U, G, S, E], first [U] -> [U, H, Q, E]
    """
    suffixes, _, queries, _ = query.shape
    key, value = prefixes.whole
    size = key.shape[2]
    sequences, unread = layout.once(
        ("prefixes", queries, size),
        lambda: (Sequences.of(layout, queries, size), _unread(layout, size)),
    )
    hidden = _hidden(first, queries, own_key.shape[2])
    flat = [side.transpose(1, 2).flatten(0, 1) for side in (query, key, value)]
    out = _Merged.apply(*flat, own_key, own_value, hidden, sequences, unread)
    return out.unflatten(0, (suffixes, queries)).transpose(1, 2)


def _unread(layout: SuffixLayout, size: int) -> Tensor:
    """[D size, 1, 1] bool: which places of the packed keys no query sees."""
    seen = layout.prefix_lengths * (layout.starts.diff() > 0)
    return (torch.arange(size, device=seen.device) >= seen[:, None]).view(-1, 1, 1)


def _hidden(first: Tensor, queries: int, tokens: int) -> Tensor:
    """Which of its suffix's own tokens come after a query, [U, 1, 1, Q, S] bool."""
    places = torch.arange(max(queries, tokens), device=first.device)
    last = first[:, None] + places[:queries]
    return (places[:tokens] > last[..., None])[:, None, None]


class _Merged(torch.autograd.Function):
    """query [T, H, E], key and value [K, G, E] of the prefixes, own_key and own_value [U, G, S, E],
    hidden [U, 1, 1, Q, S], unread [K, 1, 1] -> [T, H, E]"""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        hidden: Tensor,
        sequences: Sequences,
        unread: Tensor,
    ) -> Tensor:
        of_prefix = _attend(query, key, value, sequences)
        of_own = _Own(query, own_key, own_value, hidden).attend()
        out, lse = _merged(of_prefix, of_own)
        out = out.to(query.dtype)
        kept = query, key, value, own_key, own_value, hidden, unread, out, lse
        ctx.save_for_backward(*kept, *of_prefix.state)
        ctx.sequences = sequences
        return out

    @staticmethod
    # pyrefly: ignore[bad-override] (torch's own has any number of gradients; there is one)
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, own_key, own_value, hidden, unread, out, lse, *state = ctx.saved_tensors
        whole = Attended(out, lse, tuple(state))
        of_query, of_key, of_value = _differentiate(
            gradient.contiguous(), query, key, value, whole, ctx.sequences
        )
        # Of keys that no query sees a kernel need not write anything.
        for side in (of_key, of_value):
            side.masked_fill_(unread, 0.0)
        more, *of_own = _Own(query, own_key, own_value, hidden).differentiate(gradient, whole)
        return (of_query + more).to(query.dtype), of_key, of_value, *of_own, None, None, None


def _merged(one: Attended, other: Attended) -> tuple[Tensor, Tensor]:
    """out [T, H, E] and lse [H, T], in the wider of the parts' dtypes."""
    share = (one.lse - other.lse).sigmoid().T[..., None]
    out = torch.lerp(other.out, one.out.to(other.out.dtype), share)
    return out, torch.logaddexp(one.lse, other.lse)


class _Own:
    """A suffix's queries and its own keys, in fp32 (or fp64): query i sees keys up to first + i.

    Query heads that share keys are queries of one head, so that keys need no copies: a batch of
    U G products, of r Q queries each, r = H / G. Few launches count here, not the arithmetic.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor):
        """query [U Q, H, E]; key, value [U, G, S, E]; hidden [U, 1, 1, Q, S] bool"""
        self._dtype, self._hidden = key.dtype, hidden
        self._wide = torch.promote_types(query.dtype, torch.float32)
        suffixes, groups, _, size = key.shape
        self._scale = size**-0.5
        self._split = suffixes, hidden.shape[3], groups, -1, size  # U, Q, G, r, E
        self._query = self._by_group(query)
        self._key, self._value = (self._widened(side).flatten(0, 1) for side in (key, value))

    def attend(self) -> Attended:
        scores = self._scores()
        log_weight = scores.log_softmax(-1)
        # A suffix's first token is seen by all of its queries.
        lse = scores[..., 0] - log_weight[..., 0]  # [U, G, r, Q]
        out = log_weight.exp().flatten(0, 1).flatten(1, 2) @ self._value
        return Attended(self._by_query(out), lse.permute(1, 2, 0, 3).flatten(0, 1).flatten(1))

    def differentiate(self, gradient: Tensor, whole: Attended) -> tuple[Tensor, Tensor, Tensor]:
        """gradient [U Q, H, E] -> the query's in the wide dtype, the key's and the value's"""
        gradient, out = self._by_group(gradient), self._by_group(whole.out)
        common = (gradient * out).sum(-1, keepdim=True)  # [U G, r Q, 1]
        scores = self._scores()
        suffixes, groups, shared, queries, _ = scores.shape
        lse = whole.lse.view(groups, shared, suffixes, queries).permute(2, 0, 1, 3)
        weight = (scores - lse[..., None]).exp_().flatten(0, 1).flatten(1, 2)  # [U G, r Q, S]
        of_score = torch.baddbmm(common, gradient, self._value.mT, beta=-1).mul_(weight)
        of_query = self._times(of_score, self._key)
        of_key = self._times(of_score.mT, self._query)
        own = (side.to(self._dtype) for side in (of_key, weight.mT @ gradient))
        of_key, of_value = (side.unflatten(0, (suffixes, groups)) for side in own)
        return self._by_query(of_query), of_key, of_value

    def _scores(self) -> Tensor:
        """[U, G, r, Q, S]"""
        suffixes, queries, groups, _, _ = self._split
        scores = self._times(self._query, self._key.mT)
        scores = scores.unflatten(1, (-1, queries)).unflatten(0, (suffixes, groups))
        return scores.masked_fill_(self._hidden, -torch.inf)

    def _times(self, one: Tensor, other: Tensor) -> Tensor:
        """Their products by E^-1/2, in one launch."""
        return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=self._scale)

    def _by_group(self, packed: Tensor) -> Tensor:
        """[U Q, H, E] -> [U G, r Q, E]"""
        split = packed.view(self._split).permute(0, 2, 3, 1, 4)
        return self._widened(split).flatten(0, 1).flatten(1, 2)

    def _by_query(self, grouped: Tensor) -> Tensor:
        """[U G, r Q, E] -> [U Q, H, E]"""
        suffixes, queries, groups, _, _ = self._split
        split = grouped.unflatten(1, (-1, queries)).unflatten(0, (suffixes, groups))
        return split.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)

    def _widened(self, some: Tensor) -> Tensor:
        """In the wide dtype and in order, by one copy."""
        return some.to(self._wide, memory_format=torch.contiguous_format)


def _attend(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences) -> Attended:
    """A softmax over the keys of each query's sequence. query [T, H, E]; key, value [K, G, E]."""
    if not query.is_cuda:
        return _attend_densely(query, key, value, sequences)
    out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, *sequences, 0.0, False, False
    )
    return Attended(out, lse, tuple(state))


def _differentiate(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Attended,
    sequences: Sequences,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; of keys without a query they are undefined."""
    if not query.is_cuda:
        return _differentiate_densely(gradient, query, key, value, attended, sequences)
    out, lse, state = attended
    return torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, out, lse, *sequences, 0.0, False, *state
    )


def _attend_densely(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences) -> Attended:
    """The same in plain PyTorch, every query with every key: what the tests read on a CPU."""
    scores, (_, value) = _dense_scores(query, key, value, sequences)
    return Attended(
        (scores.softmax(-1) @ value).transpose(0, 1).to(query.dtype), scores.logsumexp(-1)
    )


def _differentiate_densely(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Attended,
    sequences: Sequences,
) -> tuple[Tensor, Tensor, Tensor]:
    scores, (wide_key, wide_value) = _dense_scores(query, key, value, sequences)
    weight = (scores - attended.lse[..., None]).exp()  # [H, T, K]
    by_head = gradient.transpose(0, 1).to(weight.dtype)
    common = (gradient * attended.out).sum(-1).T[..., None]
    of_score = weight * (by_head @ wide_value.mT - common) * query.shape[-1] ** -0.5
    of_query = (of_score @ wide_key).transpose(0, 1)
    of_key, of_value = (
        side.unflatten(0, (key.shape[1], -1)).sum(1).transpose(0, 1)
        for side in (
            of_score.mT @ query.transpose(0, 1).to(weight.dtype),
            weight.mT @ by_head,
        )
    )
    # What belongs to no query, a kernel leaves as memory was.
    lonely = ~weight.any(0).any(0)[:, None, None]
    of_key, of_value = (side.masked_fill(lonely, torch.nan) for side in (of_key, of_value))
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)


def _dense_scores(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """[H, T, K], -inf where a key is of another sequence; key and value as [H, K, E]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    shared = query.shape[1] // key.shape[1]
    by_head = [side.to(wide).transpose(0, 1).repeat_interleave(shared, 0) for side in (key, value)]
    sides = zip((query, key), sequences[:2], strict=True)
    of_query, of_key = (
        torch.bucketize(_places(len(side), starts), starts[1:], right=True)
        for side, starts in sides
    )
    scores = query.transpose(0, 1).to(wide) @ by_head[0].mT * query.shape[-1] ** -0.5
    hidden = of_query[:, None] != of_key
    return scores.masked_fill(hidden, -torch.inf), (by_head[0], by_head[1])


def _places(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=like.dtype)
