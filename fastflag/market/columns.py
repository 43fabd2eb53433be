"""Which column of a bars file is what, under the names that vendors and libraries give them.

A name counts by its letters and digits alone: "Adj. Close", "adjClose" and "5. adjusted close" are
adjclose and adjustedclose. What is not used is told in one line; a name that speaks of adjustments,
splits or dividends and is none of the known ones is refused, because prices that are read wrongly
look like gains and losses.
"""

import logging
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from fastflag.files import InputError, printable
from fastflag.market.cells import MISSING, refuse

PRICES = ("open", "high", "low", "close")

# As written by Yahoo (its pages, its JSON, yfinance, quantmod), Alpha Vantage ("1. open"), Tiingo
# (divCash), EODHD, Quandl (WIKI's Ex-Dividend, Split Ratio), Sharadar (closeadj), Nasdaq
# (Close/Last), Stooq and MetaStock (<VOL>), Polygon and Alpaca (o, h, l, c, v, t), Binance (Open
# time), Databento (ts_event), Tushare (ts_code, vol), Compustat (datadate), FinRL (tic, adjcp).
NAMES: dict[str, str] = {
    "date": "date datetime timestamp time tradedate tradingdate tradingday datadate "
    "datestamp opentime tsevent formatteddate",
    "open": "open openprice openingprice priceopen",
    "high": "high highprice pricehigh dayhigh",
    "low": "low lowprice pricelow daylow",
    "close": "close closeprice closingprice priceclose closelast",
    "volume": "volume vol totalvolume tradevolume tradingvolume sharevolume volumetraded",
    "adj_close": "adjclose adjustedclose closeadj closeadjusted adjcloseprice adjustedcloseprice "
    "adjclosingprice adjustedclosingprice adjusted adjprice adjustedprice adjcp adjlast "
    "dividendadjustedclose closeadjprice",
    "symbol": "symbol ticker tickers symbols tic sym tickersymbol stocksymbol stockcode tscode",
    "split": "split splits stocksplit stocksplits splitfactor splitratio splitcoefficient "
    "sharesplit",
    "dividend": "dividend dividends div divcash cashdividend cashdividends dividendamount "
    "exdividend dividendcash dividendpershare",
    "adj_open": "adjopen adjustedopen openadj openadjusted",
    "adj_high": "adjhigh adjustedhigh highadj highadjusted",
    "adj_low": "adjlow adjustedlow lowadj lowadjusted",
    "adj_volume": "adjvolume adjustedvolume volumeadj volumeadjusted adjvol",
}
# Where there is no column of the names above.
_INDEX = ("indexlevel0", "indexlevel1")
_SECOND: dict[str, tuple[str, ...]] = {
    "date": ("day", "dt", "ts", "t", "", "index", "unnamed0", *_INDEX),
    "open": ("o",),
    "high": ("h",),
    "low": ("l",),
    "volume": ("v",),
    "close": ("c", "price", "last", "lastprice", "settle", "settlement"),
    "symbol": (
        *("name", "code", "instrument", "stock", "asset", "pair", "security"),
        *_INDEX,
    ),
}
# Raw prices beside adjusted ones: nothing that is needed.
_UNADJUSTED = re.compile(r"(close|open|high|low|volume)unadj(usted)?|(unadj(usted)?|raw)\w*")
_ADJUSTMENT = re.compile(r"adj|split|dividend|capitalgain|exdiv|^div|cumfac")
_COUNTER = re.compile(r"\d+(\.0*)?")
_LOG = logging.getLogger(__name__)


def key(name: object) -> str:
    """What of a column's name tells it from others."""
    bare = re.sub(r"^\s*\d+[a-z]?\.\s+", "", str(name).lower())
    return "".join(letter for letter in bare if letter.isalnum())


def canonical(name: object) -> str:
    """Which column a name means, "" for none."""
    return _KNOWN.get(key(name), "")


