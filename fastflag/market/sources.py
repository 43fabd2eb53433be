"""Readers of market files, one per format, into a Market: the only code that opens such files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd

from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market import cells
from fastflag.market.bars import PRICES, Market, News
from fastflag.market.columns import bar_columns, with_decimal_points
from fastflag.market.events import Rows, events
from fastflag.market.frames import named, path_of, read_json, read_table, stem_of
from fastflag.market.mend import mended
from fastflag.market.news import assigned, news_beside, news_of, with_news
from fastflag.market.planted import NEWS_TIME, read_planted
from fastflag.market.times import bar_dates, hours_of, refuse_longer_than_days, zone_of
from fastflag.market.wide import long_rows

SAMPLES = ("AAPL", "FB", "GOOG", "IBM", "MSFT")

_NUMBERS = (*PRICES, "volume", "adj_close", "dividend")
_NOT_BEFORE = "is not before the one above it, where the newest row is first"


def load(data: DataConfig) -> Market:
    """The market of the symbol that `data` names, on the days on which its file has a row of it.

    Bars (csv:, parquet:) have columns date, open, high, low, close and, where there are, volume,
    adj_close, split, dividend and symbol, in any order, under the names of columns.py; files are
    compressed or not (gzip, bzip2, xz, zstd). Cells of CSV are separated by commas, or by ; tab or
    |, and then decimals may be commas. A cell without a value (cells.MISSING) is NaN. A symbol's
    rows are oldest or newest first. yfinance's tables of several tickers are taken apart (wide.py).
    Prices are raw or adjusted: events.py says how that is told. Bars that can't be are missing, or
    where they are many refused (mend.py). What is not used is logged in one line.

    Without a symbol column the symbol is `data.symbol`, or else the file's name. News of a file is
    added to the source's own; `names_of` says which of its names are the symbol's.

    Raises InputError, with the file and where possible its line, for whatever is wrong in a file.
    """
    whole = read(data)
    market = of_symbol(whole, data.symbol, data)
    path = news_path(data)
    if path is None:
        return market
    symbols = (*whole.symbols, *(name for name, _ in whole.others))
    own = assigned(read_news(path, data), market.symbols[0], symbols, str(path))
    return with_news(market, [*market.news, *own])


def read(data: DataConfig) -> Market:
    """All symbols of a source, without the news beside it; of a file that holds some of those that
    are `asked` for, these alone."""
    kind, colon, name = data.data.partition(":")
    if not (data.data + data.symbol + data.symbols).isprintable():
        raise InputError(f"a name with characters that can't be printed, {data.data!a}")
    if not colon or kind not in _SOURCES:
        known = ", ".join(f"{known}:" for known in _SOURCES)
        raise InputError(f"unknown data source, {data.data!r} (known: {known})")
    hours_of(data), zone_of(data)  # refused before a file is read
    return _SOURCES[kind].read(name, data)


def asked(data: DataConfig) -> tuple[str, ...]:
    """The symbols that `data` names; none where it names all that there are, or the only one.
    Raises InputError for one that is empty or there twice, and for a --symbol beside."""
    if data.symbols and data.symbol:
        raise InputError(f"both are named, --symbol {data.symbol} --symbols {data.symbols}")
    if data.symbols in ("", "all"):
        return (data.symbol,) if data.symbol else ()
    return names_in(data.symbols, "--symbols")


def names_in(text: str, flag: str) -> tuple[str, ...]:
    """Symbols between commas. Raises InputError for one that is empty or there twice."""
    names = tuple(name.strip() for name in text.split(","))
    if "" in names or len({*names}) < len(names):
        raise InputError(f"a symbol is empty or there twice, {flag} {text!r}")
    return names


def of_symbol(market: Market, symbol: str, data: DataConfig) -> Market:
    """The market of one symbol of what was read, on the days on which it has a row."""
    try:
        market = dataclasses.replace(market.of(symbol), hours=hours_of(data))
    except InputError as error:
        raise InputError(f"{error} {data.data}") from None
    if not np.isfinite(market.close).any():
        raise InputError(f"not a single bar of {market.symbols[0]}, {data.data}")
    refuse_longer_than_days(market.dates[np.isfinite(market.close[:, 0])], data.data)
    return market


def news_path(data: DataConfig) -> Path | None:
    """The news file that is named, or else the one beside the bars, where there is one."""
    kind, _, name = data.data.partition(":")
    if data.news or not _SOURCES[kind].is_file:
        return path_of(data.news) if data.news else None
    bars = path_of(name)
    return news_beside(bars.with_name(f"{stem_of(bars)}.csv"))  # of bars.csv.gz bars.news.csv too


def read_news(path: Path, data: DataConfig) -> list[News]:
    return news_of(named(read_table(path), path), str(path), zone_of(data))


# Readers: (what follows the colon, all that is asked for) -> Market


def _sample(name: str, _data: DataConfig) -> Market:
    from bokeh_sampledata import stocks

    if name.upper() not in SAMPLES:
        raise InputError(f"unknown sample {name!r}, bokeh_sampledata has {', '.join(SAMPLES)}")
    frame = pd.DataFrame(getattr(stocks, name.upper())).rename_axis("row")
    return _market(frame, f"sample:{name}", name.upper())


def _planted(name: str, data: DataConfig) -> Market:
    close = hours_of(data).close
    if close is not None and close < NEWS_TIME:
        raise InputError(
            "planted: has its news at 15:00, which tells the next day's direction only where it is "
            f"known at the close, --close-time {data.close_time}"
        )
    return read_planted(name)


def _csv(name: str, data: DataConfig) -> Market:
    return _bars("csv", name, data)


def _parquet(name: str, data: DataConfig) -> Market:
    return _bars("parquet", name, data)


def _bars(kind: str, name: str, data: DataConfig) -> Market:
    path = path_of(name)
    symbol = data.symbol or stem_of(path).upper()
    return _market(read_table(path, kind), str(path), symbol, zone_of(data), asked(data))


def _investorbench(name: str, data: DataConfig) -> Market:
    """InvestorBench's JSON, {date: {"prices": adjusted close, "news": [text]}}, without filings.

    The one price stands for open, high, low and close; a date's news is available at its close.
    """
    path = path_of(name)
    days = read_json(path)
    if not isinstance(days, dict) or not days:
        raise InputError(f"not a JSON object of dates, {path}")
    for date, day in days.items():
        if not isinstance(day, dict) or type(day.get("prices")) is not float:
            raise InputError(f"no number 'prices', {path} entry {date!r}")
        texts = day.get("news", [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"'news' is not a list of texts, {path} entry {date!r}")
    prices = [day["prices"] for day in days.values()]
    frame = pd.DataFrame({"date": list(days), **dict.fromkeys(PRICES, prices)})
    frame.index = pd.RangeIndex(1, len(frame) + 1, name="entry")
    ticker = stem_of(path).upper()
    market = _market(frame, str(path), ticker, zone_of(data))
    market = dataclasses.replace(market, hours=hours_of(data))
    entries = list(days.values())
    oldest_first = np.argsort(bar_dates(frame["date"], str(path), zone_of(data)))
    news = [
        News(close, close, ticker, text)
        for close, n in zip(market.closes, oldest_first, strict=True)
        for text in entries[n].get("news", [])
    ]
    return with_news(market, news)


class _Source(NamedTuple):
    read: Callable[[str, DataConfig], Market]
    is_file: bool = True
    """What follows the colon names one, beside which news may lie."""


_SOURCES = {
    "sample": _Source(_sample, is_file=False),
    "csv": _Source(_csv),
    "parquet": _Source(_parquet),
    "investorbench": _Source(_investorbench),
    "planted": _Source(_planted, is_file=False),
}


# Frames -> Market


def _market(
    frame: pd.DataFrame,
    where: str,
    symbol: str,
    zone: ZoneInfo | None = None,
    wanted: Sequence[str] = (),
) -> Market:
    """The Market of a frame of bars; `symbol` names them where there is no symbol column. Of
    several symbols those `wanted` alone, where any is among them.

    R rows. Those of a symbol follow one another in time, or all of them go back in it.
    """
    frame = bar_columns(long_rows(frame, where), where)
    frame = with_decimal_points(frame, (*_NUMBERS, "split"), where)
    dates = bar_dates(frame["date"], where, zone)
    numbers = {name: cells.numbers(frame[name], where) for name in _NUMBERS if name in frame}
    if "split" in frame:
        numbers["split"] = cells.ratios(frame["split"], where)
    owners = np.full(len(frame), symbol, object)
    if "symbol" in frame:
        owners = cells.texts(frame["symbol"], where)
    cells.refuse(frame, owners == "", "is empty", "symbol", where)
    owner, symbols = pd.factorize(owners)
    if "adj_close" in numbers:
        wrong = (numbers["adj_close"] <= 0) | np.isinf(numbers["adj_close"])
        if {*wanted} & {*symbols}:
            wrong &= np.isin(owners, wanted)
        cells.refuse(frame, wrong, "is not a finite price above 0", "adj_close", where)
    order = _in_time(frame, dates, owner, where)
    dates, owner = dates[order], owner[order]
    numbers = {name: column[order] for name, column in numbers.items()}
    others: tuple[tuple[str, np.datetime64], ...] = ()
    if {*wanted} & {*symbols} and len(symbols) > 1:
        # What is wrong with other symbols' prices is nobody's business here.
        own = np.isin(symbols[owner], wanted)
        bars = np.isfinite(numbers["close"]) & ~own
        found, first = np.unique(owner[bars], return_index=True)
        others = tuple(zip(symbols[found].tolist(), dates[bars][first], strict=True))
        numbers = {name: column[own] for name, column in numbers.items()}
        kept, owner = np.unique(owner[own], return_inverse=True)
        dates, symbols = dates[own], symbols[kept]
    names: list[str] = symbols.tolist()
    numbers = mended(numbers, dates, owner, names, where)
    calendar = np.unique(dates)
    place = (np.searchsorted(calendar, dates), owner)
    shape = (len(calendar), len(names))

    def aligned(column: np.ndarray, fill: float) -> np.ndarray:
        array = np.full(shape, fill, column.dtype)
        array[place] = column
        return array

    split, dividend = _events(frame, numbers, dates, owner, names, where)
    unknown = np.full(len(dates), np.nan)
    prices: dict[str, Any] = {
        name: aligned(numbers.get(name, unknown), np.nan) for name in (*PRICES, "volume")
    }
    try:
        return Market(
            calendar,
            tuple(names),
            **prices,
            split=aligned(split, 1.0),
            dividend=aligned(dividend, 0.0),
            rows=aligned(np.ones(len(dates), bool), False),
            others=others,
        )
    except InputError as error:
        raise InputError(f"{error}, {where}") from None


def _in_time(frame: pd.DataFrame, dates: np.ndarray, owner: np.ndarray, where: str) -> np.ndarray:
    """[R] order of the rows in which a symbol's are together and oldest first.

    Raises InputError, with the line, for a symbol's row that leaves its rows' order.
    """
    order = np.argsort(owner, kind="stable")
    step = np.diff(dates[order]).astype(int)
    same = np.diff(owner[order]) == 0
    symbol = owner[order][1:]
    count = owner.max() + 1
    forwards = np.bincount(symbol[same & (step > 0)], minlength=count)
    backwards = np.bincount(symbol[same & (step < 0)], minlength=count)
    newest_first = backwards > forwards
    for descending, what in ((False, "is not after the one before"), (True, _NOT_BEFORE)):
        wrong = np.zeros(len(dates), bool)
        odd = (step >= 0) if descending else (step <= 0)
        wrong[order[1:]] = same & odd & (newest_first[symbol] == descending)
        cells.refuse(frame, wrong, what, "date", where)
    rank = np.where(newest_first[owner], -np.arange(len(dates)), np.arange(len(dates)))
    return np.lexsort((rank, owner))


def _events(
    frame: pd.DataFrame,
    numbers: dict[str, np.ndarray],
    dates: np.ndarray,
    owner: np.ndarray,
    symbols: Sequence[str],
    where: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Splits and dividends [R]."""
    none = np.ones(len(dates)), np.zeros(len(dates))
    columns = [numbers.get(name) for name in ("adj_close", "split", "dividend")]
    if frame.attrs["adjusted"] or all(column is None for column in columns):
        return none
    ends = np.searchsorted(owner, np.arange(len(symbols) + 1))
    spans = [slice(*each) for each in pairwise(ends.tolist())]
    prices = (numbers["open"], numbers["close"])
    if any((price > 0).sum() != np.isfinite(price).sum() for price in prices):
        return none  # the Market refuses it
    rows = Rows(symbols, spans, dates, *prices, where)
    return events(rows, *columns, yfinance=frame.attrs["yfinance"])
