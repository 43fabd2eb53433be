"""The fingerprint of what was trained on: what it must see, and what it must not."""

import dataclasses

import numpy as np
import pytest
from small import holey_market, small_market

from fastflag.files import InputError
from fastflag.market.fingerprint import fingerprint

DAYS = range(4, 24)
COLUMNS = ("open", "high", "low", "close", "volume", "split", "dividend")


def of(market, symbol=""):
    return fingerprint(market, symbol, DAYS)


def changed(market, name, day, factor):
    column = getattr(market, name).copy()
    column[day] = column[day] * factor + 0.001 * (factor - 1)
    return dataclasses.replace(market, **{name: column})


@pytest.mark.parametrize("name", COLUMNS)
def test_every_number_up_to_the_last_training_day_counts_and_none_later(name):
    market = small_market()
    factor = 0.9999 if name == "low" else 1.0001
    if name in ("open", "close"):  # within the day's range, whichever way
        wide = {"high": market.high * 1.01, "low": market.low * 0.99}
        market = dataclasses.replace(market, **wide)
    for day in (0, 4, 23):
        assert of(changed(market, name, day, factor)) != of(market), day
    for day in (24, 39):
        assert of(changed(market, name, day, factor)) == of(market), day


def test_news_counts_where_training_could_have_read_it():
    market = small_market()
    first, later = market.news[0], [n for n in market.news if n.available > market.closes[23]]
    rest = market.news[1:]

    def with_news(*news):
        return dataclasses.replace(market, news=tuple(sorted(news, key=lambda n: n.available)))

    assert of(with_news(*rest)) != of(market)
    assert of(with_news(dataclasses.replace(first, text="other"), *rest)) != of(market)
    assert of(with_news(*(n for n in market.news if n not in later))) == of(market)
    elsewhere = dataclasses.replace(first, symbol="ANOTHER", text="other")
    assert of(with_news(elsewhere, *market.news)) == of(market)
    own = dataclasses.replace(first, symbol="PLANTED")
    assert of(with_news(own, *rest)) == of(market)


def test_a_day_less_or_a_missing_bar_is_another_market():
    market = small_market()
    columns = {name: getattr(market, name)[1:] for name in COLUMNS}
    assert of(dataclasses.replace(market, dates=market.dates[1:], **columns)) != of(market)
    assert of(holey_market()) != of(market)


def test_days_and_bars_of_another_symbol_do_not_count():
    """A file of two symbols has the days of both."""
    market = holey_market()
    extra = np.datetime64("2001-01-06")  # a Saturday
    place = int(np.searchsorted(market.dates, extra))

    def joined(name, missing):
        ours = np.insert(getattr(market, name)[:, 0], place, missing)
        return np.stack([np.full(len(ours), 7.0), ours], 1)

    prices = {name: joined(name, np.nan) for name in COLUMNS[:5]}
    others = {name: joined(name, unit) for name, unit in (("split", 1.0), ("dividend", 0.0))}
    others["split"][:, 0], others["dividend"][:, 0] = 1.0, 0.0
    dates = np.insert(market.dates, place, extra)
    both = dataclasses.replace(
        market, dates=dates, symbols=("A", "PLANTED"), news=(), **prices, **others
    )
    days = range(DAYS.start + 1, DAYS.stop + 1)
    alone = dataclasses.replace(market, news=())
    days = range(days.start, days.stop - 1)  # those of the symbol alone
    assert fingerprint(both.of("PLANTED"), "PLANTED", days) == of(alone)
    with pytest.raises(InputError, match="unknown symbol"):
        fingerprint(both, "B", days)
