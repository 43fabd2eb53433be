"""Files that have a column for every symbol and price -> a row for every symbol and date.

So yfinance writes them: two rows of names, prices and tickers in either order, and where the dates
have a name a third row with it; and so they look when the two names are joined to one (Close_AAPL,
AAPL.Close, "('Close', 'AAPL')").
"""

import re
from collections.abc import Sequence

import pandas as pd

from fastflag.files import InputError
from fastflag.market.bars import PRICES
from fastflag.market.cells import MISSING
from fastflag.market.columns import canonical, key

_CORNERS = ("price", "ticker", "tickers", "symbol", "symbols", "attributes", "date", "datetime", "")
_PAIR = re.compile(r"\(\s*'([^']*)',\s*'([^']*)'\s*\)")
_FIELDS = (*PRICES, "volume", "adj_close", "split", "dividend")


def long_rows(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """`frame` with a row for every symbol and date, or as it is where it has them so.

    Of several symbols, a row without a single cell of a symbol's is none of its rows: joined files
    have them. Raises InputError where two columns are the same price of one symbol.
    """
    names = [str(name).strip() for name in frame.columns]
    pairs = _two_rows(frame, names)
    if pairs is not None:
        frame = frame.iloc[1:]
        if len(frame) and _names_dates(frame.iloc[0]):
            frame = frame.iloc[1:]
        if not len(frame):
            raise InputError(f"no rows, {where}")
    else:
        pairs = _joined(names)
    if pairs is None:
        return frame
    return _stacked(frame, names, pairs, where)


def _two_rows(frame: pd.DataFrame, names: Sequence[str]) -> list[tuple[str, str]] | None:
    """Each column's (price, ticker) of a file whose second row has names too; None of others."""
    second = [str(cell).strip() for cell in frame.iloc[0]]
    if not {key(names[0]), key(second[0])} <= set(_CORNERS):
        return None
    first = [re.sub(r"\.\d+$", "", name) for name in names]  # pandas numbers those that repeat
    fields, tickers = (first, second) if _has_prices(first) else (second, first)
    if not _has_prices(fields):
        return None
    if key(second[0]) not in ("ticker", "tickers", "symbol", "symbols"):
        cells = [
            own for field, own in zip(fields, tickers, strict=True) if canonical(field) in PRICES
        ]
        if any(cell.lower() in MISSING or _is_number(cell) for cell in cells):
            return None
    return list(zip(fields, tickers, strict=True))


def _has_prices(names: Sequence[str]) -> bool:
    return set(PRICES) <= {canonical(name) for name in names}


def _names_dates(row: pd.Series) -> bool:
    cells = [str(cell).strip() for cell in row]
    return not any(cells[1:]) and not any(letter.isdigit() for letter in cells[0])


def _joined(names: Sequence[str]) -> list[tuple[str, str]] | None:
    """Each column's (price, ticker), ("", "") of columns that are both or neither."""
    if _has_prices(names):
        return None
    pairs = [_parted(name) for name in names]
    found: dict[str, set[str]] = {}
    for field, ticker in pairs:
        found.setdefault(ticker, set()).add(canonical(field))
    return pairs if any(set(PRICES) <= fields for fields in found.values()) else None


def _parted(name: str) -> tuple[str, str]:
    if canonical(name):  # adj_open is no open of ADJ
        return "", ""
    if pair := _PAIR.fullmatch(name):
        sides = [(pair[1], pair[2])]
    else:
        cuts = [cut.start() for cut in re.finditer(r"[_.:| ]", name)]
        sides = [(name[:cut], name[cut + 1 :]) for cut in cuts]
    either = [side for pair in sides for side in (pair, pair[::-1])]
    # "AAPL_Adj Close" ends in "Close" too; single letters may belong to a ticker (BRK_C).
    fields = [
        (field, ticker)
        for field, ticker in either
        if canonical(field) in _FIELDS and len(key(field)) > 1 and ticker.strip()
    ]
    return max(fields, key=lambda each: len(each[0]), default=("", ""))


def _stacked(
    frame: pd.DataFrame, names: Sequence[str], pairs: Sequence[tuple[str, str]], where: str
) -> pd.DataFrame:
    fields = [field if canonical(field) in _FIELDS else "" for field, _ in pairs]
    tickers = [ticker if field else "" for field, (_, ticker) in zip(fields, pairs, strict=True)]
    own = [at for at, field in enumerate(fields) if not field or not tickers[at]]
    shared = {at: _shared_name(names[at], pairs[at], at) for at in own}
    parts = []
    symbols = [each for each in dict.fromkeys(tickers) if each]
    for symbol in symbols:
        columns = [at for at, ticker in enumerate(tickers) if ticker == symbol]
        chosen = [fields[at] for at in columns]
        for field in chosen:
            if chosen.count(field) > 1:
                raise InputError(f"more than one column {field!r} of {symbol!r}, {where}")
        cells = frame.iloc[:, columns].set_axis(chosen, axis=1)
        if len(symbols) > 1:
            empty = cells.astype(object).where(cells.notna(), "").astype(str)
            filled = ~empty.apply(lambda column: column.str.strip().str.lower().isin(MISSING))
            cells = cells[filled.any(axis=1)]
        rest = frame.iloc[:, own].set_axis([shared[at] for at in own], axis=1).loc[cells.index]
        parts.append(pd.concat([rest, cells], axis=1).assign(symbol=symbol))
    result = pd.concat(parts)
    result.index.name, result.attrs = frame.index.name, frame.attrs
    return result


def _shared_name(name: str, pair: tuple[str, str], at: int) -> str:
    """The corner of a table of two names is above its dates."""
    if at == 0 and key(name) in _CORNERS and canonical(name) != "date":
        return "date"
    return pair[0] if canonical(pair[0]) == "date" else name


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
