"""Each fused op at the shapes of three models: what bench.compile, bench.kernels and bench.gpu run.

Shapes: M rows (tokens), N samples, D days of P tokens, U suffixes of S tokens; the model's are in
`Model`.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastflag.kernels.action_head import action_terms
from fastflag.kernels.logprob import token_log_probability
from fastflag.kernels.lora import lora_linear
from fastflag.kernels.nf4 import nf4_dequantise, nf4_linear
from fastflag.kernels.prefix_attention import prefix_attention
from fastflag.kernels.rmsnorm import add_rms_norm, rms_norm
from fastflag.kernels.rope import rotate_
from fastflag.kernels.swiglu import swiglu
from fastflag.market.tasks.single import ACTIONS


@dataclass(frozen=True)
class Model:
    name: str
    width: int
    inner: int  # of the MLP
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int


MODELS = (
    Model("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152),
    Model("SmolLM2-1.7B", 2048, 8192, 32, 32, 64, 49152),
    Model("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256),
)
SMALL = Model("small", 64, 96, 4, 2, 16, 500)
DAYS, PREFIX, SUFFIXES, SUFFIX = 64, 150, 24, 16


@dataclass(frozen=True)
class Memory:
    """Makes a case's tensors: with random numbers, or without any where nothing is computed."""

    device: str
    random: bool = True
    whole: bool = False
    """Random whole numbers, whose products and sums are whole and small: exact in any order."""
    rows: int = DAYS * SUFFIXES * SUFFIX
    """Tokens of a batch."""

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0
    ) -> Tensor:
        if not self.random:
            return torch.empty(shape, dtype=dtype, device=self.device)
        numbers = torch.randn(shape, device=self.device)
        if self.whole and scale < 1:  # a matrix': a few of each row are -1 or 1
            kept = torch.rand(shape, device=self.device) < (4 * scale) ** 2
            return numbers.sign_().mul_(kept).to(dtype)
        numbers.mul_(scale)
        return (numbers.round_() if self.whole else numbers).to(dtype)

    def below(self, limit: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers from 0."""
        high = limit if self.random else 1
        return torch.randint(high, shape, device=self.device).to(dtype)

    def packed(self, count: int) -> Tensor:
        """Bytes of two NF4 numbers each, the whole ones alone, which are -1, 0 and 1, if asked."""
        if not self.whole:
            return self.below(256, count, dtype=torch.uint8)
        of_whole = torch.tensor([0, 7, 15], dtype=torch.uint8, device=self.device)
        high, low = (of_whole[self.below(3, count)] for _ in range(2))
        return 16 * high + low


Inputs = dict[str, Any]
"""Arguments by parameter."""


@dataclass(frozen=True)
class Case:
    op: Callable
    shape: str
    inputs: Callable[[Memory], Inputs]
    trained: tuple[str, ...] = ()  # inputs that get a gradient

    @property
    def name(self) -> str:
        return getattr(self.op, "_name", None) or self.op.__name__

    @property
    def file(self) -> str:
        """The name of the op's file in kernels/, and of its tests: tests/test_kernels_FILE.py."""
        return self._module.rpartition(".")[2]

    @property
    def reference(self) -> Callable:
        """The op in PyTorch, of the same arguments, from the same file."""
        return getattr(sys.modules[self._module], f"{self.name.rstrip('_')}_reference")

    @property
    def _module(self) -> str:
        # A custom op is an object of torch's; the function inside it is of the kernels' file.
        return getattr(self.op, "_init_fn", self.op).__module__

    def given(self, inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
        """Arguments for one call, and the leaves that its gradients are for, which exist where
        gradients are enabled: what is trained is copied, since some implementations work in place.
        """
        leaves = [inputs[name].detach().requires_grad_() for name in self.trained]
        copies = {name: leaf.clone() for name, leaf in zip(self.trained, leaves, strict=True)}
        return inputs | copies, leaves

    def run(self, memory: Memory) -> None:
        """Forward and backward once."""
        given, leaves = self.given(self.inputs(memory))
        outputs = [output for output in tensors(self.op(**given)) if output.requires_grad]
        if leaves:
            torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])


def tensors(outputs: Any) -> list[Tensor]:
    """An op's one output, or those of several that are there."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [output for output in outputs if output is not None]


def _rms_norm(model: Model, memory: Memory) -> Inputs:
    """Of the residual stream, which is fp32."""
    return {
        "x": memory.normal(memory.rows, model.width, dtype=torch.float32),
        "weight": memory.normal(model.width),
        "epsilon": 1e-5,
    }


def _add_rms_norm(model: Model, memory: Memory) -> Inputs:
    branch = memory.normal(memory.rows, model.width)
    stream = _rms_norm(model, memory)
    return stream | {"x": branch, "residual": stream["x"]}


def _rotate(model: Model, memory: Memory) -> Inputs:
    """Views of linear layers' outputs, as a layer's are, with the angles of each suffix."""
    prompts, tokens, size = memory.rows // SUFFIX, SUFFIX, model.head_size
    query, key = (
        memory.normal(prompts, tokens, heads, size).transpose(1, 2)
        for heads in (model.heads, model.kv_heads)
    )
    cos, sin = (memory.normal(prompts, 1, tokens, size // 2) for _ in range(2))
    return {"query": query, "key": key, "cos": cos, "sin": sin}


def _swiglu(model: Model, memory: Memory) -> Inputs:
    gate, up = (memory.normal(memory.rows, model.inner) for _ in range(2))
    return {"gate": gate, "up": up}


def _gate(model: Model) -> int:
    """Outputs of the MLP's gate."""
    return model.inner


