"""Attention of suffixes to a prefix that they share, and to their own keys, in one softmax.

Query i of suffix u in prefix d sees the prefix's keys 0 .. lengths[d] - 1 and the suffix's own keys
0 .. first[u] + i. R query heads read one key/value head. Over what a query sees

    s = E^-1/2 q k^T,  p = softmax(s),  o = p v

and with delta = sum(do o) over the head (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2)

    ds = p (do v^T - delta),  dq = E^-1/2 ds k,  dk = E^-1/2 ds^T q,  dv = p^T do

D prefixes of P keys, U suffixes of S own keys, Q queries a suffix, H query heads, G key/value heads
of size E, R = H / G. The kernels are in prefix_attention_device.py.
"""

from collections.abc import Mapping
from math import e, log2

import torch
from torch import Tensor

from fastflag.kernels.compiler import launching
from fastflag.kernels.language import cdiv, next_power_of_2
from fastflag.kernels.prefix_attention_device import (
    forward_kernel,
    own_key_backward_kernel,
    prefix_key_backward_kernel,
    query_backward_kernel,
)
from fastflag.kernels.tiles import Tile, recorded


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    starts: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    first: Tensor,
) -> Tensor:
    """query [U, H, Q, E]; key and value [D, G, P, E]; own_key and own_value [U, G, S, E] -> as
    query, strides included. All of one type.

    lengths [D], starts [D + 1] and first [U] are int32, not negative, and stay on the device.
    Prefix d has lengths[d] <= P keys; padding behind them is never read. Its suffixes are
    starts[d] .. starts[d + 1] - 1, and U = starts[D]. What first is:

    - 0 for every token of a suffix, Q = S;
    - the last token's place for that token alone, Q = 1;
    - the number of tokens above for a piece in a tree of suffixes, Q = 8: its S own keys are those
      of the pieces above it, then its own, then padding that no query sees.

    A NaN or an infinity in one suffix may spread to the others of its prefix.
    """
    lengths, starts, first = (counts.contiguous() for counts in (lengths, starts, first))
    return _attention(query, key, value, lengths, starts, own_key, own_value, first)[0]


@torch.library.custom_op("fastflag::prefix_attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    starts: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    first: Tensor,
) -> tuple[Tensor, Tensor]:
    """The output, and log2 of the sum of 2^score [G, U R Q] for the backward pass."""
    query, key, value, own_key, own_value = _side_by_side(query, key, value, own_key, own_value)
    output, normaliser = _outputs(query, key)
    tile = _tile(query)
    with launching(query):
        forward_kernel[_grid_of_rows(query, key, tile)](
            _view(query),
            _view(key),
            _view(value),
            lengths,
            starts,
            _view(own_key),
            _view(own_value),
            first,
            _view(output),
            normaliser,
            len(key),
            len(query),
            own_key.shape[2],
            query.shape[2],
            **_constants(query, key),
            **tile,
        )
    return output, normaliser


@_attention.register_fake
def _(query, key, *others):
    return _outputs(*_side_by_side(query), key)


