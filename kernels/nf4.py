"""NF4 (QLoRA, arXiv 2305.14314, appendix E) as bitsandbytes stores it: four bits a number.

Over the flattened weight, two numbers to a byte, the earlier one in the high nibble, and one
absmax for every 64:

    weight[i] = round_to_dtype(level[nibble[i]] * absmax[i // 64]), a product in fp32

Nested, a byte q[b] stands for each absmax, and 256 of them share a scale:

    absmax[b] = nested_code[q[b]] * nested_absmax[b // 256] + offset, two roundings

One launch dequantises both levels, where bitsandbytes takes three.

The linear layer y = x weight^T decodes the weight inside the product. For a few rows of x the time
is that of reading the weight: 4.5 bits a number, where dequantising first takes 4.5 + 16 + 16. The
weight is frozen; the backward pass dequantises it for dx = dy weight.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastflag.kernels.compiler import launching
from fastflag.kernels.language import cdiv, jit, next_power_of_2, tl
from fastflag.kernels.tiles import recorded

BLOCKSIZE = 64

# Exact in fp32.
LEVELS = tl.constexpr(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)


@jit
def decode(packed, absmax, dtype: tl.constexpr):
    """packed u8 [R, C/2], absmax fp32 [R, C/64] -> [R, C] of `dtype`; C a multiple of 64."""
    rows: tl.constexpr = packed.shape[0]
    blocks: tl.constexpr = absmax.shape[1]
    index = tl.arange(0, 16)
    table = tl.zeros((16,), tl.float32)
    for i in tl.static_range(16):
        table = tl.where(index == i, LEVELS[i], table)
    table = tl.broadcast_to(table[None, :], rows, 16)
    byte = packed.to(tl.int32)
    # A gather takes one shuffle between lanes for each number, a tree of selects ten instructions.
    level = tl.join(tl.gather(table, byte >> 4, 1), tl.gather(table, byte & 15, 1))
    scaled = level.reshape(rows, blocks, 64) * absmax[:, :, None]
    return scaled.reshape(rows, 64 * blocks).to(dtype)


@jit
def _dequantise_kernel(
    packed_ptr,  # [ceil(size / 2)] u8
    absmax_ptr,  # [blocks] fp32, or u8 where nested
    nested_code_ptr,  # [256] fp32, or None
    nested_absmax_ptr,  # [ceil(blocks / 256)] fp32, or None
    offset_ptr,  # [1] fp32, or None
    weight_ptr,  # [size]
    packed_size,
    blocks,
    size,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    absmax = tl.load(absmax_ptr + block, mask=block < blocks, other=0)
    if nested_code_ptr is not None:
        scale = tl.load(nested_absmax_ptr + block // 256, mask=block < blocks, other=0.0)
        absmax = tl.load(nested_code_ptr + absmax.to(tl.int32)) * scale + tl.load(offset_ptr)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    packed = tl.load(packed_ptr + byte, mask=byte < packed_size, other=0)
    weight = decode(packed, absmax[:, None], weight_ptr.dtype.element_ty)
    number = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(weight_ptr + number, weight, mask=number < size)


@jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_ptr,  # [M, K]
    packed_ptr,  # [N, K / 2] u8
    absmax_ptr,  # [N, K / 64] fp32
    y_ptr,  # [splits, M, N]
    rows,  # M
    outputs,  # N
    blocks,  # K / 64
    steps,  # blocks to a split
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    split = tl.program_id(1)
    m = tl.arange(0, ROWS)[None, :]
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, 64)[:, None]
    half = tl.arange(0, 32)[None, :]
    inside = n < outputs
    # The weight's tile is the first operand, which has 64 rows or more on Hopper and Blackwell. The
    # second one may be as narrow as a few rows of x.
    y = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for block in range(split * steps, min((split + 1) * steps, blocks)):
        x = tl.load(x_ptr + (m * blocks + block) * 64 + k, mask=m < rows, other=0.0)
        at = n.to(tl.int64) * blocks + block
        packed = tl.load(packed_ptr + at[:, None] * 32 + half, mask=inside[:, None], other=0)
        absmax = tl.load(absmax_ptr + at, mask=inside, other=0.0)
        y = tl.dot(decode(packed, absmax[:, None], x.dtype), x, y)
    at = (split * rows + m) * outputs + n[:, None]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(m < rows) & inside[:, None])


@jit(do_not_specialize=["size"])
def _sum_kernel(
    part_ptr,  # [splits, size] fp32
    total_ptr,  # [size]
    splits,
    size,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(part_ptr + split * size + at, mask=at < size, other=0.0)
    tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=at < size)


@torch.library.custom_op("fastflag::nf4_dequantise", mutates_args=())
def nf4_dequantise(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_code: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The weight of n numbers, of `shape` and `dtype`, bit for bit as bitsandbytes gives it.

    packed u8 [ceil(n / 2)], absmax fp32 [ceil(n / 64)]. Nested: absmax u8, nested_code fp32 [256],
    nested_absmax fp32 [ceil(n / 64 / 256)], offset fp32 [].
    """
    weight = packed.new_empty(shape, dtype=dtype)
    blocks = cdiv(weight.numel(), BLOCKSIZE)
    tile = recorded(_DEQUANTISE_TILES, packed.device)
    with launching(weight):
        _dequantise_kernel[(cdiv(blocks, tile["BLOCKS"]),)](
            packed.contiguous(),
            absmax.contiguous(),
            None if nested_code is None else nested_code.contiguous(),
            None if nested_absmax is None else nested_absmax.contiguous(),
            offset,
            weight,
            packed.numel(),
            blocks,
            weight.numel(),
            # A fused multiply-add would round a nested absmax once, and bitsandbytes does twice.
            enable_fp_fusion=False,
            **tile,
        )
    return weight


