"""Many environments through many days; what each does is drawn from a table, or needs none."""

import numpy as np

from fastflag.market.compiled.account import advance_nb, effective_nb, fresh_nb, night_nb
from fastflag.market.compiled.constants import HISTORY, HOLD, SELL
from fastflag.market.compiled.kernel import kernel
from fastflag.market.compiled.lanes import (
    ACTION,
    ALIVE,
    LANES,
    NUM_FLOATS,
    NUM_WHOLES,
    REWARD,
    RUINED,
    copy_lanes_nb,
    gather_nb,
    night_lanes_nb,
    order_lanes_nb,
    remember_lanes_nb,
    restart_lanes_nb,
    row_lanes_nb,
    sample_lanes_nb,
    scatter_nb,
    uniform_lanes_nb,
)
from fastflag.market.compiled.random import stream_nb, uniform_nb


@kernel()
def rollout_nb(
    bars, rules, arrays, days, restarts, cdf, row_of, seed, first_env, first_step, first, end, out
):
    """Accounts first to end - 1. -> (day, code) of a state without a row, or (-1, -1)."""
    # Each access to a tuple's array counts its references: once here, not once a step.
    rows, actions, rewards, terminated, valid, next_rows = out
    floats, wholes = np.empty(NUM_FLOATS), np.empty(NUM_WHOLES, np.int64)
    streams, uniforms = np.empty(LANES, np.uint64), np.empty(LANES)
    codes = np.empty(LANES, np.int64)
    for start in range(first, end, LANES):
        size = min(LANES, end - start)
        here = slice(start, start + size)
        closed = gather_nb(arrays, start, size, floats, wholes)
        for lane in range(size):
            streams[lane] = stream_nb(seed, first_env + start + lane)
        for s in range(days.size):
            day, row, was_open = days[s], rows[s, here], valid[s, here]
            night = night_nb(bars, day, rules)
            if restarts[s]:
                restart_lanes_nb(size, floats, wholes)
                closed = 0
            if restarts[s] or s == 0:
                missing = row_lanes_nb(size, floats, wholes, bars, row_of, day, codes, row)
                if missing >= 0:
                    return day, missing
            else:
                row[:] = next_rows[s - 1, here]
            # Mostly nobody is closed, and one value for all is written faster than 256.
            was_open[:] = True
            if closed:
                copy_lanes_nb(size, wholes, ALIVE, was_open)
            uniform_lanes_nb(size, streams, first_step + s, uniforms)
            sample_lanes_nb(size, wholes, cdf, row, uniforms)
            order_lanes_nb(size, floats, wholes, night.tradable, rules)
            copy_lanes_nb(size, wholes, ACTION, actions[s, here])
            ruins = night_lanes_nb(size, floats, wholes, night, rules)
            closed += ruins
            terminated[s, here] = False
            if ruins:
                copy_lanes_nb(size, wholes, RUINED, terminated[s, here])
            copy_lanes_nb(size, floats, REWARD, rewards[s, here])
            remember_lanes_nb(size, floats, wholes, s % HISTORY, was_open)
            missing = row_lanes_nb(
                size, floats, wholes, bars, row_of, day + 1, codes, next_rows[s, here]
            )
            if missing >= 0:
                return day + 1, missing
        scatter_nb(arrays, start, size, floats, wholes)
    return np.int64(-1), np.int64(-1)


@kernel()
def equities_nb(bars, rules, starting_cash, first, seed, fixed, equity):
    for episode in range(equity.shape[0]):
        account, stream = fresh_nb(starting_cash), stream_nb(seed, episode)
        equity[episode, 0] = account.equity
        for place in range(1, equity.shape[1]):
            if account.alive:
                night = night_nb(bars, first + place - 1, rules)
                action = np.int64(fixed)
                if fixed < 0:
                    u = uniform_nb(stream, place - 1)
                    if rules.long_short:
                        action = np.int64(u * 3.0)
                    else:
                        action = np.int64(u * 2.0) + (HOLD if account.shares == 0.0 else SELL)
                action = effective_nb(rules, account.shares, night.tradable, action)
                account, _, _ = advance_nb(night, rules, account, action)
            equity[episode, place] = account.equity