def _gate_up(model: Model) -> int:
    """Of gate and up joined, as a GPU multiplies (fastflag/model/joined.py)."""
    return 2 * model.inner


def _q_k_v(model: Model) -> int:
    return (model.heads + 2 * model.kv_heads) * model.head_size


Outputs = Callable[[Model], int]


def _nf4(model: Model, memory: Memory, outputs: Outputs = _gate) -> Inputs:
    numbers = outputs(model) * model.width
    return {
        "packed": memory.packed(numbers // 2),
        "absmax": memory.normal(numbers // 64, dtype=torch.float32).abs(),
    }


def _nf4_dequantise(model: Model, memory: Memory) -> Inputs:
    shape = [model.inner, model.width]
    return _nf4(model, memory) | {"shape": shape, "dtype": torch.bfloat16}


def _nf4_dequantise_nested(model: Model, memory: Memory) -> Inputs:
    blocks = model.inner * model.width // 64
    return _nf4_dequantise(model, memory) | {
        "absmax": memory.below(256, blocks, dtype=torch.uint8),
        "nested_code": memory.normal(256, dtype=torch.float32),
        "nested_absmax": memory.normal(-(-blocks // 256), dtype=torch.float32),
        "offset": memory.normal(dtype=torch.float32),
    }


def _nf4_linear(rows: int, model: Model, memory: Memory, outputs: Outputs = _gate) -> Inputs:
    x = memory.normal(rows, model.width)
    return _nf4(model, memory, outputs) | {"x": x, "outputs": outputs(model)}


def _lora_linear(model: Model, memory: Memory, rank: int = 16, outputs: Outputs = _gate) -> Inputs:
    """The MLP's gate with an adapter, or joined matrices with theirs; scale 2."""
    return {
        "x": memory.normal(memory.rows, model.width),
        "weight": memory.normal(outputs(model), model.width, scale=model.width**-0.5),
        "absmax": None,
        "a": memory.normal(rank, model.width, dtype=torch.float32, scale=model.width**-0.5),
        "b": memory.normal(outputs(model), rank, dtype=torch.float32),
        "scale": 2.0,
    }


def _lora_linear_nf4(
    model: Model, memory: Memory, rank: int = 16, outputs: Outputs = _gate
) -> Inputs:
    stored = _nf4(model, memory, outputs)
    weight = {"weight": stored["packed"], "absmax": stored["absmax"]}
    return _lora_linear(model, memory, rank, outputs) | weight


def _few(inputs: Callable[[Model, Memory], Inputs], model: Model, memory: Memory) -> Inputs:
    """As in a rollout."""
    return inputs(model, replace(memory, rows=64))


def _prefix_attention(
    model: Model, memory: Memory, queries: int = SUFFIX, places: Sequence[int] = (0,)
) -> Inputs:
    """Of each suffix on each day, `queries` tokens from each of `places` on."""
    prompts, size = memory.rows // SUFFIX, model.head_size
    days, suffixes = max(prompts // SUFFIXES, 1), prompts * len(places)

    def heads(count: int, number: int, tokens: int) -> Tensor:
        """As a linear layer's output is laid out."""
        return memory.normal(count, tokens, number, size).transpose(1, 2)

    shared = (heads(days, model.kv_heads, PREFIX) for _ in range(2))
    own = (heads(suffixes, model.kv_heads, SUFFIX) for _ in range(2))
    first = torch.tensor(places, dtype=torch.int32, device=memory.device).repeat(prompts)
    starts = torch.linspace(0, suffixes, days + 1, device=memory.device).int()
    lengths = torch.full((days,), PREFIX, dtype=torch.int32, device=memory.device)
    inputs = {
        "query": heads(suffixes, model.heads, queries),
        **dict(zip(("key", "value"), shared, strict=True)),
        "lengths": lengths,
        "starts": starts,
        **dict(zip(("own_key", "own_value"), own, strict=True)),
        "first": first,
    }
    if memory.whole:
        _point(inputs)
    return inputs


def _point(inputs: Inputs) -> None:
    """Makes each query 1,024 times one of the keys that it sees, which are -1, 0 and 1: that key's
    score is far above all others, and its value comes out to the bit."""
    for name in ("key", "own_key"):
        inputs[name] = inputs[name].sign()
    query, key = inputs["query"], inputs["key"]
    device, (count, heads, queries, _) = query.device, query.shape
    suffix = torch.arange(count, device=device)[:, None, None]
    group = torch.arange(heads, device=device)[:, None] // (heads // key.shape[1])
    day = torch.searchsorted(inputs["starts"][1:], suffix.int(), right=True)
    place = torch.randint(key.shape[2], (count, heads, queries), device=device)
    itself = inputs["first"].long()[:, None, None] + torch.arange(queries, device=device)
    shared, own = key[day, group, place], inputs["own_key"][suffix, group, itself]
    chosen = torch.rand(count, heads, queries, 1, device=device) < 0.5
    query.copy_(1024 * torch.where(chosen, shared, own))


def _action_terms(memory: Memory) -> Inputs:
    """Log-probabilities of the trader's actions, of as many samples as there are prompts."""
    count, like = memory.rows // SUFFIX, {"dtype": torch.float32}
    logits, initial = (memory.normal(count, len(ACTIONS), **like).log_softmax(-1) for _ in range(2))
    old, advantage = (memory.normal(count, **like) for _ in range(2))
    return {
        "logits": logits,
        "allowed": None,
        "action": memory.below(len(ACTIONS), count),
        "old_log_probability": old,
        "advantage": advantage,
        "initial": initial,
        "clip": 0.2,
    }


def _token_log_probability(model: Model, memory: Memory) -> Inputs:
    return {
        "hidden": memory.normal(memory.rows // SUFFIX, model.width),
        "weight": memory.normal(model.vocabulary, model.width, scale=model.width**-0.5),
        "token": memory.below(model.vocabulary, memory.rows // SUFFIX),
    }


_ATTENDED = ("query", "key", "value", "own_key", "own_value")
_last_token = partial(_prefix_attention, queries=1, places=(SUFFIX - 1,))
# As the frozen layers take account texts: a tree of pieces, here of two depths, without gradient.
_pieces = partial(_prefix_attention, queries=8, places=(0, 8))
_OF_QKV, _OF_GATE_UP = {"rank": 48, "outputs": _q_k_v}, {"rank": 32, "outputs": _gate_up}
# An op, what is special about its inputs, how they are made, and which of them get a gradient.
_OF_A_MODEL = (
    (nf4_dequantise, "", _nf4_dequantise, ()),
    (nf4_dequantise, ", nested", _nf4_dequantise_nested, ()),
    *((nf4_linear, f", {n} rows", partial(_nf4_linear, n), ("x",)) for n in (1, 17, 64)),
    (nf4_linear, ", gate and up", partial(_nf4_linear, 64, outputs=_gate_up), ("x",)),
    (nf4_linear, ", q, k and v", partial(_nf4_linear, 64, outputs=_q_k_v), ("x",)),
    (lora_linear, "", _lora_linear, ("x", "a", "b")),
    (lora_linear, ", gate and up", partial(_lora_linear, **_OF_GATE_UP), ("x", "a", "b")),
    (lora_linear, ", q, k and v", partial(_lora_linear, **_OF_QKV), ("x", "a", "b")),
    (lora_linear, ", NF4, q, k and v", partial(_lora_linear_nf4, **_OF_QKV), ("x", "a", "b")),
    (lora_linear, ", NF4", _lora_linear_nf4, ("x", "a", "b")),
    (lora_linear, ", 64 rows", partial(_few, _lora_linear), ("x", "a", "b")),
    (lora_linear, ", NF4, 64 rows", partial(_few, _lora_linear_nf4), ("x", "a", "b")),
    (lora_linear, ", rank 64", partial(_lora_linear, rank=64), ("x", "a", "b")),
    (rms_norm, "", _rms_norm, ("x",)),
    (add_rms_norm, "", _add_rms_norm, ("x", "residual")),
    (rotate_, "", _rotate, ("query", "key")),
    (swiglu, "", _swiglu, ("gate", "up")),
    (prefix_attention, "", _prefix_attention, _ATTENDED),
    (prefix_attention, ", last token", _last_token, _ATTENDED),
    (prefix_attention, ", pieces of 8 tokens", _pieces, ()),
    (token_log_probability, "", _token_log_probability, ("hidden",)),
)
_OF_NO_MODEL = ((action_terms, f"{len(ACTIONS)} actions", _action_terms, ("logits",)),)


def cases(models: Sequence[Model]) -> tuple[Case, ...]:
    of_models = (
        Case(op, model.name + detail, partial(inputs, model), trained)
        for op, detail, inputs, trained in _OF_A_MODEL
        for model in models
    )
    return *of_models, *(Case(*case) for case in _OF_NO_MODEL)


CASES = cases(MODELS)
SMALL_CASES = cases([SMALL])
"""For machines without a GPU, and for tools that make one slow."""
