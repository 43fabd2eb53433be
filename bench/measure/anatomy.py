"""What an update's time is made of: its matrix products at a linear layer's speed, and the rest.

The products are counted as they run, forward and backward, attention's too, and set against the
speed that a frozen linear layer (`ops.frozen_linear`) has on this machine in the same moment, on a
product of the model's shape. The rest is told by kind of operator, as PyTorch's profiler measures
it; what no operator takes is Python.
"""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.measure.results import Row
from fastflag.model.arithmetic import measured
from fastflag.model.products import HAS_ONEDNN

_KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise"),
    "attention": ("_scaled_dot_product", "_softmax"),
    "copies": ("copy_", "cat", "_to_copy", "index", "clone", "contiguous", "split"),
    "unpacking": ("dequantize",),
}


def update_rows(
    work: Callable[[], object],
    seconds: Callable[[Callable[[], object]], float],
    shape: str,
    dtype: str,
    widths: tuple[int, int],
    rounds: int,
) -> list[Row]:
    """Rows of `work`, an update with a warm cache, whose products are in `dtype`; `widths` are the
    model's and its MLP's. Each round times an update and a linear layer's product side by side.
    None on a GPU, where neither kernels' products nor a replayed graph's are counted."""
    if torch.cuda.is_available():
        return []
    device = torch.device("cpu")
    operations = operations_of(work)
    ratios, ideals = [], []
    for _ in range(rounds):
        before = measured(device, *widths).gigaflops(dtype)
        took = seconds(work)
        after = measured(device, *widths).gigaflops(dtype)
        ideals.append(operations / (1e9 * (before + after) / 2))
        ratios.append(took / ideals[-1])
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        took = seconds(work)
    middle = sorted(range(rounds), key=ratios.__getitem__)[rounds // 2]
    note = f"{operations / 1e9:.0f} GFLOP, counted"
    rows = [
        Row(
            "matrix products of an update",
            shape,
            "a linear layer's speed",
            ideals[middle],
            "s",
            note=note,
        ),
        Row("an update over its products", shape, "fastflag", ratios[middle], "x"),
    ]
    return rows + [
        Row(f"share of an update: {kind}", shape, "fastflag", 100 * part / took, "%")
        for kind, part in _by_kind(profiled, took).items()
    ]


def operations_of(work: Callable[[], object]) -> int:
    """Multiplications and additions in the products of `work` on a CPU, attention's included, of
    which masked ones count too."""
    with FlopCounterMode(display=False, custom_mapping=_uncounted()) as counter:
        work()
    return counter.get_total_flops()


def _uncounted() -> dict[object, Callable[..., int]]:
    """The operators with products that PyTorch does not count, and what counts theirs: oneDNN's
    (model/products.py) and a CPU's attention."""
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    forward, backward = (getattr(torch.ops.aten, attention + end) for end in ("", "_backward"))
    counted = {forward: _attention_operations, backward: _attention_backward_operations}
    if HAS_ONEDNN:
        counted[torch.ops.mkldnn._linear_pointwise] = _product_operations
    return counted


def _product_operations(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * math.prod(x) * weight[0]


def _attention_operations(query: torch.Size, key: torch.Size, *_: object, **__: object) -> int:
    """Two products: queries with keys, weights with values. query [B, H, Q, E], key [B, G, K, E]"""
    return 2 * (2 * math.prod(query) * key[-2])


def _attention_backward_operations(
    gradient: torch.Size, query: torch.Size, key: torch.Size, *_: object, **__: object
) -> int:
    """Five: the weights again, and the gradients of weights, values, queries and keys."""
    return 5 * (2 * math.prod(query) * key[-2])


def _by_kind(profiled: profile, took: float) -> dict[str, float]:
    """Seconds of each kind of operator, of all others, and of Python."""
    found: Counter[str] = Counter()
    for event in profiled.key_averages():
        name = event.key.partition("::")[2]
        if event.key.startswith("autograd::") or not name:
            continue
        kind = next(
            (kind for kind, starts in _KINDS.items() if name.startswith(starts)), "elementwise"
        )
        found[kind] += event.self_cpu_time_total / 1e6
    return dict(found) | {"Python and autograd": max(took - sum(found.values()), 0.0)}
