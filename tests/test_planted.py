"""The positive control as a data source."""

import warnings

import numpy as np
import pytest

from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market.planted import _FALLS, _RISES, planted_market
from fastflag.market.sources import load


def told_and_came(market):
    """Of each day but the last: whether its telling headline is of rises, and whether the next
    close is above the drift."""
    told = []
    for date in market.dates:
        texts = [
            item.text for item in market.news if item.available.astype("datetime64[D]") == date
        ]
        (telling,) = {*texts} & {*_RISES, *_FALLS}
        told.append(telling in _RISES)
    return np.array(told[:-1]), np.diff(np.log(market.close[:, 0])) > 0.001


def test_the_days_headline_tells_the_next_day():
    market = load(DataConfig(data="planted:days=200,seed=3"))
    told, came = told_and_came(market)
    assert (told == came).all() and 0.3 < told.mean() < 0.7
    moves = np.abs(np.diff(np.log(market.close[:, 0])) - 0.001)
    assert moves.min() >= 0.01 and moves.max() <= 0.02
    assert (market.open[1:] == market.close[:-1]).all()
    read = [item.available for item in market.news]
    assert all(at < close for at, close in zip(read[::2], market.closes, strict=True))


def test_shuffled_headlines_tell_nothing():
    told, came = told_and_came(load(DataConfig(data="planted:days=2000,seed=3,shuffled=yes")))
    assert abs((told == came).mean() - 0.5) < 0.04


def test_what_is_left_out_has_its_default():
    whole, named = load(DataConfig(data="planted:")), planted_market(640, 0, False, 0.001)
    assert whole.close.tobytes() == named.close.tobytes() and whole.news == named.news
    other = load(DataConfig(data="planted:drift=0.0003"))
    rise = np.log(other.close[-1, 0]) - np.log(whole.close[-1, 0])
    assert rise == pytest.approx(-0.0007 * 639)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("day=3", "unknown 'day' (known: days, seed, shuffled, drift, symbols), planted:day=3"),
        ("days=5,days=6", "days is there twice, planted:days=5,days=6"),
        ("days=x", "days can't be 'x', planted:days=x"),
        ("days=", "days can't be ''"),
        ("days=-5", "days can't be '-5'"),
        ("days=1", "days must be at least 2 and at most 20,000"),
        ("days=99999999", "days must be at least 2"),
        ("shuffled=true", "shuffled can't be 'true'"),
        ("drift=nan", "drift can't be 'nan'"),
        ("drift=1", "drift can't be '1'"),
        ("seed", "seed can't be ''"),
        ("drift=0.1,days=20000", "so many days need a smaller drift, planted:drift=0.1,days=20000"),
        ("drift=-0.1,days=20000", "so many days need a smaller drift"),
        ("drift=0.1,days=400", "so many days need a smaller drift"),
    ],
)
def test_what_does_not_fit_is_refused(text, told):
    with warnings.catch_warnings(), pytest.raises(InputError) as error:
        warnings.simplefilter("error")
        load(DataConfig(data=f"planted:{text}"))
    assert told in str(error.value)


@pytest.mark.parametrize("close", ["14:59:59", "09:30"])
def test_a_close_before_the_news_is_refused(close):
    """The headlines would be read a day late, and tell nothing."""
    with pytest.raises(InputError, match=f"news at 15:00.*--close-time {close}"):
        load(DataConfig(data="planted:", close_time=close))
    market = load(DataConfig(data="planted:days=9", close_time="15:00"))
    assert all(item.available in market.closes for item in market.news)
