"""A chosen token's log-probability and the entropy over the vocabulary, from hidden states.

Nothing in fastflag calls it yet: its caller is the writing agent to come.

For each row h of hidden states, with z_j = h . W_j / temperature over the columns j:

    log_probability = z_token - log sum_j exp(z_j)
    entropy = -sum_j p_j log p_j,  p = softmax(z)

    dz_j = dlog_probability ([j = token] - p_j) - dentropy p_j (log p_j + entropy)
    dh = sum_j dz_j W_j / temperature,  dW_j = sum_rows dz_j h / temperature

Forward, a program computes the logits of one tile of rows and columns. It keeps three numbers a
row: the largest logit, the sum of exponentials relative to it, and the sum of those times their
exponents. With 128 columns a tile, they are 12 bytes in place of 256 of logits in bf16. A second
kernel merges a row's tiles by log-sum-exp. The vocabulary is split among programs whatever the
number of rows, so a row has the same bits in every batch.

Backward, the logits are recomputed for some columns at a time, and their gradient is written: at
most `_GRADIENT_SIZE` numbers, or one tile's columns. The library's matrix products make dh of it
and, if asked for, dW; dh is accumulated in fp32. These products are not fused. A row of dh does not
fit in registers, so each tile would read and write it, 2 / BLOCK_COLUMNS bytes an operation: at 800
TFLOP/s and 128 columns, nearly four times an H100's 3.35 TB/s.

Exponentials are of base 2, one instruction each. Their exponents are differences from the largest
logit: logits far from zero lose no precision.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fastflag.kernels.compiler import launching
from fastflag.kernels.language import cdiv, jit, next_power_of_2, tl
from fastflag.kernels.tiles import recorded

# Twice the columns spill on sm_80, sm_89 and sm_90, twice the rows on sm_80, sm_89 and sm_100.
# These take 128 to 200 registers in bf16, so a multiprocessor holds one block. Its four stages
# (96 KiB on sm_80 and sm_89, 128 on sm_90 and sm_100) take memory from no other.
_TILES = {80: {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 128, "num_warps": 8, "num_stages": 4}}

# 32 MiB in 16 bits: the gradient's piece is read back from the L2 cache (A100 40 MB, H100 50 MB).
_GRADIENT_SIZE = 2**24

# Row tiles that pass over the vocabulary together and read each tile of it from memory once.
_ROW_TILES = 16


@jit
def _logits(
    hidden_ptr,  # [N, C]
    weight_ptr,  # [V, C]
    rows,
    columns,
    width,
    dtype: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """This program's rows and columns (see `_grid`), and hidden[row] . weight[column] of each pair,
    0 beyond them."""
    row_tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    offsets = tl.arange(0, BLOCK_WIDTH)
    hidden_ptrs = hidden_ptr + row.to(tl.int64)[:, None] * width + offsets[None, :]
    weight_ptrs = weight_ptr + column.to(tl.int64)[None, :] * width + offsets[:, None]
    present, inside = (row < rows)[:, None], (column < columns)[None, :]
    logits = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=dtype)
    for start in range(0, width, BLOCK_WIDTH):
        left = offsets < width - start
        hidden = tl.load(hidden_ptrs + start, mask=present & left[None, :], other=0.0)
        weight = tl.load(weight_ptrs + start, mask=inside & left[:, None], other=0.0)
        logits = tl.dot(hidden, weight, logits, input_precision="ieee", out_dtype=dtype)
    return row, column, logits


@jit(do_not_specialize=["rows", "columns"])
def _forward_kernel(
    hidden_ptr,  # [N, C]
    weight_ptr,  # [V, C]
    token_ptr,  # [N]
    chosen_ptr,  # [N], the token's logit before the temperature
    highest_ptr,  # [N, tiles], the largest logit before the temperature
    total_ptr,  # [N, tiles], sum of 2^x, x being exponents relative to it
    moment_ptr,  # [N, tiles], sum of 2^x x
    rows,
    columns,
    width,
    temperature,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row, column, logits = _logits(
        hidden_ptr,
        weight_ptr,
        rows,
        columns,
        width,
        highest_ptr.dtype.element_ty,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_WIDTH,
    )
    present = row < rows
    token = tl.load(token_ptr + row, mask=present, other=-1)
    is_token = column[None, :] == token[:, None]
    chosen = tl.sum(tl.where(is_token, logits, 0.0), 1)
    here = token // BLOCK_COLUMNS == tl.program_id(1)
    tl.store(chosen_ptr + row, chosen, mask=present & here)

    inside = (column < columns)[None, :]
    highest = tl.max(tl.where(inside, logits, -float("inf")), 1)
    exponent = (logits - highest[:, None]) * (1.4426950408889634 / temperature)
    exponent = tl.where(inside, exponent, -1e4)  # 2^-1e4 is 0, and so is its product with -1e4
    power = tl.exp2(exponent)
    place = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(highest_ptr + place, highest, mask=present)
    tl.store(total_ptr + place, tl.sum(power, 1), mask=present)
    tl.store(moment_ptr + place, tl.sum(power * exponent, 1), mask=present)


@jit
def _merge_kernel(
    chosen_ptr,  # [N]
    highest_ptr,  # [N, tiles]
    total_ptr,  # [N, tiles]
    moment_ptr,  # [N, tiles]
    log_probability_ptr,  # [N]
    entropy_ptr,  # [N]
    row_highest_ptr,  # [N]
    row_log_total_ptr,  # [N]
    tiles,
    temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < tiles
    start = row.to(tl.int64) * tiles
    tile_highest = tl.load(highest_ptr + start + offsets, mask=inside, other=-float("inf"))
    tile_total = tl.load(total_ptr + start + offsets, mask=inside, other=0.0)
    tile_moment = tl.load(moment_ptr + start + offsets, mask=inside, other=0.0)

    bits = 1.4426950408889634 / temperature
    highest = tl.max(tile_highest)
    exponent = tl.where(inside, (tile_highest - highest) * bits, 0.0)
    power = tl.exp2(exponent)
    total = tl.sum(power * tile_total)
    moment = tl.sum(power * (tile_moment + exponent * tile_total))
    log_total = tl.log2(total)
    chosen = (tl.load(chosen_ptr + row) - highest) * bits

    tl.store(log_probability_ptr + row, (chosen - log_total) * 0.6931471805599453)
    tl.store(entropy_ptr + row, (log_total - moment / total) * 0.6931471805599453)
    tl.store(row_highest_ptr + row, highest)
    tl.store(row_log_total_ptr + row, log_total)


@jit(do_not_specialize=["rows", "columns", "first"])
def _gradient_kernel(
    hidden_ptr,  # [N, C]
    weight_ptr,  # [columns, C], those of the vocabulary from `first` on
    token_ptr,  # [N]
    entropy_ptr,  # [N]
    highest_ptr,  # [N]
    log_total_ptr,  # [N]
    dlog_probability_ptr,  # [N]
    dentropy_ptr,  # [N]
    gradient_ptr,  # [N, stride], for the logits before the temperature
    rows,
    columns,
    first,
    width,
    stride,
    temperature,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row, column, logits = _logits(
        hidden_ptr,
        weight_ptr,
        rows,
        columns,
        width,
        highest_ptr.dtype.element_ty,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_WIDTH,
    )
    present = row < rows
    token = tl.load(token_ptr + row, mask=present, other=-1)
    entropy = tl.load(entropy_ptr + row, mask=present, other=0.0)
    highest = tl.load(highest_ptr + row, mask=present, other=0.0)
    log_total = tl.load(log_total_ptr + row, mask=present, other=0.0)
    dlog_probability = tl.load(dlog_probability_ptr + row, mask=present, other=0.0)
    dentropy = tl.load(dentropy_ptr + row, mask=present, other=0.0)

    exponent = (logits - highest[:, None]) * (1.4426950408889634 / temperature)
    exponent = tl.where((column < columns)[None, :], exponent, -1e4)
    log2_probability = exponent - log_total[:, None]
    surprise = dlog_probability[:, None] + dentropy[:, None] * (
        log2_probability * 0.6931471805599453 + entropy[:, None]
    )
    gradient = tl.where(column[None, :] + first == token[:, None], dlog_probability[:, None], 0.0)
    gradient = (gradient - tl.exp2(log2_probability) * surprise) / temperature
    # The piece is padded to whole tiles, with 0.
    tl.store(
        gradient_ptr + row.to(tl.int64)[:, None] * stride + column[None, :],
        gradient.to(gradient_ptr.dtype.element_ty),
        mask=present[:, None],
    )


def token_log_probability(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    temperature: float = 1.0,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log_probability and entropy [...], fp32 (fp64 of fp64), of `token` after hidden states.

    hidden [..., C], weight [V, C] of the same type, token [...] int64. `allowed` [K] int64 are
    distinct tokens that share all of the probability; without it, all V do. A token outside of
    them has no log-probability: what is returned for it means nothing. The kernels read the
    temperature in fp32.
    """
    weight, token = _restricted(weight, token, allowed)
    rows = hidden.reshape(-1, hidden.shape[-1])
    outputs = token_log_probability_forward(rows, weight, token.reshape(-1), temperature)
    return outputs[0].view(token.shape), outputs[1].view(token.shape)


