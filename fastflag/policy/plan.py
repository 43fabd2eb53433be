"""What a policy needs of a GPU's memory, part by part, in bytes: arithmetic on shapes alone.

Left out is what comes and goes (a frozen layer unpacked, the gradient of a layer's activations, the
optimiser's square roots), the samples of a rollout, and what CUDA itself takes.
"""

import math
from dataclasses import dataclass

from fastflag.config import Optimizer, PlanConfig, PolicyConfig
from fastflag.model.bnb import BLOCKSIZE
from fastflag.model.joined import can_be
from fastflag.model.llama import LINEARS
from fastflag.model.model_config import ModelConfig
from fastflag.model.shared_prefix import KEY_MULTIPLE, padded_length, round_up, tile_width
from fastflag.model.weights import layer_shapes
from fastflag.policy.heads import MLP_WIDTH, SIDES

_FP32 = 4
_BYTES = {"bf16": 2, "fp16": 2, "fp32": _FP32}
# bitsandbytes' AdamW8bit leaves smaller tensors in fp32, and scales each 256 numbers on their own.
_SMALLEST_8BIT, _BLOCK_8BIT = 4096, 256


def parts(
    model: ModelConfig,
    policy: PolicyConfig,
    optimizer: Optimizer,
    batch: PlanConfig,
    actions: int,
    flash: bool = True,
) -> dict[str, int]:
    """Bytes of each part, where `policy` has no more top layers than the model has layers;
    `actions` is how many the task has.

    Without `flash`, a GPU's attention has copies of keys and values: of each prefix for each of its
    suffixes, and for each query head (model/attention.py).
    """
    dtype, trunk = _BYTES[policy.dtype], model.layers - policy.top_layers
    between = _between(policy)
    shapes = layer_shapes(model)
    matrices = [math.prod(shape) for shape in shapes.values() if len(shape) == 2]
    norms = sum(shape[0] for name, shape in shapes.items() if name.endswith("norm.weight"))
    biases = sum(shape[0] for name, shape in shapes.items() if name.endswith("bias"))
    # The base stays beside adapters; matrices trained in full are their own master copies.
    full, in_nf4 = policy.adaptation == "full", policy.adaptation == "qlora"
    base = 0 if full else _stored(matrices, "nf4" if in_nf4 else policy.dtype) + biases * between
    layers = policy.top_layers * _trained_in_layer(model, policy)
    heads = _head_tensors(model, policy, actions)
    trained = _FP32 * (sum(layers) + sum(heads))
    # Running statistics: a mean and an int64 count for each side, and a deviation. For the
    # language-model head, the rows of its words and a copy of what training starts from.
    words, initial = (actions, trained) if policy.head == "lm" else (0, 0)
    beside = _FP32 * (SIDES + 1 + words) * model.width + 8 * SIDES
    # Every layer holds the rotary frequencies.
    rotary = _FP32 * model.head_dim // 2
    kept, budget = policy.trunk_cache_mb * 2**20, policy.memory_budget * 2**20 or math.inf
    frozen = _stored(matrices, policy.trunk_weights) + biases * between
    return {
        "trunk": trunk * (frozen + norms * between + rotary),
        "embedding": model.width * (model.vocabulary * dtype + _FP32),  # and the final norm
        "top_frozen": policy.top_layers * (base + norms * between + rotary),
        "trained": _FP32 * sum(layers),
        "heads": _FP32 * sum(heads) + beside,
        "initial": initial,
        "gradients": trained,
        "optimizer_state": _optimizer_state([*layers, *heads], optimizer),
        "trunk_cache": min(_cacheable(model, policy, batch, between), kept),
        "activations": int(min(_evaluation(model, policy, batch, actions, flash), budget)),
    }


def _between(policy: PolicyConfig) -> int:
    """Bytes of an activation between products: a CPU's is fp32 (model/products.py)."""
    return _FP32 if policy.device == "cpu" else _BYTES[policy.dtype]