def bar_columns(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """The columns of a bars file that are used, under their own names: date, open, high, low, close
    and, where there are, volume, adj_close, split, dividend, symbol.

    `attrs["adjusted"]`: the prices are the file's adjusted ones, since it has no others;
    `attrs["yfinance"]`: its splits and dividends are named as yfinance names them.

    Raises InputError, with the names, for a column that is not there or there twice, and for one of
    adjustments, splits or dividends that is not understood.
    """
    names = [str(name) for name in frame.columns]
    found = _found(frame, where)
    date = frame.iloc[:, found["date"]]
    if "time" in found:
        date = _with_time(date, frame.iloc[:, found["time"]])
    adjusted = _has_adjusted_alone(found)
    wanted = {name: name for name in ("volume", "split", "dividend", "symbol")}
    wanted |= {name: f"adj_{name}" if adjusted else name for name in PRICES}
    if adjusted and "volume" not in found:
        wanted["volume"] = "adj_volume"
    if not adjusted:
        wanted["adj_close"] = "adj_close"
    _require(found, [wanted[name] for name in PRICES], names, where)
    used = {name: found[source] for name, source in wanted.items() if source in found}
    made = {"date": date, **{name: frame.iloc[:, at] for name, at in used.items()}}
    taken = {found["date"], found.get("time"), *used.values()}
    _tell_unused(frame, [at for at in range(len(names)) if at not in taken], found, where)
    result = pd.DataFrame({name: column.array for name, column in made.items()}, frame.index)
    own = {names[found[name]] for name in ("split", "dividend") if name in found}
    result.attrs |= {"adjusted": adjusted, "yfinance": own == {"Dividends", "Stock Splits"}}
    result.attrs["decimal_comma"] = frame.attrs.get("decimal_comma", False)
    return result


_KNOWN = {each: name for name, keys in NAMES.items() for each in keys.split()}


def _found(frame: pd.DataFrame, where: str) -> dict[str, int]:
    """Where each column is. `time`: a time of day beside the date."""
    names = [str(name) for name in frame.columns]
    keys = [key(name) for name in names]
    found: dict[str, int] = {}
    for name, known in NAMES.items():
        at = [i for i, each in enumerate(keys) if each in known.split()]
        if not at:
            at = [i for i, each in enumerate(keys) if each in _SECOND.get(name, ())]
            at = [i for i in at if i not in found.values()]
        if name == "symbol":  # pandas' row numbers are nobody's name
            at = [i for i in at if not (keys[i] in _INDEX and _are_numbers(frame.iloc[:, i]))]
        if name in ("date", "symbol") and len(at) > 1:
            at = [i for i in at if not _is_counter(frame.iloc[:, i])]
        if name == "date" and at and not keys[at[0]] and _is_counter(frame.iloc[:, at[0]]):
            at = []
        if name == "date" and sorted(keys[i] for i in at) == ["date", "time"]:
            at.sort(key=lambda i: keys[i])
            if _are_times(frame.iloc[:, at[1]]):
                found["time"] = at.pop()
        if name == "date" and len(at) > 1:
            at = _dates_of_unnamed(frame, keys, at)
        if len(at) > 1:
            both = " and ".join(repr(names[i].strip()) for i in at[:3])
            raise InputError(f"more than one column {name!r}: {both}, {where}")
        if at:
            found[name] = at[0]
    if "date" not in found:
        raise InputError(f"no column date{_it_has(names)}, {where}")
    return found


def _are_numbers(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column.dtype)


def _is_counter(column: pd.Series) -> bool:
    """Rows that are numbered, as an index written to a file is."""
    if pd.api.types.is_float_dtype(column.dtype) or pd.api.types.is_integer_dtype(column.dtype):
        numbers = column.to_numpy(np.float64, na_value=np.nan)
    elif pd.api.types.is_object_dtype(column.dtype) or pd.api.types.is_string_dtype(column.dtype):
        ends = (str(column.iloc[0]).strip(), str(column.iloc[-1]).strip())
        if not all(_COUNTER.fullmatch(end) for end in ends):
            return False
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    else:
        return False
    return abs(numbers[0]) <= 1 and bool((np.diff(numbers) == 1).all())


def _dates_of_unnamed(frame: pd.DataFrame, keys: Sequence[str], at: list[int]) -> list[int]:
    """Of two index levels without a name, those of times."""
    if not all(keys[i].startswith("indexlevel") for i in at):
        return at
    return [i for i in at if pd.api.types.is_datetime64_any_dtype(frame.dtypes.iloc[i])] or at


def _are_times(column: pd.Series) -> bool:
    cells = column.astype(str).str.strip()
    return bool(cells.str.fullmatch(r"0|\d{6}|\d{1,2}:\d\d(:\d\d(\.\d+)?)?").all())


def _with_time(date: pd.Series, time: pd.Series) -> pd.Series:
    """Midnights are dates."""
    cells = time.astype(str).str.strip()
    midnight = cells.str.fullmatch(r"[0:.]+")
    return date if midnight.all() else date.astype(str).str.strip() + " " + cells


def _has_adjusted_alone(found: dict[str, int]) -> bool:
    adjusted = all(f"adj_{name}" in found for name in PRICES)
    return adjusted and not all(name in found for name in PRICES)


def _require(
    found: dict[str, int], prices: Sequence[str], names: Sequence[str], where: str
) -> None:
    missing = [name for name in prices if name not in found]
    if missing:
        raise InputError(f"no column {', '.join(missing)}{_it_has(names)}, {where}")


def _it_has(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name.strip())[:30] or "''" for name in names[:12])
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f" (bars need date, open, high, low, close; there are {shown}{more})"


