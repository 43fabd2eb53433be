"""Every op a layer needs, by one name. PyTorch's, Triton's or flash-attn's implementation is chosen
here, once, with the reason.

A Triton kernel is taken on a GPU where a proof found it right and faster than PyTorch's there
(model/proof), and a run keeps what it began with (`settle`). FASTFLAG_KERNELS=triton takes every
kernel that the GPU can run all the same, in Triton's interpreter too, and
FASTFLAG_KERNELS=triton:rms_norm,swiglu those of these ops alone; FASTFLAG_KERNELS=torch takes none.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastflag.files import InputError
from fastflag.kernels import action_head, lora, nf4, rmsnorm, rope
from fastflag.kernels import prefix_attention as kernel_attention
from fastflag.kernels import swiglu as swiglu_file
from fastflag.kernels.compiler import INSTALLED, PRODUCTS_FROM, Assembler, assembler, unusable
from fastflag.model import adapted, attention, bnb, flash, products
from fastflag.model.shared_prefix import Prefixes, SuffixLayout

__all__ = [
    "INSTALLED",
    "KERNELS",
    "OPS",
    "Assembler",
    "Choice",
    "action_terms",
    "add_rms_norm",
    "assembler",
    "causal_attention",
    "frozen_linear",
    "left_open",
    "linear",
    "lora_linear",
    "nf4_dequantise",
    "nf4_linear",
    "prefix_attention",
    "rms_norm",
    "rotate",
    "settle",
    "swiglu",
]

_VARIABLE = "FASTFLAG_KERNELS"
KERNELS = Path(lora.__file__).parent
"""The folder of the kernels' sources."""


@dataclass(frozen=True)
class Choice:
    """Which implementation an op takes on a device."""

    implementation: str
    reason: str
    evidence: str = "none"


# What `settle` was given last.
_settled: dict[str, Choice] = {}


class Op:
    """One op, which on each device is one of a few functions of the same arguments."""

    def __init__(
        self,
        name: str,
        torchs: Callable[..., Any],
        triton: Callable[..., Any] | None = None,
        by: str = "torch",
        others: Callable[[], Mapping[str, Callable[..., Any]]] = dict,
        products: bool = False,
    ):
        """`others`: packages' implementations that are there, by name. `products` where its kernel
        has matrix products, for which older GPUs have no code."""
        self.name, self._others, self.products = name, others, products
        self._torchs, self._triton, self._by = torchs, triton, by
        self._chosen: dict[torch.device, Callable[..., Any]] = {}

    def __call__(self, x: Tensor, *arguments: Any) -> Any:
        """x is on the device that decides."""
        if x.device not in self._chosen:
            taken = self.choice(x.device).implementation
            self._chosen[x.device] = self.implementations.get(taken, self._torchs)
        return self._chosen[x.device](x, *arguments)

    @property
    def implementations(self) -> dict[str, Callable[..., Any]]:
        """Those that there are here, PyTorch's first."""
        found = {"torch": self._torchs}
        if self._triton is not None and INSTALLED:
            found["triton"] = self._triton
        return {**found, **self._others()}

    def take(self, device: torch.device, implementation: str) -> None:
        """On the device from now on, whatever is chosen: for who compares them."""
        self._chosen[device] = self.implementations[implementation]

    def forget(self) -> None:
        """Chooses anew when it is next called."""
        self._chosen.clear()

    def candidates(self, device: torch.device) -> dict[str, Callable[..., Any]]:
        """Those of `implementations` that the device can run."""
        can = {**self.implementations}
        if "triton" in can and self.refusal(device):
            del can["triton"]
        return can

    def refusal(self, device: torch.device) -> str:
        """Why the device can't run its Triton kernel; empty where it can."""
        if why := unusable(device):
            return why
        if not self.products or device.type != "cuda":
            return ""
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor >= PRODUCTS_FROM:
            return ""
        return (
            f"Triton has no matrix instructions for sm_{major}{minor}, only from "
            f"sm_{PRODUCTS_FROM} on: its products would crawl"
        )

    def choice(self, device: torch.device) -> Choice:
        """Raises InputError where FASTFLAG_KERNELS asks for what there is not."""
        if self._triton is None and not self._others():
            return Choice(self._by, "PyTorch's is the one there is")
        said = f"{_VARIABLE}={os.environ.get(_VARIABLE, 'auto')}"
        asked, named = _asked(said)
        if asked == "torch" or (named and self.name not in named):
            return Choice(self._by, said)
        settled = _settled.get(self.name) if device.type == "cuda" else None
        if asked == "triton" and self._triton is not None:
            return self._triton_for(device, said, settled)
        refused = self.refusal(device) if self._triton is not None else ""
        if settled is None or (refused and settled.implementation == "triton"):
            return Choice(self._by, refused or _unproved(device))
        is_torchs = settled.implementation == "torch"
        return replace(settled, implementation=self._by) if is_torchs else settled

    def _triton_for(self, device: torch.device, said: str, settled: Choice | None) -> Choice:
        if why := unusable(device):
            hint = "; TRITON_INTERPRET=1 interprets them" if device.type == "cpu" else ""
            raise InputError(f"{why}{hint}, {said}")
        if why := self.refusal(device):
            return Choice(self._by, why)
        if device.type != "cuda":
            return Choice("triton", f"{said}, in the interpreter")
        return Choice("triton", said, settled.evidence if settled else "none")


def _unproved(device: torch.device) -> str:
    if device.type == "cuda":
        return "not proved: `fastflag doctor --prove` does it"
    return "there is no GPU for Triton's kernels"


def left_open() -> bool:
    """Whether the environment leaves it to what is settled."""
    return os.environ.get(_VARIABLE, "auto") == "auto"


def settle(choices: Mapping[str, Choice]) -> None:
    """What ops take on a GPU from now on, by name, where the environment leaves it open. It is the
    process's: a policy says it again before it evaluates (policy/table.py)."""
    if _settled == choices:
        return
    _settled.clear()
    _settled.update(choices)
    for op in OPS:
        op.forget()


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
    if x.device.type == "cpu" and x.dtype == torch.float32:
        by = {"dtype": dtype, "bias": None}
        if absmax is None:
            product = _linear(x, weight, **by)
        else:
            product = _nf4_linear(x, weight, absmax, len(b), dtype)
        b = b if scale == 1.0 else scale * b
        return product + _linear(_linear(x, a, **by), b, **by)
    b = (b if scale == 1.0 else scale * b).to(x.dtype)
    if absmax is None:
        matrix = partial(weight.to, x.dtype)
    else:
        matrix = partial(nf4_dequantise, weight, absmax, (len(b), x.shape[-1]), dtype)
    made = adapted.product(x.flatten(0, -2), matrix, a.to(x.dtype), b)
    return made.unflatten(0, x.shape[:-1])


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
causal_attention = Op(
    "causal_attention",
    attention.causal,
    by="torch scaled_dot_product_attention",
    others=flash.causal_forms,
)
linear = Op("linear", _linear, by="torch's linear; on a CPU oneDNN's, of fp32 numbers")
frozen_linear = Op("frozen_linear", _frozen_linear, by="as linear; laid out for oneDNN on a CPU")
prefix_attention = Op(
    "prefix_attention",
    _prefix_attention,
    _prefix_attention_triton,
    by="torch's flash attention and products, on a CPU scaled_dot_product_attention by tiles",
    others=flash.prefix_forms,
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
