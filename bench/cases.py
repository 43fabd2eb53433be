"""Each fused op at the shapes of three models: what bench.compile, bench.kernels and bench.gpu run.

Shapes: M rows (tokens), N samples, D days of P tokens, U suffixes of S tokens; the model's are in
`Model`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastflag.kernels.rmsnorm import rms_norm


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
DAYS, PREFIX, SUFFIXES, SUFFIX = 64, 150, 24, 16


@dataclass(frozen=True)
class Memory:
    """Makes a case's tensors: with random numbers, or without any where nothing is computed."""

    device: str
    random: bool = True

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0
    ) -> Tensor:
        if not self.random:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, device=self.device).mul_(scale).to(dtype)


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

    def run(self, memory: Memory) -> None:
        """Forward and backward once."""
        inputs = self.inputs(memory)
        trained = [inputs[name].requires_grad_() for name in self.trained]
        outputs = self.op(**inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        differentiable = [output for output in outputs if output.requires_grad]
        if trained:
            gradients = [torch.empty_like(output) for output in differentiable]
            torch.autograd.grad(differentiable, trained, gradients)


def _norms() -> Iterator[Case]:
    for model in MODELS:

        def inputs(memory: Memory, width: int = model.width) -> Inputs:
            rows = DAYS * SUFFIXES
            return {
                "x": memory.normal(rows, width),
                "weight": memory.normal(width),
                "epsilon": 1e-5,
            }

        yield Case(rms_norm, model.name, inputs, ("x",))


CASES = (*_norms(),)
