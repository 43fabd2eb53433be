"""Readers of market files, one per format, into a Market: the only code that opens such files."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd

from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market.bars import Market, News
from fastflag.market.cells import one_line as _one_line
from fastflag.market.cells import refuse as _refuse
from fastflag.market.cells import require as _require
from fastflag.market.cells import texts as _texts
from fastflag.market.news import assigned, news_beside, news_of, with_news
from fastflag.market.times import bar_dates, hours_of, refuse_longer_than_days, zone_of

SAMPLES = ("AAPL", "FB", "GOOG", "IBM", "MSFT")

_PRICES = ("open", "high", "low", "close")


def load(data: DataConfig) -> Market:
    """The market of the symbol that `data` names, on the days on which its file has a row of it.

    Bars (csv:, parquet:) have columns date, open, high, low, close and, where there are, volume,
    adj_close and symbol, in any case and order; an empty cell is NaN. Without a symbol column the
    symbol is `data.symbol`, or else the file's name. News of a file is added to the source's own;
    `names_of` says which of its names are the symbol's.

    Raises InputError, with the file and where possible its line, for whatever is wrong in a file.
    """
    kind, colon, name = data.data.partition(":")
    if not (data.data + data.symbol).isprintable():
        raise InputError(f"a name with characters that can't be printed, {data.data!a}")
    if not colon or kind not in _READERS:
        known = ", ".join(f"{known}:" for known in _READERS)
        raise InputError(f"unknown data source, {data.data!r} (known: {known})")
    hours, zone = hours_of(data), zone_of(data)
    market = _READERS[kind](name, data)
    symbols = market.symbols
    try:
        market = dataclasses.replace(market.of(data.symbol), hours=hours)
    except InputError as error:
        raise InputError(f"{error} {data.data}") from None
    if not np.isfinite(market.close).any():
        raise InputError(f"not a single bar of {market.symbols[0]}, {data.data}")
    refuse_longer_than_days(market.dates[np.isfinite(market.close[:, 0])], data.data)
    path = Path(data.news) if data.news else news_beside(kind, name)
    if path is None:
        return market
    frame = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    news = news_of(frame, str(path), zone)
    own = assigned(news, market.symbols[0], symbols, str(path))
    return with_news(market, [*market.news, *own])


def recover_splits_and_dividends(
    close: np.ndarray, adjusted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Splits [T] and dividends [T] that turn raw closes [T] into adjusted closes [T] (NaN: no bar).

    With gain = (adjusted / close)[t] / (adjusted / close)[last event], a day's event is

        gain = split * (1 + dividend / close[t])

    which is how Quandl's WIKI prices were adjusted: a dividend buys shares at the close of its day.
    Reinvested so, the stream gives the adjusted total return whoever made the prices; with another
    maker's formula (1 - dividend / close[t-1]) the dividend differs from the declared one by the
    day's price move. Only rows up to t are used for row t.

    One number can't tell a split from a dividend. A gain of 1 to 1.2 is a dividend. Any other is
    the nearest p:q with q <= 5 and a dividend of at most 2%, or else a split of just that gain
    (spin-offs).

    Gains smaller than the rounding of `adjusted` are no events; its decimals are counted as they
    are seen. Gains are taken from the last event, so rounding never adds up. Measured on the 95
    events of the sample data: splits exact, dividends within 1e-11 dollars of whole cents, adjusted
    total returns within 1e-13; with `adjusted` rounded to cents the same 95 events, dividends
    within a cent.
    """
    split, dividend = np.ones(len(close)), np.zeros(len(close))
    event_factor = event_adjusted = None
    decimals = 2
    for t in np.flatnonzero(np.isfinite(close) & np.isfinite(adjusted)):
        factor = adjusted[t] / close[t]
        decimals = max(decimals, _decimals(adjusted[t]))
        if event_factor is None:
            event_factor, event_adjusted = factor, adjusted[t]
            continue
        rounding = 0.5 * 10.0**-decimals * (1 / adjusted[t] + 1 / event_adjusted)
        # Files made from float32 prices carry some 1e-7 of noise in every digit they print.
        noise = max(1.01 * rounding, 1e-6)
        gain = factor / event_factor
        if abs(gain - 1) > noise:
            split[t], dividend_yield = _split_and_yield(gain, noise)
            dividend[t] = close[t] * dividend_yield
            event_factor, event_adjusted = factor, adjusted[t]
    return split, dividend


