"""The market: aligned arrays and dated texts, checked once so that nothing later checks again; and
one symbol's bars as flat arrays. T days."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from fastflag.config import Calendar
from fastflag.files import InputError
from fastflag.market.calendar import SATURDAY, calendar_of, date_of, weekday
from fastflag.market.compiled.constants import COLUMNS

# Of a price: beyond what any unit of account needs, ratios of prices overflow.
LEAST, MOST = 1e-15, 1e15
PRICES = ("open", "high", "low", "close")
MARKET_COLUMNS = (*PRICES, "volume", "split", "dividend")
_CLOSE_TIMES: dict[Calendar, np.timedelta64] = {
    "stock": np.timedelta64(16 * 3600, "s"),
    # A market without a closing bell: the last second of the date.
    "crypto": np.timedelta64(24 * 3600 - 1, "s"),
}


@dataclass(frozen=True)
class News:
    """A text and when it could first be read. Times are the exchange's local ones."""

    published: np.datetime64  # [s]
    available: np.datetime64  # [s]
    symbol: str  # "": concerns every symbol
    text: str


@dataclass(frozen=True)
class Hours:
    """An exchange's days, as the user gives them; None: found from the dates that have bars."""

    calendar: Calendar | None = None
    close: np.timedelta64 | None = None
    """Time of day [s]."""


