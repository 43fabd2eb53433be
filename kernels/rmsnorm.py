"""RMSNorm (arXiv 1910.07467, eq. 4): y = x / sqrt(mean(x^2) + epsilon) * weight over the last axis.

The weight is frozen in every policy, so there is no gradient for it:

    r = 1 / sqrt(mean(x^2) + epsilon),  g = dy weight
    dx = r g - r^3 x mean(g x)
"""

import torch
from torch import Tensor

from fastflag.kernels.language import jit, next_power_of_2, tl


@jit
def _forward_kernel(
    x_ptr,  # [R, C]
    weight_ptr,  # [C]
    y_ptr,  # [R, C]
    columns,
    epsilon,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    start = tl.program_id(0).to(tl.int64) * columns
    stored = tl.load(x_ptr + start + offsets, mask=inside, other=0.0)
    x = stored.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x) / columns + epsilon)
    # Rounded to x's type before the weight, as the reference is.
    normed = (x * scale).to(stored.dtype)
    weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
    tl.store(y_ptr + start + offsets, normed * weight, mask=inside)


@jit
def _backward_kernel(
    x_ptr,  # [R, C]
    weight_ptr,  # [C]
    dy_ptr,  # [R, C]
    dx_ptr,  # [R, C]
    columns,
    epsilon,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    start = tl.program_id(0).to(tl.int64) * columns
    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x) / columns + epsilon)
    g = dy * weight
    dx = scale * g - scale * scale * scale * x * (tl.sum(g * x) / columns)
    tl.store(dx_ptr + start + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("fastflag::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., C], weight [C] of the same type -> [..., C]; one program a row."""
    rows = x.contiguous().view(-1, x.shape[-1])
    y = torch.empty_like(rows)
    _forward_kernel[(len(rows),)](rows, weight, y, rows.shape[1], epsilon, **_tile(rows))
    return y.view(x.shape)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastflag::rms_norm_backward", mutates_args=())
def rms_norm_backward(x: Tensor, weight: Tensor, dy: Tensor, epsilon: float) -> Tensor:
    """The gradient for x, [..., C]."""
    rows = x.contiguous().view(-1, x.shape[-1])
    dx = torch.empty_like(rows)
    _backward_kernel[(len(rows),)](
        rows, weight, dy.contiguous(), dx, rows.shape[1], epsilon, **_tile(rows)
    )
    return dx.view(x.shape)


@rms_norm_backward.register_fake
def _(x: Tensor, weight: Tensor, dy: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    x, weight, ctx.epsilon = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
    return rms_norm_backward(*ctx.saved_tensors, dy, ctx.epsilon), None, None


rms_norm.register_autograd(_differentiate, setup_context=_save)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The same in PyTorch: the mean in fp32, rounded to x's type before the weight."""
    wide = x.float()
    normed = wide * (wide.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    return weight * normed.to(x.dtype)


def _tile(rows: Tensor) -> dict[str, int]:
    """A whole row to a program, a warp for every 512 columns."""
    block = next_power_of_2(rows.shape[1])
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}