def _split_and_yield(gain: float, noise: float) -> tuple[float, float]:
    if 1 < gain < 1.2:
        return 1.0, gain - 1
    if not 1e-3 <= gain <= 1e3:
        return gain, 0.0
    if gain > 1:
        ratio = float(Fraction(gain).limit_denominator(5))
    else:
        ratio = float(1 / Fraction(1 / gain).limit_denominator(5))
    remainder = gain / ratio - 1
    if not -noise <= remainder <= 0.02:
        return gain, 0.0
    return ratio, remainder if remainder > noise else 0.0


def _decimals(value: float) -> int:
    return len(np.format_float_positional(value, trim="-").partition(".")[2])


# Readers: (what follows the colon, all that is asked for) -> Market


def _sample(name: str, _data: DataConfig) -> Market:
    from bokeh_sampledata import stocks

    if name.upper() not in SAMPLES:
        raise InputError(f"unknown sample {name!r}, bokeh_sampledata has {', '.join(SAMPLES)}")
    frame = pd.DataFrame(getattr(stocks, name.upper())).rename_axis("row")
    return _market(frame, f"sample:{name}", name.upper())


def _csv(name: str, data: DataConfig) -> Market:
    symbol = data.symbol or Path(name).stem.upper()
    return _market(_read_csv(Path(name)), name, symbol, zone_of(data))


def _parquet(name: str, data: DataConfig) -> Market:
    symbol = data.symbol or Path(name).stem.upper()
    return _market(_read_parquet(Path(name)), name, symbol, zone_of(data))


def _investorbench(name: str, data: DataConfig) -> Market:
    """InvestorBench's JSON, {date: {"prices": adjusted close, "news": [text]}}, without filings.

    The one price stands for open, high, low and close; a date's news is available at its close.
    """
    days = _read_json(Path(name))
    if not isinstance(days, dict) or not days:
        raise InputError(f"not a JSON object of dates, {name}")
    for date, day in days.items():
        if not isinstance(day, dict) or type(day.get("prices")) is not float:
            raise InputError(f"no number 'prices', {name} entry {date!r}")
        texts = day.get("news", [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"'news' is not a list of texts, {name} entry {date!r}")
    prices = [day["prices"] for day in days.values()]
    frame = pd.DataFrame({"date": list(days), **dict.fromkeys(_PRICES, prices)})
    frame.index = pd.RangeIndex(1, len(frame) + 1, name="entry")
    ticker = Path(name).stem.upper()
    market = _market(frame, name, ticker, zone_of(data))
    market = dataclasses.replace(market, hours=hours_of(data))
    news = [
        News(close, close, ticker, text)
        for close, day in zip(market.closes, days.values(), strict=True)
        for text in day.get("news", [])
    ]
    return with_news(market, news)


_READERS: dict[str, Callable[[str, DataConfig], Market]] = {
    "sample": _sample,
    "csv": _csv,
    "parquet": _parquet,
    "investorbench": _investorbench,
}


# Files -> frames. A frame's index numbers the file's lines or rows and is named "line" or "row".


def _read_csv(path: Path) -> pd.DataFrame:
    """Every cell as text. A short row is refused, not padded: so does a truncated file look."""
    text = io.TextIOWrapper(io.BytesIO(_read_bytes(path)), encoding="utf-8-sig", newline="")
    csv.field_size_limit(2**31 - 1)  # news may be long
    reader = csv.reader(text, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"not CSV text ({error}), {path} line {reader.line_num + 1}") from None
    if len(rows) < 2:
        raise InputError(f"no rows, {path}")
    header = rows.pop(0)[1]
    for line, row in rows:
        if len(row) != len(header):
            raise InputError(f"{len(row)} cells under {len(header)} names, {path} line {line}")
    lines = pd.Index([line for line, _ in rows], name="line")
    return _named(pd.DataFrame([row for _, row in rows], lines, header, dtype=object), path)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"Parquet needs the package pyarrow, {path}") from None
    content = pyarrow.BufferReader(_read_bytes(path))
    try:
        table = parquet.ParquetFile(content).read()
        table.validate(full=True)  # reading does not look whether texts are UTF-8
        # An unknown time zone is a LookupError.
        # Without the metadata a date that pandas had as its index is a column like any other.
        frame = table.to_pandas(ignore_metadata=True)
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        raise InputError(f"not Parquet ({_one_line(error)}), {path}") from None
    if frame.empty:
        raise InputError(f"no rows, {path}")
    frame.index = pd.RangeIndex(1, len(frame) + 1, name="row")
    return _named(frame, path)


