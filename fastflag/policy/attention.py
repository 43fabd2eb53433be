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


def by_tiles(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    first: Tensor,
    prefixes: Prefixes,
    layout: SuffixLayout,
) -> Tensor:
    """By products of tiles, each of some suffixes of one prefix. Scores and softmax in fp32,
    probabilities rounded to the values' dtype, as flash attention's. All products of a padded
    prefix length are of one shape, so what else is there changes no bit of a suffix."""
    hidden = ~_visible(first, query.shape[2], own_key.shape[2])
    attended = []
    for tiles in layout.tiles:
        some = [side.index_select(0, tiles.rows) for side in (query, own_key, own_value, hidden)]
        key, value = prefixes.of_size(tiles.days, tiles.size)
        shared = key.index_select(0, tiles.day), value.index_select(0, tiles.day)
        attended.append(_tiled(*some, *shared, tiles.beyond))
    return torch.cat(attended).index_select(0, layout.untiled)


def _tiled(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    beyond: Tensor,
) -> Tensor:
    """Of B tiles of n suffixes: query [B n, H, Q, E], own_key and own_value [B n, G, S, E], hidden
    [B n, Q, S] where a suffix's own keys are not seen; key and value [B, G, P, E] of the prefixes,
    beyond [B, P] where these have ended. -> [B n, H, Q, E]"""
    tiles, groups = key.shape[:2]
    each = query.unflatten(0, (tiles, -1)).unflatten(2, (groups, -1)).transpose(1, 2)
    shape = each.shape  # [B, G, n, H / G, Q, E]
    each = each.flatten(3, 4).float() * query.shape[-1] ** -0.5
    own_key, own_value = (
        side.unflatten(0, (tiles, -1)).transpose(1, 2) for side in (own_key, own_value)
    )
    shared = each.flatten(2, 3) @ key.float().transpose(-1, -2)
    own = each @ own_key.float().transpose(-1, -2)
    scores = torch.cat((shared.view(*shape[:-1], -1), own.view(*shape[:-1], -1)), dim=-1)
    masked = torch.cat(
        (
            beyond[:, None, None].expand(-1, shape[2], shape[4], -1),
            hidden.unflatten(0, (tiles, -1)),
        ),
        dim=-1,
    )
    scores = scores.masked_fill(masked[:, None, :, None], -torch.inf)
    weights = scores.softmax(-1).to(value.dtype)
    shared, own = weights.split((key.shape[2], own_key.shape[3]), dim=-1)
    attended = (shared.flatten(2, 4) @ value).view(*each.shape) + own.flatten(3, 4) @ own_value
    return attended.view(shape).transpose(1, 2).flatten(2, 3).flatten(0, 1)


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
