"""Portfolios that need no model: what a policy of the task `portfolio` is held against, under the
same rules, costs included.

Each is a series of orders that `Portfolio.equities` lives by; weights are told at each moment from
what is known at its close.
"""

from collections.abc import Callable

import numpy as np

from fastflag.files import InputError
from fastflag.market import streams
from fastflag.market.compiled.portfolio_constants import GROWTH, OPEN
from fastflag.market.tasks.portfolio import Portfolio

_BARS = 60


def random_equities(task: Portfolio, moments: range, episodes: int, seed: int) -> np.ndarray:
    """Equity at each of `moments`, [episodes, len(moments)], of accounts that start at the first
    and draw each slot's action uniformly from those allowed. Episode i of seed s is episode 0 of
    s + i."""
    return task.equities(moments, episodes, streams.random_policies(seed))


def equal_weight_equity(task: Portfolio, moments: range) -> np.ndarray:
    """Equity at each of `moments` of equal weights in all assets that have a bar, restored at every
    rebalancing."""
    return task.equities(moments, 1, 0, np.ones((len(moments) - 1, task.slots)))[0]


def buy_and_hold_equity(task: Portfolio, moments: range) -> np.ndarray:
    """Equity at each of `moments` of equal weights at the first at which an order may be given, and
    nothing after."""
    units = np.full((len(moments) - 1, task.slots), np.nan)
    open_for = task.nights[moments.start : moments.stop - 1, :, OPEN].any(1)
    units[: open_for.argmax() + 1] = 1.0
    return task.equities(moments, 1, 0, units)[0]


def inverse_volatility_equity(task: Portfolio, moments: range, bars: int = _BARS) -> np.ndarray:
    """Equity at each of `moments` of weights that are shares of 1 / deviation (ddof 1) of the last
    `bars` daily returns, restored at every rebalancing. An asset whose price never moved in them
    has no part."""

    def weights(returns: np.ndarray) -> np.ndarray:
        deviation = returns.std(axis=0, ddof=1)
        return np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)

    return _weighted_equity(task, moments, bars, weights)


def minimum_variance_equity(task: Portfolio, moments: range, bars: int = _BARS) -> np.ndarray:
    """Equity at each of `moments` of the long-only weights of least variance in the last `bars`
    daily returns, by skfolio's `MeanRisk`, at most `max_weight` each, at every rebalancing.

    Raises InputError where skfolio is not installed.
    """
    try:
        from skfolio.optimization import MeanRisk
    except ImportError:
        needed = "skfolio is not installed: pip install 'fastflag[study]'"
        raise InputError(f"{needed}, minimum variance") from None

    def weights(returns: np.ndarray) -> np.ndarray:
        # A cap below 1 / K can't be met: all is invested.
        most = max(task.rules.max_weight, 1.0 / returns.shape[1])
        return MeanRisk(max_weights=most).fit(returns).weights_

    return _weighted_equity(task, moments, bars, weights)


def _weighted_equity(
    task: Portfolio, moments: range, bars: int, weights: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """By `weights` of returns [bars, n] of those n assets that may be ordered and have as many; of
    other assets that may be ordered nothing is held. Equal weights until there are n."""
    if bars < 2:
        raise ValueError(f"a deviation needs 2 returns, not {bars}")
    units = np.full((len(moments) - 1, task.slots), np.nan)
    for place, moment in enumerate(moments[:-1]):
        open_for = task.nights[moment, :, OPEN] != 0.0
        if not open_for.any():
            continue
        known = open_for & (moment - bars >= task.first_bars)
        if known.any():
            returns = task.nights[moment - bars : moment, :, GROWTH] - 1.0
            units[place, open_for] = 0.0
            units[place, known] = np.maximum(weights(returns[:, known]), 0.0)
        else:
            units[place, open_for] = 1.0
    return task.equities(moments, 1, 0, units)[0]
