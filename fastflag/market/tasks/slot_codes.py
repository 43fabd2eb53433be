"""What a stepped text can say of a slot of a portfolio: a code, and what it stands for."""

import numpy as np

from fastflag.market.compiled.portfolio_constants import (
    CODES,
    PROFIT_LIMIT,
    PROFITS,
    WEIGHT_LIMIT,
)


def decode(code: int) -> tuple[int, int, int]:
    """(side in -1, 0, 1; size in quarters of one K-th of equity; open profit in steps of 2%) of a
    slot's code; ValueError for no code."""
    if not 0 <= code < CODES:
        raise ValueError(f"slot codes lie in 0..{CODES - 1}, not {code}")
    if code == 0:
        return 0, 0, 0
    row, profit = divmod(int(code) - 1, PROFITS)
    short, weight = divmod(row, WEIGHT_LIMIT)
    return 1 - 2 * short, weight + 1, profit - PROFIT_LIMIT


_SIDE_OF_CODE = np.array([decode(code)[0] for code in range(CODES)], np.int8)


def side_of(codes: np.ndarray) -> np.ndarray:
    """-1, 0 or 1 of each of `codes` [...]: int8 [...]."""
    return _SIDE_OF_CODE[codes]
