"""Prefix attention by PyTorch's own operators, beside the kernel: providers of rivals/ops.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.measure.cases import Inputs
from fastflag.model import packed_attention
from fastflag.model.shared_prefix import Prefixes, SuffixLayout

Function = Callable[..., Any]


def by_sdpa(inputs: Inputs) -> Function:
    """Each suffix with a copy of its prefix for every query head, so that kernels without
    grouped-query attention can be taken too; the mask is made beforehand."""
    count, heads, queries, _ = inputs["query"].shape
    groups, longest = inputs["key"].shape[1:3]
    day = day_of_suffix(inputs)
    of_head = torch.arange(heads, device=day.device) // (heads // groups)
    rows = (day[:, None] * groups + of_head).flatten()
    shared = torch.arange(longest, device=day.device) < inputs["lengths"][day, None]
    last = inputs["first"][:, None] + torch.arange(queries, device=day.device)
    own = torch.arange(inputs["own_key"].shape[2], device=day.device) <= last[..., None]
    visible = torch.cat((shared[:, None].expand(-1, queries, -1), own), dim=-1)[:, None]

    def joined(shared: Tensor, own: Tensor) -> Tensor:
        copied = shared.flatten(0, 1).index_select(0, rows).unflatten(0, (count, heads))
        return torch.cat((copied, own.repeat_interleave(heads // groups, dim=1)), dim=2)

    def attend(query, key, value, own_key, own_value, **rest) -> Tensor:
        keys, values = joined(key, own_key), joined(value, own_value)
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=visible)

    return attend


def packed(inputs: Inputs) -> Function | None:
    """What a GPU takes without the kernel: PyTorch's flash attention, which a CPU has not."""
    query = inputs["query"]
    by_flash = packed_attention.takes(query.device, query.dtype, query.shape[-1])
    return packed_by_prefix(inputs) if query.is_cuda and by_flash else None


def packed_by_prefix(inputs: Inputs) -> Function:
    lengths, tokens = inputs["lengths"].tolist(), inputs["own_key"].shape[2]
    own = torch.full_like(inputs["first"], tokens, dtype=torch.int64)
    layout = SuffixLayout.build(inputs["starts"].diff().tolist(), lengths, own, tokens)

    def attend(query, key, value, own_key, own_value, first, **rest) -> Tensor:
        prefixes = Prefixes([(key, value)], lengths)
        return packed_attention.packed(query, own_key, own_value, first.long(), prefixes, layout)

    return attend


def day_of_suffix(inputs: Inputs) -> Tensor:
    """[U] int64"""
    counts = inputs["starts"].diff().long()
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
