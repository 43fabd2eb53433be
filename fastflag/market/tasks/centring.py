"""Which accounts centre the features: one of each side at every moment, whatever was visited."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastflag.market.accounts import Accounts, Columns
from fastflag.market.compiled.portfolio_constants import GONE, GROWTH
from fastflag.market.portfolio_accounts import PortfolioAccounts
from fastflag.market.task import Task
from fastflag.market.tasks.portfolio import Portfolio
from fastflag.market.tasks.single import BUY, HOLD, SELL, Single

# Holding periods in days, cycled over the moments, so that the centring statistics cover positions
# of different age and profit.
_HELD = np.array([1, 3, 10, 30])


def centring_accounts(
    task: Single, moments: Sequence[int] | np.ndarray
) -> tuple[Accounts, np.ndarray]:
    """An account of each side that the position mode knows at each of `moments`, and the moment of
    each account [R] int64.

    It put all its cash into that side at a close some days before and has kept to it since. What
    it is depends on the moment alone: no policy, no other moment. Before the first bar, and where
    the position would have been ruined, there is none but the flat one.
    """
    moments = np.asarray(moments, np.int64)
    sides = np.array([0, 1, -1] if task.rules.positions == "long_short" else [0, 1])
    keeping = np.repeat(np.array([SELL, HOLD, BUY])[sides + 1], len(moments))
    side, moment = np.repeat(sides, len(moments)), np.tile(moments, len(sides))
    begin, first = task.timeline.first[moment], _first_bars(task)[moment]
    held = np.clip(_HELD[moment % len(_HELD)], 0, np.maximum(moment - first, 0))
    accounts = task.start(len(moment))
    # All take every step; whatever they did before they enter is forgotten when they do.
    for ago in range(held.max(), -1, -1):
        now, entering = np.maximum(moment - ago, begin), held == ago
        accounts.reset(entering)
        entered = np.where(entering & (now >= first), side, 0)
        accounts.enter(entered, task.bars.mark[now], now)
        if ago:
            task.step(accounts, now, keeping)
    there = np.flatnonzero(np.sign(accounts.shares) == side)
    return accounts.take(there), moment[there]


def centring_portfolios(
    task: Portfolio, moments: Sequence[int] | np.ndarray
) -> tuple[PortfolioAccounts, np.ndarray]:
    """The same of portfolios: equal parts of the equity in every asset, on each side, that were
    held for some days, of another number in each slot.

    Nothing is held of an asset before its first bar and from its delisting on.
    """
    moments = np.asarray(moments, np.int64)
    sides = np.array([0, 1, -1] if task.rules.positions == "long_short" else [0, 1])
    side, moment = np.repeat(sides, len(moments)), np.tile(moments, len(sides))
    slots = np.arange(task.slots)
    age = moment[:, None] - task.first_bars
    held = np.clip(_HELD[(moment[:, None] + slots) % len(_HELD)], 0, np.maximum(age, 0))
    there, ratio = age >= 0, np.ones(held.shape)
    for ago in range(1, held.max(initial=0) + 1):
        night = task.nights[np.maximum(moment - ago, 0)]
        ratio *= np.where(ago <= held, night[..., GROWTH], 1.0)
        there &= (ago > held) | (night[..., GONE] == 0.0)
    accounts = task.start(len(moment))
    accounts.holding[...] = there * side[:, None] * accounts.equity[:, None] / task.slots
    accounts.ratio[...] = np.where(accounts.holding != 0.0, ratio, 1.0)
    accounts.cash -= accounts.holding.sum(1)
    return accounts, moment


def accounts_that_centre(
    task: Task[Any], moments: Sequence[int] | np.ndarray
) -> tuple[Columns, np.ndarray]:
    """What centres the features of a task at `moments`: accounts, and the moment of each."""
    if isinstance(task, Portfolio):
        return centring_portfolios(task, moments)
    assert isinstance(task, Single)
    return centring_accounts(task, moments)


def _first_bars(task: Single) -> np.ndarray:
    """The moment of the first bar of each moment's symbol, [M]."""
    marked, spans = np.isfinite(task.bars.mark), task.timeline.spans
    first = [span.start + marked[span.start : span.stop].argmax() for span in spans]
    return np.repeat(first, list(map(len, spans)))
