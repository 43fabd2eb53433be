"""A market whose news tells the next day's direction: the positive control. What learns at all
learns it, and what learns it when the news is shuffled looks ahead.
"""

import inspect
from dataclasses import replace
from typing import Any

import numpy as np

from fastflag.files import InputError
from fastflag.market.bars import MARKET_COLUMNS, Market, News

_NAME = "PLANTED"
_MOST_DAYS, _MOST_SYMBOLS = 20_000, 500
NEWS_TIME = np.timedelta64(15 * 3600, "s")
"""Of day, at which every headline is available."""
_RISES = (
    "Profit beats every forecast",
    "Orders jump to a record",
    "Regulator clears the merger",
    "Guidance raised for the year",
    "Analysts upgrade the shares",
    "Dividend doubled after strong sales",
    "Rival withdraws from the market",
    "New plant opens ahead of plan",
)
_FALLS = (
    "Loss widens on weak demand",
    "Factory fire halts output",
    "Regulator opens a fraud inquiry",
    "Guidance cut for the year",
    "Analysts downgrade the shares",
    "Chief executive quits suddenly",
    "Largest customer cancels contract",
    "Recall ordered after defects",
)
_NEUTRAL = (
    "Annual meeting set for spring",
    "Office moves to a new address",
    "Sponsor of the city marathon",
    "Company marks its anniversary",
)


def planted_market(
    days: int = 640, seed: int = 0, shuffled: bool = False, drift: float = 0.001, symbols: int = 1
) -> Market:
    """Every close brings one telling headline and one neutral one; the next day goes that way by
    1% to 2% (log returns, to which `drift` a day is added). With `shuffled` the headlines are dealt
    to days at random and tell nothing. Several `symbols` know nothing of one another. Raises
    InputError where prices leave a Market's range."""
    names = [_NAME, *(f"{_NAME}{number}" for number in range(2, symbols + 1))]
    seeds = [seed, *([seed, number] for number in range(1, symbols))]
    each = [
        _one(name, days, np.random.default_rng(of_one), shuffled, drift)
        for name, of_one in zip(names, seeds, strict=True)
    ]
    if symbols == 1:
        return each[0]
    joined: dict[str, Any] = {
        column: np.concatenate([getattr(market, column) for market in each], axis=1)
        for column in MARKET_COLUMNS
    }
    named = (
        replace(item, symbol=name)
        for name, market in zip(names, each, strict=True)
        for item in market.news
    )
    news = sorted(named, key=lambda item: item.available)
    return Market(each[0].dates, tuple(names), **joined, news=tuple(news))


def _one(name: str, days: int, random: np.random.Generator, shuffled: bool, drift: float) -> Market:
    up = random.random(days) < 0.5
    size = random.uniform(0.01, 0.02, days)
    returns = np.concatenate([[0.0], (np.where(up, size, -size) + drift)[:-1]])
    with np.errstate(over="ignore"):  # the Market refuses what is too large or small
        close = 100 * np.exp(np.cumsum(returns))
    opened = np.concatenate([[100.0], close[:-1]])
    dates = np.busday_offset(np.datetime64("2001-01-01", "D"), np.arange(days)).astype(
        "datetime64[D]"
    )
    telling = random.permutation(up) if shuffled else up
    news = []
    for day, rises in zip(dates, telling, strict=True):
        told = random.choice(_RISES if rises else _FALLS)
        moment = day.astype("datetime64[s]") + NEWS_TIME
        for text in random.permutation([told, random.choice(_NEUTRAL)]):
            news.append(News(published=moment, available=moment, symbol="", text=str(text)))

    def column(values: np.ndarray) -> np.ndarray:
        return np.asarray(values, float)[:, None]

    return Market(
        dates=dates,
        symbols=(name,),
        open=column(opened),
        high=column(np.maximum(opened, close)),
        low=column(np.minimum(opened, close)),
        close=column(close),
        volume=np.full((days, 1), 1e6),
        split=np.ones((days, 1)),
        dividend=np.zeros((days, 1)),
        news=tuple(news),
    )


def read_planted(text: str) -> Market:
    """`planted_market` by the text of a data source, NAME=VALUE between commas, as in
    days=640,seed=0,shuffled=no,drift=0.001,symbols=1: those that are left out have these values.

    Raises InputError for another name and a value that does not fit.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(planted_market).parameters.items()
    }
    chosen: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name in chosen:
            raise InputError(f"{name} is there twice, planted:{text}")
        if name not in defaults:
            raise InputError(f"unknown {name!r} (known: {', '.join(defaults)}), planted:{text}")
        try:
            chosen[name] = _parsed(value, type(defaults[name]))
        except ValueError:
            raise InputError(f"{name} can't be {value!r}, planted:{text}") from None
    if not 2 <= chosen.get("days", 2) <= _MOST_DAYS:
        raise InputError(f"days must be at least 2 and at most {_MOST_DAYS:,}, planted:{text}")
    if not 1 <= chosen.get("symbols", 1) <= _MOST_SYMBOLS:
        raise InputError(f"symbols must be at least 1 and at most {_MOST_SYMBOLS}, planted:{text}")
    try:
        return planted_market(**chosen)
    except InputError as error:
        told = f"{error}: so many days need a smaller drift"
        raise InputError(f"{told}, planted:{text}") from None


def _parsed(value: str, kind: type) -> Any:
    """Raises ValueError for a value of another kind or range."""
    if kind is bool:
        return ("no", "yes").index(value) == 1
    number = kind(value)
    if not (-0.1 <= number <= 0.1 if kind is float else number >= 0):
        raise ValueError
    return number