def _tell_unused(
    frame: pd.DataFrame, unused: Sequence[int], found: dict[str, int], where: str
) -> None:
    """Raises InputError for a column of adjustments that is not understood, unless it is empty."""
    told = []
    for at in unused:
        name, column = str(frame.columns[at]).strip(), frame.iloc[:, at]
        if not name and _is_empty(column):
            continue
        known = canonical(name)
        understood = known in found and (not known.startswith("adj_") or "adj_close" in found)
        speaks = _ADJUSTMENT.search(key(name)) and not _UNADJUSTED.fullmatch(key(name))
        if speaks and not understood and not _is_empty(column):
            raise InputError(
                f"column {name!r} looks like an adjustment, a split or a dividend and is not "
                f"understood: rename it or take it out, {where}"
            )
        told.append(name)
    tell_unused(told, where)


def tell_unused(names: Sequence[str], where: str) -> None:
    """One line on the log, where there are any."""
    if names:
        told = ", ".join(printable(name)[:60] or "''" for name in names[:20])
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        _LOG.warning("columns that are not used: %s%s, %s", told, more, where)


def _is_empty(column: pd.Series) -> bool:
    """Nothing in it, or only zeros."""
    cells = column.astype(object).where(column.notna(), "").astype(str).str.strip().str.lower()
    return bool((cells.isin(MISSING) | cells.str.fullmatch(r"0+(\.0*)?")).all())


def with_decimal_points(frame: pd.DataFrame, names: Sequence[str], where: str) -> pd.DataFrame:
    """`frame` with decimal commas as points in the columns of numbers, `names`.

    A comma is decimal where cells are separated by something else. Raises InputError for a point
    among them, which would separate thousands, and for commas that three digits follow each beside
    numbers of up to three digits without one: thousands, as likely.
    """
    if not frame.attrs.get("decimal_comma"):
        return frame
    cells = {name: frame[name].astype(str) for name in names if name in frame}
    if not any(column.str.contains(",", regex=False).any() for column in cells.values()):
        return frame
    for name, column in cells.items():
        points = column.str.contains(".", regex=False) & ~column.str.strip().str.lower().isin(
            MISSING
        )
        refuse(frame, points.to_numpy(), "has a point among decimal commas", name, where)
        bare = column.str.strip()
        thousands = bare.str.fullmatch(r"[1-9]\d{0,2}(,\d{3})+")
        others = ~bare.str.lower().isin(MISSING) & ~thousands
        if thousands.any() and others.any() and bare[others].str.fullmatch(r"\d{1,3}").all():
            what = "is a decimal comma or thousands, which can't be told"
            refuse(frame, thousands.to_numpy(), what, name, where)
    changed = frame.assign(
        **{name: column.str.replace(",", ".", regex=False) for name, column in cells.items()}
    )
    changed.attrs = frame.attrs
    return changed
