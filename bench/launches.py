"""What a trained layer launches on a GPU, and what an update does, counted without one.

    python -m bench.launches [--json]

A layer of SmolLM2-135M with adapters on its seven matrices runs over one day's suffixes on the CPU,
under PyTorch's profiler, while Triton compiles in place of launching (bench.compile). Counted are
Triton's launches and PyTorch's operators that compute or copy; views and empty memory are not. On a
GPU each of those operators is one launch or more. PyTorch's flash attention, which a CPU has not,
is one forward, and backward three and two that add up shared heads.

An update is the evaluation of two such layers and one gradient step, over prompts that lie ready,
by PyTorch's operators: launched, and as graphs, of which each is one launch beside what is copied
into its memory and out of it.
"""

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TypeVar

# Read when a kernel is defined.
os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.utils import clip_grad

from bench.compile import compile_instead
from bench.measure.cases import MODELS, PREFIX, SUFFIX, SUFFIXES
from bench.measure.results import Row, publish
from fastflag.config import AlgorithmConfig, PlanConfig, from_dict
from fastflag.learn.update import make_optimizer, update
from fastflag.learn.whole_lesson import whole_lesson
from fastflag.market.tasks.single import ACTIONS
from fastflag.model import attention, joined, ops, packed_attention
from fastflag.model.joined import adapters_cast
from fastflag.model.linear import FrozenLinear, LoRALinear
from fastflag.model.llama import Block, suffix_pass
from fastflag.model.model_config import Settings, json_config
from fastflag.model.proof.key import Subject
from fastflag.model.proof.layer import random_weights
from fastflag.model.shared_prefix import Prefixes, SuffixLayout
from fastflag.model.weights import layer_shapes
from fastflag.policy.graphs import Graphs
from fastflag.policy.table import Policy

CPU, VOCABULARY = torch.device("cpu"), 1024
T = TypeVar("T")

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


def of_update(graphed: bool) -> tuple[int, int]:
    """Of one that is not the first: (evaluation, gradient step)."""
    policy, lesson = _policy(), whole_lesson(PlanConfig(4, 8), VOCABULARY, CPU)
    replays: list[int] = []

    def capture(work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        return work(), lambda: replays.append(1)

    heads = filter(None, [policy.action_head, policy.value_head])
    modules = nn.ModuleList([*policy.top, *heads])
    policy.graphs = Graphs(policy._evaluate_stage, modules, capture if graphed else None)
    algorithm = AlgorithmConfig()
    groups = make_optimizer(policy, algorithm).param_groups
    for group in groups:
        group["lr"] = torch.tensor(group["lr"])
    optimizer = torch.optim.AdamW([group | {"fused": True} for group in groups], fused=True)
    counts: list[int] = []
    for _ in range(3):
        counts.clear()
        replays.clear()
        with profile() as of_evaluation:
            table = policy.evaluate(lesson.prompts)
        counts.append(_operators(of_evaluation) + len(replays))
        replays.clear()
        with profile() as of_step:
            update(policy, optimizer, table, lesson, algorithm, 0)
        counts.append(_operators(of_step) + len(replays))
    return counts[0], counts[1]


def _policy() -> Policy:
    """SmolLM2-135M's two top layers, random, in bf16 as on a GPU."""
    model = MODELS[0]
    sizes = (model.width, model.inner, model.heads, model.kv_heads, model.head_size)
    subject = Subject(*sizes, False, False, len(ACTIONS), "bf16", "bf16", "lora", 8, 2)
    settings = {"dtype": "bf16", "trunk_weights": "bf16", "trunk_disk_mb": 0, "device": "cpu"}
    config = from_dict({"policy": settings}, "launches").policy
    policy = Policy(random_weights(subject, 3, VOCABULARY), config, range(len(ACTIONS)), 0)
    for block in policy.top:
        block.dtype = torch.bfloat16
        block.input_norm, block.mlp_norm = (
            norm.to(block.dtype) for norm in (block.input_norm, block.mlp_norm)
        )
    return policy


def flash_forward(query: Tensor, *_: object) -> packed_attention.Attended:
    # By NumPy, which is not counted.
    lse = torch.from_numpy(np.zeros((query.shape[1], len(query)), np.float32))
    return packed_attention.Attended(torch.zeros_like(query), lse)


def flash_backward(gradient: Tensor, *sides: Tensor) -> tuple[Tensor, ...]:
    query, key, value = sides[:3]
    made = [torch.zeros_like(side) for side in (query, query, query, key, value)]
    return tuple(made[2:])


def _operators(profiled: profile) -> int:
    """PyTorch's operators that compute: those that call no other that does."""
    return sum(_launches(event) for event in profiled.function_events if not event.cpu_parent)


def _launches(event: FunctionEvent) -> int:
    """What is done to a list of tensors is one launch on a GPU, for each tensor one on a CPU."""
    if "::_foreach" in event.name:
        return 1
    return sum(map(_launches, event.cpu_children)) or _computes(event)


def _computes(event: FunctionEvent) -> bool:
    namespace, _, name = event.name.partition("::")
    return namespace == "aten" and name not in _FREE.split()


def update_rows() -> list[Row]:
    for op in ops.OPS:
        op._chosen[CPU] = op._torchs
    clip_grad._has_foreach_support = lambda *_: True  # of all gradients at once, as on a GPU
    ways = {"launched": of_update(False), "graphs": of_update(True)}
    return [
        Row(what, "2 layers", name, counts[place], "launches", ratio, "launched")
        for place, what in enumerate(("evaluation", "gradient step"))
        for name, counts in ways.items()
        for ratio in [ways["launched"][place] / counts[place]]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.launches")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON document")
    as_json = parser.parse_args().json
    launched = compile_instead(90)
    joined.taken = lambda device: True  # as on a GPU
    block, rows = layer(), []
    ops.prefix_attention._torchs = attention.on_cuda
    packed_attention._attend, packed_attention._differentiate = flash_forward, flash_backward
    ways = {"torch": "_torchs", "triton": "_triton"}
    casts = {"torch": block.dtype, "triton": torch.float32}  # as policy/table.py has them
    contexts = {name: partial(adapters_cast, block, dtype) for name, dtype in casts.items()}
    counted = {}
    for name, way in ways.items():
        for op in ops.OPS:
            op._chosen[CPU] = getattr(op, way) or op._torchs
        counted[name] = launches(block, launched, contexts[name])
    for place, what in enumerate(("layer forward", "layer backward")):
        for name, counts in counted.items():
            ratio = counted["torch"][place] / counts[place]
            shape = f"{SUFFIXES} x {SUFFIX}"
            rows.append(Row(what, shape, name, counts[place], "launches", ratio, "torch"))
    rows += update_rows()
    publish("launches", rows, as_json)


if __name__ == "__main__":
    main()
