"""What every task's rollout checks, and how threads share it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numba import config as numba_config

from fastflag.market.task import Timeline

_THREADED_STEPS = 2**18
_Result = TypeVar("_Result")


def checked_moments(
    timeline: Timeline, moments: np.ndarray, restarts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both [H] as the kernels take them. Raises ValueError for a moment that has none after it in
    its span, and for moments that neither follow one another nor begin anew."""
    moments = np.ascontiguousarray(moments, np.int64)
    restarts = np.ascontiguousarray(restarts, np.bool_)
    timeline.check(moments, 1)
    if np.any((np.diff(moments) != 1) & ~restarts[1:]):
        raise ValueError("moments must be consecutive between restarts")
    return moments, restarts


def checked_cdf(cdf: np.ndarray) -> np.ndarray:
    """Cumulative probabilities [R, A] as the kernels take them, of any total. Raises RuntimeError
    for a row that is no distribution."""
    cdf = np.ascontiguousarray(cdf, np.float64)
    rising = (cdf[:, 0] >= 0) & (cdf[:, 1:] >= cdf[:, :-1]).all(1)
    valid = rising & (cdf[:, -1] > 0) & (cdf[:, -1] < np.inf)
    if not valid.all():
        row = int(np.argmin(valid))
        raise RuntimeError(f"row {row} of the policy is no distribution: {cdf[row]}")
    return cdf


def shared(run: Callable[[range], _Result], accounts: int, steps: int, lanes: int) -> list[_Result]:
    """`run` of each thread's part of the accounts: of all below `_THREADED_STEPS`."""
    parts = parts_of(accounts, steps, lanes)
    if len(parts) == 1:
        return [run(parts[0])]
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, parts))


def parts_of(accounts: int, steps: int, lanes: int) -> list[range]:
    """The accounts of each thread; blocks of `lanes` stay whole."""
    # Not get_num_threads, which starts Numba's threads, and PyTorch then counts as many for itself:
    # its results depend on that number.
    threads = numba_config.NUMBA_NUM_THREADS if accounts * steps >= _THREADED_STEPS else 1
    size = max(-(-accounts // (threads * lanes)), 1) * lanes
    return [range(first, min(first + size, accounts)) for first in range(0, accounts, size)]
