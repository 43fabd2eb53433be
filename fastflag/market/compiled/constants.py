"""What the kernels read and write: constants, and tuples that Numba takes as arguments."""

from typing import NamedTuple

import numpy as np

SELL, HOLD, BUY = 0, 1, 2
HISTORY = 10
"""Past steps that an account remembers, for prompts."""
COLUMNS = ("open", "close", "mark", "split", "dividend", "tradable", "payable")
"""Of `Bars.matrix`."""
OPEN, CLOSE, MARK, SPLIT, DIVIDEND, TRADABLE, PAYABLE = range(len(COLUMNS))
PROFIT_STEP = 0.005
PROFIT_LIMIT = 40
HELD_BUCKETS = (0, 1, 2, 3, 5, 10, 20, 40)
PROFITS = 2 * PROFIT_LIMIT + 1
CODES = 1 + 2 * PROFITS * len(HELD_BUCKETS)
"""Number of account codes: flat, and (side, open profit, days held)."""
MOST_STEPS, LATER_BUCKETS = float(PROFIT_LIMIT), HELD_BUCKETS[1:]
NEXT_OPEN, NEXT_CLOSE, SAME_CLOSE = 0, 1, 2

# A deviation below this part of the starting cash is rounding (float64 equity moves by 1e-16 of
# itself at a constant price), and a Sharpe ratio of rounding errors is noise of order 1.
ZERO_DEVIATION = 1e-12


class Rules(NamedTuple):
    """The config as the kernels take it.

    Numba pickles the classes of a kernel's arguments (this one, `Arrays`, `Outputs`) by name into
    its cache, and a cache that names a class which is gone can't be read: don't rename them.
    """

    fill: int
    long_short: bool
    log_return: bool
    reinvest: bool
    fee: float
    slippage: float
    lot: float
    ruin: float


class Position(NamedTuple):
    cash: float
    shares: float
    entry: float
    opened: np.int64
    fees: float


class Night(NamedTuple):
    day: int
    close: float
    mark: float
    tradable: bool
    next_open: float
    next_close: float
    next_mark: float
    split: float
    dividend: float
    next_tradable: bool


class Account(NamedTuple):
    starting_cash: float
    cash: float
    shares: float
    entry: float
    opened: np.int64
    pending: np.int64
    equity: float
    fees: float
    count: np.int64
    mean: float
    m2: float
    sharpe: float
    alive: bool


class Outputs(NamedTuple):
    row: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    valid: np.ndarray
    next_row: np.ndarray
