"""What a stepped text can say of an account, as a number; and which numbers can be reached."""

import numpy as np

from fastflag.market.compiled.account import entry_nb, growth_nb
from fastflag.market.compiled.constants import (
    CLOSE,
    HELD_BUCKETS,
    LATER_BUCKETS,
    MARK,
    MOST_STEPS,
    NEXT_OPEN,
    OPEN,
    PAYABLE,
    PROFIT_LIMIT,
    PROFIT_STEP,
    PROFITS,
    SAME_CLOSE,
    SPLIT,
    TRADABLE,
)
from fastflag.market.compiled.kernel import kernel


@kernel()
def code_nb(shares, entry, opened, mark, day):
    if shares == 0.0:
        return np.int64(0)
    change = mark / entry - 1.0
    profit = change if shares > 0.0 else -change
    steps = np.int64(min(abs(profit) / PROFIT_STEP, MOST_STEPS) + 0.5)
    steps = PROFIT_LIMIT + (steps if profit > 0.0 else -steps)
    bucket = 0
    for bound in LATER_BUCKETS:
        bucket += np.int64(day - opened >= bound)
    row = np.int64(shares > 0.0) * PROFITS + steps
    return 1 + row * len(HELD_BUCKETS) + bucket


@kernel()
def codes_nb(bars, arrays, days, codes):
    for b in range(days.size):
        codes[b] = code_nb(
            arrays.shares[b],
            arrays.entry[b],
            np.int64(arrays.opened[b]),
            bars[days[b], MARK],
            days[b],
        )


@kernel()
def _kept_entry_nb(bars, rules, day, entry):
    """The entry at the close of `day` of a position that had `entry` at the close before."""
    entry = entry / bars[day, SPLIT]
    if rules.reinvest and bars[day, PAYABLE] != 0.0:
        entry = entry / growth_nb(bars[day, PAYABLE], bars[day, CLOSE])
    return entry


@kernel()
def _mark_path_nb(bars, rules, reached, first, start, side, entry, opened):
    """Marks the codes of a position held from day first + start on; `entry` is that day's."""
    for place in range(start, len(reached)):
        day = first + place
        if place > start:
            entry = _kept_entry_nb(bars, rules, day, entry)
        # Fills wait for a bar, so from here on there is a mark.
        reached[place, code_nb(side, entry, opened, bars[day, MARK], day)] = True


@kernel()
def _mark_entry_nb(bars, rules, reached, first, place, side):
    """Marks what a position entered on day first + place shows at the closes it lives to see."""
    day = first + place
    price = bars[day, OPEN if rules.fill == NEXT_OPEN else CLOSE]
    _, entry = entry_nb(price, side, rules)
    if rules.fill != SAME_CLOSE:
        _mark_path_nb(bars, rules, reached, first, place, side, entry, day)
    elif place + 1 < len(reached):
        entry = _kept_entry_nb(bars, rules, day + 1, entry)
        _mark_path_nb(bars, rules, reached, first, place + 1, side, entry, day)


@kernel()
def reachable_nb(bars, rules, first, arrays, reached):
    reached[:, 0] = True
    for b in range(arrays.shares.size):
        if arrays.shares[b] != 0.0:
            side, opened = np.sign(arrays.shares[b]), np.int64(arrays.opened[b])
            _mark_path_nb(bars, rules, reached, first, 0, side, arrays.entry[b], opened)
    for place in range(0 if rules.fill == SAME_CLOSE else 1, len(reached)):
        if bars[first + place, TRADABLE] != 0.0:
            _mark_entry_nb(bars, rules, reached, first, place, 1.0)
            if rules.long_short:
                _mark_entry_nb(bars, rules, reached, first, place, -1.0)
