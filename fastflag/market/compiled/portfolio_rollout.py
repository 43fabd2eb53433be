"""Portfolios through nights: by given actions, by actions drawn from a table, by given units."""

import numpy as np

from fastflag.market.compiled.kernel import kernel
from fastflag.market.compiled.portfolio import (
    ALIVE,
    BLOCK,
    EQUITY,
    HOLDING,
    LANES,
    NUM_OWNS,
    ORDER,
    RATIO,
    REWARD,
    RUINED,
    STRIDE,
    gather_nb,
    night_nb,
    order_nb,
    restart_nb,
    scatter_nb,
)
from fastflag.market.compiled.portfolio_codes import code_nb, scale_nb
from fastflag.market.compiled.portfolio_constants import OPEN
from fastflag.market.compiled.random import stream_nb, uniform_nb


@kernel()
def step_nb(nights, rules, arrays, moments, actions, rewards, terminated):
    """Neighbours at one moment go together. `actions` [B, K] become what was executed."""
    assets = nights.shape[1]
    owns, slots = np.empty(NUM_OWNS), np.empty(assets * BLOCK)
    orders = np.empty(assets * STRIDE, np.int64)
    start = 0
    while start < moments.size:
        end, moment = start, moments[start]
        while end < min(start + LANES, moments.size) and moments[end] == moment:
            end += 1
        size = end - start
        gather_nb(arrays, start, size, owns, slots)
        for k in range(assets):
            for lane in range(size):
                orders[k * STRIDE + lane] = actions[start + lane, k]
        order_nb(size, nights[moment], orders, owns, slots)
        night_nb(size, nights[moment], owns, slots, rules)
        scatter_nb(arrays, start, size, owns, slots)
        for k in range(assets):
            for lane in range(size):
                actions[start + lane, k] = orders[k * STRIDE + lane]
        for lane in range(size):
            rewards[start + lane] = owns[REWARD + lane]
            terminated[start + lane] = owns[RUINED + lane] != 0.0
        start = end


@kernel()
def _rows_nb(size, owns, slots, row_of, scales, codes, shown):
    """Finds the rows `shown` [K x STRIDE] of what each lane shows; `row_of` [K, CODES]. -> whether
    all have one."""
    assets, least = row_of.shape[0], np.int64(0)
    for lane in range(size):
        scales[lane] = scale_nb(owns[EQUITY + lane], assets)
    for k in range(assets):
        at, here, row_of_code = k * BLOCK, k * STRIDE, row_of[k]
        for lane in range(size):
            holding, ratio = slots[at + HOLDING + lane], slots[at + RATIO + lane]
            codes[lane] = code_nb(holding, ratio, scales[lane])
        for lane in range(size):
            row = np.int64(row_of_code[np.uint64(codes[lane])])
            shown[here + lane] = row
            least = min(least, row)
    return least >= 0


@kernel()
def _without_row_nb(size, owns, slots, row_of):
    """(slot, code) of a state that has no row; one has none."""
    assets = row_of.shape[0]
    for k in range(assets):
        for lane in range(size):
            holding, ratio = slots[k * BLOCK + HOLDING + lane], slots[k * BLOCK + RATIO + lane]
            code = code_nb(holding, ratio, scale_nb(owns[EQUITY + lane], assets))
            if row_of[k, code] < 0:
                return k, code
    return -1, -1


