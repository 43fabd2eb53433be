"""Who computes an op: its Triton kernel, its reference, that one compiled, and other libraries.

A provider makes, of a case's inputs, a function of them by parameter name that gives the op's
outputs, or the first of them. What is done once for a weight or a layout (a quantisation state, a
mask) is done there and is not timed. A library that is not there has no provider, and none is
trusted: bench.kernels compares each with the reference before it is timed. The naive head, all
logits and their log_softmax, is token_log_probability's reference.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.measure.cases import Case, Inputs
from bench.rivals import attention

Function = Callable[..., Any]
"""The op's inputs by parameter name -> its outputs."""


class Absent(Exception):
    """A library is not there, or not the part of it that is needed."""


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[Case, Inputs], Function | None]
    """None where the provider has nothing for such inputs; raises Absent."""
    note: str = ""
    differentiable: bool = True
    to_the_bit: bool = False
    """Whether sums of small whole numbers must come out exact, which they are in any order."""


def providers(case: Case, launch: bool) -> list[Provider]:
    """All that there can be for a case; kernels only with `launch`."""
    kernel = [Provider("triton", lambda case, inputs: case.op, to_the_bit=True)]
    return [*(kernel if launch else []), *_EVERYWHERE, *_OTHERS[case.name]]


def _compiled(case: Case, inputs: Inputs) -> Function:
    # Without a reset the ninth shape is one recompilation too many and runs uncompiled, silently.
    torch._dynamo.reset()
    return torch.compile(case.reference, dynamic=False)


_EVERYWHERE = (
    Provider("reference", lambda case, inputs: case.reference),
    Provider("compile", _compiled),
)
_OTHERS: dict[str, list[Provider]] = defaultdict(list)


def _of(op: str, name: str, note: str = "", differentiable: bool = True) -> Callable:
    """Marks a function of an op's inputs as what makes a provider of it."""

    def add(make: Callable[[Inputs], Function | None]) -> Callable[[Inputs], Function | None]:
        made = Provider(name, lambda case, inputs: make(inputs), note, differentiable)
        _OTHERS[op].append(made)
        return make

    return add


def symbol(module: str, name: str) -> Any:
    """What a library calls so. That it is installed is not enough: flash-attn 4 has a package of
    flash-attn 2's name without its functions."""
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # some libraries raise anything where there is no GPU
        raise Absent(f"{module}.{name}") from error


@_of("rms_norm", "torch rms_norm")
def _(inputs: Inputs) -> Function:
    def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon).to(weight.dtype)

    return norm


@_of("rms_norm", "liger")
def _(inputs: Inputs) -> Function:
    norm = symbol("liger_kernel.transformers.functional", "liger_rms_norm")
    return lambda x, weight, epsilon: norm(x, weight, epsilon).to(weight.dtype)


@_of("rms_norm", "unsloth")
def _(inputs: Inputs) -> Function:
    norm = symbol("unsloth.kernels.rms_layernorm", "Fast_RMS_Layernorm")
    return lambda x, weight, epsilon: norm.apply(x, weight, epsilon).to(weight.dtype)


@_of("add_rms_norm", "torch rms_norm")
def _(inputs: Inputs) -> Function:
    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple:
        total = x + residual
        normed = functional.rms_norm(total, weight.shape, weight.to(total.dtype), epsilon)
        return total, normed.to(weight.dtype)

    return add_norm


@_of("add_rms_norm", "liger")
def _(inputs: Inputs) -> Function:
    norm = symbol("liger_kernel.transformers.functional", "liger_fused_add_rms_norm")

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple:
        normed, total = norm(x.to(residual.dtype), residual, weight, epsilon)
        return total, normed.to(weight.dtype)

    return add_norm


@_of("swiglu", "liger")
def _(inputs: Inputs) -> Function:
    swiglu = symbol("liger_kernel.transformers.functional", "liger_swiglu")
    return lambda gate, up: swiglu(gate, up)


@_of("swiglu", "unsloth", differentiable=False)
def _(inputs: Inputs) -> Function:
    swiglu = symbol("unsloth.kernels.swiglu", "swiglu_fg_kernel")
    shape = inputs["gate"].shape
    rows = (1, -1, shape[-1])
    return lambda gate, up: swiglu(gate.view(rows), up.view(rows)).view(shape)


@_of("rotate_", "liger")
def _(inputs: Inputs) -> Function | None:
    if inputs["key"] is None:
        return None
    rotate = symbol("liger_kernel.transformers.functional", "liger_rope")
    # It takes the angles of both halves of a head, [N or 1, T, E].
    twice = [torch.cat([inputs[name]] * 2, dim=-1).squeeze(1) for name in ("cos", "sin")]
    return lambda query, key, cos, sin: rotate(query, key, *twice)


@_of("nf4_dequantise", "bitsandbytes")
def _(inputs: Inputs) -> Function:
    dequantise = symbol("bitsandbytes.functional", "dequantize_4bit")
    state = _state(**inputs)
    return lambda packed, **rest: dequantise(packed.view(-1, 1), state)


@_of("nf4_dequantise", "unsloth", differentiable=False)
def _(inputs: Inputs) -> Function | None:
    if inputs.get("nested_absmax") is None:
        return None
    dequantise = symbol("unsloth.kernels.utils", "fast_dequantize")
    state = _state(**inputs)
    return lambda packed, **rest: dequantise(packed.view(-1, 1), state)


