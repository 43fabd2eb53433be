"""Which moments an episode lives."""

from collections.abc import Sequence

import numpy as np

from fastflag.files import InputError
from fastflag.market.random_numbers import uniform

# Start days must not be drawn by the numbers that the rollouts of the same seed draw.
_START_SEED = 0x5354 << 48


def schedule(
    spans: Sequence[range],
    horizon: int,
    seed: int,
    group: int,
    first_step: int,
    num_steps: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The moments that a group's accounts live in the global steps first_step + 0 .. num_steps - 1.

    Episodes of min(horizon, the longest span - 1) decisions follow one another, each from a moment
    drawn uniformly among those of all `spans` where all of it fits. A function of its arguments
    alone, so any part of a run can be worked out anew. -> moment [num_steps] int64, restart
    [num_steps] (first step of an episode), last [num_steps] (truncated after it). Raises InputError
    where no decision fits.
    """
    starts, length = starts_of(spans, horizon)
    episode, offset = np.divmod(np.arange(first_step, first_step + num_steps), length)
    start_of = {k: int(drawn(starts, seed, group, k)[0]) for k in np.unique(episode).tolist()}
    start = np.array([start_of[k] for k in episode.tolist()], np.int64)
    return start + offset, offset == 0, offset == length - 1


def starts_of(spans: Sequence[range], horizon: int) -> tuple[np.ndarray, int]:
    """(the moments where all of an episode fits [n] int64, its decisions: min(horizon, the longest
    span - 1)). Raises InputError where no decision fits."""
    longest = max(map(len, spans))
    length = min(horizon, longest - 1)
    if length < 1:
        raise InputError(f"an episode needs 2 days and a horizon of 1, {longest} days, {horizon}")
    starts = [np.asarray(span, np.int64)[: max(len(span) - length, 0)] for span in spans]
    return np.concatenate(starts), length


def drawn(starts: np.ndarray, seed: int, group: np.ndarray | int, episode: int) -> np.ndarray:
    """The first moment of each group's `episode`, one of `starts`: a function of (seed + group,
    episode) and nothing else, int64 [number of groups]."""
    numbers = uniform(int(seed) + _START_SEED, group, episode)
    return starts[(numbers * len(starts)).astype(np.int64)]
