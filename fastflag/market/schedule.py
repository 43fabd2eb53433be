"""Which days an episode lives."""

import numpy as np

from fastflag.files import InputError
from fastflag.market.simulator import uniform

# Start days must not be drawn by the numbers that the rollouts of the same seed draw.
_START_SEED = 0x5354 << 48


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
