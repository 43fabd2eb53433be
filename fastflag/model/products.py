"""Products of fp32 numbers with a model's matrices on a CPU, which may round their factors to bf16.

On a CPU activations are fp32, whatever the configuration's dtype. In bf16 oneDNN rounds the two
factors of a product inside it and gives the sums in fp32: what comes out of a product is not
rounded, nor what happens between products. Products that give bf16 were up to twice as fast, but
the gradient's error was 0.196 of its norm for 0.094 (SmolLM2-135M, AMX), and a row's bits depended
on how many rows there were, as those of MKL's fp32 products do on Intel's CPUs. oneDNN's fp32
products, from 64 rows on, give a row the same bits beside any others.

Without bf16 units oneDNN rounds nothing: matrices that are kept in bf16 are all that is rounded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Not public: where a version has them not, `linear` does it.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
)
# Products of fewer rows are computed in another order: of under 16 in fp32, of under 40 in bf16.
_LEAST_ROWS = 64


def product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + b with gradient. x [..., I] fp32, weight [O, I] of any dtype, bias [O] fp32 or None;
    `dtype` is what the factors are rounded to, fp32 or bf16. -> [..., O] fp32"""
    return _Product.apply(x, weight, bias, dtype)


def laid_out(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The product with one matrix, without gradient, for one x after another.

    The matrix is laid out for oneDNN once, as torch.compile does it for frozen models: 15% faster
    on 500 to 4,000 rows (2 cores, AVX2), with the same bits.
    """
    matrix = weight.float()
    matrix = torch.ops.mkldnn._reorder_linear_weight(matrix) if HAS_ONEDNN else matrix
    return lambda x: _multiplied(x, matrix, bias, dtype)


class _Product(torch.autograd.Function):
    """The gradient's products are rounded as the forward's are."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        return _multiplied(x, weight.float(), bias, dtype)

    @staticmethod
    # pyrefly: ignore[bad-override] (torch's own has any number of gradients; there is one)
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        rows = gradient.flatten(0, -2)
        with _rounding(ctx.dtype):
            if ctx.needs_input_grad[0]:
                of_x = (rows @ weight.float()).view_as(x)
            if ctx.needs_input_grad[1]:
                of_weight = (rows.T @ x.flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias, None


def _multiplied(x: Tensor, matrix: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """matrix [O, I] fp32, as it lies or laid out."""
    rows = x.flatten(0, -2)
    missing = max(_LEAST_ROWS - len(rows), 0)
    rows = functional.pad(rows, (0, 0, 0, missing)) if missing else rows
    with _rounding(dtype):
        if HAS_ONEDNN:
            made = torch.ops.mkldnn._linear_pointwise(rows, matrix, bias, "none", [], "")
        else:
            made = functional.linear(rows, matrix, bias)
    return made[: len(made) - missing].unflatten(0, x.shape[:-1])


@contextmanager
def _rounding(dtype: torch.dtype) -> Iterator[None]:
    """Inside, PyTorch's products of fp32 numbers round their factors to `dtype` on a CPU.

    All of the process's: another thread's too, so one thread alone may compute. Attention's would
    take five times as long (measured, AMX), so it stays outside.
    """
    # pyrefly: ignore[missing-attribute] (torch puts it there when it is imported)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if dtype == torch.bfloat16 else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
