"""What the kernels of portfolios read and write: constants, and tuples that Numba takes."""

from typing import NamedTuple

import numpy as np

OUT, KEEP, NEUTRAL, OVER, SHORT = range(5)
"""Actions of a slot: target units 0, none, 1, 2, -1."""

COLUMNS = ("open", "filled", "to_fill", "paid", "after", "growth", "gone")
OPEN, FILLED, TO_FILL, PAID, AFTER, GROWTH, GONE = range(len(COLUMNS))
"""Of an asset's night, from one close to the next, as `Nights` has them."""

WEIGHT_STEPS = 4
"""Steps of weight in one K-th of equity."""
WEIGHT_LIMIT = 20
PROFIT_STEPS = 50
"""Steps of open profit in 100%."""
PROFIT_LIMIT = 10
PROFITS = 2 * PROFIT_LIMIT + 1
CODES = 1 + 2 * WEIGHT_LIMIT * PROFITS
"""Number of a slot's codes: nothing held, and (side, weight, open profit)."""


class PortfolioRules(NamedTuple):
    """The config as the kernels take it. Numba's cache names this class and the next: don't rename
    them."""

    long_short: bool
    log_return: bool
    cost: float
    """Of the traded value: fee and slippage."""
    borrow: float
    """Of a short's value, a bar."""
    max_weight: float
    ruin: float


class PortfolioOutputs(NamedTuple):
    row: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    valid: np.ndarray
    next_row: np.ndarray
