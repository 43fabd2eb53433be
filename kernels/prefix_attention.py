"""Attention of suffixes to a prefix that they share, and to themselves, in one softmax.

Query i of suffix u, head h, sees the keys 0 .. lengths[d] - 1 of its prefix d and the suffix's own
keys j <= first[u] + i, both of key/value head h // R, R query heads to one. Over what it sees

    s = E^-1/2 q k^T,  p = softmax(s),  o = p v

and with delta = sum(do o) over the head (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2)

    ds = p (do v^T - delta),  dq = E^-1/2 ds k,  dk = E^-1/2 ds^T q,  dv = p^T do

D prefixes of P keys, U suffixes of S own keys, Q queries a suffix, H query heads, G key/value heads
of size E. The R Q rows (head, query) of a suffix follow one another, and so do the suffixes of a
prefix: a tile of rows crosses suffixes, never prefixes, and loads each key of the prefix once for
all of them. Their own keys follow one another too, so the rest of the softmax is a few more tiles
of keys, of which each row sees a block on the diagonal. It goes on in the same program: merging two
kernels' results by their log-sum-exp would write the output and read it back twice.

Backward, one launch holds rows and lets keys pass, for dq and delta; one holds keys, the prefixes'
and then the suffixes', and lets the rows that see them pass, so every sum has a fixed order. Where
a prefix's suffixes begin is known to the device alone: the grid has as many tiles as there can be.
"""

from collections.abc import Mapping
from math import e, log2

import torch
from torch import Tensor

from fastflag.kernels.language import cdiv, jit, next_power_of_2, tl
from fastflag.kernels.tiles import Tile, recorded

# In the kernels a tensor of four axes is a tuple: its pointer and the strides of the first three
# axes, the last one's being 1. Counts vary from call to call; nothing is compiled for one of them.
_COUNTS = ("prefixes", "suffixes", "keys", "own_keys", "queries")


