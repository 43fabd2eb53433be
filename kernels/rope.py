"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34) in the half-split layout:

    (left, right) -> (left cos - right sin, right cos + left sin)

for the halves of every head. One launch rotates queries and keys in place and reads the angles once
for all heads. PyTorch takes seven operators for each of the two. A rotation is orthogonal: its
gradient is the incoming one rotated back, the same kernel with -sin.
"""

import torch
from torch import Tensor

from fastflag.kernels.compiler import launching
from fastflag.kernels.language import jit, next_power_of_2, tl


@jit(do_not_specialize=["tokens", "angles"])
def _rotate_kernel(
    query_ptr,  # [N, H, T, E]
    key_ptr,  # [N, G, T, E], or None
    rotated_query_ptr,  # as query, which it may be
    rotated_key_ptr,  # as key, which it may be
    cos_ptr,  # [A, E / 2], A = N T, or T for all rows
    sin_ptr,  # [A, E / 2]
    query_strides,  # of N, H and T; E's is 1
    key_strides,
    tokens,
    angles,
    heads,
    groups,
    half,
    DIRECTION: tl.constexpr,  # 1, or -1 for back
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
):
    place = tl.program_id(0)
    row, token = (place // tokens).to(tl.int64), (place % tokens).to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    angle = (place % angles).to(tl.int64) * half + column
    cos = tl.load(cos_ptr + angle, mask=column < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=column < half, other=0.0).to(tl.float32) * DIRECTION
    start = row * query_strides[0] + token * query_strides[2]
    source, target = query_ptr + start, rotated_query_ptr + start
    _rotate_heads(source, target, query_strides[1], heads, half, cos, sin, HEADS, HALF)
    if key_ptr is not None:
        start = row * key_strides[0] + token * key_strides[2]
        source, target = key_ptr + start, rotated_key_ptr + start
        _rotate_heads(source, target, key_strides[1], groups, half, cos, sin, GROUPS, HALF)


@jit
def _rotate_heads(
    source_ptr,  # [H, E] of one token
    target_ptr,
    stride,  # of H
    heads,
    half,
    cos,  # [1, HALF]
    sin,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    offsets, inside = head.to(tl.int64) * stride + column, (head < heads) & (column < half)
    left = tl.load(source_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source_ptr + half + offsets, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = target_ptr.dtype.element_ty
    tl.store(target_ptr + offsets, (left * cos - right * sin).to(dtype), mask=inside)
    tl.store(target_ptr + half + offsets, (right * cos + left * sin).to(dtype), mask=inside)


def rotate_(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Rotates query [N, H, T, E] and key [N, G, T, E], or query alone, in their own memory; they
    may be strided, with E unit-strided. cos and sin [N or 1, 1, T, E / 2].

    Use what is returned: it is the rotated memory, with the gradient through the rotation. Do not
    use the arguments again: a backward that saved one of them raises, as after any in-place
    operation.
    """
    return _Rotate.apply(query, key, cos, sin)


class _Rotate(torch.autograd.Function):
    # The arguments are not marked as dirty: autograd refuses that for two views at once, and for
    # one view its backward pass copies the gradient of the whole base four times.

    @staticmethod
    def forward(ctx, query, key, cos, sin):
        rotate_in_place(query, key, cos, sin)
        ctx.save_for_backward(cos, sin)
        return query, key

    @staticmethod
    def backward(ctx, dquery, dkey):
        gradients = [gradient for gradient in (dquery, dkey) if gradient is not None]
        return (*rotate_back(gradients, *ctx.saved_tensors), None, None, None)[:4]


@torch.library.custom_op("fastflag::rotate_in_place", mutates_args=("query", "key"))
def rotate_in_place(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    """`rotate_` without a gradient."""
    tensors = [query] if key is None else [query, key]
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("what is rotated in place has unit stride in its last axis")
    if query is key or any(_repeats(tensor) for tensor in tensors):
        raise ValueError("what is rotated in place lies in memory of its own")
    _launch(tensors, tensors, cos, sin, direction=1)


def _repeats(x: Tensor) -> bool:
    """Whether some of it is the same memory, as an expanded axis is."""
    return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))


@rotate_in_place.register_fake
def _(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    pass


@torch.library.custom_op("fastflag::rotate_back", mutates_args=())
def rotate_back(gradients: list[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """New tensors: one or two gradients [N, heads, T, E] rotated by the opposite angles, laid out
    as [N, T, heads, E], which the linear layers' backward reads without a copy."""
    sources = [_by_token(gradient) for gradient in gradients]
    targets = [torch.empty_like(source) for source in sources]
    _launch(sources, targets, cos, sin, direction=-1)
    return targets


@rotate_back.register_fake
def _(gradients: list[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    return [torch.empty_like(_by_token(gradient)) for gradient in gradients]


def _by_token(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def rotate_reference(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The same in PyTorch, in new memory; every product and sum rounded to the tensors' type."""

    def rotate(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

    return rotate(query), None if key is None else rotate(key)


def _launch(
    sources: list[Tensor], targets: list[Tensor], cos: Tensor, sin: Tensor, direction: int
) -> None:
    """One program a token, for all heads of one tensor or two. `targets` are laid out like them."""
    (rows, heads, tokens, size), groups = sources[0].shape, sources[-1].shape[1]
    block, half = next_power_of_2(heads), next_power_of_2(size // 2)
    with launching(cos):
        _rotate_kernel[(rows * tokens,)](
            *(*sources, None)[:2],
            *(*targets, None)[:2],
            cos.contiguous(),
            sin.contiguous(),
            sources[0].stride()[:3],
            sources[-1].stride()[:3],
            tokens,
            cos.shape[0] * tokens,
            heads,
            groups,
            size // 2,
            DIRECTION=direction,
            HEADS=block,
            GROUPS=next_power_of_2(groups),
            HALF=half,
            # Each thread has 16 bytes of either half of the queries.
            num_warps=min(max(block * half // 256, 1), 8),
        )
