"""`planted:`: what is planted is there, is worth what it says, and nothing else is."""

import numpy as np
import oracles
import pytest

from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market.planted import FALLS, NEUTRAL, RISES, Planted, parse_planted, planted_market
from fastflag.market.sources import load


def told_rises(market):
    """Each day's telling headline, as whether it says rise: bool [T]."""
    telling = [item.text for item in market.news if item.text not in NEUTRAL]
    assert len(telling) == len(market.dates) and {*telling} <= {*RISES, *FALLS}
    return np.array([text in RISES for text in telling])


def returns(market):
    """Of the days after the first, which are what the headlines of all but the last speak of."""
    close = market.close[:, 0]
    return close[1:] / close[:-1] - 1


@pytest.mark.parametrize("edge", [0.0, 0.5, 1.0])
def test_the_pattern_is_worth_its_formula(edge):
    """E[side x return] = edge x 0.015, and of the drift as much is lost as won."""
    market = planted_market(Planted(10_000, edge, seed=1))
    side, after = np.where(told_rises(market)[:-1], 1, -1), returns(market)
    of_mean = 4 / np.sqrt(len(after))  # four standard errors, of a deviation of 1
    assert (side * after).mean() == pytest.approx(0.015 * edge, abs=0.0153 * of_mean)
    assert after.mean() == pytest.approx(0.0003, abs=0.0153 * of_mean)
    right = (side == np.sign(after)).mean()
    assert right == (1 if edge == 1 else pytest.approx((1 + edge) / 2, abs=0.5 * of_mean))
    size = np.abs(after - 0.0003)
    assert size.min() > 0.01 - 1e-12 and size.max() < 0.02
    assert size.mean() == pytest.approx(0.015, abs=0.01 / np.sqrt(12) * of_mean)


def test_nothing_else_tells_the_next_day():
    """Neither the return before, nor whether the neutral headline comes first, nor which it is."""
    market = planted_market(Planted(10_000, seed=2))
    after = returns(market)[1:]
    texts = np.array([item.text for item in market.news]).reshape(-1, 2)[1:-1]
    first = np.isin(texts[:, 0], NEUTRAL)
    which = np.where(first, texts[:, 0], texts[:, 1]) == NEUTRAL[0]
    for known in (returns(market)[:-1], first, which):
        assert abs(np.corrcoef(known, after)[0, 1]) < 4 / np.sqrt(len(after))


def test_an_order_at_the_next_open_earns_the_day_that_was_told():
    market = planted_market(Planted(50))
    assert np.array_equal(market.open[1:], market.close[:-1])
    told = np.array([item.available for item in market.news])
    assert np.array_equal(told, np.repeat(market.closes - np.timedelta64(1, "h"), 2))


def test_it_is_made_of_counted_random_numbers():
    """A twin by Python's integers and floats, to the bit, and a longer market goes on from it."""
    market = load(DataConfig("planted:days=40,edge=0.5,seed=7"))
    key = int(np.random.SeedSequence(7, spawn_key=(1,)).generate_state(1, np.uint64)[0] >> 16)
    product, says = 1.0, []
    for day in range(40):
        assert market.close[day, 0] == 100 * product
        rises, size, true, phrase, _, _ = (oracles.splitmix(key, day, n) for n in range(6))
        move = 0.01 + 0.01 * size
        product *= 1 + ((move if rises < 0.5 else -move) + 0.0003)
        says.append(((rises < 0.5) == (true < 0.75), int(8 * phrase)))
    telling = [item.text for item in market.news if item.text not in NEUTRAL]
    assert telling == [(RISES if rise else FALLS)[n] for rise, n in says]
    longer = planted_market(Planted(60, 0.5, 7))
    assert np.array_equal(longer.close[:40], market.close) and longer.news[:80] == market.news


def test_seeds_share_no_days():
    """A counted number is of seed + day: neighbours would be one market, a day apart."""
    one, other = (planted_market(Planted(1000, seed=seed)) for seed in (0, 1))
    moves = [returns(market) for market in (one, other)]
    for apart in range(3):
        pair = moves[0][apart:], moves[1][: 999 - apart]
        assert abs(np.corrcoef(*pair)[0, 1]) < 0.15


def test_what_is_left_out_has_a_default():
    assert parse_planted("") == Planted(500, 1.0, 0)
    assert parse_planted("seed=3,days=60") == Planted(60, 1.0, 3)
    assert load(DataConfig("planted:")).symbols == ("PLANTED",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("days=4,egde=1", "'egde' is not one of days, edge, seed, planted:days=4,egde=1"),
        ("days=4,days=5", "'days' is given twice, planted:days=4,days=5"),
        ("days", "days must be a whole number, not '', planted:days"),
        ("days=1.5", "days must be a whole number, not '1.5', planted:days=1.5"),
        ("days=1", "days must be at least 2 and at most 10,000, not 1, planted:days=1"),
        ("edge=nan", "edge must be at least 0 and at most 1, not nan, planted:edge=nan"),
        ("edge=high", "edge must be a number, not 'high', planted:edge=high"),
        ("seed=-1", "seed must be at least 0 and at most 1,000,000,000,000, not -1, "),
    ],
)
def test_what_is_not_understood_is_refused(text, told):
    with pytest.raises(InputError) as refused:
        load(DataConfig(f"planted:{text}"))
    assert str(refused.value).startswith(told) and "\n" not in str(refused.value)


def test_news_of_a_file_is_added(tmp_path):
    (tmp_path / "more.csv").write_text(
        "published,available,symbol,text\n2001-01-01 09:00,2001-01-01 09:00,PLANTED,Strike\n"
    )
    market = load(DataConfig("planted:days=5", news=str(tmp_path / "more.csv")))
    assert [item.text for item in market.news].count("Strike") == 1 and len(market.news) == 11
