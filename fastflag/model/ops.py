"""Every op a layer needs, by one name. Triton or PyTorch is chosen here, once, with the reason.

A Triton kernel is taken on GPUs where bench.gpu has shown it right and not slower than PyTorch's
(`_PROVEN`). FASTFLAG_KERNELS=triton takes every kernel that the GPU can run all the same, in
Triton's interpreter too, and FASTFLAG_KERNELS=triton:rms_norm,swiglu those of these ops alone;
FASTFLAG_KERNELS=torch takes none.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastflag.files import InputError
from fastflag.kernels import action_head, lora, nf4, rmsnorm, rope
from fastflag.kernels import prefix_attention as kernel_attention
from fastflag.kernels import swiglu as swiglu_file
from fastflag.kernels.compiler import PRODUCTS_FROM, Assembler, assembler, unusable
from fastflag.model import attention, bnb, products
from fastflag.model.shared_prefix import Prefixes, SuffixLayout

__all__ = [
    "OPS",
    "Assembler",
    "Choice",
    "action_terms",
    "add_rms_norm",
    "assembler",
    "causal_attention",
    "frozen_linear",
    "linear",
    "lora_linear",
    "nf4_dequantise",
    "nf4_linear",
    "prefix_attention",
    "rms_norm",
    "rotate",
    "swiglu",
]

_VARIABLE = "FASTFLAG_KERNELS"

# {op: {architecture: where it was measured, and how much faster it was than the best of the
# others}}; what bench.gpu has written to bench/results/. No kernel has run on a GPU yet.
_PROVEN: dict[str, dict[int, str]] = {}


@dataclass(frozen=True)
class Choice:
    """Which implementation an op takes on a device."""

    implementation: str
    reason: str
    evidence: str = "none"


class Op:
    """One op, which on each device is one of two functions of the same arguments."""

    def __init__(
        self,
        name: str,
        torchs: Callable[..., Any],
        triton: Callable[..., Any] | None = None,
        by: str = "torch",
        products: bool = False,
    ):
        """`products` where its kernel has matrix products, for which older GPUs have no code."""
        self.name, self.products = name, products
        self._torchs, self._triton, self._by = torchs, triton, by
        self._chosen: dict[torch.device, Callable[..., Any]] = {}

    def __call__(self, x: Tensor, *arguments: Any) -> Any:
        """x is on the device that decides."""
        if x.device not in self._chosen:
            triton = self._triton if self.choice(x.device).implementation == "triton" else None
            self._chosen[x.device] = triton or self._torchs
        return self._chosen[x.device](x, *arguments)

    def choice(self, device: torch.device) -> Choice:
        """Raises InputError where FASTFLAG_KERNELS asks for what there is not."""
        if self._triton is None:
            return Choice(self._by, "PyTorch's is the one there is")
        return _choice(self.name, self._by, self.products, device)


def _choice(name: str, otherwise: str, products: bool, device: torch.device) -> Choice:
    said = f"{_VARIABLE}={os.environ.get(_VARIABLE, 'auto')}"
    asked, named = _asked(said)
    if asked == "torch" or (named and name not in named):
        return Choice(otherwise, said)
    why = unusable(device)
    if why and asked == "triton":
        hint = "; TRITON_INTERPRET=1 interprets them" if device.type == "cpu" else ""
        raise InputError(f"{why}{hint}, {said}")
    if why:
        return Choice(otherwise, why)
    if device.type != "cuda" and asked == "triton":
        return Choice("triton", f"{said}, in the interpreter")
    if device.type != "cuda":
        return Choice(otherwise, "there is no GPU for Triton's kernels")
    major, minor = torch.cuda.get_device_capability(device)
    if products and 10 * major + minor < PRODUCTS_FROM:
        return Choice(
            otherwise,
            f"Triton has no matrix instructions for sm_{major}{minor}, only from "
            f"sm_{PRODUCTS_FROM} on: its products would crawl",
        )
    evidence = _PROVEN.get(name, {}).get(10 * major + minor)
    if asked == "triton":
        return Choice("triton", said, evidence or "none")
    if evidence is None:
        return Choice(
            otherwise,
            f"the Triton kernel is not measured on sm_{major}{minor}: `python -m bench.gpu` does "
            f"it, {_VARIABLE}=triton takes it all the same",
        )
    return Choice("triton", f"right and not slower on sm_{major}{minor}", evidence)


def _asked(said: str) -> tuple[str, set[str]]:
    """Of the environment's words: auto, triton or torch, and the ops that they are for, none where
    for all. Raises InputError for other words."""
    asked, colon, names = said.partition("=")[2].partition(":")
    if asked not in ("auto", "triton", "torch") or (colon and asked != "triton"):
        raise InputError(f"{said} is not auto, triton, triton:OP,OP or torch, environment")
    named = {*names.split(",")} if colon else set()
    known = {op.name for op in OPS}
    if named - known:
        unknown = ", ".join(sorted(named - known))
        raise InputError(f"no op is called {unknown!r}, but {', '.join(sorted(known))}, {said}")
    return asked, named


# PyTorch's form on each kind of device; the table in model/attention.py has all of them.
_PREFIX_ATTENTION = {"cpu": attention.by_tiles, "cuda": attention.on_cuda}


def _prefix_attention(query: Tensor, *arguments: Any) -> Tensor:
    return _PREFIX_ATTENTION[query.device.type](query, *arguments)


def _prefix_attention_triton(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    first: Tensor,
    prefixes: Prefixes,
    layout: SuffixLayout,
) -> Tensor:
    lengths, starts = layout.prefix_lengths, layout.starts
    return kernel_attention.prefix_attention(
        query, *prefixes.whole, lengths, starts, own_key, own_value, first.int()
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + b, its factors in `dtype`; x is in fp32 on a CPU, in `dtype` elsewhere."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return products.product(x, weight, bias, dtype)
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _frozen_linear(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + b for one x after another, without gradient, as `_linear`."""
    if weight.device.type == "cpu":
        return products.laid_out(weight, bias, dtype)
    return lambda x: functional.linear(x, weight, bias)