def _outputs(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    suffixes, heads, queries, _ = query.shape
    groups = key.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    size = (groups, suffixes * (heads // groups) * queries)
    return torch.empty_like(query), query.new_empty(size, dtype=exact)


@torch.library.custom_op("fastflag::prefix_attention_query_backward", mutates_args=())
def _query_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    starts: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    first: Tensor,
    output: Tensor,
    normaliser: Tensor,
    d_output: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradient for query, and delta [G, U R Q] for the keys' backward pass."""
    query, key, value, own_key, own_value, d_output = _side_by_side(
        query, key, value, own_key, own_value, d_output
    )
    d_query, delta = torch.empty_like(query), torch.empty_like(normaliser)
    tile = _tile(query)
    with launching(query):
        query_backward_kernel[_grid_of_rows(query, key, tile)](
            _view(query),
            _view(key),
            _view(value),
            lengths,
            starts,
            _view(own_key),
            _view(own_value),
            first,
            _view(output),
            normaliser,
            _view(d_output),
            _view(d_query),
            delta,
            len(key),
            len(query),
            own_key.shape[2],
            query.shape[2],
            **_constants(query, key),
            **tile,
        )
    return d_query, delta


@_query_backward.register_fake
def _(query, *others):
    return torch.empty_like(*_side_by_side(query)), torch.empty_like(others[-2])


@torch.library.custom_op("fastflag::prefix_attention_key_backward", mutates_args=())
def _key_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    starts: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    first: Tensor,
    normaliser: Tensor,
    d_output: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients for key and value, 0 behind a prefix's length, and own_key and own_value."""
    query, key, value, own_key, own_value, d_output = _side_by_side(
        query, key, value, own_key, own_value, d_output
    )
    d_key, d_value, d_own_key, d_own_value = map(torch.empty_like, (key, value, own_key, own_value))
    tile, constants = _tile(query), _constants(query, key)
    # Only its own suffix's rows see a token: with 64 tokens together fewer products are masked than
    # with 128, which besides spill on sm_80 and sm_120.
    own_tile = {**tile, "KEPT": min(tile["KEPT"], 64)}
    prefixes, groups, keys, _ = key.shape
    suffixes, _, own_keys, _ = own_key.shape
    with launching(query):
        prefix_key_backward_kernel[(prefixes * cdiv(keys, tile["KEPT"]), groups)](
            _view(query),
            _view(key),
            _view(value),
            lengths,
            starts,
            normaliser,
            _view(d_output),
            delta,
            _view(d_key),
            _view(d_value),
            suffixes,
            keys,
            query.shape[2],
            **constants,
            **tile,
        )
        own_key_backward_kernel[(cdiv(suffixes * own_keys, own_tile["KEPT"]), groups)](
            _view(query),
            _view(own_key),
            _view(own_value),
            first,
            normaliser,
            _view(d_output),
            delta,
            _view(d_own_key),
            _view(d_own_value),
            suffixes,
            own_keys,
            query.shape[2],
            **constants,
            **own_tile,
        )
    return d_key, d_value, d_own_key, d_own_value


@_key_backward.register_fake
def _(query, key, value, lengths, starts, own_key, own_value, *others):
    return tuple(map(torch.empty_like, _side_by_side(key, value, own_key, own_value)))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_output: Tensor, _) -> tuple[Tensor | None, ...]:
    if d_output is None:
        return (None,) * 8
    *inputs, output, normaliser = ctx.saved_tensors
    d_query, delta = _query_backward(*inputs, output, normaliser, d_output)
    gradients = [d_query, *[None] * 7]
    keys = (1, 2, 5, 6)
    if any(ctx.needs_input_grad[number] for number in keys):
        for number, gradient in zip(
            keys, _key_backward(*inputs, normaliser, d_output, delta), strict=True
        ):
            gradients[number] = gradient
    return tuple(gradients)


_attention.register_autograd(_differentiate, setup_context=_save)


def prefix_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    starts: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    first: Tensor,
) -> Tensor:
    """The same in PyTorch, each suffix with a copy of its prefix. Scores and softmax are in fp32;
    the probabilities are rounded to the values' type."""
    suffix = torch.arange(len(query), dtype=starts.dtype, device=query.device)
    prefix = torch.searchsorted(starts[1:], suffix, right=True)
    keys = torch.cat((key.index_select(0, prefix), own_key), dim=2)
    values = torch.cat((value.index_select(0, prefix), own_value), dim=2)
    place = torch.arange(key.shape[2], device=query.device)
    own_place = torch.arange(own_key.shape[2], device=query.device)
    last = first[:, None] + torch.arange(query.shape[2], device=query.device)
    shared = (place < lengths[prefix, None])[:, None].expand(-1, query.shape[2], -1)
    visible = torch.cat((shared, own_place <= last[..., None]), dim=-1)
    wide = torch.promote_types(query.dtype, torch.float32)
    q = query.unflatten(1, (keys.shape[1], -1)).to(wide) * query.shape[-1] ** -0.5
    scores = q @ keys[:, :, None].to(wide).transpose(-1, -2)
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    return (scores.softmax(-1).to(value.dtype) @ values[:, :, None]).flatten(1, 2)


def _side_by_side(*tensors: Tensor) -> list[Tensor]:
    """Each as it is, or a copy where the last axis does not lie side by side."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _view(x: Tensor) -> tuple[Tensor, int, int, int]:
    """A tensor of four axes as the kernels take it."""
    return (x, *x.stride()[:3])


def _grid_of_rows(query: Tensor, key: Tensor, tile: Tile) -> tuple[int, int]:
    """All rows' full tiles, and one for each prefix that is not full."""
    suffixes, heads, queries, _ = query.shape
    prefixes, groups = key.shape[:2]
    return suffixes * (heads // groups) * queries // tile["KEPT"] + prefixes, groups


def _constants(query: Tensor, key: Tensor) -> dict[str, float]:
    size = query.shape[3]
    return {
        "SCALE": log2(e) * size**-0.5,
        "R": query.shape[1] // key.shape[1],
        "E": size,
        "COLUMNS": _columns(query),
    }


def _columns(query: Tensor) -> int:
    """The head's size as tl.dot takes it."""
    return max(next_power_of_2(query.shape[3]), 16)


# By the bytes of a head: rows that a program keeps and keys that it passes over, or the reverse.
# These are the largest that spill no registers in bf16, E = 64 and 128, with rows of its own for
# each warp or warpgroup. With fewer rows than columns, Ampere's products are split by columns and
# their operands repeated in every warp. wgmma and tcgen05 take 64 rows and more.
_NARROW = {"KEPT": 64, "PASSED": 32, "num_warps": 4, "num_stages": 2}
_WIDE = {
    512: {"KEPT": 64, "PASSED": 16, "num_warps": 8, "num_stages": 2},
    1024: {"KEPT": 16, "PASSED": 16, "num_warps": 4, "num_stages": 1},
}
_LONG = {"KEPT": 128, "PASSED": 16, "num_warps": 8, "num_stages": 2}
_AMPERE = {128: _NARROW, 256: _LONG} | _WIDE
_TILES: Mapping[int, Mapping[int, Tile]] = {
    80: _AMPERE,
    90: _AMPERE | {256: _LONG | {"PASSED": 32}},
    120: _AMPERE,  # which has sm_89's matrix instructions
}


def _tile(query: Tensor) -> Tile:
    # fp32 has no matrix instruction here: the tiles of sm_90, made for one, spill 20 times as much.
    tiles = recorded(_TILES, query.device) if query.element_size() == 2 else _TILES[80]
    size = _columns(query) * query.element_size()
    return tiles[min(known for known in tiles if size <= known)]
