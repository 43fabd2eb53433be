"""Each op's formula in fp64, of the arguments that model/ops.py gives it: the truth of a proof.

Plain on purpose, and apart from what it judges: kernels and their PyTorch twins share roundings.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastflag.model.shared_prefix import Prefixes, SuffixLayout

# The 16 levels of NF4 (QLoRA, arXiv 2305.14314, appendix E).
_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def nf4_dequantise(packed: Tensor, absmax: Tensor, shape: Sequence[int], _: Any) -> Tensor:
    """Numbers lie row by row, the high half of a byte first; 64 of them have one absmax."""
    count = math.prod(shape)
    nibbles = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[:count].long()
    levels = torch.tensor(_LEVELS, dtype=torch.float64, device=packed.device)
    return (levels[nibbles] * absmax.double().repeat_interleave(64)[:count]).view(*shape)


def nf4_linear(x: Tensor, packed: Tensor, absmax: Tensor, outputs: int, _: Any) -> Tensor:
    return x @ nf4_dequantise(packed, absmax, (outputs, x.shape[-1]), None).T


def lora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    _: Any,
) -> Tensor:
    base = x @ weight.T if absmax is None else nf4_linear(x, weight, absmax, len(b), None)
    return base + scale * (x @ a.T) @ b.T


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    return x + residual, rms_norm(x + residual, weight, epsilon)


def rotate(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Each pair of numbers half a head apart is turned by its angle."""

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    return turned(query), None if key is None else turned(key)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Some queries after others, whose scores are computed again in the backward pass: those of
    10,000 tokens would not be held."""
    groups, tokens = key.shape[1], query.shape[2]
    shared = query.unflatten(1, (groups, -1)) * query.shape[-1] ** -0.5
    place = torch.arange(tokens, device=query.device)

    def some(first: int) -> Tensor:
        rows = slice(first, first + _QUERIES)
        scores = torch.einsum("nghqe,ngke->nghqk", shared[..., rows, :], key)
        hidden = place > place[rows, None]
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("nghqk,ngke->nghqe", probabilities, value)

    parts = [checkpoint(some, first, use_reentrant=False) for first in range(0, tokens, _QUERIES)]
    return torch.cat(parts, 3).flatten(1, 2)


_QUERIES = 512


def prefix_attention(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    first: Tensor,
    prefixes: Prefixes,
    layout: SuffixLayout,
) -> Tensor:
    """Prefix by prefix, a softmax over all that a query sees."""
    starts, lengths = layout.starts.tolist(), layout.prefix_lengths.tolist()
    keys, values = prefixes.whole
    groups, share = keys.shape[1], query.shape[1] // keys.shape[1]
    place = torch.arange(own_key.shape[2], device=query.device)
    last = first[:, None] + torch.arange(query.shape[2], device=query.device)
    hidden = (place > last[..., None])[:, None, None]  # [U, 1, 1, Q, S]
    attended = []
    for number, length in enumerate(lengths):
        rows = slice(starts[number], starts[number + 1])
        q = query[rows].unflatten(1, (groups, share)) * query.shape[-1] ** -0.5
        key, value = (side[number, :, :length] for side in (keys, values))
        seen = torch.einsum("ughqe,gpe->ughqp", q, key)
        own = torch.einsum("ughqe,ugse->ughqs", q, own_key[rows])
        scores = torch.cat((seen, own.masked_fill(hidden[rows], -torch.inf)), -1).softmax(-1)
        parts = scores.split((length, own.shape[-1]), dim=-1)
        made = torch.einsum("ughqp,gpe->ughqe", parts[0], value)
        made = made + torch.einsum("ughqs,ugse->ughqe", parts[1], own_value[rows])
        attended.append(made.flatten(1, 2))
    return torch.cat(attended)


def action_terms(
    logits: Tensor,
    allowed: Tensor | None,
    action: Tensor,
    old: Tensor,
    advantage: Tensor,
    initial: Tensor,
    clip: float | None,
) -> tuple[Tensor, ...]:
    """(log-probability, entropy, ratio, surrogate, divergence); PPO's clipped objective
    (arXiv 1707.06347, eq. 7) with its sign turned."""
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    p = logits.exp()
    chosen = logits.gather(-1, action[:, None])[:, 0]
    ratio = (chosen - old).exp()
    bounded = ratio if clip is None else ratio.clamp(1 - clip, 1 + clip)
    surrogate = (
        -advantage * chosen if clip is None else -torch.min(advantage * ratio, advantage * bounded)
    )
    finite = torch.where(p > 0, logits, 0.0)
    gap = torch.where((p > 0) & initial.isfinite(), finite - initial, 0.0)
    return chosen, -(p * finite).sum(-1), ratio, surrogate, (p * gap).sum(-1)


EXACT: Mapping[str, Callable[..., Any]] = {
    "nf4_dequantise": nf4_dequantise,
    "nf4_linear": nf4_linear,
    "lora_linear": lora_linear,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rotate": rotate,
    "swiglu": swiglu,
    "causal_attention": causal_attention,
    "prefix_attention": prefix_attention,
    "action_terms": action_terms,
}
