"""Device code of prefix attention; the formulas and the shapes are in prefix_attention.py.

A program works for one key/value head and the R query heads that read it. The R Q rows
(head, query) of a suffix follow one another, and so do the suffixes of a prefix. A tile of rows may
hold several suffixes, but of one prefix only: it loads each key of the prefix once for all of them.

The suffixes' own keys follow one another too. So the rest of the softmax is a few more tiles of
keys, of which each row sees a block on the diagonal. The same program goes on with them. Two
kernels would have to merge their results by log-sum-exp: the output would be written and read back
twice.

Backward, one kernel keeps a tile of rows and passes over the keys they see, for dq and delta. Two
others keep a tile of keys, of prefixes and of suffixes, and pass over the rows that see them. No
kernel adds to memory that another program adds to: every sum has a fixed order.

Only the device knows where a prefix's suffixes begin. So the grid has as many tiles of rows as
there can be. A program whose tile has none passes over no keys and stores nothing. It does not
return early, and no branch that is taken at run time goes round a loop: kernels of either shape
were miscompiled, silently (Triton 3.7.0, triton-lang/triton#11148 and #11153).
"""

from fastflag.kernels.language import jit, tl

# A tensor of four axes is a tuple: its pointer and the strides of the first three axes. The last
# axis has stride 1. Counts vary from call to call, so no kernel is specialised for one of them.
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
    """[X, COLUMNS]. Padding is 0: rows that are not inside, columns beyond the head's size."""
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

    Prefix d has the tiles from floor(starts[d] rows / KEPT) + d on. These are as many as it needs,
    or one more, which begins beyond its rows and so has none.
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
    """low and high [X]: a row sees the own keys low .. high - 1, counted over all suffixes."""
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
def forward_kernel(
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
    row = begin + tl.arange(0, KEPT)
    inside = row < end
    q = _load(_row_pointers(query, row, queries, R, COLUMNS), inside, E)
    accumulator = normaliser_ptr.dtype.element_ty
    highest = tl.full([KEPT], float("-inf"), accumulator)
    total = tl.zeros([KEPT], accumulator)
    attended = tl.zeros([KEPT, COLUMNS], accumulator)

    length = tl.where(begin < end, tl.load(lengths_ptr + prefix), 0)
    for start in range(0, length, PASSED):
        k, v, visible = _prefix_tile(key, value, prefix, start, length, E, COLUMNS, PASSED)
        highest, total, attended = _attend(q, k, v, visible, highest, total, attended, SCALE)

    low, high = _own_sight(first_ptr, row, inside, own_keys, queries, R)
    own_end = tl.cdiv(tl.minimum(begin + KEPT, end), rows) * own_keys
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
def query_backward_kernel(
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

    length = tl.where(begin < end, tl.load(lengths_ptr + prefix), 0)
    for start in range(0, length, PASSED):
        k, v, visible = _prefix_tile(key, value, prefix, start, length, E, COLUMNS, PASSED)
        _, d_scores = _weights(q, k, d_o, v, normaliser, delta, visible, SCALE)
        d_q += tl.dot(d_scores.to(k.dtype), k, input_precision="ieee")

    low, high = _own_sight(first_ptr, row, inside, own_keys, queries, R)
    own_end = tl.cdiv(tl.minimum(begin + KEPT, end), rows) * own_keys
    for start in range(begin // rows * own_keys, own_end, PASSED):
        k, v, visible = _own_tile(
            own_key, own_value, start, own_end, low, high, own_keys, E, COLUMNS, PASSED
        )
        _, d_scores = _weights(q, k, d_o, v, normaliser, delta, visible, SCALE)
        d_q += tl.dot(d_scores.to(k.dtype), k, input_precision="ieee")

    _store(_row_pointers(d_query, row, queries, R, COLUMNS), d_q * E**-0.5, inside, E)


@jit
def _key_gradients(
    k,
    v,
    d_k,
    d_v,
    low,
    high,
    token,
    row,
    inside,
    query,
    normaliser_ptr,
    d_output,
    delta_ptr,
    suffixes,
    queries,
    SCALE: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """d_k and d_v with what one more tile of rows adds. Row i sees tokens low[i] .. high[i] - 1.
    A row that is not inside has a query and a d_output of 0, and adds nothing."""
    q = _load(_row_pointers(query, row, queries, R, COLUMNS), inside, E)
    d_o = _load(_row_pointers(d_output, row, queries, R, COLUMNS), inside, E)
    in_group = tl.program_id(1).to(tl.int64) * suffixes * (R * queries) + row
    normaliser = tl.load(normaliser_ptr + in_group, mask=inside, other=0.0)[None, :]
    delta = tl.load(delta_ptr + in_group, mask=inside, other=0.0)[None, :]
    visible = (low <= token[:, None]) & (token[:, None] < high)
    p, d_scores = _weights(k, q, v, d_o, normaliser, delta, visible, SCALE)
    d_v += tl.dot(p.to(d_o.dtype), d_o, input_precision="ieee")
    d_k += tl.dot(d_scores.to(q.dtype), q, input_precision="ieee")
    return d_k, d_v


@jit(do_not_specialize=_COUNTS)
def prefix_key_backward_kernel(
    query,  # [U, H, Q, E]
    key,  # [D, G, P, E]
    value,  # [D, G, P, E]
    lengths_ptr,  # [D]
    starts_ptr,  # [D + 1]
    normaliser_ptr,  # [G, U R Q]
    d_output,  # [U, H, Q, E]
    delta_ptr,  # [G, U R Q]
    d_key,  # [D, G, P, E]
    d_value,  # [D, G, P, E]
    suffixes,
    keys,
    queries,
    SCALE: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
    PASSED: tl.constexpr,
):
    tiles = tl.cdiv(keys, KEPT)
    prefix = tl.program_id(0) // tiles
    token = tl.program_id(0) % tiles * KEPT + tl.arange(0, KEPT)
    length = tl.load(lengths_ptr + prefix)
    k = _load(_key_pointers(key, prefix, token, COLUMNS), token < length, E)
    v = _load(_key_pointers(value, prefix, token, COLUMNS), token < length, E)
    d_k = tl.zeros([KEPT, COLUMNS], delta_ptr.dtype.element_ty)
    d_v = tl.zeros([KEPT, COLUMNS], delta_ptr.dtype.element_ty)
    end = tl.load(starts_ptr + prefix + 1) * (R * queries)
    for begin in range(tl.load(starts_ptr + prefix) * (R * queries), end, PASSED):
        row = begin + tl.arange(0, PASSED)
        d_k, d_v = _key_gradients(
            k,
            v,
            d_k,
            d_v,
            0,
            length,
            token,
            row,
            row < end,
            query,
            normaliser_ptr,
            d_output,
            delta_ptr,
            suffixes,
            queries,
            SCALE,
            R,
            E,
            COLUMNS,
        )
    _store(_key_pointers(d_key, prefix, token, COLUMNS), d_k * E**-0.5, token < keys, E)
    _store(_key_pointers(d_value, prefix, token, COLUMNS), d_v, token < keys, E)


@jit(do_not_specialize=_COUNTS)
def own_key_backward_kernel(
    query,  # [U, H, Q, E]
    own_key,  # [U, G, S, E]
    own_value,  # [U, G, S, E]
    first_ptr,  # [U]
    normaliser_ptr,  # [G, U R Q]
    d_output,  # [U, H, Q, E]
    delta_ptr,  # [G, U R Q]
    d_own_key,  # [U, G, S, E]
    d_own_value,  # [U, G, S, E]
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
    token = tl.program_id(0) * KEPT + tl.arange(0, KEPT)
    there = token < suffixes * own_keys
    owner, place = token // own_keys, token % own_keys
    k = _load(_key_pointers(own_key, owner, place, COLUMNS), there, E)
    v = _load(_key_pointers(own_value, owner, place, COLUMNS), there, E)
    d_k = tl.zeros([KEPT, COLUMNS], delta_ptr.dtype.element_ty)
    d_v = tl.zeros([KEPT, COLUMNS], delta_ptr.dtype.element_ty)
    # The rows of the suffixes that the tile's tokens are of, in whole or in part.
    first = tl.program_id(0) * KEPT // own_keys
    last = tl.minimum(tl.program_id(0) * KEPT + KEPT, suffixes * own_keys)
    end = tl.cdiv(last, own_keys) * (R * queries)
    for begin in range(first * (R * queries), end, PASSED):
        row = begin + tl.arange(0, PASSED)
        low, high = _own_sight(first_ptr, row, row < end, own_keys, queries, R)
        d_k, d_v = _key_gradients(
            k,
            v,
            d_k,
            d_v,
            low[None, :],
            high[None, :],
            token,
            row,
            row < end,
            query,
            normaliser_ptr,
            d_output,
            delta_ptr,
            suffixes,
            queries,
            SCALE,
            R,
            E,
            COLUMNS,
        )
    _store(_key_pointers(d_own_key, owner, place, COLUMNS), d_k * E**-0.5, there, E)
    _store(_key_pointers(d_own_value, owner, place, COLUMNS), d_v, there, E)
