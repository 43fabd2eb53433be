"""Which days a period is: training days, held-out days, START..END."""

import numpy as np

from fastflag.files import InputError
from fastflag.market.bars import PRICES, Market
from fastflag.market.calendar import date_of


def parse_period(text: str, name: str = "period") -> tuple[str, str]:
    """ "A..B" -> ("A", "B"). Raises InputError, with the period's `name`, unless both are dates and
    A is not after B."""
    start, dots, end = text.partition("..")
    if not dots:
        raise InputError(f"not START..END, {name} {text!r}")
    if date_of(start, name) > date_of(end, name):
        raise InputError(f"start after end, {name} {text}")
    return start, end


def days_of(market: Market, period: str, name: str = "period") -> range:
    """Indices of the days of a period "A..B". Raises InputError as `parse_period` and `Market.days`
    do."""
    return market.days(*parse_period(period, name), name)


def days_within(market: Market, period: str, name: str = "period") -> range:
    """Those of a market that need not reach over the whole period, or into it: then none. Raises
    InputError as `parse_period` does."""
    first, last = (date_of(date, name) for date in parse_period(period, name))
    start = int(np.searchsorted(market.dates, first))
    return range(start, int(np.searchsorted(market.dates, last, side="right")))


def split_days(
    market: Market,
    train: str,
    test: str,
    names: tuple[str, str] = ("training period", "test period"),
) -> tuple[range, range]:
    """Indices of the training days and of the held-out days; `train`, `test` as in DataConfig, by
    their `names` in refusals.

    Raises InputError where a period has fewer than the two days of one decision or than two bars,
    and where testing begins before training has ended.
    """
    total = len(market.dates)
    train_days = days_of(market, train, names[0]) if train else range(total * 4 // 5)
    test_days = days_of(market, test, names[1]) if test else range(train_days.stop, total)
    for name, days in (("training", train_days), ("test", test_days)):
        if len(days) < 2:
            raise InputError(f"fewer than 2 days, {name} period of a market of {total} days")
    if test_days.start < train_days.stop:
        raise InputError(
            f"test begins on {market.dates[test_days[0]]}, before training ends on "
            f"{market.dates[train_days[-1]]}"
        )
    for name, days in (("training", train_days), ("test", test_days)):
        if _bars_in(market, days) < 2:
            period = f"{market.dates[days[0]]}..{market.dates[days[-1]]}"
            raise InputError(
                f"fewer than 2 bars of {', '.join(market.symbols)}, {name} period {period}"
            )
    return train_days, test_days


def _bars_in(market: Market, days: range) -> int:
    """Days on which some symbol has a bar."""
    prices = [getattr(market, name)[days.start : days.stop] for name in PRICES]
    return int(np.logical_and.reduce(np.isfinite(prices)).any(1).sum())