@kernel()
def _sample_nb(size, streams, first, cdf, names, shown, points, orders):
    """Inverse CDF, as in lanes.py: an action of probability 0 can't be drawn. `cdf` [R x names].

    Of four actions the fourth bound is the total, which no point reaches.
    """
    for k in range(shown.size // STRIDE):
        here = k * STRIDE
        for lane in range(size):
            points[lane] = uniform_nb(streams[lane], first + k)
        for lane in range(size):
            at = shown[here + lane] * names
            point = points[lane] * cdf[np.uint64(at + names - 1)]
            action = np.int64(point >= cdf[np.uint64(at)])
            action += np.int64(point >= cdf[np.uint64(at + 1)])
            action += np.int64(point >= cdf[np.uint64(at + 2)])
            orders[here + lane] = action + np.int64(point >= cdf[np.uint64(at + 3)])


@kernel()
def _copy_nb(size, numbers, columns):
    """`numbers` [K x STRIDE] into `columns` [K, size]."""
    for k in range(columns.shape[0]):
        column = columns[k]
        for lane in range(size):
            column[lane] = numbers[k * STRIDE + lane]


@kernel()
def rollout_nb(
    nights,
    rules,
    arrays,
    moments,
    restarts,
    cdf,
    row_of,
    seed,
    first_env,
    first_step,
    first,
    end,
    out,
):
    """Accounts first to end - 1. -> (moment, slot, code) of a state without a row, or -1s."""
    rows, actions, rewards, terminated, valid, next_rows = out
    assets, names, flat = nights.shape[1], cdf.shape[1], cdf.ravel()
    owns, slots = np.empty(NUM_OWNS), np.empty(assets * BLOCK)
    streams, points, scales = np.empty(LANES, np.uint64), np.empty(LANES), np.empty(LANES)
    orders, codes = np.empty(assets * STRIDE, np.int64), np.empty(LANES, np.int64)
    shown = np.empty(assets * STRIDE, np.int64)
    for start in range(first, end, LANES):
        size = min(LANES, end - start)
        here = slice(start, start + size)
        gather_nb(arrays, start, size, owns, slots)
        for lane in range(size):
            streams[lane] = stream_nb(seed, first_env + start + lane)
        for s in range(moments.size):
            moment, night = moments[s], nights[moments[s]]
            if restarts[s]:
                restart_nb(size, assets, owns, slots)
            anew = restarts[s] or s == 0
            if anew and not _rows_nb(size, owns, slots, row_of[moment], scales, codes, shown):
                return moment, *_without_row_nb(size, owns, slots, row_of[moment])
            _copy_nb(size, shown, rows[s, :, here])
            for lane in range(size):
                valid[s, start + lane] = owns[ALIVE + lane] != 0.0
            counter = (first_step + s) * assets
            _sample_nb(size, streams, counter, flat, names, shown, points, orders)
            order_nb(size, night, orders, owns, slots)
            _copy_nb(size, orders, actions[s, :, here])
            night_nb(size, night, owns, slots, rules)
            for lane in range(size):
                rewards[s, start + lane] = owns[REWARD + lane]
                terminated[s, start + lane] = owns[RUINED + lane] != 0.0
            if not _rows_nb(size, owns, slots, row_of[moment + 1], scales, codes, shown):
                return moment + 1, *_without_row_nb(size, owns, slots, row_of[moment + 1])
            _copy_nb(size, shown, next_rows[s, :, here])
        scatter_nb(arrays, start, size, owns, slots)
    return np.int64(-1), np.int64(-1), np.int64(-1)


@kernel()
def _random_nb(size, night, streams, first, names, slots, orders):
    """Draws uniformly from the actions allowed, where there are others than Keep."""
    for k in range(night.shape[0]):
        for lane in range(size):
            fewer = np.int64(slots[k * BLOCK + HOLDING + lane] == 0.0)
            point = uniform_nb(streams[lane], first + k)
            orders[k * STRIDE + lane] = np.int64(point * (names - fewer)) + fewer


@kernel()
def equities_nb(nights, rules, arrays, first, seed, units, equity):
    """Equity [B, T] at moment `first` and those after, by `units` [T - 1, K] ordered at each (NaN
    keeps); by random actions where there are none ([0, 0])."""
    assets = nights.shape[1]
    owns, slots = np.empty(NUM_OWNS), np.empty(assets * BLOCK)
    orders, streams = np.empty(assets * STRIDE, np.int64), np.empty(LANES, np.uint64)
    names = 5 if rules.long_short else 4
    for start in range(0, equity.shape[0], LANES):
        size = min(LANES, equity.shape[0] - start)
        gather_nb(arrays, start, size, owns, slots)
        for lane in range(size):
            streams[lane] = stream_nb(seed, start + lane)
            equity[start + lane, 0] = owns[EQUITY + lane]
        for place in range(1, equity.shape[1]):
            night = nights[first + place - 1]
            if units.size:
                for k in range(assets):
                    unit = units[place - 1, k] if night[k, OPEN] != 0.0 else np.nan
                    for lane in range(size):
                        alive = owns[ALIVE + lane] != 0.0
                        slots[k * BLOCK + ORDER + lane] = unit if alive else np.nan
            else:
                counter = (place - 1) * assets
                _random_nb(size, night, streams, counter, names, slots, orders)
                order_nb(size, night, orders, owns, slots)
            night_nb(size, night, owns, slots, rules)
            for lane in range(size):
                equity[start + lane, place] = owns[EQUITY + lane]
        scatter_nb(arrays, start, size, owns, slots)
