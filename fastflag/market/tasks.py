"""Which days an episode lives, and the policies that need no model: random, and one action only."""

import numpy as np

from fastflag.config import SimulatorConfig
from fastflag.files import InputError
from fastflag.market.accounts import Bars
from fastflag.market.simulator import equities, uniform

# Start days and random policies must not draw the numbers that the rollouts of the same seed draw.
_START_SEED = 0x5354 << 48
_RANDOM_SEED = 0x524E << 48


def schedule(
    days: range, horizon: int, seed: int, group: int, first_step: int, num_steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The days that a group's accounts live in the global steps first_step + 0 .. num_steps - 1.

    Episodes of min(horizon, len(days) - 1) decisions follow one another, each from a day drawn
    uniformly among those where all of it fits. A function of its arguments alone, so any part of
    a run can be worked out anew. -> day [num_steps] int64, restart [num_steps] (first step of an
    episode), last [num_steps] (truncated after it). Raises InputError where no decision fits.
    """
    length = min(horizon, len(days) - 1)
    if length < 1:
        raise InputError(f"an episode needs 2 days and a horizon of 1, {len(days)} days, {horizon}")
    episode, offset = np.divmod(np.arange(first_step, first_step + num_steps), length)
    starts = len(days) - length
    start_of = {
        k: days[0] + int(uniform(int(seed) + _START_SEED, group, k)[0] * starts)
        for k in np.unique(episode).tolist()
    }
    start = np.array([start_of[k] for k in episode.tolist()], np.int64)
    return start + offset, offset == 0, offset == length - 1


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
