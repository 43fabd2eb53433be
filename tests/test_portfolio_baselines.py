"""Portfolios that need no model."""

import sys

import numpy as np
import portfolio_oracle as oracle
import pytest

from fastflag.config import PortfolioConfig
from fastflag.files import InputError
from fastflag.market.tasks.portfolio import Portfolio
from fastflag.market.tasks.portfolio_baselines import (
    buy_and_hold_equity,
    equal_weight_equity,
    inverse_volatility_equity,
    minimum_variance_equity,
    random_equities,
)

FREE = {"fill": "same_close", "fee_bps": 0.0, "slippage_bps": 0.0, "cash": 1.0}


def market_of_closes(close):
    ones = np.ones(len(close))
    return oracle.market_of([(c, c, ones, 0.0 * ones, np.isfinite(c)) for c in close.T])


def random_closes(days, deviations, seed=0):
    returns = np.random.default_rng(seed).normal(0.0005, deviations, (days, len(deviations)))
    return 50.0 * np.exp(np.cumsum(returns, axis=0))


def test_equal_weights_and_holding_by_hand():
    close = random_closes(30, [0.01, 0.03, 0.02])
    task = Portfolio.of(PortfolioConfig(**FREE), market_of_closes(close))
    growth = close[1:] / close[:-1]
    rebalanced = np.append(1.0, np.cumprod(growth.mean(1)))
    np.testing.assert_allclose(equal_weight_equity(task, range(30)), rebalanced, rtol=1e-12)
    held = (close / close[0]).mean(1)
    np.testing.assert_allclose(buy_and_hold_equity(task, range(30)), held, rtol=1e-12)
    later = (close[7:] / close[7]).mean(1)
    np.testing.assert_allclose(buy_and_hold_equity(task, range(7, 30)), later, rtol=1e-12)


def test_rebalancing_every_fourth_day_lets_weights_drift():
    close = random_closes(21, [0.03, 0.05])
    rules = PortfolioConfig(**FREE, rebalance_every=4)
    equity = equal_weight_equity(Portfolio.of(rules, market_of_closes(close)), range(21))
    expected = 1.0
    for day in range(0, 20, 4):
        expected *= (close[day + 4] / close[day]).mean()
    np.testing.assert_allclose(equity[-1], expected, rtol=1e-12)


def weighted_by_hand(close, first, weights):
    """Wealth of weights(returns so far, day) restored daily, of equal ones before day `first`."""
    growth, wealth = close[1:] / close[:-1], [1.0]
    for day in range(len(growth)):
        w = weights(growth[:day] - 1.0) if day >= first else np.full(close.shape[1], 1.0)
        wealth.append(wealth[-1] * growth[day] @ (w / w.sum()))
    return np.array(wealth)


def test_inverse_volatility_by_hand():
    close = random_closes(40, [0.01, 0.03, 0.02])
    task = Portfolio.of(PortfolioConfig(**FREE), market_of_closes(close))
    expected = weighted_by_hand(close, 10, lambda r: 1.0 / np.std(r[-10:], axis=0, ddof=1))
    equity = inverse_volatility_equity(task, range(40), bars=10)
    np.testing.assert_allclose(equity, expected, rtol=1e-12)


def test_an_asset_with_too_few_returns_is_left_out():
    """The second is listed on day 12: by day 22 it has ten returns, and its part."""
    close = random_closes(30, [0.01, 0.02])
    close[:12, 1] = np.nan
    market = market_of_closes(close)
    equity = inverse_volatility_equity(
        Portfolio.of(PortfolioConfig(**FREE), market), range(30), bars=10
    )
    np.testing.assert_allclose(equity[10:23], equity[10] * close[10:23, 0] / close[10, 0])
    assert abs(equity[23] / equity[22] - close[23, 0] / close[22, 0]) > 1e-5


def test_weights_know_nothing_of_the_future():
    close = random_closes(40, [0.01, 0.03, 0.02])
    other = close.copy()
    other[26:] *= [1.5, 0.5, 2.0]
    one, two = (
        inverse_volatility_equity(
            Portfolio.of(PortfolioConfig(), market_of_closes(each)), range(40), bars=10
        )
        for each in (close, other)
    )
    np.testing.assert_array_equal(one[:26], two[:26])
    assert one[26] != two[26]


def test_minimum_variance_is_the_closed_form_inside():
    """Where no weight is 0: inverse covariance times ones."""
    pytest.importorskip("skfolio", reason="skfolio is not installed: pip install fastflag[study]")
    close = random_closes(36, [0.01, 0.014, 0.012], seed=1)
    task = Portfolio.of(PortfolioConfig(**FREE), market_of_closes(close))

    def weights(returns):
        found = np.linalg.solve(np.cov(returns[-30:].T), np.ones(3))
        assert (found > 0).all()
        return found

    equity = minimum_variance_equity(task, range(36), bars=30)
    np.testing.assert_allclose(equity, weighted_by_hand(close, 30, weights), rtol=2e-5)


def test_without_skfolio_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "skfolio", None)
    monkeypatch.setitem(sys.modules, "skfolio.optimization", None)
    task = Portfolio.of(PortfolioConfig(), market_of_closes(random_closes(9, [0.01, 0.02])))
    with pytest.raises(InputError, match=r"^skfolio is not installed: pip install .*variance$"):
        minimum_variance_equity(task, range(9))


def test_random_policies_are_not_those_of_the_rollouts_seed():
    task = Portfolio.of(PortfolioConfig(), oracle.random_market(1, 3, 20))
    equities = random_equities(task, range(20), 6, seed=4)
    assert equities.shape == (6, 20) and len(np.unique(equities[:, -1])) > 1
    np.testing.assert_array_equal(equities[2], random_equities(task, range(20), 1, seed=6)[0])
    assert not np.array_equal(equities, task.equities(range(20), 6, 4))
