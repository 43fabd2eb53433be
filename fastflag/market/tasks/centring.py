"""Which accounts centre the features: one of each side at every moment, whatever was visited."""

from collections.abc import Sequence

import numpy as np

from fastflag.market.accounts import Accounts
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


def _first_bars(task: Single) -> np.ndarray:
    """The moment of the first bar of each moment's symbol, [M]."""
    marked, spans = np.isfinite(task.bars.mark), task.timeline.spans
    first = [span.start + marked[span.start : span.stop].argmax() for span in spans]
    return np.repeat(first, list(map(len, spans)))
