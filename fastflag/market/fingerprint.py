"""What a run was trained on, in a few characters: so that a file that moved is known again."""

import hashlib

import numpy as np

from fastflag.market.bars import MARKET_COLUMNS, Market


def fingerprint(market: Market, symbol: str, days: range) -> str:
    """sha256, in hex, of all that training on `days` could read of `symbol` (empty: the only one):
    its bars, splits and dividends up to the last of them, and the news available by its close.

    Files' names and formats, later days and other symbols' bars leave it as it is. Raises
    InputError for an unknown symbol.
    """
    column = market.column(symbol)
    values = np.stack([getattr(market, name)[: days.stop, column] for name in MARKET_COLUMNS])
    values = np.where(np.isnan(values), np.nan, values)  # NaN has many bit patterns
    dates = market.dates[: days.stop].astype("datetime64[D]").astype(np.int64)
    digest = hashlib.sha256(dates.tobytes() + np.ascontiguousarray(values).tobytes())
    known = ("", market.symbols[column])
    for item in market.news:
        if item.symbol in known and item.available <= market.closes[days[-1]]:
            told = (str(item.published), str(item.available), item.text)
            digest.update(repr(told).encode())
    return digest.hexdigest()
