"""Splits and dividends of files: the prices say whether they are adjusted already."""

import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from market_files import (
    DIVIDENDS,
    PRICES,
    SPLIT,
    SPLIT_DAY,
    adjusted_close,
    factors,
    raw_bars,
    scaled,
)

from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market.bars import Market
from fastflag.market.sources import load

RAW = raw_bars()
FOR_SPLIT, FOR_DIVIDEND = factors(RAW)
BARE = RAW.drop(columns=["split", "dividend"])
OHLCV = [*PRICES, "volume"]


@pytest.fixture
def read(tmp_path):
    def market(frame: pd.DataFrame) -> Market:
        frame.to_csv(tmp_path / "bars.csv", index=False)
        return load(DataConfig(data=f"csv:{tmp_path}/bars.csv", symbol="A"))

    return market


def splits(market: Market) -> dict[int, float]:
    days = np.flatnonzero(market.split[:, 0] != 1)
    return {int(day): float(market.split[day, 0]) for day in days}


def dividends(market: Market) -> dict[int, float]:
    days = np.flatnonzero(market.dividend[:, 0])
    return {int(day): float(market.dividend[day, 0]) for day in days}


def total_return(market: Market) -> float:
    """Of one share whose dividends buy shares at the close of their day."""
    close = market.close[:, 0]
    shares = np.cumprod(market.split[:, 0] * (1 + market.dividend[:, 0] / close))
    return close[-1] * shares[-1] / (close[0] * shares[0])


YAHOO = [*map(str.title, OHLCV), "Adj Close"]
ADJUSTED_NAMES = [
    "Adj Close",
    "adjClose",
    "adjusted close",
    "adj_close",
    "Adjusted_close",
    "adj. close",
    "closeadj",
    "close_adj",
    "5. adjusted close",
    "adjclose",
    "Adj. Close",
    "AdjClose",
    "Adj Close**",
    "ADJ_CLOSE",
    "Adjusted",
    "adjusted_close_price",
]


@pytest.mark.parametrize("name", ADJUSTED_NAMES)
def test_an_adjusted_close_under_any_name(name, read):
    market = read(BARE.assign(**{name: adjusted_close(RAW)}))
    assert splits(market) == {SPLIT_DAY: SPLIT}
    adjusted = adjusted_close(RAW)
    assert total_return(market) == pytest.approx(adjusted.iloc[-1] / adjusted.iloc[0], rel=1e-6)


def test_every_vendor_s_file(read, caplog):
    """The same stock, and its total return, from each; Yahoo's own prices are split-adjusted."""
    adjusted, whole = adjusted_close(RAW), FOR_SPLIT * FOR_DIVIDEND
    all_adjusted = scaled(RAW, whole).round(dict.fromkeys(PRICES, 6))
    none_as_0 = RAW["split"].replace(1.0, 0.0)
    in_new_shares = RAW["dividend"] * FOR_SPLIT
    tiingo = BARE.assign(
        **{f"adj{name.title()}": all_adjusted[name] for name in PRICES},
        adjVolume=RAW["volume"] / FOR_SPLIT,
        divCash=RAW["dividend"],
        splitFactor=RAW["split"],
    )
    alpha = BARE.rename(columns={name: f"{n}. {name}" for n, name in enumerate(PRICES, 1)})
    alpha = alpha.rename(columns={"date": "", "volume": "6. volume"})
    alpha = alpha.assign(
        **{
            "5. adjusted close": adjusted,
            "7. dividend amount": RAW["dividend"],
            "8. split coefficient": RAW["split"],
        }
    ).iloc[::-1]
    quandl = BARE.rename(columns=str.title).assign(
        **{"Ex-Dividend": RAW["dividend"], "Split Ratio": RAW["split"]},
        **{f"Adj. {name.title()}": all_adjusted[name] for name in PRICES},
    )
    yahoo = scaled(BARE, FOR_SPLIT).round(dict.fromkeys(PRICES, 6)).rename(columns=str.title)
    yahoo = yahoo.assign(**{"Adj Close": adjusted})
    with_actions = yahoo.assign(**{"Dividends": in_new_shares, "Stock Splits": none_as_0})
    files = {
        "tiingo": (tiingo, SPLIT),
        "alpha vantage": (alpha, SPLIT),
        "quandl": (quandl, SPLIT),
        "eodhd": (BARE.rename(columns=str.title).assign(Adjusted_close=adjusted), SPLIT),
        "yahoo": (yahoo, 1),
        "yfinance": (with_actions, 1),
    }
    for name, (frame, split) in files.items():
        market = read(frame)
        assert splits(market) == ({SPLIT_DAY: SPLIT} if split != 1 else {}), name
        assert list(dividends(market)) == list(DIVIDENDS), name
        expected = adjusted.iloc[-1] / adjusted.iloc[0]
        assert total_return(market) == pytest.approx(expected, rel=2e-5), name
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2  # of Tiingo and Quandl alone
    assert told[0].startswith("columns that are not used: adjOpen, adjHigh, adjLow, adjVolume, ")
    assert told[1].startswith("columns that are not used: Adj. Open, Adj. High, Adj. Low, ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("split", 4.0),
        ("splits", 4.0),
        ("Stock Splits", 4.0),
        ("stock_splits", "4:1"),
        ("split_factor", "4/1"),
        ("splitFactor", 4.0),
        ("8. split coefficient", 4.0),
        ("Split Ratio", 4.0),
    ],
)
@pytest.mark.parametrize("none", ["0", "1", ""])
def test_splits_in_a_column_of_their_own(name, value, none, read):
    column = pd.Series(none, RAW.index, dtype=object)
    column[SPLIT_DAY] = value
    market = read(BARE.assign(**{name: column}))
    assert splits(market) == {SPLIT_DAY: 4.0}
    market = read(scaled(BARE, FOR_SPLIT).assign(**{name: column}))
    assert splits(market) == {}


