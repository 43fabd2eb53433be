"""Policies that need no model: random, and one action only."""

import numpy as np

from fastflag.config import SimulatorConfig
from fastflag.market.bars import Bars
from fastflag.market.simulator import equities

# They must not draw the numbers that the rollouts of the same seed draw.
_RANDOM_SEED = 0x524E << 48


def random_equities(
    bars: Bars, config: SimulatorConfig, days: range, episodes: int, seed: int
) -> np.ndarray:
    """Equity at the close of each day, [episodes, len(days)], of accounts that start on `days[0]`
    and draw each action uniformly from those allowed. Episode i of seed s is episode 0 of s + i."""
    return equities(bars, config, days, episodes, int(seed) + _RANDOM_SEED)


def fixed_action_equity(
    bars: Bars, config: SimulatorConfig, days: range, action: int
) -> np.ndarray:
    """Equity at the close of each day, [len(days)], of always taking `action` (Hold where it is
    not allowed): with Buy, buy and hold."""
    return equities(bars, config, days, 1, 0, action)[0]