@jit
def _row_pointers(tensor, row, queries, R: tl.constexpr, COLUMNS: tl.constexpr):
    """[X, COLUMNS] of the rows [X] of the program's group in [U, H, Q, E]."""
    suffix = (row // (R * queries)).to(tl.int64)
    head = tl.program_id(1) * R + row // queries % R
    offset = suffix * tensor[1] + head * tensor[2] + row % queries * tensor[3]
    return tensor[0] + offset[:, None] + tl.arange(0, COLUMNS)[None, :]


@jit
def _key_pointers(tensor, owner, place, COLUMNS: tl.constexpr):
    """[X, COLUMNS] of the keys at `place` [X] of prefixes or suffixes `owner` in [_, G, _, E]."""
    offset = owner.to(tl.int64) * tensor[1] + tl.program_id(1) * tensor[2] + place * tensor[3]
    return tensor[0] + offset[:, None] + tl.arange(0, COLUMNS)[None, :]


@jit
def _load(pointers, inside, E: tl.constexpr):
    """[X, COLUMNS], 0 in rows that are not inside and in columns beyond the head's size."""
    columns = tl.arange(0, pointers.shape[1])
    return tl.load(pointers, mask=inside[:, None] & (columns < E)[None, :], other=0.0)


@jit
def _store(pointers, numbers, inside, E: tl.constexpr):
    columns = tl.arange(0, pointers.shape[1])
    numbers = numbers.to(pointers.dtype.element_ty)
    tl.store(pointers, numbers, mask=inside[:, None] & (columns < E)[None, :])


@jit
def _tile_of_rows(starts_ptr, prefixes, rows, KEPT: tl.constexpr):
    """The prefix of the program's tile of rows, the tile's first row and the prefix's last + 1.

    Prefix d has the tiles from floor(starts[d] rows / KEPT) + d on: as many as it needs or one
    more, which begins beyond its rows.
    """
    tile = tl.program_id(0)
    prefix = -1
    for begin in range(0, prefixes, 256):
        number = begin + tl.arange(0, 256)
        start = tl.load(starts_ptr + number, mask=number < prefixes, other=0)
        begun = (number < prefixes) & (start * rows // KEPT + number <= tile)
        prefix += tl.sum(begun.to(tl.int32))
    start = tl.load(starts_ptr + prefix) * rows
    end = tl.load(starts_ptr + prefix + 1) * rows
    return prefix, start + (tile - start // KEPT - prefix) * KEPT, end


@jit
def _prefix_tile(key, value, prefix, start, length, E, COLUMNS: tl.constexpr, PASSED: tl.constexpr):
    """k, v [PASSED, COLUMNS] and which of them all rows see [1, PASSED]."""
    place = start + tl.arange(0, PASSED)
    inside = place < length
    k = _load(_key_pointers(key, prefix, place, COLUMNS), inside, E)
    v = _load(_key_pointers(value, prefix, place, COLUMNS), inside, E)
    return k, v, inside[None, :]


@jit
def _own_tile(
    own_key,
    own_value,
    start,
    end,
    low,
    high,
    own_keys,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    PASSED: tl.constexpr,
):
    """k, v [PASSED, COLUMNS] and which of them each row sees [ROWS, PASSED]."""
    token = start + tl.arange(0, PASSED)
    owner, place = token // own_keys, token % own_keys
    k = _load(_key_pointers(own_key, owner, place, COLUMNS), token < end, E)
    v = _load(_key_pointers(own_value, owner, place, COLUMNS), token < end, E)
    return k, v, (low[:, None] <= token[None, :]) & (token[None, :] < high[:, None])


@jit
def _own_sight(first_ptr, row, inside, own_keys, queries, R: tl.constexpr):
    """Rows [X] see the own keys from low to high - 1, of all suffixes' keys in a line."""
    suffix = row // (R * queries)
    last = tl.load(first_ptr + suffix, mask=inside, other=0) + row % queries
    return suffix * own_keys, suffix * own_keys + tl.minimum(last + 1, own_keys)


@jit
def _attend(q, k, v, visible, highest, total, attended, SCALE: tl.constexpr):
    """One more tile of keys in the running softmax; scores are powers of 2."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
    scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrunk = tl.exp2(highest - base)
    attended *= shrunk[:, None]
    attended += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return higher, total * shrunk + tl.sum(weights, 1), attended


@jit(do_not_specialize=_COUNTS)
def _forward_kernel(
    query,  # [U, H, Q, E]
    key,  # [D, G, P, E]
    value,  # [D, G, P, E]
    lengths_ptr,  # [D]
    starts_ptr,  # [D + 1]
    own_key,  # [U, G, S, E]
    own_value,  # [U, G, S, E]
    first_ptr,  # [U]
    output,  # [U, H, Q, E]
    normaliser_ptr,  # [G, U R Q], log2 of the sum of 2^score
    prefixes,
    suffixes,
    own_keys,
    queries,
    SCALE: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
    PASSED: tl.constexpr,
):
    rows = R * queries
    prefix, begin, end = _tile_of_rows(starts_ptr, prefixes, rows, KEPT)
    if begin >= end:
        return
    row = begin + tl.arange(0, KEPT)
    inside = row < end
    q = _load(_row_pointers(query, row, queries, R, COLUMNS), inside, E)
    accumulator = normaliser_ptr.dtype.element_ty
    highest = tl.full([KEPT], float("-inf"), accumulator)
    total = tl.zeros([KEPT], accumulator)
    attended = tl.zeros([KEPT, COLUMNS], accumulator)

    length = tl.load(lengths_ptr + prefix)
    for start in range(0, length, PASSED):
        k, v, visible = _prefix_tile(key, value, prefix, start, length, E, COLUMNS, PASSED)
        highest, total, attended = _attend(q, k, v, visible, highest, total, attended, SCALE)

    low, high = _own_sight(first_ptr, row, inside, own_keys, queries, R)
    own_end = ((tl.minimum(begin + KEPT, end) - 1) // rows + 1) * own_keys
    for start in range(begin // rows * own_keys, own_end, PASSED):
        k, v, visible = _own_tile(
            own_key, own_value, start, own_end, low, high, own_keys, E, COLUMNS, PASSED
        )
        highest, total, attended = _attend(q, k, v, visible, highest, total, attended, SCALE)

    total = tl.where(inside, total, 1.0)
    o = attended / total[:, None]
    _store(_row_pointers(output, row, queries, R, COLUMNS), o, inside, E)
    normaliser_ptr += tl.program_id(1).to(tl.int64) * suffixes * rows
    tl.store(normaliser_ptr + row, highest + tl.log2(total), mask=inside)


@jit
def _weights(a, b, d_a, d_b, normaliser, delta, visible, SCALE: tl.constexpr):
    """p and ds of a tile from q, k, do, v; or their transposes from k, q, v, do."""
    scores = tl.dot(a, tl.trans(b), input_precision="ieee") * SCALE
    p = tl.exp2(tl.where(visible, scores - normaliser, float("-inf")))
    return p, p * (tl.dot(d_a, tl.trans(d_b), input_precision="ieee") - delta)


@jit(do_not_specialize=_COUNTS)
def _query_kernel(
    query,  # [U, H, Q, E]
    key,  # [D, G, P, E]
    value,  # [D, G, P, E]
    lengths_ptr,  # [D]
    starts_ptr,  # [D + 1]
    own_key,  # [U, G, S, E]
    own_value,  # [U, G, S, E]
    first_ptr,  # [U]
    output,  # [U, H, Q, E]
    normaliser_ptr,  # [G, U R Q]
    d_output,  # [U, H, Q, E]
    d_query,  # [U, H, Q, E]
    delta_ptr,  # [G, U R Q]
    prefixes,
    suffixes,
    own_keys,
    queries,
    SCALE: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
    PASSED: tl.constexpr,
):
    rows = R * queries
    prefix, begin, end = _tile_of_rows(starts_ptr, prefixes, rows, KEPT)
    if begin >= end:
        return
    row = begin + tl.arange(0, KEPT)
    inside = row < end
    q = _load(_row_pointers(query, row, queries, R, COLUMNS), inside, E)
    o = _load(_row_pointers(output, row, queries, R, COLUMNS), inside, E)
    d_o = _load(_row_pointers(d_output, row, queries, R, COLUMNS), inside, E)
    accumulator = normaliser_ptr.dtype.element_ty
    delta = tl.sum(d_o.to(accumulator) * o.to(accumulator), 1)
    in_group = tl.program_id(1).to(tl.int64) * suffixes * rows + row
    tl.store(delta_ptr + in_group, delta, mask=inside)
    normaliser = tl.load(normaliser_ptr + in_group, mask=inside, other=0.0)[:, None]
    delta = delta[:, None]
    d_q = tl.zeros([KEPT, COLUMNS], accumulator)

    length = tl.load(lengths_ptr + prefix)
    for start in range(0, length, PASSED):
        k, v, visible = _prefix_tile(key, value, prefix, start, length, E, COLUMNS, PASSED)
        _, d_scores = _weights(q, k, d_o, v, normaliser, delta, visible, SCALE)
        d_q += tl.dot(d_scores.to(k.dtype), k, input_precision="ieee")

    low, high = _own_sight(first_ptr, row, inside, own_keys, queries, R)
    own_end = ((tl.minimum(begin + KEPT, end) - 1) // rows + 1) * own_keys
    for start in range(begin // rows * own_keys, own_end, PASSED):
        k, v, visible = _own_tile(
            own_key, own_value, start, own_end, low, high, own_keys, E, COLUMNS, PASSED
        )
        _, d_scores = _weights(q, k, d_o, v, normaliser, delta, visible, SCALE)
        d_q += tl.dot(d_scores.to(k.dtype), k, input_precision="ieee")

    _store(_row_pointers(d_query, row, queries, R, COLUMNS), d_q * E**-0.5, inside, E)


@jit(do_not_specialize=_COUNTS)
def _key_kernel(
    query,  # [U, H, Q, E]
    key,  # [D, G, P, E]
    value,  # [D, G, P, E]
    lengths_ptr,  # [D]
    starts_ptr,  # [D + 1]
    own_key,  # [U, G, S, E]
    own_value,  # [U, G, S, E]
    first_ptr,  # [U]
    normaliser_ptr,  # [G, U R Q]
    d_output,  # [U, H, Q, E]
    delta_ptr,  # [G, U R Q]
    d_key,  # [D, G, P, E]
    d_value,  # [D, G, P, E]
    d_own_key,  # [U, G, S, E]
    d_own_value,  # [U, G, S, E]
    prefixes,
    suffixes,
    keys,
    own_keys,
    queries,
    SCALE: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
    PASSED: tl.constexpr,
):
    rows = R * queries
    tiles = tl.cdiv(keys, KEPT)
    own_tile = tl.program_id(0) - prefixes * tiles
    own = own_tile >= 0
    if own:
        token = own_tile * KEPT + tl.arange(0, KEPT)
        inside = token < suffixes * own_keys
        owner, place = token // own_keys, token % own_keys
        k = _load(_key_pointers(own_key, owner, place, COLUMNS), inside, E)
        v = _load(_key_pointers(own_value, owner, place, COLUMNS), inside, E)
        length = 0
        last = tl.minimum(own_tile * KEPT + KEPT, suffixes * own_keys) - 1
        start = own_tile * KEPT // own_keys * rows
        end = (last // own_keys + 1) * rows
    else:
        prefix = tl.program_id(0) // tiles
        token = tl.program_id(0) % tiles * KEPT + tl.arange(0, KEPT)
        length = tl.load(lengths_ptr + prefix)
        k = _load(_key_pointers(key, prefix, token, COLUMNS), token < length, E)
        v = _load(_key_pointers(value, prefix, token, COLUMNS), token < length, E)
        start = tl.load(starts_ptr + prefix) * rows
        end = tl.load(starts_ptr + prefix + 1) * rows
    d_k = tl.zeros([KEPT, COLUMNS], delta_ptr.dtype.element_ty)
    d_v = tl.zeros([KEPT, COLUMNS], delta_ptr.dtype.element_ty)

    for begin in range(start, end, PASSED):
        row = begin + tl.arange(0, PASSED)
        inside = row < end
        q = _load(_row_pointers(query, row, queries, R, COLUMNS), inside, E)
        d_o = _load(_row_pointers(d_output, row, queries, R, COLUMNS), inside, E)
        in_group = tl.program_id(1).to(tl.int64) * suffixes * rows + row
        normaliser = tl.load(normaliser_ptr + in_group, mask=inside, other=0.0)[None, :]
        delta = tl.load(delta_ptr + in_group, mask=inside, other=0.0)[None, :]
        low, high = _own_sight(first_ptr, row, inside & own, own_keys, queries, R)
        low, high = tl.where(own, low, 0), tl.where(own, high, length)
        visible = (low[None, :] <= token[:, None]) & (token[:, None] < high[None, :])
        p, d_scores = _weights(k, q, v, d_o, normaliser, delta, visible, SCALE)
        d_v += tl.dot(p.to(d_o.dtype), d_o, input_precision="ieee")
        d_k += tl.dot(d_scores.to(q.dtype), q, input_precision="ieee")

    d_k *= E**-0.5
    if own:
        inside = token < suffixes * own_keys
        owner, place = token // own_keys, token % own_keys
        _store(_key_pointers(d_own_key, owner, place, COLUMNS), d_k, inside, E)
        _store(_key_pointers(d_own_value, owner, place, COLUMNS), d_v, inside, E)
    else:
        prefix = tl.program_id(0) // tiles
        _store(_key_pointers(d_key, prefix, token, COLUMNS), d_k, token < keys, E)
        _store(_key_pointers(d_value, prefix, token, COLUMNS), d_v, token < keys, E)


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

    Prefix d has lengths[d] <= P keys (what lies behind them is never read) and the suffixes
    starts[d] .. starts[d + 1] - 1, of U = starts[D]. Query i of suffix u sees its own keys
    j <= first[u] + i: first is 0 where Q = S, and the last token's place where Q = 1. lengths [D],
    starts [D + 1] and first [U] are int32, not negative, and stay on the device. An infinite value
    or NaN of one suffix may spread to those of its prefix.
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
    _forward_kernel[_grid_of_rows(query, key, tile)](
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
    _query_kernel[_grid_of_rows(query, key, tile)](
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
    gradients = [torch.empty_like(x) for x in (key, value, own_key, own_value)]
    tile = _tile(query)
    prefixes, groups, keys, _ = key.shape
    suffixes, _, own_keys, _ = own_key.shape
    tiles = prefixes * cdiv(keys, tile["KEPT"]) + cdiv(suffixes * own_keys, tile["KEPT"])
    _key_kernel[(tiles, groups)](
        _view(query),
        _view(key),
        _view(value),
        lengths,
        starts,
        _view(own_key),
        _view(own_value),
        first,
        normaliser,
        _view(d_output),
        delta,
        *map(_view, gradients),
        prefixes,
        suffixes,
        keys,
        own_keys,
        query.shape[2],
        **_constants(query, key),
        **tile,
    )
    return tuple(gradients)


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
    """The same in PyTorch, each suffix with a copy of its prefix: scores and softmax in fp32, the
    probabilities rounded to the values' type."""
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


# Rows that a program keeps and keys that pass by, or the reverse, by the bytes of a head. The
# largest that spill no registers in bf16, E = 64 and 128, each warp or warpgroup with
# rows of its own: with fewer rows than columns, Ampere's products are split by columns and their
# operands repeated in every warp. wgmma and tcgen05 take 64 rows and more.
_NARROW = {"KEPT": 64, "PASSED": 32, "num_warps": 4, "num_stages": 2}
_WIDE = {
    512: {"KEPT": 64, "PASSED": 16, "num_warps": 8, "num_stages": 2},
    1024: {"KEPT": 16, "PASSED": 16, "num_warps": 4, "num_stages": 1},
}
_TILES: Mapping[int, Mapping[int, Tile]] = {
    80: {128: _NARROW, 256: {"KEPT": 128, "PASSED": 16, "num_warps": 8, "num_stages": 2}} | _WIDE,
    90: {128: _NARROW, 256: {"KEPT": 128, "PASSED": 32, "num_warps": 8, "num_stages": 2}} | _WIDE,
}


def _tile(query: Tensor) -> Tile:
    # fp32 has no matrix instruction here: the tiles of sm_90, made for one, spill 20 times as much.
    tiles = recorded(_TILES) if query.element_size() == 2 else _TILES[80]
    size = _columns(query) * query.element_size()
    return tiles[min(known for known in tiles if size <= known)]
