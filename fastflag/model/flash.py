"""Prefix attention by the package flash-attn (FlashAttention-2, arXiv 2307.08691): one more
implementation that a proof may take. It has not run on a GPU here.

Shapes as in attention.py. Each suffix has a copy of its prefix before its own keys, one suffix
after another without padding; places beyond the last are not read. Nothing waits for the device.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastflag.model.shared_prefix import Prefixes, SuffixLayout


@cache
def varlen() -> Callable[..., Any] | None:
    """flash-attn's function, None where it is not there. That a package of its name is installed
    is not enough: flash-attn 4 has one without this function."""
    try:
        return import_module("flash_attn").flash_attn_varlen_func
    except Exception:  # without a GPU, or of another build of torch, it raises anything
        return None


def prefix_attention(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    first: Tensor,
    prefixes: Prefixes,
    layout: SuffixLayout,
) -> Tensor:
    """Its causal mask is that of queries at the end of their keys, which is the one wanted: keys of
    a suffix end where its last query is."""
    attend = varlen()
    assert attend is not None
    count, _, queries, _ = query.shape
    keys, values = prefixes.whole
    longest, own = keys.shape[2], own_key.shape[2]
    device = query.device
    suffix = torch.arange(count, device=device)
    of_prefix = torch.searchsorted(layout.starts[1:], suffix.int(), right=True)
    lengths = layout.prefix_lengths.index_select(0, of_prefix).long()
    ends = (lengths + first + queries).cumsum(0)
    starts = torch.cat((ends.new_zeros(1), ends))
    place = torch.arange(count * (longest + own), device=device)
    of = torch.searchsorted(ends, place, right=True).clamp_max(count - 1)
    offset = place - starts[of]
    shared = offset < lengths[of]
    in_prefix = of_prefix[of] * longest + offset
    in_own = (offset - lengths[of]).clamp(0, own - 1) + of * own + len(keys) * longest
    rows = torch.where(shared, in_prefix, in_own)

    def packed(shared: Tensor, own: Tensor) -> Tensor:
        """[count (longest + own), G, E]"""
        by_token = [side.transpose(1, 2).flatten(0, 1) for side in (shared, own)]
        return torch.cat(by_token).index_select(0, rows)

    made = attend(
        query.transpose(1, 2).flatten(0, 1),
        packed(keys, own_key),
        packed(values, own_value),
        torch.arange(0, (count + 1) * queries, queries, device=device, dtype=torch.int32),
        starts.int(),
        queries,
        longest + own,
        causal=True,
        deterministic=True,  # its backward adds with atomics otherwise
    )
    return made.unflatten(0, (count, queries)).transpose(1, 2)
