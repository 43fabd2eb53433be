"""RMSNorm (arXiv 1910.07467, eq. 4): y = x / sqrt(mean(x^2) + epsilon) * weight over the last axis.

What is normed is x, or a residual stream's next state x + residual, which is then an output too.
The norm has the weight's type, the next state the residual's. So a stream in fp32 is read in fp32
and rounded once, for the product that follows. The weight is frozen and has no gradient. That of x:

    r = 1 / sqrt(mean(x^2) + epsilon),  g = dy weight
    dx = r g - r^3 x mean(g x)

With total = x + residual, both addends have the gradient dtotal + dx(total), each in its own type.
One launch adds and norms, one differentiates both, and each reads its inputs once. PyTorch takes
nine operators forward, and most of their intermediate results are fp32.
"""

import torch
from torch import Tensor

from fastflag.kernels.compiler import launching
from fastflag.kernels.language import cdiv, check_shapes, jit, next_power_of_2, tl


@jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,  # [R, C]
    residual_ptr,  # [R, C], or None: x alone is normed
    weight_ptr,  # [C]
    total_ptr,  # [R, C], or None like residual
    normed_ptr,  # [R, C]
    rows,
    columns,
    epsilon,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets, column, inside = _tile(rows, columns, ROWS, BLOCK)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, total, mask=inside)
        # What is normed is the total that others read, after its rounding.
        x = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / columns + epsilon)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    normed = x * scale * weight
    tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows"])
def _backward_kernel(
    x_ptr,  # [R, C], what was normed
    weight_ptr,  # [C]
    dy_ptr,  # [R, C]
    dtotal_ptr,  # [R, C], or None: x has no other gradient
    dx_ptr,  # [R, C]
    rows,
    columns,
    epsilon,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets, column, inside = _tile(rows, columns, ROWS, BLOCK)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / columns + epsilon)
    g = dy * weight
    mean = tl.sum(g * x, axis=1, keep_dims=True) / columns
    dx = scale * g - scale * scale * scale * x * mean
    if dtotal_ptr is not None:
        dx += tl.load(dtotal_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@jit
def _tile(rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's offsets, their columns, and which of them exist, each [ROWS, BLOCK]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    # One for each offset: the layout of a single row would be changed through shared memory. For
    # Qwen3's heads that doubles the backward kernel's instructions and registers.
    column = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], ROWS, BLOCK)
    return row * columns + column, column, (row < rows) & (column < columns)


@torch.library.custom_op("fastflag::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., C], weight [C] -> [..., C] in the weight's type"""
    normed = _empty(x, weight.dtype)
    _launch(_forward_kernel, x, None, weight, None, normed, epsilon=epsilon)
    return normed


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return _empty(x, weight.dtype)


@torch.library.custom_op("fastflag::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """x and residual [..., C], weight [C] -> x + residual in the residual's type, and its norm in
    the weight's."""
    check_shapes(x, residual)
    total, normed = _empty(residual), _empty(x, weight.dtype)
    _launch(_forward_kernel, x, residual, weight, total, normed, epsilon=epsilon)
    return total, normed


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return _empty(residual), _empty(x, weight.dtype)


@torch.library.custom_op("fastflag::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    x: Tensor, weight: Tensor, dy: Tensor, dtotal: Tensor | None, epsilon: float
) -> Tensor:
    """The gradient for what was normed, x [..., C]; `dtotal` is the one it has from elsewhere."""
    dx = _empty(x)
    _launch(_backward_kernel, x, weight, dy, dtotal, dx, epsilon=epsilon)
    return dx


@rms_norm_backward.register_fake
def _(x: Tensor, weight: Tensor, dy: Tensor, dtotal: Tensor | None, epsilon: float) -> Tensor:
    return _empty(x)


def _save(ctx, inputs, output) -> None:
    x, weight, ctx.epsilon = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
    return rms_norm_backward(*ctx.saved_tensors, dy, None, ctx.epsilon), None, None


def _save_sum(ctx, inputs, output) -> None:
    x, _, weight, ctx.epsilon = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(output[0], weight)


def _differentiate_sum(ctx, dtotal: Tensor, dnormed: Tensor) -> tuple[Tensor, Tensor, None, None]:
    dtotal = rms_norm_backward(*ctx.saved_tensors, dnormed, dtotal, ctx.epsilon)
    return dtotal.to(ctx.dtype), dtotal, None, None


rms_norm.register_autograd(_differentiate, setup_context=_save)
add_rms_norm.register_autograd(_differentiate_sum, setup_context=_save_sum)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The same in PyTorch: in fp32, rounded once; in fp64 where x and the weight are."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * (wide.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    return (normed * weight).to(weight.dtype)  # a product in the wider of the two types


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch."""
    total = (x + residual).to(residual.dtype)
    return total, rms_norm_reference(total, weight, epsilon)


# Elements a program: a whole row, or as many short ones (the heads of q and k) as fit.
_ELEMENTS = 2048


def _launch(kernel, x: Tensor, *tensors: Tensor | None, epsilon: float) -> None:
    """Outputs are contiguous; inputs that are not are copied. A warp for every 512 elements."""
    columns = x.shape[-1]
    rows, block = x.numel() // columns, next_power_of_2(columns)
    rows_each = max(_ELEMENTS // block, 1)
    with launching(x):
        kernel[(cdiv(rows, rows_each),)](
            *(tensor if tensor is None else tensor.contiguous() for tensor in (x, *tensors)),
            rows,
            columns,
            epsilon,
            ROWS=rows_each,
            BLOCK=block,
            num_warps=min(rows_each * block // 512, 16),
        )


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
