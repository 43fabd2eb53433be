"""Policies that need no model: random, and one action only."""

import numpy as np

from fastflag.market import streams
from fastflag.market.tasks.single import Single


def random_equities(task: Single, moments: range, episodes: int, seed: int) -> np.ndarray:
    """Equity at each of `moments`, [episodes, len(moments)], of accounts that start at the first
    and draw each action uniformly from those allowed; `seed` is a World's."""
    return task.equities(moments, episodes, streams.random_policies(seed))


def fixed_action_equity(task: Single, moments: range, action: int) -> np.ndarray:
    """Equity at each of `moments`, [len(moments)], of always taking `action` (Hold where it is not
    allowed): with Buy, buy and hold."""
    return task.equities(moments, 1, 0, action)[0]