@torch.library.custom_op("fastflag::token_log_probability_forward", mutates_args=())
def token_log_probability_forward(
    hidden: Tensor, weight: Tensor, token: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, C], weight [V, C], token [N] -> log_probability, entropy, and what the backward
    pass needs: the largest logit before the temperature, and log2 of the sum of exponentials
    relative to it; [N] each."""
    hidden, weight, token = hidden.contiguous(), weight.contiguous(), token.contiguous()
    rows, tile = len(hidden), _tile(hidden)
    grid = _grid(rows, len(weight), tile)
    like = {"dtype": _accumulator(hidden), "device": hidden.device}
    chosen, log_probability, entropy, highest, log_total = (
        torch.empty(rows, **like) for _ in range(5)
    )
    partial = [torch.empty((rows, grid[1]), **like) for _ in range(3)]
    with launching(hidden):
        _forward_kernel[grid](
            hidden,
            weight,
            token,
            chosen,
            *partial,
            rows,
            len(weight),
            hidden.shape[1],
            temperature,
            **tile,
        )
    outputs = log_probability, entropy, highest, log_total
    with launching(hidden):
        _merge_kernel[(rows,)](
            chosen, *partial, *outputs, grid[1], temperature, BLOCK=next_power_of_2(grid[1])
        )
    return outputs


@token_log_probability_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, token: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = {"dtype": _accumulator(hidden), "device": hidden.device}
    return tuple(torch.empty(len(hidden), **like) for _ in range(4))


@torch.library.custom_op("fastflag::token_log_probability_backward", mutates_args=())
def token_log_probability_backward(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    temperature: float,
    entropy: Tensor,
    highest: Tensor,
    log_total: Tensor,
    dlog_probability: Tensor,
    dentropy: Tensor,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients for hidden and weight; one that is not asked for has no elements."""
    hidden, weight, token = hidden.contiguous(), weight.contiguous(), token.contiguous()
    dlog_probability, dentropy = dlog_probability.contiguous(), dentropy.contiguous()
    rows, tile = len(hidden), _tile(hidden)
    piece = _piece(rows, len(weight), tile["BLOCK_COLUMNS"])
    gradient = hidden.new_empty(rows, piece)
    dhidden = hidden.new_zeros(hidden.shape if of_hidden else 0, dtype=_accumulator(hidden))
    dweight = torch.empty_like(weight) if of_weight else weight.new_empty(0)
    for first in range(0, len(weight), piece):
        some = weight[first : first + piece]
        with launching(hidden):
            _gradient_kernel[_grid(rows, len(some), tile)](
                hidden,
                some,
                token,
                entropy,
                highest,
                log_total,
                dlog_probability,
                dentropy,
                gradient,
                rows,
                len(some),
                first,
                hidden.shape[1],
                piece,
                temperature,
                **tile,
            )
        dlogits = gradient[:, : len(some)]
        if of_hidden:
            dhidden += _product(dlogits, some, dhidden.dtype)
        if of_weight:
            torch.mm(dlogits.T, hidden, out=dweight[first : first + piece])
    return dhidden.to(hidden.dtype), dweight


