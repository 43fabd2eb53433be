"""What each asset does from one close to the next, worked out once so that the kernel knows no
rule of fills, splits, dividends or missing bars."""

from collections.abc import Sequence

import numpy as np

from fastflag.config import PortfolioConfig
from fastflag.market.bars import Bars
from fastflag.market.compiled.portfolio_constants import COLUMNS


def nights_of(assets: Sequence[Bars], rules: PortfolioConfig) -> np.ndarray:
    """[M, K, COLUMNS] float64, of the bars of K assets on the same M days. Row t is the night
    between the closes of days t and t + 1; of the last, `open` is all that is known:

    open
        1 where an order may be given at the close of day t: it has a bar, and t is a multiple of
        `rebalance_every`.
    filled
        1 where an order is filled, given then or before: the day of the fill has a bar.
    to_fill, paid
        What a holding worth 1 at the close of day t is worth at the fill, and the dividends paid
        on it by then.
    after
        The close of day t + 1 over the price of the fill.
    growth
        What a holding worth 1 is worth at the close of day t + 1 where nothing is traded,
        dividends reinvested at that close.
    gone
        1 where day t + 1 is the `delisted_after`-th without a bar: what is held is paid out, less
        `delisting_loss`.

    A dividend of a day without a bar comes with the next bar. All of row t is known at the close of
    day t + 1, and `open` at that of day t.
    """
    return np.stack([_nights(bars, rules) for bars in assets], axis=1)


def _nights(bars: Bars, rules: PortfolioConfig) -> np.ndarray:
    today, tomorrow = bars.tradable[:-1], bars.tradable[1:]
    open_for = bars.tradable & (np.arange(len(bars)) % rules.rebalance_every == 0)
    # A holding worth 1 is as many shares tomorrow. NaN before the first bar: there is none.
    shares = bars.split[1:] / bars.mark[:-1]
    held = tomorrow & np.isfinite(shares)
    total = np.where(held, shares * (bars.close[1:] + bars.payable[1:]), 1.0)
    ones, zeros = np.ones(len(today)), np.zeros(len(today))
    if rules.fill == "same_close":
        filled, to_fill, paid, after = today, ones, zeros, total
    else:
        price = bars.open[1:] if rules.fill == "next_open" else bars.close[1:]
        filled = tomorrow
        to_fill = np.where(held, shares * price, ones)
        paid = np.where(held, shares * bars.payable[1:], zeros)
        after = np.where(tomorrow, bars.close[1:] / price, ones)
    gone = _days_without(bars.tradable)[1:] == rules.delisted_after
    nights = {
        "open": open_for[:-1],
        "filled": filled,
        "to_fill": to_fill,
        "paid": paid,
        "after": np.where(gone, 1.0 - rules.delisting_loss, after),
        "growth": np.where(gone, 1.0 - rules.delisting_loss, total),
        "gone": gone,
    }
    known = np.column_stack([nights[name] for name in COLUMNS]).astype(np.float64)
    last = dict.fromkeys(COLUMNS, np.nan) | {"open": open_for[-1]}
    return np.vstack([known, [last[name] for name in COLUMNS]])


def _days_without(tradable: np.ndarray) -> np.ndarray:
    """[M] days since the last bar; -1 before the first."""
    days = np.arange(len(tradable))
    last = np.maximum.accumulate(np.where(tradable, days, -1))
    return np.where(last >= 0, days - last, -1)
