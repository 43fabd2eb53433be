"""A layer's matrices in NF4 beside those in bf16, the kernel's and PyTorch's by PEFT's formula."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.measure.cases import Memory, Model
from bench.measure.results import Row
from bench.rivals.ops import adapted
from fastflag.model.proof.clock import Clock, interleaved


def layer_rows(model: Model, tokens: int, linear: Callable, timer: Clock) -> list[Row]:
    """Ratios are to the fastest in bf16, the kernel's or PyTorch's by PEFT's formula."""
    rank, memory = 16, Memory(timer.device)

    def peft(x, weight, absmax, a, b, scale):
        return adapted(torch.nn.functional.linear(x, weight), x, a, b, scale)

    works = {
        name: partial(_layer_pass, layer_inputs(model, tokens, rank, memory, nf4), linear)
        for name, linear, nf4 in (
            ("nf4", linear, True),
            ("bf16", linear, False),
            ("bf16, torch + peft", peft, False),
        )
    }
    times = interleaved(works, timer, 30, 3.0)
    best = min(("bf16", "bf16, torch + peft"), key=lambda name: times[name].percentile(50))
    what, shape = "LoRA layer forward + backward", f"{model.name}, {tokens} tokens"
    return [
        Row(what, shape, name, 1e3 * took.percentile(50), "ms", took.faster_than(times[best]), best)
        for name, took in times.items()
    ]


def layer_inputs(model: Model, tokens: int, rank: int, memory: Memory, nf4: bool) -> list[dict]:
    """Arguments of lora_linear for q, k, v, o, gate, up and down; equal inputs are one tensor."""
    inner, groups = model.heads * model.head_size, model.kv_heads * model.head_size
    width = model.width
    shapes = [(inner, width), (groups, width), (groups, width), (width, inner)]
    shapes += [(model.inner, width), (model.inner, width), (width, model.inner)]
    sources = {
        "attention": memory.normal(tokens, width),
        "attended": memory.normal(tokens, inner),
        "mlp": memory.normal(tokens, width),
        "activated": memory.normal(tokens, model.inner),
    }
    order = ("attention", "attention", "attention", "attended", "mlp", "mlp", "activated")
    return [
        {
            "x": sources[source].requires_grad_(),
            **_stored_matrix(outputs, columns, memory, nf4),
            "a": memory.normal(rank, columns, dtype=torch.float32).requires_grad_(),
            "b": memory.normal(outputs, rank, dtype=torch.float32).requires_grad_(),
            "scale": 2.0,
        }
        for source, (outputs, columns) in zip(order, shapes, strict=True)
    ]


def _stored_matrix(outputs: int, columns: int, memory: Memory, nf4: bool) -> dict[str, Any]:
    if not nf4:
        return {"weight": memory.normal(outputs, columns, scale=columns**-0.5), "absmax": None}
    size = outputs * columns
    packed = torch.randint(256, ((size + 1) // 2,), dtype=torch.uint8, device=memory.device)
    absmax = memory.normal((size + 63) // 64, dtype=torch.float32, scale=columns**-0.5).abs_()
    return {"weight": packed, "absmax": absmax}


def _layer_pass(inputs: list[dict], linear: Callable) -> Callable[[], Any]:
    leaves = list({id(t): t for some in inputs for t in (some["x"], some["a"], some["b"])}.values())
    shapes = [(len(some["x"]), len(some["b"])) for some in inputs]
    x = inputs[0]["x"]
    gradients = [torch.randn(shape, device=x.device).to(x.dtype) for shape in shapes]

    def work() -> Any:
        outputs = [linear(**some) for some in inputs]
        return torch.autograd.grad(outputs, leaves, gradients)

    return work
