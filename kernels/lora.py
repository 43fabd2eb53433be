"""A linear layer whose weight W is frozen, with a low-rank adapter (LoRA, arXiv 2106.09685, eq. 3):

    S = x A^T,  y = x W^T + scale S B^T
    dS = scale dy B,  dx = dy W + dS A,  dA = dS^T x,  dB = scale dy^T S

The adapter costs little arithmetic. Unfused, its product reads and writes y once more, and its
gradients read dy twice and dx once more. So the large product's accumulator starts from the small
product, forward and backward, and one kernel computes dS and dB from one reading of dy (the split
at S is LoRAFusion's, arXiv 2510.00206). S and dA are the library's products.

An NF4 W is decoded tile by tile inside the product, where there are few rows: each block of rows
decodes it again. For more rows it is decoded to memory once, and the products are the library's.
"""

from math import inf

import torch
from torch import Tensor
from torch.nn import functional

from fastflag.kernels.compiler import launching
from fastflag.kernels.language import cdiv, jit, next_power_of_2, tl
from fastflag.kernels.nf4 import BLOCKSIZE, decode, nf4_dequantise, nf4_dequantise_reference
from fastflag.kernels.tiles import Tile, recorded


@jit
def _weight_tile(
    weight_ptr,  # [rows, columns], or NF4: u8 [rows * columns / 2]
    absmax_ptr,  # None, or of NF4: fp32 [rows * columns / 64]
    row,
    column,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    dtype: tl.constexpr,
):
    """[ROWS, COLUMNS] of W in `dtype` from [row, column] on, zero outside. NF4 needs COLUMNS,
    `column` and `columns` to be multiples of 64."""
    row = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    inside = row < rows
    if absmax_ptr is None:
        at = column + tl.arange(0, COLUMNS)[None, :]
        mask = inside & (at < columns)
        tile = tl.load(weight_ptr + row * columns + at, mask=mask, other=0.0).to(dtype)
    else:
        at = column // 2 + tl.arange(0, COLUMNS // 2)[None, :]
        mask = inside & (at < columns // 2)
        packed = tl.load(weight_ptr + row * (columns // 2) + at, mask=mask, other=0)
        at = column // 64 + tl.arange(0, COLUMNS // 64)[None, :]
        mask = inside & (at < columns // 64)
        absmax = tl.load(absmax_ptr + row * (columns // 64) + at, mask=mask, other=0.0)
        tile = decode(packed, absmax, dtype)
    return tile


@jit(do_not_specialize=["rows"])
def _product_kernel(
    x_ptr,  # [M, I]; I = K, O = N forward, I = N, O = K backward
    weight_ptr,  # [N, K], or NF4: u8 [N * K / 2]
    absmax_ptr,  # None, or of NF4: fp32 [N * K / 64]
    low_ptr,  # [M, R], of x's type
    up_ptr,  # [O, R], of any strides and type
    y_ptr,  # [M, O]
    rows,
    outputs,
    inputs,
    rank,
    up_stride,
    up_rank_stride,
    scale,
    FORWARD: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    inner = inputs if FORWARD else outputs
    outer = outputs if FORWARD else inputs
    # Eight tiles of rows follow one another at each tile of W: what they read stays in the L2.
    tiles = tl.cdiv(outer, BLOCK_O)
    number = tl.program_id(0)
    m, o = tl.swizzle2d(number // tiles, number % tiles, tl.cdiv(rows, BLOCK_M), tiles, 8)
    first = o * BLOCK_O
    o = first + tl.arange(0, BLOCK_O)
    r = tl.arange(0, RANK)[None, :]
    row = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    inside = row < rows
    low = tl.load(low_ptr + row * rank + r, mask=inside & (r < rank), other=0.0)
    up_ptrs = up_ptr + o[:, None] * up_stride + r * up_rank_stride
    up = tl.load(up_ptrs, mask=(o < outer)[:, None] & (r < rank), other=0.0).to(dtype)
    y = tl.dot(low, tl.trans(up), input_precision="ieee", out_dtype=wide) * scale
    for start in range(0, inner, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)[None, :]
        x = tl.load(x_ptr + row * inner + i, mask=inside & (i < inner), other=0.0)
        tile = _weight_tile(
            weight_ptr,
            absmax_ptr,
            first if FORWARD else start,
            start if FORWARD else first,
            outputs,
            inputs,
            BLOCK_O if FORWARD else BLOCK_I,
            BLOCK_I if FORWARD else BLOCK_O,
            dtype,
        )
        tile = tl.trans(tile) if FORWARD else tile
        y = tl.dot(x, tile, y, input_precision="ieee", out_dtype=wide)
    tl.store(y_ptr + row * outer + o[None, :], y.to(dtype), mask=inside & (o < outer)[None, :])


@jit(do_not_specialize=["rows"])
def _low_kernel(
    dy_ptr,  # [M, N]
    low_ptr,  # [M, R]
    b_ptr,  # [N, R]
    dlow_ptr,  # [M, R]
    db_ptr,  # [ceil(M / BLOCK_M), N, R] fp32, or fp64 where dy is: of each block of rows
    rows,
    outputs,
    rank,
    scale,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    block = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, RANK)[None, :]
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    inside = row < rows
    of_low = inside & (r < rank)
    low = tl.load(low_ptr + row * rank + r, mask=of_low, other=0.0)
    dlow = tl.zeros((BLOCK_M, RANK), wide)
    for start in range(0, outputs, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[None, :]
        dy = tl.load(dy_ptr + row * outputs + n, mask=inside & (n < outputs), other=0.0)
        n = start + tl.arange(0, BLOCK_N)[:, None]
        of_b = (n < outputs) & (r < rank)
        b = tl.load(b_ptr + n * rank + r, mask=of_b, other=0.0).to(dtype)
        dlow = tl.dot(dy, b, dlow, input_precision="ieee", out_dtype=wide)
        db = tl.dot(tl.trans(dy), low, input_precision="ieee", out_dtype=wide) * scale
        tl.store(db_ptr + (block * outputs + n) * rank + r, db, mask=of_b)
    tl.store(dlow_ptr + row * rank + r, (dlow * scale).to(dtype), mask=of_low)


# By architecture: the fused product's tile for up to so many rows; for more, the library's product.
# Not measured on a GPU yet.
# - NF4: the bounds are those of bitsandbytes 0.50's own fused product on these GPUs. Decoding to
#   memory, 2.56 bytes a number, would take as long as the whole product at 190, 210 and 260 rows
#   (A100, RTX 4090, H100; from FLOP/s and bytes/s).
# - A float W: fusing saves one reading and writing of y, the same share at every number of rows. Up
#   to 64 rows a taller tile is mostly padding.
# None spills at any rank; 128 x 256 does on Ampere. With W's tile as the first operand, Hopper
# could read it from registers, but NF4's decoding by shuffles ends in shared memory anyway.
_SMALL = {"BLOCK_M": 64, "BLOCK_I": 64, "BLOCK_O": 64, "num_warps": 4, "num_stages": 4}
_TALL = {"BLOCK_M": 128, "BLOCK_I": 64, "BLOCK_O": 64, "num_warps": 8, "num_stages": 4}
_LARGE = {"BLOCK_M": 128, "BLOCK_I": 64, "BLOCK_O": 128, "num_warps": 8, "num_stages": 3}
# - sm_120 has the matrix instructions and the shared memory of sm_89, and so its tiles: those of
#   sm_90 spill there.
_AMPERE = {64: _SMALL, inf: _LARGE}
_FLOAT_TILES = {80: _AMPERE, 90: {64: _SMALL, inf: _LARGE | {"BLOCK_O": 256}}, 120: _AMPERE}
_ADA_NF4 = {256: _TALL}
_NF4_TILES = {80: {128: _TALL}, 89: _ADA_NF4, 90: {64: _SMALL}, 120: _ADA_NF4}
# At rank 64 Ampere spills with 64 columns or 4 warps. Hopper's matrix instruction takes 64 columns
# at least.
_AMPERE_LOW = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3}
_LOW_TILES = {80: _AMPERE_LOW, 90: _AMPERE_LOW | {"BLOCK_N": 64}, 120: _AMPERE_LOW}
# For fp32 and fp64: no matrix instruction computes their products exactly, and larger tiles spill.
# W has to be of the same type: on sm_100 Triton 3.7.1 takes operands that it casts or decodes to
# fp32 in tf32, though asked for "ieee".
_WIDE = {"BLOCK_M": 64, "BLOCK_I": 64, "BLOCK_O": 64, "num_warps": 8, "num_stages": 1}
_WIDE_LOW = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}


_HIGHEST_RANK = 64  # a rank of 128 takes more shared memory than an H100 has


def lora_linear(
    x: Tensor, weight: Tensor, absmax: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x W^T + scale (x a^T) b^T: x [..., K] -> [..., N].

    weight [N, K] of any float type, or NF4 as bitsandbytes packs it: u8 of two numbers each, with
    absmax fp32 of every 64. a [R, K] and b [N, R] are cast to x's type; their gradients have their
    own type. Ranks above 64 fit no kernel and take the reference.
    """
    if len(a) > _HIGHEST_RANK:
        return lora_linear_reference(x, weight, absmax, a, b, scale)
    return _lora_linear(x, weight, absmax, a, b, scale)[0]


@torch.library.custom_op("fastflag::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor, weight: Tensor, absmax: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """y [..., N] and S [..., R], which the backward reads."""
    rows = _rows(x)
    low = functional.linear(rows, a.to(x.dtype))
    y = _product(rows, weight, absmax, low, b, scale, forward=True)
    return y.view(*x.shape[:-1], len(b)), low.view(*x.shape[:-1], len(a))


@_lora_linear.register_fake
def _(
    x: Tensor, weight: Tensor, absmax: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], len(b)), x.new_empty(*x.shape[:-1], len(a))


@torch.library.custom_op("fastflag::lora_low_gradients", mutates_args=())
def lora_low_gradients(dy: Tensor, low: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients for S [..., R] and for b [N, R].

    The latter is summed over blocks of 128 rows in a fixed order, so that runs do not differ. A
    block writes and reads 4 N R bytes for it, where a second reading of dy would take 256 N. From
    rank 32 on it saves nothing but a launch.
    """
    rows, low_rows = _rows(dy), _rows(low)
    tile = _WIDE_LOW if dy.itemsize > 2 else recorded(_LOW_TILES, dy.device)
    blocks = cdiv(len(rows), tile["BLOCK_M"])
    dlow = torch.empty_like(low_rows)
    db = b.new_empty(blocks, *b.shape, dtype=torch.promote_types(dy.dtype, torch.float32))
    with launching(rows):
        _low_kernel[(blocks,)](
            rows,
            low_rows,
            b.contiguous(),
            dlow,
            db,
            len(rows),
            *b.shape,
            scale,
            _padded(b.shape[1]),
            **tile,
        )
    return dlow.view(low.shape), db.sum(0).to(b.dtype)


@lora_low_gradients.register_fake
def _(dy: Tensor, low: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return low.new_empty(low.shape), b.new_empty(b.shape)


@torch.library.custom_op("fastflag::lora_input_gradient", mutates_args=())
def lora_input_gradient(
    dy: Tensor, weight: Tensor, absmax: Tensor | None, dlow: Tensor, a: Tensor
) -> Tensor:
    """The gradient for x, [..., K], from that for S."""
    dx = _product(_rows(dy), weight, absmax, _rows(dlow), a.T, 1.0, forward=False)
    return dx.view(*dy.shape[:-1], a.shape[1])


@lora_input_gradient.register_fake
def _(dy: Tensor, weight: Tensor, absmax: Tensor | None, dlow: Tensor, a: Tensor) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], a.shape[1])


def _save(ctx, inputs, output) -> None:
    x, weight, absmax, a, b, ctx.scale = inputs
    low = output[1]
    # Otherwise each backward pass would fill zeros for S's gradient.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(low)
    ctx.save_for_backward(x, weight, absmax, a, b, low)


def _differentiate(ctx, dy: Tensor | None, _) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    x, weight, absmax, a, b, low = ctx.saved_tensors
    dlow, db = lora_low_gradients(dy, low, b, ctx.scale)
    dx = da = None
    if ctx.needs_input_grad[0]:
        dx = lora_input_gradient(dy, weight, absmax, dlow, a)
    if ctx.needs_input_grad[3]:
        da = _product_in(a.dtype, _rows(dlow).T, _rows(x))
    return dx, None, None, da, db, None


_lora_linear.register_autograd(_differentiate, setup_context=_save)


def lora_linear_reference(
    x: Tensor, weight: Tensor, absmax: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """The same in PyTorch: S, each product and their sum are rounded to x's type."""
    if absmax is not None:
        weight = nf4_dequantise_reference(weight, absmax, (len(b), a.shape[1]), x.dtype)
    low = functional.linear(x, a.to(x.dtype))
    return functional.linear(x, weight.to(x.dtype)) + functional.linear(low, scale * b.to(x.dtype))


def _product(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    low: Tensor,
    up: Tensor,
    scale: float,
    forward: bool,
) -> Tensor:
    """x W^T + scale low up^T forward, x W + scale low up^T backward: x [M, I], low [M, R], up
    [O, R] -> [M, O]."""
    shape = (len(up), x.shape[1]) if forward else (x.shape[1], len(up))
    y = x.new_empty(len(x), len(up))
    tile = _tile(x, weight, absmax, shape[1])
    if tile is None:
        matrix = weight if absmax is None else nf4_dequantise(weight, absmax, shape, x.dtype)
        y.addmm_(low, up.to(x.dtype).T, beta=0, alpha=scale)
        return y.addmm_(x, (matrix.T if forward else matrix).to(x.dtype))
    programs = cdiv(len(x), tile["BLOCK_M"]) * cdiv(len(up), tile["BLOCK_O"])
    with launching(x):
        _product_kernel[(programs,)](
            x,
            weight.contiguous(),
            absmax if absmax is None else absmax.contiguous(),
            low,
            up,
            y,
            len(x),
            *shape,
            low.shape[1],
            *up.stride(),
            scale,
            forward,
            _padded(low.shape[1]),
            **tile,
        )
    return y


def _product_in(dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    """left @ right in `dtype`; on a GPU without a rounding to the factors' type in between."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def _tile(x: Tensor, weight: Tensor, absmax: Tensor | None, inputs: int) -> Tile | None:
    """The fused product's tile, or None for the library's product: of many rows or an NF4 W whose
    blocks cross its rows, and of an fp32 or fp64 x and a W of another type."""
    if x.itemsize > 2:
        return _WIDE if weight.dtype == x.dtype else None
    if absmax is not None and inputs % BLOCKSIZE:
        return None
    tiles = recorded(_FLOAT_TILES if absmax is None else _NF4_TILES, x.device)
    return next((tile for bound, tile in tiles.items() if len(x) <= bound), None)


def _rows(x: Tensor) -> Tensor:
    return x.contiguous().view(-1, x.shape[-1])


def _padded(rank: int) -> int:
    """No matrix instruction takes fewer than 16."""
    return max(next_power_of_2(rank), 16)