def _stored(matrices: list[int], weights: str) -> int:
    """A frozen layer's matrices. NF4 is half a byte a number, and an fp32 scale a block."""
    if weights != "nf4":
        return sum(matrices) * _BYTES[weights]
    return sum(-(-n // 2) + _FP32 * -(-n // BLOCKSIZE) for n in matrices)


def _trained_in_layer(model: ModelConfig, policy: PolicyConfig) -> list[int]:
    """Numbers of each trained tensor of a top layer: LoRA's A and B of each matrix, or all but the
    norms. Both are fp32, whatever the arithmetic."""
    shapes = layer_shapes(model)
    if policy.adaptation == "full":
        return [math.prod(shape) for name, shape in shapes.items() if "norm" not in name]
    sides = [side for shape in shapes.values() if len(shape) == 2 for side in shape]
    return [side * policy.lora_rank for side in sides]


def _head_tensors(model: ModelConfig, policy: PolicyConfig, actions: int) -> list[int]:
    """Numbers of each tensor of the value head and, but for "lm", of the action head."""
    action = {
        "linear": [actions * model.width, SIDES * actions],
        "mlp": [MLP_WIDTH * model.width, MLP_WIDTH, actions * MLP_WIDTH, SIDES * actions],
        "lm": [],
    }
    return [model.width, SIDES, *action[policy.head]]


def _optimizer_state(tensors: list[int], optimizer: Optimizer) -> int:
    """Two moments of each number. AdamW's are fp32 (its step counters lie on the host); AdamW8bit's
    a byte and an fp32 scale a block, with two tables of 256 fp32 levels that all tensors share."""
    large = [n for n in tensors if n >= _SMALLEST_8BIT and optimizer == "adamw8bit"]
    tables = 2 * _FP32 * 256 if large else 0
    of_large = sum(n + _FP32 * -(-n // _BLOCK_8BIT) for n in large)
    return 2 * (of_large + _FP32 * (sum(tensors) - sum(large))) + tables


def _cacheable(model: ModelConfig, policy: PolicyConfig, batch: PlanConfig, dtype: int) -> int:
    """Bytes of every text's states under the top layers, which are fp32, or without such of its
    last token's, and of each day's keys and values in every frozen layer, which account texts yet
    to come attend to."""
    trunk = model.layers - policy.top_layers
    kept = batch.suffix_tokens if policy.top_layers else 1
    states = _FP32 * model.width * (batch.prefix_tokens + batch.texts * kept)
    read = padded_length(batch.prefix_tokens) * 2 * model.kv_heads * model.head_dim
    return batch.days * (states + dtype * trunk * read)


def prefix_bytes(
    model: ModelConfig, policy: PolicyConfig, rows: int, tokens: int, flash: bool
) -> int:
    """What autograd keeps of the top layers' pass over `rows` prefixes of `tokens`."""
    return _Kept(model, policy, flash).passed(_Texts(rows, padded_length(tokens)))


def suffix_bytes(
    model: ModelConfig,
    policy: PolicyConfig,
    rows: int,
    tokens: int,
    prefixes: int,
    prefix: int,
    flash: bool,
) -> int:
    """What it keeps of `rows` suffixes of `tokens`, after up to `prefixes` prefixes of `prefix`
    tokens; at most, as the suffixes of each are not counted."""
    tokens, prefix = map(padded_length, (tokens, prefix))
    width = tile_width(tokens)
    tiles = (rows + (width - 1) * min(prefixes, rows)) // width
    return _Kept(model, policy, flash).passed(_Texts(rows, tokens, prefix, prefixes, tiles))


def _evaluation(
    model: ModelConfig, policy: PolicyConfig, batch: PlanConfig, actions: int, flash: bool
) -> int:
    """Of tokens as they are padded (model/shared_prefix.py)."""
    prompts, centring = batch.days * batch.texts, batch.days * min(batch.texts, SIDES)
    prefix, suffix = map(padded_length, (batch.prefix_tokens, batch.suffix_tokens))
    tiles = batch.days * -(-batch.texts // tile_width(suffix))
    kept = _Kept(model, policy, flash)
    return (
        kept.passed(_Texts(batch.days, prefix))
        + kept.passed(_Texts(prompts, suffix, prefix, batch.days, tiles))
        + kept.read_out(prompts, centring, actions)
    )


@dataclass(frozen=True)
class _Texts:
    """Prefixes, or with `prefix` suffixes after so many tokens; all padded to one length."""

    rows: int
    tokens: int
    prefix: int = 0
    prefixes: int = 0
    tiles: int = 0  # in which a CPU's attention takes suffixes (model/attention.py)


@dataclass(frozen=True)
class _Kept:
    """What autograd keeps until the backward pass, in bytes."""

    model: ModelConfig
    policy: PolicyConfig
    flash: bool

    def passed(self, texts: _Texts) -> int:
        """Of texts through the top layers. The last layer is asked for what suffixes attend to, and
        for their last token."""
        if not self.policy.top_layers:
            return 0
        asked = 1 if texts.prefix else 0
        # cos and sin, half a head each, of a prefix's places, of a suffix's and of its last token.
        places = texts.rows * (texts.tokens + 1) if texts.prefix else texts.tokens
        total = places * self.model.head_dim * self._dtype
        for index in range(self.policy.top_layers):
            last = index == self.policy.top_layers - 1
            queries = asked if last else texts.tokens
            total += self._layer(texts, queries, through=index > 0, last=last)
        return total

    @property
    def _dtype(self) -> int:
        return _between(self.policy)

    def _layer(self, texts: _Texts, queries: int, through: bool, last: bool) -> int:
        """A layer over texts, which asks for queries, output and MLP of the last `queries` tokens.
        A gradient goes through to its input unless it is the first one trained."""
        model, width, mlp = self.model, self.model.width, self.model.mlp_width
        read, asked = texts.rows * texts.tokens, texts.rows * queries
        # Linear layers keep their input, one for q, k and v, of which the last tokens' is copied.
        inputs = read + (asked if queries < texts.tokens else 0)
        projected = ("k", "v") if last else ("q", "k", "v")
        total = inputs * width * self._dtype + self._linears(read, projected, through)
        total += self._norm(read, width) if through else 0
        if model.qk_norm:
            total += self._norm(read * model.kv_heads + asked * model.heads, model.head_dim)
            if self._dtype == _FP32 and self._joined(len(projected), width):
                # Its input is a view of the joined product, which is kept with the values in it.
                total += read * model.kv_heads * model.head_dim * _FP32
        if not queries:
            return total
        total += self._attention(texts, queries, last)
        # gate and up have one input; silu keeps gate, the product silu(gate) and up, down its own.
        total += self._norm(asked, width) + asked * (width + 4 * mlp) * self._dtype
        total += self._linears(asked, ("q",), through) if last else 0
        for names in (("o",), ("gate", "up"), ("down",)):
            total += self._linears(asked, names, through=True)
        return total

    def _norm(self, rows: int, columns: int) -> int:
        """The input in fp32, and one over its root mean square."""
        return rows * (columns + 1) * _FP32

    def _linears(self, tokens: int, names: tuple[str, ...], through: bool) -> int:
        """What linear layers of one input keep besides it: the matrices as they were multiplied,
        where a gradient goes through, and LoRA's products with A and scaled B. fp32 matrices, and
        all on a CPU, are multiplied as they lie, but for joined ones."""
        shapes = layer_shapes(self.model)
        sides = [shapes[f"{LINEARS[name]}.weight"] for name in names]
        outputs, inputs = sum(side[0] for side in sides), sides[0][1]
        joined = self._joined(len(names), inputs)
        cast = through and self.policy.device != "cpu" and (joined or self.policy.dtype != "fp32")
        if self.policy.adaptation == "full":
            return outputs * inputs * cast * self._dtype
        ranks = len(names) * self.policy.lora_rank
        of_b = outputs * (ranks if joined else self.policy.lora_rank)
        return (ranks * (tokens + inputs * cast) + of_b) * self._dtype

    def _joined(self, layers: int, inputs: int) -> bool:
        """Whether so many adapted layers are one product (model/joined.py)."""
        policy = self.policy
        if policy.adaptation == "full" or policy.device == "cpu" or layers == 1:
            return False
        return can_be(layers, policy.lora_rank, inputs, packed=policy.adaptation == "qlora")

    def _attention(self, texts: _Texts, queries: int, last: bool) -> int:
        """N texts of H query heads and G key/value heads of E numbers, Q queries and K keys a text.
        A CPU's prefixes are as with flash attention, its suffixes in B tiles of n (`_tiled`). D
        prefixes of P tokens are there for suffixes of S; what prefixes keep themselves is not
        counted again: their values, but for the last layer's.

        | tensor             | flash: prefixes   | flash: suffixes   | copies               |
        |--------------------|-------------------|-------------------|----------------------|
        | query, attended    | [N, H, Q, E] each | the same          | the same             |
        | key, value         | [N, G, K, E] each | [N, G, S, E] each | [N, H, K, E] each    |
        | prefixes' of these |                   | [D, G, P, E] each |                      |
        | mask               |                   | [N, Q, S] bool    | of suffixes [N, Q, K] |
        | a sum              | [N, H, Q] fp32    | the same          | the same             |
        | side by side       | [N, Q, H E]       |                   | [N, Q, H E]          |

        Side by side is what is attended where Q is 1, and with flash attention of suffixes.
        dtype: the activations', where none is given.
        """
        if texts.prefix and self.policy.device == "cpu":
            return self._tiled(texts, queries)
        rows, heads, head = texts.rows, self.model.heads, self.model.head_dim
        groups, flash = self.model.kv_heads, self.flash or self.policy.device == "cpu"
        asked = rows * heads * queries
        total = asked * _FP32 + 2 * asked * head * self._dtype
        if flash and texts.prefix:
            shared = (2 if last else 1) * texts.prefixes * texts.prefix
            keys = 2 * rows * texts.tokens + shared
            return total + groups * keys * head * self._dtype + rows * queries * texts.tokens
        keys = texts.prefix + texts.tokens
        numbers = 2 * rows * (groups if flash else heads) * keys * head
        numbers += asked * head if queries > 1 else 0
        numbers += rows * queries * keys if texts.prefix else 0
        return total + numbers * self._dtype

    def _tiled(self, texts: _Texts, queries: int) -> int:
        """A CPU's attention of suffixes, in tiles: all fp32, K the places of a tile's keys.

        | tensor          | shape                 |
        |-----------------|-----------------------|
        | query, attended | [B, G, n H / G Q, E] each |
        | key, value      | [B, G, K, E] each     |
        | mask            | [B, n H / G Q, K]     |
        | a sum           | [B, G, n H / G Q]     |
        | side by side    | [N, Q, H E]           |
        """
        heads, groups, head = self.model.heads, self.model.kv_heads, self.model.head_dim
        width = tile_width(texts.tokens)
        keys = round_up(texts.prefix, KEY_MULTIPLE) + width * round_up(texts.tokens, KEY_MULTIPLE)
        asked = width * queries * heads
        of_tile = asked * (2 * head + 1) + 2 * groups * keys * head + asked // groups * keys
        return _FP32 * (texts.tiles * of_tile + texts.rows * queries * heads * head)

    def read_out(self, prompts: int, centring: int, actions: int) -> int:
        """The final norm; then in fp32, of all rows and of the centring ones (one a day and side)
        what they are from their means, all rows centred, an MLP's numbers, log-probabilities. Of
        frozen features no gradient is asked: they are centred, and that is all."""
        inner = MLP_WIDTH if self.policy.head == "mlp" else 0
        of_heads = prompts * (self.model.width + inner + actions)
        if not self.policy.top_layers:
            return _FP32 * of_heads
        numbers = (prompts + centring) * self.model.width + of_heads
        return self._norm(prompts, self.model.width) + _FP32 * numbers
