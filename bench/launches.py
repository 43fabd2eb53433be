"""What a trained layer launches on a GPU, forward and backward, counted without one.

    python -m bench.launches [--json]

A layer of SmolLM2-135M with adapters on its seven matrices runs over one day's suffixes on the CPU,
under PyTorch's profiler, while Triton compiles in place of launching (bench.compile). Counted are
Triton's launches and PyTorch's operators that compute or copy; views and empty memory are not. On a
GPU each of those operators is one launch or more. PyTorch's flash attention, which a CPU has not,
is one forward, and backward three and two that add up shared heads.
"""

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

# Read when a kernel is defined.
os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.autograd.profiler_util import FunctionEvent

from bench.compile import compile_instead
from bench.measure.cases import MODELS, PREFIX, SUFFIX, SUFFIXES
from bench.measure.results import Row, publish
from fastflag.model import attention, joined, ops, packed_attention
from fastflag.model.joined import adapters_cast
from fastflag.model.linear import FrozenLinear, LoRALinear
from fastflag.model.llama import Block, suffix_pass
from fastflag.model.model_config import Settings, json_config
from fastflag.model.shared_prefix import Prefixes, SuffixLayout
from fastflag.model.weights import layer_shapes

_FREE = """
    _reshape_alias _unsafe_view alias as_strided chunk contiguous detach empty empty_like
    empty_strided expand flatten lift_fresh mT narrow new_empty numpy_T permute promote_types
    reshape resize_ resolve_conj result_type select set_ slice split split_with_sizes squeeze t to
    transpose unbind unflatten unsqueeze view view_as
    """


class Weights:
    """One layer of a model's shape, random."""

    source = "random"

    def __init__(self):
        model = MODELS[0]
        settings = {
            "model_type": "llama",
            "num_hidden_layers": 2,  # the last of a model has fewer queries than keys
            "hidden_size": model.width,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "intermediate_size": model.inner,
            "vocab_size": model.vocabulary,
            "max_position_embeddings": 2048,
        }
        self.config = json_config(Settings(settings, self.source))
        self._shapes = {f"model.layers.0.{k}": v for k, v in layer_shapes(self.config).items()}

    def names(self) -> list[str]:
        return list(self._shapes)

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        return torch.randn(self._shapes[name], dtype=dtype).mul_(0.02)


def layer(dtype: torch.dtype = torch.bfloat16) -> Block:
    generator = torch.Generator().manual_seed(0)

    def adapted(weight: Tensor, bias: Tensor | None) -> LoRALinear:
        return LoRALinear(FrozenLinear(weight, bias, dtype), 16, 32.0, generator)

    block = Block(Weights(), 0, dtype, torch.device("cpu"), adapted)
    # A CPU's activations are fp32, a GPU's are not.
    block.dtype = dtype
    block.input_norm, block.mlp_norm = (n.to(dtype) for n in (block.input_norm, block.mlp_norm))
    return block


def launches(
    block: Block, launched: list, context: Callable[[], AbstractContextManager] = nullcontext
) -> tuple[int, int]:
    """Of one day's suffixes through the layer, inside of a context: (forward, backward). `launched`
    is the list to which every launch of Triton's adds."""
    model = MODELS[0]
    x = torch.randn(SUFFIXES, SUFFIX, model.width).requires_grad_()
    shared = torch.randn(2, 1, model.kv_heads, PREFIX, model.head_size, dtype=torch.bfloat16)
    prefixes = [Prefixes([tuple(shared.requires_grad_().unbind())], [PREFIX])]
    layout = SuffixLayout.build([SUFFIXES], [PREFIX], torch.full((SUFFIXES,), SUFFIX), SUFFIX)
    counts = []
    for _ in range(2):  # the first time compiles, and whatever that computes is counted too
        counts.clear()
        launched.clear()
        block.zero_grad()
        with profile() as of_forward, context():
            y = suffix_pass([block], x, prefixes, layout)
        counts.append(_operators(of_forward) + len(launched))
        launched.clear()
        with profile() as of_backward:
            y.backward(torch.ones_like(y))
        counts.append(_operators(of_backward) + len(launched))
    return counts[0], counts[1]


def flash_forward(query: Tensor, *_: object) -> packed_attention.Attended:
    lse = torch.empty(query.shape[1], len(query))
    return packed_attention.Attended(torch.zeros_like(query), lse)


def flash_backward(gradient: Tensor, *sides: Tensor) -> tuple[Tensor, ...]:
    query, key, value = sides[:3]
    made = [torch.zeros_like(side) for side in (query, query, query, key, value)]
    return tuple(made[2:])


def _operators(profiled: profile) -> int:
    """PyTorch's operators that compute: those that call no other that does."""
    return sum(_computes(event) and not _any_below(event) for event in profiled.function_events)


def _any_below(event: FunctionEvent) -> bool:
    return any(_computes(child) or _any_below(child) for child in event.cpu_children)


def _computes(event: FunctionEvent) -> bool:
    namespace, _, name = event.name.partition("::")
    return namespace == "aten" and name not in _FREE.split()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.launches")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON document")
    as_json = parser.parse_args().json
    launched = compile_instead(90)
    joined.taken = lambda device: True  # as on a GPU
    block, rows, cpu = layer(), [], torch.device("cpu")
    ops.prefix_attention._torchs = attention.on_cuda
    packed_attention._attend, packed_attention._differentiate = flash_forward, flash_backward
    ways = {"torch": "_torchs", "triton": "_triton"}
    casts = {"torch": block.dtype, "triton": torch.float32}  # as policy/table.py has them
    contexts = {name: partial(adapters_cast, block, dtype) for name, dtype in casts.items()}
    counted = {}
    for name, way in ways.items():
        for op in ops.OPS:
            op._chosen[cpu] = getattr(op, way) or op._torchs
        counted[name] = launches(block, launched, contexts[name])
    for place, what in enumerate(("layer forward", "layer backward")):
        for name, counts in counted.items():
            ratio = counted["torch"][place] / counts[place]
            shape = f"{SUFFIXES} x {SUFFIX}"
            rows.append(Row(what, shape, name, counts[place], "launches", ratio, "torch"))
    publish("launches", rows, as_json)


if __name__ == "__main__":
    main()
