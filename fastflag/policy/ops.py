"""Every op a layer needs, by one name. Triton or reference is chosen here, once, with the reason.

Shapes: N rows (days or prompts), T tokens, C width, H query heads, G key/value heads, E head size;
D prefixes of P tokens, U suffixes of S tokens, Q queries a suffix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fastflag.kernels.rmsnorm import rms_norm_reference as rms_norm

__all__ = [
    "IMPLEMENTATIONS",
    "causal_attention",
    "prefix_attention",
    "rms_norm",
    "rotate",
    "swiglu",
]

# What `fastflag doctor` prints. No Triton kernel has run on a GPU yet, so every op is PyTorch's.
IMPLEMENTATIONS: dict[str, tuple[str, str]] = {
    "rms_norm": ("torch", "the Triton kernel has not run on a GPU yet"),
    "rotate": ("torch", "no fused kernel yet"),
    "swiglu": ("torch", "no fused kernel yet"),
    "causal_attention": ("torch scaled_dot_product_attention", "no fused kernel yet"),
    "prefix_attention": (
        "torch scaled_dot_product_attention on CUDA, products prefix by prefix on a CPU",
        "no fused kernel yet",
    ),
    "nf4": ("bitsandbytes dequantise + torch matmul", "no fused kernel yet"),
}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, eq. 34) in the half-split layout.

    x [N, heads, T, E]; cos and sin [N or 1, 1, T, E / 2].
    """
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    return functional.silu(gate) * up


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each token attends to itself and those before it. query [N,H,T,E]; key, value [N,G,T,E]."""
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )


def prefix_attention(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    visible: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    counts: Sequence[int],
) -> Tensor:
    """Each query attends to all of its prefix and to what it may see of its own suffix, in one
    softmax. -> [U, H, Q, E]

    query [U, H, Q, E]; own_key and own_value [U, G, S, E]; visible [U or 1, Q, S] bool; prefixes
    are D keys and values [G, P, E], shared by counts[d] suffixes each, which follow one another.
    """
    if query.is_cuda:
        return _prefix_attention_padded(query, own_key, own_value, visible, prefixes, counts)
    return _prefix_attention_by_prefix(query, own_key, own_value, visible, prefixes, counts)


def _prefix_attention_by_prefix(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    visible: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    counts: Sequence[int],
) -> Tensor:
    """All queries of a prefix in one product with its keys, of which no copy is made. Scores and
    softmax in fp32, probabilities rounded to the values' dtype, as flash attention's."""
    groups, queries = own_key.shape[1], query.shape[2]
    query = query.unflatten(1, (groups, -1)).flatten(2, 3).float() * query.shape[-1] ** -0.5
    own = (query @ own_key.float().transpose(-1, -2)).unflatten(2, (-1, queries))
    own = own.masked_fill(~visible[:, None, None], -torch.inf).flatten(2, 3)  # [U, G, HQ / G, S]
    attended = []
    split = (tensor.split(list(counts)) for tensor in (query, own, own_value))
    for (key, value), some, scores, values in zip(prefixes, *split, strict=True):
        shared = _by_group(some) @ key.float().transpose(-1, -2)
        scores = torch.cat((_by_suffix(shared, len(some)), scores), dim=-1)
        weights = scores.softmax(-1).to(value.dtype)
        shared, alone = weights.split((key.shape[1], values.shape[2]), dim=-1)
        attended.append(_by_suffix(_by_group(shared) @ value, len(some)) + alone @ values)
    return torch.cat(attended).unflatten(2, (-1, queries)).flatten(1, 2)


def _by_group(x: Tensor) -> Tensor:
    """[n, G, R, X] -> [G, n R, X]"""
    return x.transpose(0, 1).flatten(1, 2)


def _by_suffix(x: Tensor, count: int) -> Tensor:
    """[G, n R, X] -> [n, G, R, X]"""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


def _prefix_attention_padded(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    visible: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    counts: Sequence[int],
) -> Tensor:
    """By PyTorch's attention, each suffix with a copy of its prefix: a launch for all of them."""
    of_prefix = torch.arange(len(counts), device=query.device).repeat_interleave(
        torch.tensor(counts, device=query.device)
    )
    keys, values = (
        pad_sequence([pair[side].transpose(0, 1) for pair in prefixes], batch_first=True)
        .transpose(1, 2)
        .index_select(0, of_prefix)
        for side in (0, 1)
    )
    lengths = torch.tensor([key.shape[1] for key, _ in prefixes], device=query.device)[of_prefix]
    shared = torch.arange(keys.shape[2], device=query.device) < lengths[:, None]
    count, _, queries, _ = query.shape
    mask = torch.cat(
        (shared[:, None].expand(-1, queries, -1), visible.expand(count, -1, -1)), dim=-1
    )
    return functional.scaled_dot_product_attention(
        query,
        torch.cat((keys, own_key), dim=2),
        torch.cat((values, own_value), dim=2),
        attn_mask=mask[:, None],
        enable_gqa=query.shape[1] != own_key.shape[1],
    )
