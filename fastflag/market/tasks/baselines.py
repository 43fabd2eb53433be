"""Policies that need no model: random, and one action only."""

import numpy as np

from fastflag.market.tasks.single import Single

# They must not draw the numbers that the rollouts of the same seed draw.
_RANDOM_SEED = 0x524E << 48


def random_equities(task: Single, moments: range, episodes: int, seed: int) -> np.ndarray:
    """Equity at each of `moments`, [episodes, len(moments)], of accounts that start at the first
    and draw each action uniformly from those allowed. Episode i of seed s is episode 0 of s + i."""
    return task.equities(moments, episodes, int(seed) + _RANDOM_SEED)


def fixed_action_equity(task: Single, moments: range, action: int) -> np.ndarray:
    """Equity at each of `moments`, [len(moments)], of always taking `action` (Hold where it is not
    allowed): with Buy, buy and hold."""
    return task.equities(moments, 1, 0, action)[0]
