"""A made-up market with a pattern that can be learnt: the positive control of a training.

What is planted: at the close of day t a headline is read that says rise or fall, and day t + 1 goes
that way with probability (1 + edge) / 2. A day's return is 0.0003 + or - a size that is uniform
between 1% and 2%, all of it between the open, which is the close before, and the close; so an order
at the next open earns it whole. Prices tell nothing, nor does a second headline of each day, which
is neutral. Holding 1 after "rise" and -1 after "fall" earns edge x 1.5% a day on average, always
holding 1 earns 0.03%. With edge 0 the headlines tell nothing: the placebo.

Random numbers are counted, and prices are products: a market is the same to the bit on every
machine, and a longer one begins as a shorter one does.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastflag.config.fields import Range
from fastflag.files import InputError
from fastflag.market.bars import Market, News
from fastflag.market.simulator import uniform

DRIFT, LEAST, MOST = 0.0003, 0.01, 0.02
SYMBOL = "PLANTED"
RISES = (
    "Profit beats every forecast",
    "Orders jump to a record",
    "Regulator clears the merger",
    "Guidance raised for the year",
    "Analysts upgrade the shares",
    "Dividend doubled after strong sales",
    "Rival withdraws from the market",
    "New plant opens ahead of plan",
)
FALLS = (
    "Loss widens on weak demand",
    "Factory fire halts output",
    "Regulator opens a fraud inquiry",
    "Guidance cut for the year",
    "Analysts downgrade the shares",
    "Chief executive quits suddenly",
    "Largest customer cancels contract",
    "Recall ordered after defects",
)
NEUTRAL = (
    "Annual meeting set for spring",
    "Office moves to a new address",
    "Sponsor of the city marathon",
    "Company marks its anniversary",
)
_FIRST_DAY = "2001-01-01"
_TOLD_AT = np.timedelta64(15 * 3600, "s")  # an hour before the close
_NUMBERS_A_DAY = 6


@dataclass(frozen=True)
class Planted:
    """What `planted:` can be told."""

    days: int = 500
    edge: float = 1.0
    seed: int = 0


_RANGES = {
    "days": Range(at_least=2, at_most=10_000),
    "edge": Range(at_least=0, at_most=1),
    "seed": Range(at_least=0, at_most=10**12),
}


def parse_planted(text: str) -> Planted:
    """ "days=400,edge=0.5,seed=1", each of which may be left out. Raises InputError."""
    where, found = f"planted:{text}", Planted()
    names: list[str] = []
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in _RANGES or name in names:
            wrong = "given twice" if name in names else f"not one of {', '.join(_RANGES)}"
            raise InputError(f"{name!r} is {wrong}, {where}")
        names.append(name)
        found = replace(found, **{name: _number(name, value, where)})
    return found


def _number(name: str, text: str, where: str) -> Any:
    kind = type(getattr(Planted(), name))
    try:
        value = kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise InputError(f"{name} must be {expected}, not {text!r}, {where}") from None
    if value not in _RANGES[name]:
        raise InputError(f"{name} must be {_RANGES[name]}, not {text}, {where}")
    return value


def planted_market(planted: Planted) -> Market:
    """The market that the module's text describes."""
    days = planted.days
    rises, size, true, phrase, neutral, order = _numbers(planted)
    up = rises < 0.5
    returns = np.where(up, 1, -1) * (LEAST + (MOST - LEAST) * size) + DRIFT
    # Day t's numbers are those of the return that its headline tells, which is the next day's.
    close = 100 * np.cumprod(np.concatenate([[1.0], 1 + returns[:-1]]))
    opened = np.concatenate([[100.0], close[:-1]])
    dates = np.busday_offset(_FIRST_DAY, np.arange(days)).astype("datetime64[D]")
    says_up = up == (true < (1 + planted.edge) / 2)
    news = []
    for t, moment in enumerate(dates.astype("datetime64[s]") + _TOLD_AT):
        texts = [_of(RISES if says_up[t] else FALLS, phrase[t]), _of(NEUTRAL, neutral[t])]
        for text in texts if order[t] < 0.5 else texts[::-1]:
            news.append(News(published=moment, available=moment, symbol="", text=text))
    return Market(
        dates=dates,
        symbols=(SYMBOL,),
        open=opened[:, None],
        high=np.maximum(opened, close)[:, None],
        low=np.minimum(opened, close)[:, None],
        close=close[:, None],
        volume=np.full((days, 1), 1e6),
        split=np.ones((days, 1)),
        dividend=np.zeros((days, 1)),
        news=tuple(news),
    )


def _numbers(planted: Planted) -> np.ndarray:
    """Numbers in [0, 1) [6, T]. The seed is hashed, apart from the seeds of runs: neighbouring
    seeds, and a run of the same seed, share none."""
    hashed = np.random.SeedSequence(planted.seed, spawn_key=(1,)).generate_state(1, np.uint64)[0]
    of_days = np.arange(planted.days)
    return np.stack([uniform(int(hashed >> 16), of_days, n) for n in range(_NUMBERS_A_DAY)])


def _of(texts: tuple[str, ...], number: float) -> str:
    return texts[int(number * len(texts))]