@token_log_probability_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    temperature: float,
    entropy: Tensor,
    highest: Tensor,
    log_total: Tensor,
    dlog_probability: Tensor,
    dentropy: Tensor,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0),
    )


def _save(ctx, inputs, output) -> None:
    hidden, weight, token, ctx.temperature = inputs
    _, entropy, highest, log_total = output
    ctx.mark_non_differentiable(highest, log_total)
    ctx.save_for_backward(hidden, weight, token, entropy, highest, log_total)


def _differentiate(
    ctx, dlog_probability: Tensor, dentropy: Tensor, *_: Tensor
) -> tuple[Tensor | None, Tensor | None, None, None]:
    hidden, weight, token, *saved = ctx.saved_tensors
    asked = ctx.needs_input_grad[:2]
    gradients = token_log_probability_backward(
        hidden, weight, token, ctx.temperature, *saved, dlog_probability, dentropy, *asked
    )
    dhidden, dweight = (
        gradient if wanted else None for gradient, wanted in zip(gradients, asked, strict=True)
    )
    return dhidden, dweight, None, None


token_log_probability_forward.register_autograd(_differentiate, setup_context=_save)


def token_log_probability_reference(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    temperature: float = 1.0,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch: all logits, rounded to hidden's type, then fp32."""
    weight, token = _restricted(weight, token, allowed)
    logits = functional.linear(hidden, weight).to(_accumulator(hidden)) / temperature
    log_probabilities = logits.log_softmax(-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return log_probabilities.gather(-1, token[..., None]).squeeze(-1), entropy


def _restricted(weight: Tensor, token: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The allowed tokens' rows of the weight, and each token's place among them."""
    if allowed is None:
        return weight, token
    return weight.index_select(0, allowed), (token[..., None] == allowed).int().argmax(-1)


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, not rounded to their type; the library has such a product on CUDA only."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _tile(hidden: Tensor) -> dict[str, int]:
    """The recorded tile, with 128 bytes of every row at a time."""
    return {**recorded(_TILES, hidden.device), "BLOCK_WIDTH": 128 // hidden.element_size()}


def _piece(rows: int, columns: int, block: int) -> int:
    """How many columns have their gradient written at a time, in whole tiles."""
    fitting = _GRADIENT_SIZE // (max(rows, 1) * block)
    return block * min(max(fitting, 1), cdiv(columns, block))


def _grid(rows: int, columns: int, tile: dict[str, int]) -> tuple[int, int, int]:
    """Row tiles of a group (the fastest), column tiles, groups of at most `_ROW_TILES`."""
    row_tiles = cdiv(rows, tile["BLOCK_ROWS"])
    groups = cdiv(row_tiles, _ROW_TILES)
    return cdiv(row_tiles, max(groups, 1)), cdiv(columns, tile["BLOCK_COLUMNS"]), groups