@dataclass(frozen=True, eq=False)
class Market:
    """T days of N symbols. Prices are RAW, as traded; a bar is tradable iff all four are finite.

    Raises InputError, with the symbol and the date, for dates unsorted or repeated, a price not
    above 0, a high or low that open or close exceeds, a volume or dividend below 0, infinities,
    arrays of other shapes, news not sorted by `available`.
    """

    dates: np.ndarray  # [T] datetime64[D], strictly increasing
    symbols: tuple[str, ...]  # N
    open: np.ndarray  # [T, N] float64; NaN: no bar that day
    high: np.ndarray
    low: np.ndarray
    close: np.ndarray
    volume: np.ndarray  # [T, N] float64, raw shares; NaN: not known
    split: np.ndarray  # [T, N] float64: shares held are multiplied by it before the open; 1: none
    dividend: np.ndarray  # [T, N] float64: cash per share held after the split, before the open
    news: tuple[News, ...] = ()  # sorted by `available`
    hours: Hours = Hours()
    rows: np.ndarray | None = None  # [T, N] bool: a row that day, be it empty; None: everywhere
    others: tuple[tuple[str, np.datetime64], ...] = ()  # the file's other symbols, their first bars

    def __post_init__(self) -> None:
        shape = (len(self.dates), len(self.symbols))
        if 0 in shape:
            raise InputError(f"no bars, market of {shape[0]} days and {shape[1]} symbols")
        for name in MARKET_COLUMNS:
            array = getattr(self, name)
            if array.shape != shape or array.dtype != np.float64:
                found = f"{array.dtype} {list(array.shape)}"
                raise InputError(f"{name} is {found}, not float64 {list(shape)}, market")
        backwards = np.flatnonzero(np.diff(self.dates) <= np.timedelta64(0, "D"))
        if len(backwards):
            raise InputError(
                f"dates not strictly increasing, {self.dates[backwards[0]]} before "
                f"{self.dates[backwards[0] + 1]}"
            )
        for name in MARKET_COLUMNS:
            self._refuse(np.isinf(getattr(self, name)), f"{name} is infinite")
        for name in PRICES:
            self._refuse(getattr(self, name) <= 0, f"{name} is not above 0")
            self._refuse(getattr(self, name) < LEAST, f"{name} is below {LEAST:g}")
            self._refuse(getattr(self, name) > MOST, f"{name} is above {MOST:g}")
        self._refuse(self.high < np.fmax(self.open, self.close), "high is below open or close")
        self._refuse(self.low > np.fmin(self.open, self.close), "low is above open or close")
        self._refuse(self.high < self.low, "high is below low")
        self._refuse(self.volume < 0, "volume is below 0")
        self._refuse(~(self.split > 0), "split is not above 0")
        self._refuse(~(self.dividend >= 0), "dividend is below 0")
        times = [item.available for item in self.news]
        if any(later < earlier for earlier, later in pairwise(times)):
            raise InputError("news is not sorted by its available time, market")

    def __repr__(self) -> str:
        names = ", ".join(self.symbols[:3]) + (", ..." if len(self.symbols) > 3 else "")
        period = f"{self.dates[0]}..{self.dates[-1]}"
        return f"Market({names}: {len(self.dates)} days {period}, {len(self.news)} news)"

    def _refuse(self, wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            day, column = np.argwhere(wrong)[0]
            raise InputError(f"{what}, {self.symbols[column]} {self.dates[day]}")

    @cached_property
    def calendar(self) -> Calendar:
        """The user's, or else what the days with bars are."""
        return self.hours.calendar or calendar_of(self.dates[np.isfinite(self.close).any(1)])

    @cached_property
    def close_time(self) -> np.timedelta64:
        """Time of day [s] of the decision: as given, or else 16:00:00, and 23:59:59 where every day
        is traded."""
        return _CLOSE_TIMES[self.calendar] if self.hours.close is None else self.hours.close

    @cached_property
    def closes(self) -> np.ndarray:
        """[T] datetime64[s]: the moment at which day t's decision is made."""
        return self.dates.astype("datetime64[s]") + self.close_time

    @cached_property
    def first_bars(self) -> dict[str, np.datetime64]:
        """The date of the first close of every symbol of the file that has one."""
        bars = np.isfinite(self.close)
        days = zip(self.symbols, np.atleast_1d(bars.any(0)), bars.argmax(0), strict=True)
        return {name: self.dates[day] for name, some, day in days if some} | dict(self.others)

    def of(self, symbol: str = "") -> "Market":
        """The market of one symbol: its bars on the days on which it has a row, be it an empty one.

        So a file's other symbols bear on no day, closing time, period or figure. All news stays,
        and the others' names with their first bars. Saturdays are no days where not one has a bar,
        split or dividend, nor are Sundays: files may be filled up to every date. Raises InputError
        as `column` does.
        """
        n = self.column(symbol)
        days = np.ones(len(self.dates), bool) if self.rows is None else self.rows[:, n]
        day_of_week = weekday(self.dates)
        told = np.isfinite(self.close[:, n]) | (self.split[:, n] != 1) | (self.dividend[:, n] > 0)
        days = days & (np.isin(day_of_week, day_of_week[told]) | (day_of_week < SATURDAY))
        own = self.symbols[n]
        return replace(
            self,
            dates=self.dates[days],
            symbols=(own,),
            rows=None,
            others=tuple((name, day) for name, day in self.first_bars.items() if name != own),
            **{name: getattr(self, name)[days, n : n + 1] for name in MARKET_COLUMNS},
        )

    def several(self, symbols: Sequence[str] = ()) -> "Market":
        """The market of some symbols, in this order, on the days on which it has a row of any;
        none are all. Raises InputError as `column` does."""
        columns = [self.column(symbol) for symbol in symbols or self.symbols]
        rows = (
            np.ones((len(self.dates), len(self.symbols)), bool) if self.rows is None else self.rows
        )
        rows = rows[:, columns]
        days = rows.any(1)
        own = tuple(self.symbols[column] for column in columns)
        return replace(
            self,
            dates=self.dates[days],
            symbols=own,
            rows=rows[days],
            others=tuple(pair for pair in self.first_bars.items() if pair[0] not in own),
            **{name: getattr(self, name)[np.ix_(days, columns)] for name in MARKET_COLUMNS},
        )

    def on_all_days(self, symbol: str) -> "Market":
        """The market of one symbol on every day of this one, whether it has a row or not. Raises
        InputError as `column` does."""
        n = self.column(symbol)
        own = self.symbols[n]
        return replace(
            self,
            symbols=(own,),
            rows=None,
            others=tuple((name, day) for name, day in self.first_bars.items() if name != own),
            **{name: getattr(self, name)[:, n : n + 1] for name in MARKET_COLUMNS},
        )

    @cached_property
    def each(self) -> tuple["Market", ...]:
        """N, each symbol's own market, as `of` has it; that of one symbol is itself."""
        return (self,) if len(self.symbols) == 1 else tuple(map(self.of, self.symbols))

    def column(self, symbol: str = "") -> int:
        """Column of `symbol`; empty: of the only one. Raises InputError where there is none."""
        if not symbol and len(self.symbols) == 1:
            return 0
        if symbol not in self.symbols:
            wrong = f"unknown symbol {symbol!r}" if symbol else "no symbol chosen"
            known = (*self.symbols, *(name for name, _ in self.others))
            raise InputError(f"{wrong} of {', '.join(known)}, market")
        return self.symbols.index(symbol)

    def days(self, start: str, end: str, name: str = "period") -> range:
        """Indices of the days START..END, both inclusive ("2020-07-01").

        Raises InputError, with the period's `name`, for a malformed date, an empty period, and one
        not inside the data.
        """
        first, last = date_of(start, name), date_of(end, name)
        if min(first, last) < self.dates[0] or max(first, last) > self.dates[-1]:
            raise InputError(
                f"{name} {start}..{end} is not inside the data, {self.dates[0]}..{self.dates[-1]}"
            )
        if first > last:
            raise InputError(f"start after end, {name} {start}..{end}")
        found = range(
            int(np.searchsorted(self.dates, first)),
            int(np.searchsorted(self.dates, last, side="right")),
        )
        if not found:
            raise InputError(f"no day of the market, {name} {start}..{end}")
        return found


@dataclass(frozen=True, eq=False)
class Bars:
    """One symbol's bars, all [T]; raw prices, NaN where there is no bar.

    `mark` is the close, or on days without a bar the last mark divided by the day's split (NaN
    before the first bar). `split` multiplies shares before the open, `dividend` is cash per
    (post-split) share paid before the open. `payable` is the dividend as it can be reinvested: that
    of a day without a bar waits for the next bar, per share of that day. Raises ValueError for
    columns of unequal length.
    """

    open: np.ndarray
    close: np.ndarray
    mark: np.ndarray
    split: np.ndarray
    dividend: np.ndarray
    tradable: np.ndarray
    """bool."""
    payable: np.ndarray
    matrix: np.ndarray = field(init=False, repr=False)
    """The columns side by side, [T, 7] float64, as the kernels read them."""

    def __post_init__(self) -> None:
        for name in COLUMNS:
            column = np.asarray(getattr(self, name), np.bool_ if name == "tradable" else np.float64)
            if column.shape != (len(self.close),):
                raise ValueError(f"bars.{name} has shape {column.shape}, not {(len(self.close),)}")
            object.__setattr__(self, name, column)
        matrix = np.column_stack([getattr(self, name) for name in COLUMNS])
        object.__setattr__(self, "matrix", matrix)

    @classmethod
    def from_columns(
        cls,
        open: np.ndarray,
        close: np.ndarray,
        split: np.ndarray,
        dividend: np.ndarray,
        tradable: np.ndarray,
    ) -> "Bars":
        """Bars with their marks and what is payable worked out."""
        close, split = np.asarray(close, float), np.asarray(split, float)
        mark = np.full(len(close), np.nan)
        last = np.nan
        for day in range(len(close)):
            last = close[day] if tradable[day] else last / split[day]
            mark[day] = last
        payable = _payable(split, dividend, tradable)
        return cls(open, close, mark, split, dividend, tradable, payable)

    @classmethod
    def joined(cls, symbols: Sequence["Bars"]) -> "Bars":
        """The bars of several symbols, those of each after those of the one before."""
        columns = ([getattr(bars, name) for bars in symbols] for name in COLUMNS)
        return cls(*map(np.concatenate, columns))

    @classmethod
    def from_market(cls, market: Market, symbol: str) -> "Bars":
        """The bars of `symbol`; InputError where the market has no such symbol."""
        n = market.column(symbol)
        prices = (market.open, market.high, market.low, market.close)
        tradable = np.logical_and.reduce([np.isfinite(price[:, n]) for price in prices])
        return cls.from_columns(
            market.open[:, n],
            market.close[:, n],
            market.split[:, n],
            market.dividend[:, n],
            tradable,
        )

    def __len__(self) -> int:
        return len(self.close)

    def __repr__(self) -> str:
        return f"Bars({len(self)} days, {self.tradable.sum()} with a bar)"


def _payable(split: np.ndarray, dividend: np.ndarray, tradable: np.ndarray) -> np.ndarray:
    payable, waiting = np.zeros(len(split)), 0.0
    for day in range(len(split)):
        waiting = waiting / split[day] + dividend[day]
        if tradable[day]:
            payable[day], waiting = waiting, 0.0
    return payable
