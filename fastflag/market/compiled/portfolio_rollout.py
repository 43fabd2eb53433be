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
    drawn = np.empty(STRIDE, np.int64)
    start = 0
    while start < moments.size:
        size = 1
        while (
            size < LANES and start + size < moments.size and moments[start + size] == moments[start]
        ):
            size += 1
        night = nights[moments[start]]
        gather_nb(arrays, start, size, owns, slots)
        for k in range(assets):
            for lane in range(size):
                drawn[lane] = actions[start + lane, k]
            order_nb(size, k * BLOCK, night[k, OPEN] != 0.0, drawn, owns, slots)
            for lane in range(size):
                actions[start + lane, k] = drawn[lane]
        night_nb(size, night, owns, slots, rules)
        scatter_nb(arrays, start, size, owns, slots)
        for lane in range(size):
            rewards[start + lane] = owns[REWARD + lane]
            terminated[start + lane] = owns[RUINED + lane] != 0.0
        start += size


@kernel()
def _rows_nb(size, owns, slots, row_of, scales, codes, rows):
    """Finds the rows [K, size] of what each lane shows; `row_of` [K, CODES]. -> (slot, code) that
    has none, or (-1, -1)."""
    assets = row_of.shape[0]
    for lane in range(size):
        scales[lane] = scale_nb(owns[EQUITY + lane], assets)
    for k in range(assets):
        at, row_of_code, row = k * BLOCK, row_of[k], rows[k]
        for lane in range(size):
            holding, ratio = slots[at + HOLDING + lane], slots[at + RATIO + lane]
            codes[lane] = code_nb(holding, ratio, scales[lane])
        for lane in range(size):
            row[lane] = row_of_code[np.uint64(codes[lane])]
        missing = np.int64(-1)
        for lane in range(size):
            missing = max(missing, codes[lane] if row[lane] < 0 else np.int64(-1))
        if missing >= 0:
            return np.int64(k), missing
    return np.int64(-1), np.int64(-1)


@kernel()
def _sample_nb(size, streams, counter, cdf, row, points, actions):
    """Inverse CDF, as in lanes.py: an action of probability 0 can't be drawn."""
    names = np.uint64(cdf.shape[1])
    flat = cdf.ravel()
    for lane in range(size):
        points[lane] = uniform_nb(streams[lane], counter)
    for lane in range(size):
        points[lane] *= flat[np.uint64(row[lane]) * names + names - np.uint64(1)]
        actions[lane] = 0
    for a in range(cdf.shape[1] - 1):
        for lane in range(size):
            bound = flat[np.uint64(row[lane]) * names + np.uint64(a)]
            actions[lane] += np.int64(points[lane] >= bound)


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
    assets = nights.shape[1]
    owns, slots = np.empty(NUM_OWNS), np.empty(assets * BLOCK)
    streams, points, scales = np.empty(LANES, np.uint64), np.empty(LANES), np.empty(LANES)
    drawn, codes = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    for start in range(first, end, LANES):
        size = min(LANES, end - start)
        here = slice(start, start + size)
        gather_nb(arrays, start, size, owns, slots)
        for lane in range(size):
            streams[lane] = stream_nb(seed, first_env + start + lane)
        for s in range(moments.size):
            moment, night = moments[s], nights[moments[s]]
            row = rows[s, :, here]
            if restarts[s]:
                restart_nb(size, assets, owns, slots)
            if restarts[s] or s == 0:
                slot, code = _rows_nb(size, owns, slots, row_of[moment], scales, codes, row)
                if slot >= 0:
                    return moment, slot, code
            else:
                row[:] = next_rows[s - 1, :, here]
            for lane in range(size):
                valid[s, start + lane] = owns[ALIVE + lane] != 0.0
            for k in range(assets):
                counter = (first_step + s) * assets + k
                _sample_nb(size, streams, counter, cdf, row[k], points, drawn)
                order_nb(size, k * BLOCK, night[k, OPEN] != 0.0, drawn, owns, slots)
                action = actions[s, k, here]
                for lane in range(size):
                    action[lane] = drawn[lane]
            night_nb(size, night, owns, slots, rules)
            for lane in range(size):
                rewards[s, start + lane] = owns[REWARD + lane]
                terminated[s, start + lane] = owns[RUINED + lane] != 0.0
            shown = next_rows[s, :, here]
            slot, code = _rows_nb(size, owns, slots, row_of[moment + 1], scales, codes, shown)
            if slot >= 0:
                return moment + 1, slot, code
        scatter_nb(arrays, start, size, owns, slots)
    return np.int64(-1), np.int64(-1), np.int64(-1)


@kernel()
def equities_nb(nights, rules, arrays, first, seed, units, equity):
    """Equity [B, T] at moment `first` and those after, by `units` [T, K] ordered at each (NaN
    keeps); by random actions where there are none ([0, 0])."""
    assets = nights.shape[1]
    owns, slots = np.empty(NUM_OWNS), np.empty(assets * BLOCK)
    drawn, names = np.empty(LANES, np.int64), 5 if rules.long_short else 4
    for start in range(0, equity.shape[0], LANES):
        size = min(LANES, equity.shape[0] - start)
        gather_nb(arrays, start, size, owns, slots)
        for place in range(equity.shape[1]):
            for lane in range(size):
                equity[start + lane, place] = owns[EQUITY + lane]
            if place + 1 == equity.shape[1]:
                break
            night = nights[first + place]
            for k in range(assets):
                at = k * BLOCK
                is_open = night[k, OPEN] != 0.0
                if units.size:
                    unit = units[place, k] if is_open else np.nan
                    for lane in range(size):
                        slots[at + ORDER + lane] = unit if owns[ALIVE + lane] != 0.0 else np.nan
                    continue
                for lane in range(size):
                    stream = stream_nb(seed, start + lane)
                    fewer = np.int64(slots[at + HOLDING + lane] == 0.0)
                    u = uniform_nb(stream, place * assets + k)
                    drawn[lane] = np.int64(u * (names - fewer)) + fewer
                order_nb(size, at, is_open, drawn, owns, slots)
            night_nb(size, night, owns, slots, rules)
        scatter_nb(arrays, start, size, owns, slots)