def test_raw_prices_with_splits_and_dividends(read):
    market = read(RAW)
    assert splits(market) == {SPLIT_DAY: SPLIT} and dividends(market) == DIVIDENDS


def test_prices_of_yfinance_are_adjusted_already(read):
    names = {"split": "Stock Splits", "dividend": "Dividends"}
    for changes in ({}, {"split": 0.0}):  # without a split in it nothing but the names tells
        frame = scaled(RAW, FOR_SPLIT * FOR_DIVIDEND).assign(**changes)
        market = read(
            frame.rename(columns=str.title)
            .rename(columns={"Split": "Stock Splits"})
            .rename(columns={"Dividend": "Dividends"})
        )
        assert splits(market) == {} and dividends(market) == {}
        np.testing.assert_array_equal(market.close[:, 0], frame["close"])
    raw = read(RAW.rename(columns=names))  # prices tell more than names
    assert splits(raw) == {SPLIT_DAY: SPLIT} and dividends(raw) == DIVIDENDS


def test_adjusted_prices_alone(read):
    whole = scaled(RAW, FOR_SPLIT * FOR_DIVIDEND)
    names = {name: f"adj_{name}" for name in PRICES}
    market = read(whole.rename(columns=names))
    assert splits(market) == {} and dividends(market) == {}
    np.testing.assert_array_equal(market.open[:, 0], whole["open"])
    np.testing.assert_array_equal(market.volume[:, 0], RAW["volume"])


def test_an_adjusted_close_for_splits_alone(read):
    frame = RAW.assign(adj_close=RAW["close"] * FOR_SPLIT)
    market = read(frame)
    assert splits(market) == {SPLIT_DAY: SPLIT} and dividends(market) == DIVIDENDS


def test_large_dividends_show_in_the_prices(read):
    quiet = scaled(BARE, FOR_SPLIT)
    pays = np.isin(quiet.index, range(40, 140, 20))
    falling = scaled(quiet, np.cumprod(np.where(pays, 0.8, 1.0)))
    paid = np.where(pays, 0.2 * falling["close"].shift(), 0.0).round(4)
    found = dividends(read(falling.assign(dividend=paid)))
    assert list(found.items()) == [(day, paid[day]) for day in range(40, 140, 20)]
    assert dividends(read(quiet.assign(dividend=0.2 * pays * quiet["close"]))) == {}