def _read_json(path: Path) -> Any:
    """JSON with all numbers as floats; repeated keys, which `json` would drop, are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"repeated key {next(key for key in keys if keys.count(key) > 1)!r}")
        return dict(pairs)

    try:
        return json.loads(_read_bytes(path), parse_int=float, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({_one_line(error)}), {path}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{getattr(error, 'strerror', None) or error}, {path}") from None
    if not content:
        raise InputError(f"empty file, {path}")
    return content


def _named(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    names = [str(name).strip().lower().replace(" ", "_") for name in frame.columns]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"more than one column {name!r}, {path}")
    return frame.set_axis(names, axis=1)


# Frames -> Market


def _market(frame: pd.DataFrame, where: str, symbol: str, zone: ZoneInfo | None = None) -> Market:
    """The Market of a frame of bars; `symbol` names them where there is no symbol column."""
    _require(frame, ("date", *_PRICES), where)
    dates = bar_dates(frame["date"], where, zone)
    numbers = {
        name: _numbers(frame[name], where)
        for name in (*_PRICES, "volume", "adj_close")
        if name in frame
    }
    owners = np.full(len(frame), symbol, object)
    if "symbol" in frame:
        owners = _texts(frame["symbol"], where)
    _refuse(frame, owners == "", "is empty", "symbol", where)
    symbols = tuple(dict.fromkeys(owners))
    calendar = np.unique(dates)
    shape = (len(calendar), len(symbols))
    arrays = {name: np.full(shape, np.nan) for name in (*_PRICES, "volume")}
    split, dividend = np.ones(shape), np.zeros(shape)
    present = np.zeros(shape, bool)
    for column, owner in enumerate(symbols):
        rows = np.flatnonzero(owners == owner)
        follows = np.zeros(len(frame), bool)
        follows[rows[1:]] = np.diff(dates[rows]) <= np.timedelta64(0, "D")
        _refuse(frame, follows, "is not after the one before", "date", where)
        days = np.searchsorted(calendar, dates[rows])
        present[days, column] = True
        for name in arrays.keys() & numbers.keys():
            arrays[name][days, column] = numbers[name][rows]
        if "adj_close" in numbers:
            adjusted = numbers["adj_close"]
            wrong = (adjusted <= 0) | np.isinf(adjusted)
            _refuse(frame, wrong, "is not a finite price above 0", "adj_close", where)
            split[days, column], dividend[days, column] = recover_splits_and_dividends(
                np.where(numbers["close"] > 0, numbers["close"], np.nan)[rows], adjusted[rows]
            )
    try:
        return Market(calendar, symbols, **arrays, split=split, dividend=dividend, rows=present)
    except InputError as error:
        raise InputError(f"{error}, {where}") from None


# Columns -> arrays


def _numbers(column: pd.Series, where: str) -> np.ndarray:
    """A column as float64, empty cells and "nan" as NaN."""
    if pd.api.types.is_numeric_dtype(column.dtype):
        return column.to_numpy(np.float64, na_value=np.nan)
    texts = pd.Series(_texts(column, where), column.index, dtype=object)
    numbers = pd.to_numeric(texts, errors="coerce").to_numpy(np.float64)
    wrong = np.isnan(numbers) & ~texts.str.lower().isin(["", "nan"]).to_numpy()
    _refuse(column.to_frame(), wrong, "is not a number", column.name, where)
    return numbers