@_of("nf4_linear", "bitsandbytes")
def _(inputs: Inputs) -> Function:
    multiply = symbol("bitsandbytes", "matmul_4bit")
    x = inputs["x"]
    state = _state(absmax=inputs["absmax"], shape=[inputs["outputs"], x.shape[-1]], dtype=x.dtype)
    return lambda x, packed, absmax, outputs: multiply(x, packed.view(-1, 1), state)


@_of("lora_linear", "bitsandbytes + peft")
def _(inputs: Inputs) -> Function | None:
    x, b = inputs["x"], inputs["b"]
    if inputs["absmax"] is None:
        return None
    multiply = symbol("bitsandbytes", "matmul_4bit")
    state = _state(absmax=inputs["absmax"], shape=[len(b), x.shape[-1]], dtype=x.dtype)

    def linear(x: Tensor, weight: Tensor, absmax: Tensor, a: Tensor, b: Tensor, scale: float):
        return adapted(multiply(x, weight.view(-1, 1), state), x, a, b, scale)

    return linear


@_of("lora_linear", "torch + peft")
def _(inputs: Inputs) -> Function | None:
    if inputs["absmax"] is not None:
        return None

    def linear(x: Tensor, weight: Tensor, absmax: None, a: Tensor, b: Tensor, scale: float):
        return adapted(functional.linear(x, weight), x, a, b, scale)

    return linear


def adapted(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The formula of peft/tuners/lora/layer.py, Linear.forward, in x's type as under autocast."""
    low = functional.linear(x, a.to(x.dtype))
    return base + functional.linear(low, b.to(x.dtype)) * scale


def _state(
    absmax: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    nested_code: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
    **rest: Any,
) -> Any:
    """bitsandbytes' account of a matrix in NF4, with the absmax plain or nested."""
    state = symbol("bitsandbytes.functional", "QuantState")
    levels = symbol("bitsandbytes.functional", "get_4bit_type")("nf4", device=absmax.device)
    nested = None
    if nested_absmax is not None:
        nested = state(nested_absmax, code=nested_code, blocksize=256, dtype=torch.float32)
    return state(
        absmax,
        shape=torch.Size(shape),
        code=levels,
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=offset,
        state2=nested,
    )


@_of("token_log_probability", "torch logsumexp")
def _(inputs: Inputs) -> Function:
    """Fewer passes over the logits than log_softmax: H = lse - sum(p z)."""

    def head(
        hidden: Tensor,
        weight: Tensor,
        token: Tensor,
        temperature: float = 1.0,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if allowed is not None:
            weight = weight.index_select(0, allowed)
            token = (token[..., None] == allowed).int().argmax(-1)
        logits = functional.linear(hidden, weight).float() / temperature
        total = logits.logsumexp(-1)
        chosen = logits.gather(-1, token[..., None]).squeeze(-1)
        return chosen - total, total - (logits.softmax(-1) * logits).sum(-1)

    return head


@_of("token_log_probability", "torch linear_cross_entropy", "its log-probability alone")
def _(inputs: Inputs) -> Function | None:
    if inputs.get("allowed") is not None:
        return None
    loss = symbol("torch.nn.functional", "linear_cross_entropy")
    temperature = inputs.get("temperature", 1.0)
    return lambda hidden, weight, token, **rest: (
        -loss(
            hidden if temperature == 1.0 else hidden / temperature, weight, token, reduction="none"
        )
    )


_of("prefix_attention", "torch sdpa")(attention.by_sdpa)
_of("prefix_attention", "packed")(attention.packed)


@_of("prefix_attention", "flash-attn")
def _(inputs: Inputs) -> Function:
    """Each suffix after a copy of its prefix, side by side without padding: the causal mask of
    queries at the end of their keys is the one wanted."""
    varlen = symbol("flash_attn", "flash_attn_varlen_func")
    count, _, queries, _ = inputs["query"].shape
    day = attention.day_of_suffix(inputs)
    rows, offsets = _packed_rows(inputs, day)
    starts = torch.arange(0, (count + 1) * queries, queries, device=day.device).int()
    longest = int(offsets.diff().max())

    def packed(shared: Tensor, own: Tensor) -> Tensor:
        """[sum of lengths, G, E]"""
        by_token = [side.transpose(1, 2).flatten(0, 1) for side in (shared, own)]
        return torch.cat(by_token).index_select(0, rows)

    def attend(query, key, value, own_key, own_value, **rest) -> Tensor:
        made = varlen(
            query.transpose(1, 2).flatten(0, 1),
            packed(key, own_key),
            packed(value, own_value),
            starts,
            offsets,
            queries,
            longest,
            causal=True,
        )
        return made.unflatten(0, (count, queries)).transpose(1, 2)

    return attend


def _packed_rows(inputs: Inputs, day: Tensor) -> tuple[Tensor, Tensor]:
    """Where each suffix's visible keys are among all prefixes' and then all suffixes' tokens, one
    suffix after another; and where each suffix begins and ends, [U + 1] int32."""
    days, _, longest, _ = inputs["key"].shape
    count, _, own, _ = inputs["own_key"].shape
    lengths = inputs["lengths"].long()[day]
    seen = inputs["first"].long() + inputs["query"].shape[2]
    place = torch.arange(longest, device=day.device)
    own_place = torch.arange(own, device=day.device)
    suffix = torch.arange(count, device=day.device)[:, None]
    rows = torch.cat((day[:, None] * longest + place, days * longest + suffix * own + own_place), 1)
    there = torch.cat((place < lengths[:, None], own_place < seen[:, None]), 1)
    ends = (lengths + seen).cumsum(0)
    return rows[there], torch.cat((ends.new_zeros(1), ends)).int()
