"""What a market shows in numbers, each within bounds and known at its day's close. T days."""

import re
import zlib
from functools import cache
from typing import NamedTuple

import numpy as np
from gymnasium.spaces import Box

from fastflag.config import DataConfig
from fastflag.market.bars import Bars, Market
from fastflag.market.features import RETURN_BARS, forward_adjusted, indicators
from fastflag.market.periods import days_within
from fastflag.market.several import load
from fastflag.prompt.headlines import headline

NEWS_BUCKETS = 64
"""Fewer, and words that mean the opposite share one too often."""
_WORD = re.compile("[a-z]+")


class Column(NamedTuple):
    """One number of an observation."""

    name: str
    low: float
    high: float


def market_columns(news_buckets: int) -> tuple[Column, ...]:
    """Those of `market_numbers`."""
    return (
        Column("tradable", 0.0, 1.0),
        *(Column(f"return_{bars}", -4.0, 4.0) for bars in RETURN_BARS),
        Column("volatility_20", 0.0, 1.0),
        Column("rsi_14", -1.0, 1.0),
        Column("drawdown_60", -1.0, 0.0),
        *(Column(f"news_{bucket}", 0.0, 1.0) for bucket in range(news_buckets)),
    )


def market_numbers(market: Market, news_buckets: int) -> np.ndarray:
    """Of a market of one symbol, [T, F] float32; 0 where history is too short.

    tradable
        1 where the day has a bar.
    return_1, return_5, return_20
        In standard deviations of as many days: over volatility_20 x sqrt(days).
    volatility_20, rsi_14, drawdown_60
        As `features.indicators` has them; volatility in tenths, the index as -1..1.
    news_0, ...
        1 where a word of a headline that came after the last close and by this one has the bucket:
        the CRC-32 of the word in small letters, modulo their number.
    """
    (symbol,) = market.symbols
    bars = Bars.from_market(market, symbol)
    close = np.where(bars.tradable, bars.close, np.nan)
    known = indicators(
        forward_adjusted(close, bars.split), forward_adjusted(market.high[:, 0], bars.split)
    )
    deviation = np.where(known["volatility_20"] > 0, known["volatility_20"], np.nan)
    numbers = [bars.tradable.astype(np.float64)]
    numbers += [known[f"return_{n}"] / (deviation * np.sqrt(n)) for n in RETURN_BARS]
    numbers += [10 * known["volatility_20"], known["rsi_14"] / 50 - 1, known["drawdown_60"]]
    news = _news_of_days(market, symbol, news_buckets)
    whole = np.column_stack([*numbers, news])
    low, high = bounds(market_columns(news_buckets))
    return np.clip(np.where(np.isnan(whole), 0.0, whole), low, high).astype(np.float32)


@cache
def bounds(columns: tuple[Column, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(lows, highs) [F] float32."""
    _, low, high = zip(*columns, strict=True)
    return np.array(low, np.float32), np.array(high, np.float32)


def box_of(columns: tuple[Column, ...]) -> Box:
    return Box(*bounds(columns), dtype=np.float32)


def market_of(market: Market | str) -> Market:
    """A market, or that of a data source, as `--data` names it, with all its symbols."""
    if isinstance(market, str):
        return load(DataConfig(data=market, symbols="all"))
    return market


def days_in(market: Market, period: str) -> range:
    """Those of a period "A..B"; with none, all."""
    return days_within(market, period) if period else range(len(market.dates))


def _news_of_days(market: Market, symbol: str, buckets: int) -> np.ndarray:
    """[T, buckets] bool"""
    found = np.zeros((len(market.dates), buckets), bool)
    items = [item for item in market.news if item.symbol in ("", symbol)] if buckets else []
    available = np.array([item.available for item in items], "datetime64[s]")
    days = np.searchsorted(market.closes, available)
    for day, item in zip(days.tolist(), items, strict=True):
        if day < len(found):
            words = _WORD.findall(headline(item.text).lower())
            found[day, [zlib.crc32(word.encode()) % buckets for word in words]] = True
    return found
