"""Every op a layer needs, by one name. Triton or reference is chosen here, once, with the reason.

Shapes: N rows (days or prompts), T tokens, C width, H query heads, G key/value heads, E head size.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fastflag.kernels.rmsnorm import rms_norm_reference as rms_norm

__all__ = [
    "IMPLEMENTATIONS",
    "causal_attention",
    "masked_attention",
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
    "masked_attention": (
        "torch scaled_dot_product_attention on CUDA, products by group of heads on a CPU",
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


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """One softmax over the keys where mask is True. query [N,H,Q,E], key and value [N,G,K,E],
    mask [N,1,Q,K]; every query sees at least one key."""
    if not query.is_cuda:
        return _masked_attention_by_group(query, key, value, mask)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
    )


def _masked_attention_by_group(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Scores and softmax in fp32, probabilities rounded to the values' dtype, as flash attention's.

    On a CPU core in bf16, forward and backward of 128 suffixes of 16 tokens over 170 keys (9 heads,
    3 for keys) take 48 ms, and 92 by scaled_dot_product_attention; for one query each, 20 and 96.
    """
    groups = key.shape[1]
    queries = query.unflatten(1, (groups, -1)).flatten(2, 3).float() * query.shape[-1] ** -0.5
    scores = (queries @ key.float().transpose(-1, -2)).unflatten(2, (-1, query.shape[2]))
    weights = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).to(value.dtype)
    attended = weights.flatten(2, 3) @ value
    return attended.unflatten(2, (-1, query.shape[2])).flatten(1, 2)
