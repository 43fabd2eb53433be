"""Attention in PyTorch: causal, and of suffixes that share their prefixes' keys and values.

Shapes: N rows, T tokens, H query heads, G key/value heads, E head size; D prefixes of P tokens, U
suffixes of S tokens, Q queries a suffix. The two forms of prefix attention take the same and give
the same: query [U, H, Q, E], own_key and own_value [U, G, S, E], and first [U] int64: query i of
suffix u sees all of its prefix and its own keys up to first[u] + i, in one softmax. -> [U, H, Q, E]
"""

import torch
from torch import Tensor
from torch.nn import functional

from fastflag.policy.shared_prefix import Prefixes, SuffixLayout


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each token attends to itself and those before it. query [N,H,T,E]; key, value [N,G,T,E]."""
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )


def by_prefix(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    first: Tensor,
    prefixes: Prefixes,
    layout: SuffixLayout,
) -> Tensor:
    """All queries of a prefix in one product with its keys, of which no copy is made. Scores and
    softmax in fp32, probabilities rounded to the values' dtype, as flash attention's. What else
    follows a prefix changes no bit of a suffix."""
    groups, queries = own_key.shape[1], query.shape[2]
    hidden = ~_visible(first, queries, own_key.shape[2])
    query = query.unflatten(1, (groups, -1)).flatten(2, 3).float() * query.shape[-1] ** -0.5
    own = (query @ own_key.float().transpose(-1, -2)).unflatten(2, (-1, queries))
    own = own.masked_fill(hidden[:, None, None], -torch.inf).flatten(2, 3)  # [U, G, HQ / G, S]
    attended = []
    split = (tensor.split(list(layout.counts)) for tensor in (query, own, own_value))
    for (key, value), some, scores, values in zip(prefixes.days, *split, strict=True):
        shared = _by_group(some) @ key.float().transpose(-1, -2)
        scores = torch.cat((_by_suffix(shared, some.shape), scores), dim=-1)
        weights = scores.softmax(-1).to(value.dtype)
        shared, alone = weights.split((key.shape[1], values.shape[2]), dim=-1)
        attended.append(_by_suffix(_by_group(shared) @ value, some.shape) + alone @ values)
    return torch.cat(attended).unflatten(2, (-1, queries)).flatten(1, 2)


def _by_group(x: Tensor) -> Tensor:
    """[n, G, R, X] -> [G, n R, X], with rows of zeros up to 4: in a batch of products, those of
    fewer rows alone are computed in another order (measured, CPU fp32, 1 and 2 threads)."""
    x = x.transpose(0, 1).flatten(1, 2)
    return functional.pad(x, (0, 0, 0, max(4 - x.shape[1], 0)))


def _by_suffix(x: Tensor, shape: torch.Size) -> Tensor:
    """[G, n R or more, X] -> [n, G, R, X], n and R as in `shape` [n, G, R, _]"""
    count, _, rows, _ = shape
    return x[:, : count * rows].unflatten(1, (count, rows)).transpose(0, 1)


def padded(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    first: Tensor,
    prefixes: Prefixes,
    layout: SuffixLayout,
) -> Tensor:
    """By PyTorch's attention, each suffix with a copy of its prefix: a launch for all of them."""
    count, _, queries, _ = query.shape
    rows = torch.arange(count, device=query.device, dtype=torch.int32)
    of_prefix = torch.searchsorted(layout.starts[1:], rows, right=True)
    keys, values = (side.index_select(0, of_prefix) for side in prefixes.block)
    places = torch.arange(keys.shape[2], device=query.device)
    shared = places < layout.prefix_lengths.index_select(0, of_prefix)[:, None]
    own = _visible(first, queries, own_key.shape[2])
    mask = torch.cat((shared[:, None].expand(-1, queries, -1), own), dim=-1)
    return functional.scaled_dot_product_attention(
        query,
        torch.cat((keys, own_key), dim=2),
        torch.cat((values, own_value), dim=2),
        attn_mask=mask[:, None],
        enable_gqa=query.shape[1] != own_key.shape[1],
    )


def _visible(first: Tensor, queries: int, tokens: int) -> Tensor:
    """Which of a suffix's own tokens each of its queries sees. [U] -> [U, Q, S] bool"""
    last = first[:, None] + torch.arange(queries, device=first.device)
    return torch.arange(tokens, device=first.device) <= last[..., None]
