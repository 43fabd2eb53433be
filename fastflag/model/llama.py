"""The one forward of Llama-like models, over prompts that share prefixes.

A prompt is a prefix (one a day) and a suffix (the account). Attention is causal, so a prefix never
sees a suffix: it is computed once, and each suffix attends to its prefix's keys and values and to
itself, its positions going on where the prefix ends. One softmax spans both.

The residual stream is fp32, whatever the arithmetic: norms read it in fp32 and round once for the
products, whose results are added in fp32. On SmolLM2 the stream has a norm of 42 where 3.8 tells
prompts apart: rounded to bf16 at every addition, it lost a third of the gradient's exactness.

Shapes: D prefixes, P prefix tokens, U prompts, S suffix tokens, C width, H query heads, G key/value
heads, E head size. Both batches are padded on the right; attention is causal, so no token sees it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastflag.model import joined, ops
from fastflag.model.arithmetic import activations_dtype
from fastflag.model.shared_prefix import Pieces, Prefixes, SuffixLayout
from fastflag.model.weights import Weights

Rotary = tuple[Tensor, Tensor]
"""cos and sin of the rotary angles, each [N or 1, 1, T, E / 2]."""

LinearFactory = Callable[[Tensor, Tensor | None], nn.Module]
"""(matrix [O, I], bias [O] or None), both on the CPU -> the layer that holds them on the device."""

LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# Layers of one input. The last block computes queries for fewer tokens than keys (`suffix_pass`).
_TOGETHER = ("q", "k", "v"), ("gate", "up")
_OF_LAST = ("k", "v"), ("gate", "up")


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + swiglu(norm(x)), with x in fp32.

    Its norms are frozen, also where the matrices are trained in full.
    """

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module

    def __init__(
        self,
        weights: Weights,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
        make_linear: LinearFactory,
    ):
        super().__init__()
        self.config = weights.config
        self.dtype = activations_dtype(device, dtype)
        self.frequencies = torch.from_numpy(self.config.rotary_frequencies()).to(
            device, torch.float32
        )
        names = set(weights.names())

        def optional(name: str) -> Tensor | None:
            full_name = f"model.layers.{index}.{name}"
            return weights.tensor(full_name, self.dtype) if full_name in names else None

        def norm(name: str) -> Tensor | None:
            weight = optional(f"{name}.weight")
            return None if weight is None else weight.to(device)

        self.input_norm = norm("input_layernorm")
        self.mlp_norm = norm("post_attention_layernorm")
        self.q_norm = norm("self_attn.q_norm")
        self.k_norm = norm("self_attn.k_norm")
        for short, name in LINEARS.items():
            matrix = weights.tensor(f"model.layers.{index}.{name}.weight", dtype)
            setattr(self, short, make_linear(matrix, optional(f"{name}.bias")))
        last = index == self.config.layers - 1
        self.joined = self._joined(_OF_LAST if last else _TOGETHER, device)

    def queries_keys_values(self, normed: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """normed [N, T, C] -> queries [N, H, T, E], keys and values, each [N, G, T, E]"""
        query, key, value = self._project(normed, "q", "k", "v")
        query, key = ops.rotate(self._queries(query), self._keys(key), *rotary)
        return query, key, self._values(value, key)

    def keys_values(self, normed: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """normed [N, T, C] -> keys and values, each [N, G, T, E]"""
        key, value = self._project(normed, "k", "v")
        key, _ = ops.rotate(self._keys(key), None, *rotary)
        return key, self._values(value, key)

    def queries(self, normed: Tensor, rotary: Rotary) -> Tensor:
        """normed [N, T, C] -> [N, H, T, E]"""
        return ops.rotate(self._queries(self.q(normed)), None, *rotary)[0]

    def norm(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.input_norm, self.config.rms_eps)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer after attention. x [N, T, C], attended [N, H, T, E] -> [N, T, C]"""
        branch = self.o(attended.transpose(1, 2).flatten(2))
        x, normed = ops.add_rms_norm(branch, x, self.mlp_norm, self.config.rms_eps)
        return x + self.down(ops.swiglu(*self._project(normed, "gate", "up")))

    def _project(self, x: Tensor, *names: str) -> Sequence[Tensor]:
        """What each of these layers makes of x; as one product, where they are joined."""
        together = "_".join(names)
        if together in self.joined:
            return self.joined[together](x)
        return [getattr(self, name)(x) for name in names]

    def _joined(self, groups: Sequence[tuple[str, ...]], device: torch.device) -> nn.ModuleDict:
        """The layers of each group as one, by their names."""
        made = nn.ModuleDict()
        for names in groups if joined.taken(device) else ():
            layers = [getattr(self, name) for name in names]
            if joined.fit(layers):
                made["_".join(names)] = joined.JoinedLinear(layers)
        return made

    def _queries(self, query: Tensor) -> Tensor:
        return self._heads(query, self.config.heads, self.q_norm)

    def _keys(self, key: Tensor) -> Tensor:
        return self._heads(key, self.config.kv_heads, self.k_norm)

    def _values(self, value: Tensor, key: Tensor) -> Tensor:
        """`key` is rotated. Where that is new memory, a value that is a view would keep all of the
        product that it is a part of."""
        if key.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
            value = value.contiguous()
        return self._heads(value, self.config.kv_heads, None)

    def _heads(self, x: Tensor, heads: int, norm: Tensor | None) -> Tensor:
        x = x.unflatten(-1, (heads, self.config.head_dim))
        if norm is not None:
            x = ops.rms_norm(x, norm, self.config.rms_eps)
        return x.transpose(1, 2)


def prefix_pass(
    blocks: Sequence[Block], x: Tensor, lengths: Sequence[int], keys_values_only: bool = False
) -> tuple[Tensor, list[Prefixes]]:
    """Runs prefixes x [D, P, C] fp32 of `lengths` [D] through `blocks`.

    Returns their hidden states [D, P, C] and what suffixes attend to in each layer. With
    `keys_values_only` the last layer stops at its keys and values, which is all that
    suffixes read of it; the hidden states returned are then that layer's input.
    """
    if not blocks:
        return x, []
    collected = []
    positions = torch.arange(x.shape[1], device=x.device)[None]
    rotary = rotary_tables(blocks[0].frequencies, positions, blocks[0].dtype)
    for number, block in enumerate(blocks):
        normed = block.norm(x)
        if keys_values_only and number == len(blocks) - 1:
            collected.append(Prefixes([block.keys_values(normed, rotary)], lengths))
            break
        query, key, value = block.queries_keys_values(normed, rotary)
        collected.append(Prefixes([(key, value)], lengths))
        x = block.finish(x, ops.causal_attention(query, key, value))
    return x, collected


def suffix_pass(
    blocks: Sequence[Block],
    x: Tensor,
    prefixes: Sequence[Prefixes],
    layout: SuffixLayout,
    last_only: bool = False,
) -> Tensor:
    """Runs suffixes x [U, S, C] fp32 through `blocks` on top of `prefixes`, one a layer.

    Returns hidden states [U, S, C], or [U, C] of the last tokens with `last_only`: the last layer
    then computes queries, output and MLP for those alone.
    """
    if not blocks:
        return x
    rows, first = torch.arange(len(x), device=x.device), torch.zeros_like(layout.last)
    rotary = rotary_tables(blocks[0].frequencies, layout.positions, blocks[0].dtype)
    for number, (block, shared) in enumerate(zip(blocks, prefixes, strict=True)):
        normed = block.norm(x)
        if last_only and number == len(blocks) - 1:
            key, value = block.keys_values(normed, rotary)
            x, normed = x[rows, layout.last][:, None], normed[rows, layout.last][:, None]
            cosines, sines = (table[rows, :, layout.last][:, None] for table in rotary)
            rotary = cosines, sines
            first, query = layout.last, block.queries(normed, rotary)
        else:
            query, key, value = block.queries_keys_values(normed, rotary)
        attended = ops.prefix_attention(query, key, value, first, shared, layout)
        x = block.finish(x, attended)
    return x[:, 0] if last_only else x


def piece_pass(block: Block, x: Tensor, prefixes: Prefixes, pieces: Pieces) -> Tensor:
    """Runs pieces of suffixes x [N, T, C] fp32 through `block`.

    A piece attends to its prefix, to the pieces above it, and to itself. Returns hidden states
    [N, T, C].
    """
    positions = pieces.layout.positions + pieces.above[:, None]
    rotary = rotary_tables(block.frequencies, positions, block.dtype)
    query, key, value = block.queries_keys_values(block.norm(x), rotary)
    keys, values = (torch.cat([side[at] for at in pieces.path], 2) for side in (key, value))
    attended = ops.prefix_attention(query, keys, values, pieces.above, prefixes, pieces.layout)
    return block.finish(x, attended)


def rotary_tables(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """cos and sin [N, 1, T, E / 2] of RoPE's angles at positions [N, T], in fp32 until rounded.

    frequencies [E / 2] fp32, in radians a position.
    """
    angles = (positions[..., None] * frequencies)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)
