"""Observations of many accounts at once: a row of the market, and the account in numbers.

Each number within its bounds, `low` and `high`. B accounts, M moments, K assets, F columns. Nothing
is called here: Numba's cache notices changes of a kernel's own file only.
"""

import numpy as np

from fastflag.market.compiled.constants import HELD_BUCKETS
from fastflag.market.compiled.kernel import kernel

_LONGEST_HELD = float(HELD_BUCKETS[-1])


@kernel()
def observe_single_nb(market, mark, arrays, moment, left, low, high, out):
    """`out` [B, F] by `market` [M, F less the account's], `mark` [M], `moment` and `left` [B]."""
    shown = market.shape[1]
    for b in range(moment.size):
        t, shares, order = moment[b], arrays.shares[b], float(arrays.pending[b])
        out[b, :shown] = market[t]
        side, profit, held = np.sign(shares), 0.0, 0.0
        if shares != 0.0:
            profit = side * (mark[t] / arrays.entry[b] - 1.0)
            held = (t - arrays.opened[b]) / _LONGEST_HELD
        numbers = (
            side,
            profit,
            held,
            1.0 if order >= 0.0 else 0.0,
            order - 1.0 if order >= 0.0 else 0.0,
            np.log(arrays.equity[b] / arrays.starting_cash[b]),
            arrays.sharpe[b],
            left[b],
        )
        for place in range(len(numbers)):
            out[b, shown + place] = min(max(numbers[place], low[place]), high[place])


@kernel()
def observe_portfolio_nb(market, arrays, moment, left, low, high, out):
    """`out` [B, F] by `market` [M, F less the slots' and the account's]."""
    for b in range(moment.size):
        place = market.shape[1]
        out[b, :place] = market[moment[b]]
        equity = arrays.equity[b]
        for k in range(arrays.holding.shape[1]):
            holding, units = arrays.holding[b, k], arrays.pending[b, k]
            waits = np.isfinite(units)
            numbers = (
                holding / equity if equity > 0.0 else 0.0,
                np.sign(holding) * (arrays.ratio[b, k] - 1.0),
                1.0 if waits else 0.0,
                units if waits else 0.0,
            )
            for n in range(len(numbers)):
                at = place - market.shape[1]
                out[b, place] = min(max(numbers[n], low[at]), high[at])
                place += 1
        numbers = (
            arrays.cash[b] / equity if equity > 0.0 else 0.0,
            np.log(equity / arrays.starting_cash[b]),
            arrays.sharpe[b],
            left[b],
        )
        for n in range(len(numbers)):
            at = place - market.shape[1]
            out[b, place] = min(max(numbers[n], low[at]), high[at])
            place += 1
