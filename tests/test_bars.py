import dataclasses

import numpy as np
import pytest

from fastflag.files import InputError
from fastflag.market.bars import Hours, Market, News
from fastflag.market.periods import parse_period, split_days


def market(
    days: int = 10, symbols: tuple[str, ...] = ("A", "B"), start: str = "2024-01-01", **changes
):
    """Weekdays of quiet bars; `changes` replace whole arrays."""
    dates = np.busday_offset(start, np.arange(days), roll="forward")
    shape = (days, len(symbols))
    arrays = {name: np.full(shape, 10.0) for name in ("open", "high", "low", "close", "volume")}
    arrays |= {"split": np.ones(shape), "dividend": np.zeros(shape)}
    return Market(**{"dates": dates, "symbols": symbols, **arrays, **changes})


def changed(name: str, value: float) -> dict[str, np.ndarray]:
    array = getattr(market(), name).copy()
    array[3, 1] = value
    return {name: array}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (changed("open", 0.0), "open is not above 0, B 2024-01-04"),
        (changed("close", -1.0), "close is not above 0, B 2024-01-04"),
        (changed("close", np.inf), "close is infinite, B 2024-01-04"),
        (changed("high", 9.0), "high is below open or close, B 2024-01-04"),
        (changed("low", 11.0), "low is above open or close, B 2024-01-04"),
        (changed("volume", -1.0), "volume is below 0, B 2024-01-04"),
        (changed("split", 0.0), "split is not above 0, B 2024-01-04"),
        (changed("split", np.nan), "split is not above 0, B 2024-01-04"),
        (changed("dividend", -0.1), "dividend is below 0, B 2024-01-04"),
        ({"close": np.ones((10, 1))}, r"close is float64 \[10, 1\], not float64 \[10, 2\], market"),
        ({"close": np.ones((10, 2), np.float32)}, "close is float32"),
        ({"symbols": ()}, "no bars, market of 10 days and 0 symbols"),
        (
            {"dates": np.roll(market().dates, 1)},
            "dates not strictly increasing, 2024-01-12 before 2024-01-01",
        ),
        (
            {"dates": np.repeat(market().dates[::2], 2)},
            "dates not strictly increasing, 2024-01-01 before 2024-01-01",
        ),
    ],
)
def test_refused(changes, message):
    with pytest.raises(InputError, match=message):
        market(**changes)


def test_news_must_be_sorted():
    early, late = (np.datetime64(f"2024-01-0{day}T12:00:00") for day in (2, 3))
    news = (News(late, late, "", "later"), News(early, early, "", "earlier"))
    with pytest.raises(InputError, match="not sorted by its available time"):
        market(news=news)
    assert market(news=news[::-1]).news[0].text == "earlier"


def test_a_missing_bar_is_not_an_error():
    bar = {name: changed(name, np.nan)[name] for name in ("open", "high", "low", "close", "volume")}
    assert np.isnan(market(**bar).close[3, 1])
    # Half a bar is not tradable, but what is there is still checked.
    assert np.isfinite(market(**changed("open", np.nan)).close[3, 1])
    with pytest.raises(InputError, match="high is below low"):
        market(**changed("open", np.nan) | changed("close", np.nan) | changed("high", 9.0))


def test_closes():
    stock = market(5)
    assert stock.closes[0] == np.datetime64("2024-01-01T16:00:00")
    weekend = dataclasses.replace(stock, dates=np.arange("2024-01-03", "2024-01-08", dtype="M8[D]"))
    assert weekend.closes[0] == np.datetime64("2024-01-03T23:59:59")
    assert weekend.closes.dtype == "datetime64[s]"


def test_hours_that_are_told():
    told = market(hours=Hours("crypto"))
    assert (told.calendar, told.closes[0]) == ("crypto", np.datetime64("2024-01-01T23:59:59"))
    told = market(hours=Hours(close=np.timedelta64(0, "s")))
    assert (told.calendar, told.closes[1]) == ("stock", np.datetime64("2024-01-02T00:00:00"))


