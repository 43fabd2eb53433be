"""What a stepped text can say of a slot, as a number; and which numbers can be reached."""

import numpy as np

from fastflag.market.compiled.kernel import kernel
from fastflag.market.compiled.portfolio_constants import (
    AFTER,
    FILLED,
    GONE,
    GROWTH,
    PAID,
    PROFIT_LIMIT,
    PROFIT_STEPS,
    PROFITS,
    TO_FILL,
    WEIGHT_LIMIT,
    WEIGHT_STEPS,
)

_MOST_WEIGHT, _MOST_PROFIT = float(WEIGHT_LIMIT), float(PROFIT_LIMIT)
# A product of the same numbers in another order is no further off.
_ROUNDING = 1e-12


@kernel()
def _profit_nb(ratio, is_long):
    """Open profit in steps, half away from zero, from 0 (the greatest loss) on; a float."""
    change = ratio - 1.0 if is_long else 1.0 - ratio
    steps = np.floor(min(abs(change) * PROFIT_STEPS, _MOST_PROFIT) + 0.5)
    return PROFIT_LIMIT + (steps if change > 0.0 else -steps)


@kernel()
def _code_of_nb(is_long, weight, profit):
    """All that can be done in floats is: LLVM has no fast product of whole numbers."""
    side = 0.0 if is_long else _MOST_WEIGHT
    return np.int64(1.0 + (side + weight - 1.0) * PROFITS + profit)


@kernel()
def code_nb(holding, ratio, scale):
    """Of a slot: 0 where nothing is held, else side, weight in steps (one at least) and profit."""
    weight = np.floor(max(min(abs(holding) * scale, _MOST_WEIGHT) + 0.5, 1.0))
    is_long = holding > 0.0
    code = _code_of_nb(is_long, weight, _profit_nb(ratio, is_long))
    return np.int64(0) if holding == 0.0 else code


@kernel()
def scale_nb(equity, assets):
    """Steps of weight in a unit of money."""
    return WEIGHT_STEPS * assets / equity if equity > 0.0 else 0.0


@kernel()
def codes_nb(arrays, codes):
    assets = codes.shape[1]
    for b in range(codes.shape[0]):
        scale = scale_nb(arrays.equity[b], assets)
        for k in range(assets):
            codes[b, k] = code_nb(arrays.holding[b, k], arrays.ratio[b, k], scale)


@kernel()
def _mark_nb(reached, is_long, least, most, heaviest):
    """Marks all weights with the profits of the ratios from `least` to `most`."""
    one = _profit_nb(least * (1.0 - _ROUNDING), is_long)
    other = _profit_nb(most * (1.0 + _ROUNDING), is_long)
    for weight in range(1, heaviest + 1):
        for profit in range(np.int64(min(one, other)), np.int64(max(one, other)) + 1):
            reached[_code_of_nb(is_long, float(weight), float(profit))] = True


@kernel()
def _side_nb(nights, cost, first, k, holding, ratio, is_long, heaviest, reached):
    """Follows the least and the greatest ratio that a position of one side of asset `k` can have.

    What is bought beside what is held gives a mean of both ratios.
    """
    entry = 1.0 / (1.0 + cost) if is_long else 1.0 / (1.0 - cost)
    least, most = np.inf, -np.inf
    for b in range(holding.shape[0]):
        if holding[b, k] > 0.0 if is_long else holding[b, k] < 0.0:
            least, most = min(least, ratio[b, k]), max(most, ratio[b, k])
    for place in range(1, reached.shape[0]):
        night = nights[first + place - 1, k]
        total = night[TO_FILL] + night[PAID]
        low, high = least * night[GROWTH], most * night[GROWTH]
        if night[FILLED] != 0.0:
            low = min(low, min(least * total, entry) * night[AFTER])
            high = max(high, max(most * total, entry) * night[AFTER])
        least, most = (np.inf, -np.inf) if night[GONE] != 0.0 else (low, high)
        if least <= most:
            _mark_nb(reached[place, k], is_long, least, most, heaviest)


@kernel()
def reachable_nb(nights, rules, first, arrays, reached):
    """`reached` [T, K, CODES], all False, of what accounts at moment `first` could show then and
    at the T - 1 moments after."""
    accounts, assets = arrays.holding.shape
    reached[:, :, 0] = True
    for b in range(accounts):
        scale = scale_nb(arrays.equity[b], assets)
        for k in range(assets):
            reached[0, k, code_nb(arrays.holding[b, k], arrays.ratio[b, k], scale)] = True
    for k in range(assets):
        held = arrays.holding, arrays.ratio
        # Nothing held long alone can be more than all.
        heaviest = WEIGHT_LIMIT if rules.long_short else min(WEIGHT_STEPS * assets, WEIGHT_LIMIT)
        _side_nb(nights, rules.cost, first, k, *held, True, heaviest, reached)
        if rules.long_short:
            _side_nb(nights, rules.cost, first, k, *held, False, WEIGHT_LIMIT, reached)