def _lora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    # A GPU's product has two dimensions, so that the adapter's is added in place: in one launch,
    # and one pass over what nothing has kept.
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    rows = x if on_cpu else x.flatten(0, -2)
    if absmax is None:
        product = _linear(rows, weight, None, dtype)
    else:
        product = _nf4_linear(rows, weight, absmax, len(b), dtype)
    low, b = _linear(rows, a, None, dtype), b if scale == 1.0 else scale * b
    if on_cpu:
        return product + _linear(low, b, None, dtype)
    return product.addmm_(low, b.to(x.dtype).T).unflatten(0, x.shape[:-1])


def _lora_linear_triton(x: Tensor, *arguments: Any) -> Tensor:
    return lora.lora_linear(x, *arguments[:-1])


def _nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, outputs: int, dtype: torch.dtype
) -> Tensor:
    """The backward pass dequantises anew: autograd would keep 16 bits of each number."""
    dequantised = partial(nf4_dequantise, packed, absmax, (outputs, x.shape[-1]), dtype)
    weight = dequantised()
    storage = weight.untyped_storage().data_ptr()

    def pack(kept: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        is_weight = kept.untyped_storage().data_ptr() == storage
        return (kept.shape, kept.stride()) if is_weight else kept

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        return kept if isinstance(kept, Tensor) else dequantised().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return _linear(x, weight, None, dtype)


def _nf4_linear_triton(x: Tensor, *arguments: Any) -> Tensor:
    return nf4.nf4_linear(x, *arguments[:-1])


nf4_dequantise = Op("nf4_dequantise", bnb.dequantise_nf4, nf4.nf4_dequantise, by="bitsandbytes")
nf4_linear = Op(
    "nf4_linear",
    _nf4_linear,
    _nf4_linear_triton,
    by="nf4_dequantise, torch's product",
    products=True,
)
lora_linear = Op(
    "lora_linear",
    _lora_linear,
    _lora_linear_triton,
    by="torch, product by product",
    products=True,
)
rms_norm = Op("rms_norm", rmsnorm.rms_norm_reference, rmsnorm.rms_norm)
add_rms_norm = Op("add_rms_norm", rmsnorm.add_rms_norm_reference, rmsnorm.add_rms_norm)
rotate = Op("rotate", rope.rotate_reference, rope.rotate_)
action_terms = Op("action_terms", action_head.action_terms_reference, action_head.action_terms)
swiglu = Op("swiglu", swiglu_file.swiglu_reference, swiglu_file.swiglu)
causal_attention = Op("causal_attention", attention.causal, by="torch scaled_dot_product_attention")
linear = Op("linear", _linear, by="torch's linear; on a CPU oneDNN's, of fp32 numbers")
frozen_linear = Op("frozen_linear", _frozen_linear, by="as linear; laid out for oneDNN on a CPU")
prefix_attention = Op(
    "prefix_attention",
    _prefix_attention,
    _prefix_attention_triton,
    by="torch's flash attention and products, on a CPU scaled_dot_product_attention by tiles",
    products=True,
)

OPS = (
    nf4_dequantise,
    linear,
    frozen_linear,
    nf4_linear,
    lora_linear,
    rms_norm,
    add_rms_norm,
    rotate,
    swiglu,
    causal_attention,
    prefix_attention,
    action_terms,
)
