"""The product of a frozen matrix and of its adapter (LoRA) by PyTorch's operators on a GPU, each
sum made in place by a product:

    S = x A^T,  y = x W^T + S B^T
    dS = dy B,  dx = dy W + dS A,  dA = dS^T x,  dB = dy^T S

Shapes: M rows, I inputs, O outputs, R the rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def product(x: Tensor, matrix: Callable[[], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """y [M, O], of x [M, I], a [R, I] and b [O, R] of one type. `matrix` gives W [O, I], again in
    the backward pass: what it has to make is not kept."""
    return _Adapted.apply(x, matrix, a, b)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Callable[[], Tensor], a: Tensor, b: Tensor) -> Tensor:
        low = functional.linear(x, a)
        ctx.matrix = matrix
        ctx.save_for_backward(x, a if ctx.needs_input_grad[0] else None, b, low)
        return functional.linear(x, matrix()).addmm_(low, b.T)

    @staticmethod
    # pyrefly: ignore[bad-override] (torch's own has any number of gradients; there is one)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        dlow = dy @ b
        dx = None if a is None else (dy @ ctx.matrix()).addmm_(dlow, a)
        return dx, None, dlow.T @ x, dy.T @ low
