"""Attention in PyTorch: causal, and of suffixes that share their prefixes' keys and values.

| op of model/ops.py | on a CPU | on CUDA | with Triton (kernels/)          |
|--------------------|----------|---------|---------------------------------|
| causal_attention   | causal   | causal  | none: PyTorch's has a kernel    |
| prefix_attention   | by_tiles | on_cuda | prefix_attention.py, and a twin |

On CUDA that is packed_attention.py, where PyTorch's flash attention takes the tensors (16 bits,
sm_80 and newer), else `padded`.

The truth for all of prefix attention is a softmax token by token in fp64, values and gradients: in
tests/test_llama.py for PyTorch's forms, in tests/test_kernels_prefix_attention.py for the
kernel, whose error may be no larger than its twin's. Whole forwards, causal attention in them, are
compared with transformers' of each prompt (tests/test_llama.py).

Shapes: N rows, T tokens, H query heads, G key/value heads, E head size; D prefixes of P tokens, U
suffixes of S tokens, Q queries a suffix. All forms of prefix attention give the same: query
[U, H, Q, E], own_key and own_value [U, G, S, E], and first [U] int64: query i of suffix u sees all
of its prefix and its own keys up to first[u] + i, in one softmax. -> [U, H, Q, E]
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastflag.model import packed_attention
from fastflag.model.shared_prefix import KEY_MULTIPLE, Prefixes, SuffixLayout, padded_up


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each token attends to itself and those before it. query [N,H,T,E]; key, value [N,G,T,E]."""
    if not packed_attention.takes(query.device, query.dtype, query.shape[-1]):
        key, value = _copied(query, key), _copied(query, value)
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
    """By PyTorch's attention over tiles, each of some suffixes of one prefix. A tile's queries are
    given the own keys of all its suffixes; the mask hides those of others. What is computed for a
    padded prefix length is of one shape a tile, so what else is there changes no bit of one."""
    visible = padded_up(_visible(first, query.shape[2], own_key.shape[2]), 2, KEY_MULTIPLE)
    own_key, own_value = (padded_up(side, 2, KEY_MULTIPLE) for side in (own_key, own_value))
    attended = []
    for tiles in layout.tiles:
        some = [side.index_select(0, tiles.rows) for side in (query, own_key, own_value, visible)]
        shared = [side.index_select(0, tiles.prefix) for side in prefixes.of_size(tiles.size)]
        attended.append(_tiled(*some, *shared, there=tiles.there))
    return torch.cat(attended).index_select(0, layout.untiled)


def _tiled(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    visible: Tensor,
    key: Tensor,
    value: Tensor,
    there: Tensor,
) -> Tensor:
    """Of B tiles of n suffixes: query [B n, H, Q, E], own_key and own_value [B n, G, S, E], visible
    [B n, Q, S] of these; key and value [B, G, P, E] of the prefixes, there [B, P] of these.
    -> [B n, H, Q, E]. Query heads that share keys are queries of one head: keys need no copies."""
    tiles, groups = key.shape[:2]
    own_key, own_value, visible = (
        side.unflatten(0, (tiles, -1)) for side in (own_key, own_value, visible)
    )
    each = query.unflatten(0, (tiles, -1)).unflatten(2, (groups, -1)).transpose(1, 2)
    _, _, count, shared, queries, _ = each.shape  # [B, G, n, H / G, Q, E]
    keys, values = (
        torch.cat((side, own.transpose(1, 2).flatten(2, 3)), dim=2)
        for side, own in ((key, own_key), (value, own_value))
    )
    same = torch.eye(count, dtype=torch.bool, device=query.device)
    own = visible[:, :, :, None] & same[:, None, :, None]  # [B, n, Q, n, S]
    seen = torch.cat((there[:, None, None].expand(-1, count, queries, -1), own.flatten(3)), dim=-1)
    mask = seen[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 3)
    attended = functional.scaled_dot_product_attention(
        each.flatten(2, 4), keys, values, attn_mask=mask[:, None]
    )
    return attended.view(each.shape).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def on_cuda(query: Tensor, *arguments: Any) -> Tensor:
    """By the form that PyTorch has a fast kernel for."""
    taken = packed_attention.takes(query.device, query.dtype, query.shape[-1])
    return (packed_attention.packed if taken else padded)(query, *arguments)


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
    keys, values = (side.index_select(0, of_prefix) for side in prefixes.whole)
    places = torch.arange(keys.shape[2], device=query.device)
    shared = places < layout.prefix_lengths.index_select(0, of_prefix)[:, None]
    own = _visible(first, queries, own_key.shape[2])
    mask = torch.cat((shared[:, None].expand(-1, queries, -1), own), dim=-1)
    sides = (torch.cat(parts, dim=2) for parts in ((keys, own_key), (values, own_value)))
    key, value = (_copied(query, side) for side in sides)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None])


def _copied(query: Tensor, side: Tensor) -> Tensor:
    """Keys or values [N, G, K, E] for each query head, [N, H, K, E]. The kernel of PyTorch's that
    takes fp32 and masks takes no shared heads; what is left of them computes score by score."""
    shared = query.shape[1] // side.shape[1]
    return side if shared == 1 else side.repeat_interleave(shared, 1)


def _visible(first: Tensor, queries: int, tokens: int) -> Tensor:
    """Which of a suffix's own tokens each of its queries sees. [U] -> [U, Q, S] bool"""
    last = first[:, None] + torch.arange(queries, device=first.device)
    return torch.arange(tokens, device=first.device) <= last[..., None]
