"""What a stepped text can say of an account: a code, and what it stands for."""

import numpy as np

from fastflag.market.compiled.constants import CODES, HELD_BUCKETS, PROFIT_LIMIT, PROFITS


def decode(code: int) -> tuple[int, int, int]:
    """(side in -1, 0, 1; profit in steps; bars held) of an account code; ValueError for no code."""
    if not 0 <= code < CODES:
        raise ValueError(f"account codes lie in 0..{CODES - 1}, not {code}")
    if code == 0:
        return 0, 0, 0
    row, bucket = divmod(int(code) - 1, len(HELD_BUCKETS))
    long, steps = divmod(row, PROFITS)
    return 2 * long - 1, steps - PROFIT_LIMIT, HELD_BUCKETS[bucket]


_SIDE_OF_CODE = np.array([decode(code)[0] for code in range(CODES)], np.int8)


def side_of(codes: np.ndarray) -> np.ndarray:
    """-1, 0 or 1 of each of `codes` [n]: int8 [n]."""
    return _SIDE_OF_CODE[codes]
