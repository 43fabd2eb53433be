"""SwiGLU (arXiv 2002.05202, eq. 6, between its linear layers): y = silu(gate) up, elementwise, with
silu(g) = g s(g) and s the logistic function:

    dup = dy silu(gate),  dgate = dy up s (1 + gate (1 - s))

One launch forward, and one for both gradients, which recomputes s. Only gate and up are kept.
PyTorch writes silu(gate) and its gradient to memory and reads them back.
"""

import torch
from torch import Tensor

from fastflag.kernels.compiler import launching
from fastflag.kernels.language import cdiv, check_alike, jit, tl
from fastflag.kernels.tiles import recorded

# Each thread has 16 bytes of each array in a 16-bit type. Nothing is reused, so no architecture
# gains from more.
_TILES = {80: {"BLOCK": 1024, "num_warps": 4}}


@jit
def _forward_kernel(
    gate_ptr,  # [R, F]
    up_ptr,  # [R, F]
    y_ptr,  # [R, F], contiguous
    gate_stride,
    up_stride,
    columns,
    BLOCK: tl.constexpr,
):
    row, column = _place(BLOCK)
    inside = column < columns
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    # Rounded before the product, as PyTorch's silu is.
    silu = (wide * _logistic(wide)).to(gate.dtype).to(tl.float32)
    tl.store(y_ptr + row * columns + column, (silu * up).to(gate.dtype), mask=inside)


@jit
def _backward_kernel(
    gate_ptr,  # [R, F]
    up_ptr,  # [R, F]
    dy_ptr,  # [R, F], contiguous as the gradients are
    dgate_ptr,  # [R, F]
    dup_ptr,  # [R, F]
    gate_stride,
    up_stride,
    columns,
    BLOCK: tl.constexpr,
):
    row, column = _place(BLOCK)
    inside = column < columns
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    logistic = _logistic(gate)
    dgate = dy * up * logistic * (1.0 + gate * (1.0 - logistic))
    dup = dy * gate * logistic
    dtype: tl.constexpr = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + row * columns + column, dgate.to(dtype), mask=inside)
    tl.store(dup_ptr + row * columns + column, dup.to(dtype), mask=inside)


@jit
def _place(BLOCK: tl.constexpr):
    """This program's row and columns."""
    return tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)


@jit
def _logistic(x):
    """1 / (1 + exp(-x)), without an exponential that overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@torch.library.custom_op("fastflag::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [..., F] of the same type -> [..., F]

    Rows may be any constant distance apart: the halves of one [..., 2F] are read where they lie.
    silu(gate) is rounded to its type before the product, as in PyTorch; the gradients once.
    """
    check_alike(gate, up)
    y = _empty(gate)
    _launch(_forward_kernel, gate, up, y)
    return y


@swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return _empty(gate)


@torch.library.custom_op("fastflag::swiglu_backward", mutates_args=())
def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients for gate and up, each [..., F]."""
    dgate, dup = _empty(gate), _empty(up)
    _launch(_backward_kernel, gate, up, dy.contiguous(), dgate, dup)
    return dgate, dup


@swiglu_backward.register_fake
def _(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(gate), _empty(up)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward(*ctx.saved_tensors, dy)


swiglu.register_autograd(_differentiate, setup_context=_save)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same in PyTorch."""
    return torch.nn.functional.silu(gate) * up


def _launch(kernel, gate: Tensor, up: Tensor, *tensors: Tensor) -> None:
    gate, up = _rows(gate), _rows(up)
    rows, columns = gate.shape
    tile = recorded(_TILES, gate.device)
    with launching(gate):
        kernel[(rows, cdiv(columns, tile["BLOCK"]))](
            gate, up, *tensors, gate.stride(0), up.stride(0), columns, **tile
        )


def _rows(x: Tensor) -> Tensor:
    """[..., F] -> [R, F] with unit stride in F; a copy only where rows have no constant stride."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
