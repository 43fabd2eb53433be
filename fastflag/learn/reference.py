"""Which prompts centre the features: an account of each side on every day, whatever was visited."""

from collections.abc import Sequence

import numpy as np

from fastflag.config import SimulatorConfig
from fastflag.market.accounts import Accounts
from fastflag.market.bars import Bars
from fastflag.market.simulator import BUY, HOLD, SELL, step

# Days for which the position has been held, by turns of the day's index: a text of a position tells
# its age and profit, and the deviation of the features must hold what these do to them.
_HELD = np.array([1, 3, 10, 30])


def reference_accounts(
    bars: Bars, config: SimulatorConfig, days: Sequence[int]
) -> tuple[Accounts, np.ndarray]:
    """An account of each side that the position mode knows at the close of each of `days`, and the
    day of each account [R] int64.

    It put all its cash into that side at a close some days before and has kept to it since. What
    it is depends on the day alone: no policy, no other day. Before the first bar, and where the
    position would have been ruined, there is none but the flat one.
    """
    sides = np.array([0, 1, -1] if config.positions == "long_short" else [0, 1])
    keeping = np.repeat(np.array([SELL, HOLD, BUY])[sides + 1], len(days))
    side, day = np.repeat(sides, len(days)), np.tile(np.asarray(days, np.int64), len(sides))
    first = int(np.isfinite(bars.mark).argmax())
    held = np.clip(_HELD[day % len(_HELD)], 0, np.maximum(day - first, 0))
    accounts = Accounts.start(len(day), config.cash)
    # All take every step; whatever they did before they enter is forgotten when they do.
    for ago in range(held.max(), -1, -1):
        now, entering = np.maximum(day - ago, 0), held == ago
        accounts.reset(entering)
        accounts.enter(np.where(entering & (now >= first), side, 0), bars.mark[now], now)
        if ago:
            step(bars, config, accounts, now, keeping)
    there = np.flatnonzero(np.sign(accounts.shares) == side)
    return accounts.take(there), day[there]
