import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflag.config import DataConfig
from fastflag.market.features import forward_adjusted, indicators
from fastflag.market.sources import load


def pandas_indicators(close: pd.Series, high: pd.Series) -> dict[str, pd.Series]:
    """The slow twin: pandas' rolling windows on the bars alone, carried over days without one."""
    close = close.dropna()
    high = high.reindex(close.index)
    change = close.diff()
    result = {f"return_{bars}": close.pct_change(bars) for bars in (1, 5, 20)}
    result["volatility_20"] = np.log(close).diff().rolling(20).std()
    averages = []
    for moves in (change.clip(lower=0), (-change).clip(lower=0)):
        seeded = moves.copy()
        seeded.iloc[14] = moves.iloc[1:15].mean()
        averages.append(seeded.iloc[14:].ewm(alpha=1 / 14, adjust=False).mean())
    result["rsi_14"] = 100 - 100 / (1 + averages[0] / averages[1])
    result["drawdown_60"] = close / high.rolling(60).max() - 1
    return result


@pytest.fixture(scope="module")
def bars():
    """AAPL over its 2005 split, forward-adjusted, with two days made untradable."""
    market = load(DataConfig(data="sample:AAPL"))
    days = market.days("2004-06-01", "2005-12-30")
    close, high = (
        forward_adjusted(prices[days, 0], market.split[days, 0])
        for prices in (market.close, market.high)
    )
    close[[100, 101]] = np.nan
    return market.dates[days], close, high


def test_against_pandas(bars):
    dates, close, high = bars
    ours = indicators(close, high)
    theirs = pandas_indicators(pd.Series(close, dates), pd.Series(high, dates))
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        expected = values.reindex(dates).ffill()
        np.testing.assert_allclose(ours[name], expected, rtol=1e-10, atol=1e-12, err_msg=name)
        assert np.isfinite(ours[name]).sum() > 300


def test_a_split_makes_no_jump(bars):
    dates, close, high = bars
    split_day = np.flatnonzero(dates == np.datetime64("2005-02-28"))[0]
    # Raw closes 88.99 and 44.86, two for one.
    assert indicators(close, high)["return_1"][split_day] == pytest.approx(2 * 44.86 / 88.99 - 1)


def test_history_too_short():
    first = {"return_1": 1, "return_5": 5, "return_20": 20, "volatility_20": 20, "rsi_14": 14}
    first["drawdown_60"] = 59
    close = np.linspace(10, 20, 80)
    for name, values in indicators(close, close).items():
        assert np.isnan(values[: first[name]]).all()
        assert np.isfinite(values[first[name] :]).all()
    for close in (np.array([]), np.full(3, np.nan)):
        assert all(np.isnan(values).all() for values in indicators(close, close).values())


def test_extremes():
    rising, flat = np.arange(1.0, 101.0), np.ones(100)
    assert indicators(rising, rising)["rsi_14"][-1] == 100
    assert indicators(rising[::-1], rising[::-1])["rsi_14"][-1] == 0
    assert indicators(flat, flat)["rsi_14"][-1] == 50
    assert indicators(flat, flat)["volatility_20"][-1] == 0
    assert indicators(rising, rising)["drawdown_60"][-1] == 0
    # A bar without a high still has its close.
    assert indicators(rising, np.full(100, np.nan))["drawdown_60"][-1] == 0


@st.composite
def price_paths(draw):
    length = draw(st.integers(2, 130))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    close = 100 * np.exp(np.cumsum(random.normal(0, 0.03, length)))
    high = close * (1 + random.uniform(0, 0.02, length))
    close[random.random(length) < draw(st.sampled_from([0, 0.1, 0.9]))] = np.nan
    split = random.choice([1.0, 2.0, 0.1, 1.5], length, p=[0.9, 0.05, 0.025, 0.025])
    return close, high, split, draw(st.integers(1, length))


@given(price_paths())
def test_the_future_changes_no_bit(path):
    close, high, split, known = path

    def told(days):
        return indicators(
            forward_adjusted(close[:days], split[:days]),
            forward_adjusted(high[:days], split[:days]),
        )

    whole, prefix = told(len(close)), told(known)
    for name in whole:
        assert whole[name][:known].tobytes() == prefix[name].tobytes()


def test_forward_adjusted():
    adjusted = forward_adjusted(
        np.array([90.0, 46.0, 48.0, np.nan]), np.array([1.0, 2.0, 1.0, 0.5])
    )
    np.testing.assert_array_equal(adjusted, [90, 92, 96, np.nan])
