"""Bars that can't be: rounding noise is clipped, a few wrong bars are missing, many are refused."""

import logging
from collections.abc import Sequence

import numpy as np

from fastflag.files import InputError
from fastflag.market.bars import PRICES

# Of a price: adjusting in float32 and printing fewer digits leaves as much.
NOISE = 1e-6
# Of a symbol's bars: a file with more of them is no record of a market.
_FEW = 0.01
_LOG = logging.getLogger(__name__)


def mended(
    numbers: dict[str, np.ndarray],
    dates: np.ndarray,
    owner: np.ndarray,
    symbols: Sequence[str],
    where: str,
) -> dict[str, np.ndarray]:
    """`numbers` ([R] each, R rows) with bars that can be, of `symbols[owner]` on `dates`.

    A high below the open, close or low, and a low above them, by `NOISE` of itself at most is set
    to them. A bar with a price not above 0, or with a high or low further off, is a missing bar:
    all its prices are NaN, and one line tells how many there are and of which dates. Raises
    InputError where a symbol has more than one in a hundred of them.
    """
    opened, high, low, close = (numbers[name] for name in PRICES)
    top = np.fmax(np.fmax(opened, close), low)
    high = np.where((high < top) & (high >= top * (1 - NOISE)), top, high)
    bottom = np.fmin(np.fmin(opened, close), high)
    low = np.where((low > bottom) & (low <= bottom * (1 + NOISE)), bottom, low)
    kinds = {f"{name} is not above 0": numbers[name] <= 0 for name in PRICES} | {
        "high is below open or close": high < np.fmax(opened, close),
        "low is above open or close": low > np.fmin(opened, close),
        "high is below low": high < low,
    }
    # Infinities are not mended: the Market refuses them.
    infinite = np.logical_or.reduce([np.isinf(numbers[name]) for name in PRICES])
    wrong = np.logical_or.reduce(list(kinds.values())) & ~infinite
    result = numbers | {"high": high, "low": low}
    if not wrong.any():
        return result
    bars = np.bincount(owner[np.isfinite(close)], minlength=len(symbols))
    count = np.bincount(owner[wrong], minlength=len(symbols))
    for n in np.flatnonzero(count > _FEW * bars).tolist():
        row = np.flatnonzero(wrong & (owner == n))[0]
        what = next(what for what, rows in kinds.items() if rows[row])
        told = f", and {count[n]} of {bars[n]} bars are like it" if count[n] > 1 else ""
        raise InputError(f"{what}, {symbols[n]} {dates[row]}{told}, {where}")
    rows = np.flatnonzero(wrong)
    days = ", ".join(f"{symbols[owner[row]]} {dates[row]}" for row in rows[:5])
    _LOG.warning(
        "bars that can't be (a price not above 0, a high or low that open or close exceeds), taken "
        "as missing: %d, %s%s, %s",
        len(rows),
        days,
        f" and {len(rows) - 5} more" if len(rows) > 5 else "",
        where,
    )
    return result | {name: np.where(wrong, np.nan, result[name]) for name in PRICES}