def test_of_one_symbol():
    """A stock with an empty row of its own, beside a later coin that is traded every day."""
    dates = np.arange("2024-01-01", "2024-01-29", dtype="datetime64[D]")
    stock = np.isin(dates, np.busday_offset(dates[0], np.arange(20)))
    prices = np.outer(np.arange(1.0, 29.0), [1.0, 100.0])
    prices[~stock, 0] = prices[:10, 1] = np.nan
    prices[2, 0] = np.nan
    rows = np.stack([stock, dates > dates[9]], axis=1)
    split = np.ones((28, 2))
    split[20, 1] = 2.0  # on a Sunday
    arrays = dict.fromkeys(("open", "high", "low", "close", "volume"), prices)
    news = (News(np.datetime64("2024-01-02T12"), np.datetime64("2024-01-02T12"), "COIN", "up"),)
    both = Market(
        dates, ("STOCK", "COIN"), **arrays, split=split, dividend=0 * split, news=news, rows=rows
    )
    assert both.calendar == "crypto"
    alone = both.of("STOCK")
    assert (alone.symbols, alone.calendar, alone.news) == (("STOCK",), "stock", news)
    np.testing.assert_array_equal(alone.dates, dates[stock])
    np.testing.assert_array_equal(alone.close, prices[stock, :1])
    assert np.isnan(alone.close[2, 0]) and (alone.split == 1).all()
    assert alone.first_bars == {"STOCK": dates[0], "COIN": dates[10]}
    assert alone.of().first_bars == alone.first_bars
    coin = both.of("COIN")
    assert (coin.calendar, len(coin.dates), coin.split[10, 0]) == ("crypto", 18, 2.0)
    assert coin.first_bars == {"COIN": dates[10], "STOCK": dates[0]}
    with pytest.raises(InputError, match="no symbol chosen of STOCK, COIN"):
        both.of()


def test_column():
    assert market().column("B") == 1
    assert market(symbols=("A",)).column() == 0
    with pytest.raises(InputError, match="unknown symbol 'C' of A, B"):
        market().column("C")
    with pytest.raises(InputError, match="no symbol chosen of A, B"):
        market().column()


def test_days_are_inclusive():
    bars = market()  # 2024-01-01 (Monday) .. 2024-01-12
    assert bars.days("2024-01-02", "2024-01-04") == range(1, 4)
    assert bars.days("2024-01-06", "2024-01-08") == range(5, 6)  # from a Saturday
    assert bars.days("2024-01-01", "2024-01-12") == range(10)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        ("2023-12-29", "2024-01-04", "not inside the data, 2024-01-01..2024-01-12"),
        ("2024-01-02", "2024-01-15", "not inside the data"),
        ("2024-01-06", "2024-01-07", "no day of the market"),
        ("2024-01-13", "2024-01-14", "not inside the data"),
        ("2024-01-04", "2023-12-29", "not inside the data"),
        ("2024-01-04", "2024-01-02", "^start after end, --flag 2024-01-04..2024-01-02$"),
        ("2024-01", "2024-01-02", "not a date"),
        ("2024-01-02", "2024-01-32", "not a date"),
        ("NaT", "2024-01-02", "not a date"),
    ],
)
def test_days_refused(start, end, message):
    with pytest.raises(InputError, match=message):
        market().days(start, end, "--flag")


def test_parse_period():
    assert parse_period("2024-01-02..2024-02-01") == ("2024-01-02", "2024-02-01")
    for text in (
        "2024-01-02",
        "2024-01-02...2024-02-01",
        "..",
        "2024-02-01..2024-01-02",
        "1.1.24..2.1.24",
    ):
        with pytest.raises(InputError, match=r"^(not|start).*, --flag .*"):
            parse_period(text, "--flag")


def test_split_days():
    bars = market()
    assert split_days(bars, "", "") == (range(8), range(8, 10))
    assert split_days(bars, "2024-01-02..2024-01-04", "") == (range(1, 4), range(4, 10))
    assert split_days(bars, "", "2024-01-11..2024-01-12") == (range(8), range(8, 10))
    assert split_days(bars, "2024-01-01..2024-01-03", "2024-01-08..2024-01-09")[1] == range(5, 7)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("2024-01-02..2024-01-08", "2024-01-08..2024-01-12", "before training ends on 2024-01-08"),
        ("2024-01-09..2024-01-12", "2024-01-01..2024-01-03", "before training ends"),
        ("", "2024-01-09..2024-01-12", "before training ends on 2024-01-10"),
        ("2024-01-01..2024-01-12", "", "fewer than 2 days, test period"),
        ("2024-01-02..2024-01-02", "", "fewer than 2 days, training period"),
    ],
)
def test_split_refused(train, test, message):
    with pytest.raises(InputError, match=message):
        split_days(market(), train, test)


@pytest.mark.parametrize(("name", "days"), [("training", slice(0, 7)), ("test", slice(8, 9))])
def test_a_period_has_two_bars(name, days):
    """Eight days to train on and two to test on, with one bar each: nothing can be bought there
    and seen to change."""
    close = market(symbols=("A",)).close.copy()
    close[days] = np.nan
    found = {"training": "2024-01-01..2024-01-10", "test": "2024-01-11..2024-01-12"}[name]
    with pytest.raises(InputError, match=rf"fewer than 2 bars of A, {name} period {found}"):
        split_days(market(symbols=("A",), close=close), "", "")
    close[6] = close[8] = 10.0
    assert split_days(market(symbols=("A",), close=close), "", "") == (range(8), range(8, 10))