REFUSED = {
    "inverted": (RAW.assign(split=1 / RAW["split"]), "split 0.25 does not fit the prices"),
    "another day": (
        RAW.assign(split=RAW["split"].shift(2, fill_value=1.0)),
        "the prices show the split 4 on 2019-04-24",
    ),
    "small": (
        scaled(BARE, FOR_SPLIT).assign(split=np.where(BARE.index == 50, 1.02, 1.0)),
        "prices don't show whether they are adjusted for the split already",
    ),
    "dividends alone": (
        scaled(RAW.drop(columns="split"), FOR_SPLIT),
        "prices don't show whether they are adjusted for the dividend already",
    ),
    "dividends beside adjusted prices": (
        scaled(RAW, FOR_SPLIT),
        "give adj_close, or take the column dividend out, A 2019-02-13",
    ),
    "one of two splits": (
        scaled(BARE, np.where(BARE.index < 40, 0.5, 1.0)).assign(
            split=np.select([BARE.index == 20, BARE.index == SPLIT_DAY], [3.0, 4.0], 1.0)
        ),
        "prices are adjusted for the split of A 2019-01-30",
    ),
    "an adjusted close without the split": (
        RAW.assign(adj_close=RAW["close"]),
        "split 4 and adj_close contradict each other",
    ),
    "an adjusted close of another split": (
        RAW.assign(adj_close=RAW["close"] * np.where(RAW.index < SPLIT_DAY, 0.5, 1.0)),
        "split 4 and adj_close contradict each other",
    ),
    "an adjusted close of other dividends": (
        RAW.assign(adj_close=adjusted_close(RAW), dividend=3 * RAW["dividend"]),
        "dividend 4.8 and adj_close, which says 1.5",
    ),
    "negative": (RAW.assign(dividend=-RAW["dividend"]), "dividend -1.6 is no dividend"),
    "a negative split": (RAW.assign(split=-1.0), "split -1 is no split"),
    "adjustment factors": (BARE.assign(adj_factor=2.0), "column 'adj_factor' looks like"),
    "a split's text": (RAW.assign(split="soon"), "split 'soon' is not a number"),
    "capital gains": (BARE.assign(**{"Capital Gains": 0.1}), "column 'Capital Gains' looks like"),
    "an adjusted open alone": (BARE.assign(adjOpen=1.0), "column 'adjOpen' looks like"),
    "two adjusted closes": (
        BARE.assign(adjClose=1.0, **{"Adj Close": 1.0}),
        "more than one column 'adj_close': 'adjClose' and 'Adj Close'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, read, tmp_path):
    frame, told = REFUSED[name]
    with pytest.raises(InputError) as caught:
        read(frame)
    line = str(caught.value)
    assert told in line and f"{tmp_path}/bars.csv" in line


def test_columns_that_are_not_used_are_told_once(read, caplog):
    read(BARE.assign(vwap=1.0, **{"Capital Gains": 0.0, "Trade Count": 3}))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        "columns that are not used: vwap, Capital Gains, Trade Count, "
    )


def test_events_that_only_the_adjusted_close_has_are_told(read, caplog):
    market = read(RAW.assign(adj_close=adjusted_close(RAW), dividend=0.0))
    assert list(dividends(market)) == list(DIVIDENDS)
    (record,) = caplog.records
    assert "events of adj_close that split and dividend don't have, taken from it: 2, first" in (
        record.getMessage()
    )


@given(
    st.integers(0, 2**32),
    st.sampled_from([0.1, 0.25, 0.5, 1.5, 2.0, 3.0, 7.0, 20.0]),
    st.booleans(),
    st.integers(5, 150),
)
def test_a_split_is_applied_once(seed, ratio, adjusted, day):
    from fastflag.market.events import Rows, events

    raw = scaled(raw_bars(seed=seed), factors(raw_bars(seed=seed))[0])
    split = np.where(raw.index == day, ratio, 1.0)
    if not adjusted:
        raw = scaled(raw, np.where(raw.index < day, ratio, 1.0))
    span, arrays = [slice(0, len(raw))], (raw["open"].to_numpy(), raw["close"].to_numpy())
    rows = Rows(["A"], span, raw["date"].to_numpy(), *arrays, "file")
    found, paid = events(rows, None, split, None, False)
    np.testing.assert_array_equal(found, 1.0 if adjusted else split)
    assert not paid.any()


@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("at", [SPLIT_DAY, *DIVIDENDS])
def test_an_event_on_a_day_without_adjusted_close_is_not_moved_to_another(read, at, gap):
    """It would have been read as of the next day: a fall of 75% and a gain of 300%."""
    adjusted = adjusted_close(RAW)
    adjusted.iloc[at - gap + 1 : at + 1] = np.nan
    with pytest.raises(
        InputError, match=f"day is not known then.* {str(RAW['date'][at + 1])[:10]}"
    ):
        read(BARE.assign(adj_close=adjusted))


def test_other_days_without_adjusted_close_are_told(read, caplog):
    whole = read(BARE.assign(adj_close=adjusted_close(RAW)))
    adjusted = adjusted_close(RAW)
    adjusted[[SPLIT_DAY + 10, SPLIT_DAY + 11]] = np.nan
    with caplog.at_level(logging.WARNING):
        market = read(BARE.assign(adj_close=adjusted))
    assert f"adj_close has no value on 2 of {len(RAW)} days with a bar" in caplog.text
    np.testing.assert_array_equal(market.split, whole.split)
    np.testing.assert_allclose(market.dividend, whole.dividend, atol=1e-6)