@nf4_dequantise.register_fake
def _(packed, absmax, shape, dtype, nested_code=None, nested_absmax=None, offset=None) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


@torch.library.custom_op("fastflag::nf4_linear", mutates_args=())
def nf4_linear(x: Tensor, packed: Tensor, absmax: Tensor, outputs: int) -> Tensor:
    """x [..., K], the weight [N, K] as packed u8 [ceil(N K / 2)] and absmax fp32
    [ceil(N K / 64)] -> [..., N].

    Fused for up to 64 rows of 16 bits, where the weight's rows are whole blocks. For more rows,
    dequantising once costs less than decoding for each tile of them (bitsandbytes' own kernels
    stop there on an H100). The product of fp32 numbers is the library's, for on sm_100 Triton
    3.7.1 takes decoded operands in tf32, though asked for "ieee".
    """
    rows = x.contiguous().view(-1, x.shape[-1])
    if len(rows) > 64 or x.element_size() > 2 or x.shape[-1] % BLOCKSIZE:
        weight = nf4_dequantise(packed, absmax, (outputs, x.shape[-1]), x.dtype)
        return functional.linear(x, weight)
    tile = recorded(_LINEAR_TILES, x.device)
    blocks = rows.shape[1] // BLOCKSIZE
    programs = cdiv(outputs, tile["OUTPUTS"])
    steps = cdiv(blocks, _splits(programs, blocks))
    splits = cdiv(blocks, steps)
    y = rows.new_empty(splits, len(rows), outputs, dtype=x.dtype if splits == 1 else torch.float32)
    with launching(rows):
        _linear_kernel[(programs, splits)](
            rows,
            packed.contiguous(),
            absmax.contiguous(),
            y,
            len(rows),
            outputs,
            blocks,
            steps,
            ROWS=max(next_power_of_2(len(rows)), 16),
            **tile,
        )
    shape = (*x.shape[:-1], outputs)
    if splits == 1:
        return y.view(shape)
    total = rows.new_empty(shape)
    with launching(rows):
        _sum_kernel[(cdiv(total.numel(), 1024),)](y, total, splits, total.numel(), BLOCK=1024)
    return total


@nf4_linear.register_fake
def _(x: Tensor, packed: Tensor, absmax: Tensor, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _save(ctx, inputs, output) -> None:
    x, packed, absmax, _ = inputs
    ctx.inputs = x.shape[-1]
    ctx.save_for_backward(packed, absmax)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
    weight = nf4_dequantise(*ctx.saved_tensors, (dy.shape[-1], ctx.inputs), dy.dtype)
    return dy @ weight, None, None, None


nf4_linear.register_autograd(_differentiate, setup_context=_save)


def nf4_dequantise_reference(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_code: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The same in PyTorch."""
    if nested_code is not None:
        scale = nested_absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = nested_code.index_select(0, absmax.int()) * scale + offset
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1)
    levels = torch.tensor(LEVELS.value, device=packed.device)
    size = math.prod(shape)
    level = levels.index_select(0, nibbles.flatten()[:size].int())
    scaled = level * absmax.repeat_interleave(BLOCKSIZE)[:size]
    return scaled.to(dtype).view(shape)


def nf4_linear_reference(x: Tensor, packed: Tensor, absmax: Tensor, outputs: int) -> Tensor:
    """The same in PyTorch: the weight rounded to x's type, then the library's product."""
    shape = (outputs, x.shape[-1])
    return functional.linear(x, nf4_dequantise_reference(packed, absmax, shape, x.dtype))


def _splits(programs: int, blocks: int) -> int:
    """How many programs share a row of the weight: up to 256 in all, 16 blocks or more each."""
    return max(1, min(256 // programs, blocks // 16))


# At most 72 registers on any architecture.
_DEQUANTISE_TILES = {80: {"BLOCKS": 64, "num_warps": 4}}

# Tiles of 64 outputs would read x from the L2 cache twice as often: at 64 rows, 8 KB a tile of x
# beside 2 KB of the weight. Hopper's wgmma has the decoded weight in registers: pipelined, its
# product is wrong by every ptxas before 13.3 (triton-lang/triton#9433), so it has one stage.
_PIPELINED = {"OUTPUTS": 128, "num_warps": 8, "num_stages": 4}
_LINEAR_TILES = {80: _PIPELINED, 90: _PIPELINED | {"num_stages": 1}, 100: _PIPELINED}
