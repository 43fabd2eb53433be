"""Attention by the packages flash-attn (FlashAttention-2, arXiv 2307.08691), 3 and 4: more
implementations that a proof may take. None has run on a GPU here.

PyTorch has a registry for 3 and 4 (torch.nn.attention.activate_flash_attention_impl). It changes
every call of the process's, packed attention's too, so that two could not be timed by turns nor one
op alone be given one: here their own functions are called.

Shapes as in attention.py. In prefix attention each suffix has a copy of its prefix before its own
keys, one suffix after another without padding; places beyond the last are not read. Nothing waits
for the device.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastflag.model.shared_prefix import Prefixes, SuffixLayout

_CAUSAL = {
    "flash-attn": ("flash_attn", "flash_attn_func"),
    "flash-attn-3": ("flash_attn_interface", "flash_attn_func"),
    "flash-attn-4": ("flash_attn.cute", "flash_attn_func"),
}


@cache
def symbol(module: str, name: str) -> Callable[..., Any] | None:
    """A package's function, None where it is not there. That a package of its name is installed is
    not enough: flash-attn 4 has one of 2's name without its functions."""
    try:
        return getattr(import_module(module), name)
    except Exception:  # without a GPU, or of another build of torch, it raises anything
        return None


def causal_forms() -> dict[str, Callable[..., Tensor]]:
    """Causal attention by each of the packages that are there."""
    found = {name: symbol(*place) for name, place in _CAUSAL.items()}
    return {name: partial(_causal, one) for name, one in found.items() if one is not None}


def prefix_forms() -> dict[str, Callable[..., Tensor]]:
    """Prefix attention, likewise."""
    attend = symbol("flash_attn", "flash_attn_varlen_func")
    return {} if attend is None else {"flash-attn": partial(_prefix, attend)}


def _causal(attend: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Tokens come before heads, and query heads share keys, as in attention.py. Version 4 gives the
    log-sum-exps too, and 3 did."""
    sides = (side.transpose(1, 2) for side in (query, key, value))
    # Their backward passes add with atomics otherwise.
    made = attend(*sides, causal=True, deterministic=True)
    return (made if isinstance(made, Tensor) else made[0]).transpose(1, 2)


def _prefix(
    attend: Callable[..., Any],
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    first: Tensor,
    prefixes: Prefixes,
    layout: SuffixLayout,
) -> Tensor:
    """Its causal mask is that of queries at the end of their keys, which is the one wanted: keys of
    a suffix end where its last query is."""
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
