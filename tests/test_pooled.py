"""Several symbols told together: by hand, by enumeration and by a textbook's formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflag.evaluate.pooled import _on_days, pooled
from fastflag.evaluate.statistics import Equities, judged, paired, returns
from fastflag.market.metrics import metrics

DAYS = np.array(["2024-01-02", "2024-01-03", "2024-01-04", "2024-01-05"], "datetime64[D]")


def told(symbol, days, greedy, held, sampled, random):
    """A symbol's document, as far as it is read, and its equities."""
    equities = Equities(*(np.array(each, float) for each in (greedy, held, sampled, random)))
    document = {
        "symbol": symbol,
        "action_names": ["Sell", "Hold", "Buy"],
        "split": "test",
        "positions": "long_flat",
        "fill": "next_open",
        "dividends": "reinvest",
        "anonymised": True,
        "fee_bps": 1.0,
        "slippage_bps": 2.0,
        "start": str(days[0]),
        "end": str(days[-1]),
        "dates": [str(day) for day in days],
        **judged(equities, "stock"),
    }
    return document, equities


@pytest.fixture(scope="module")
def two():
    """A on all four days, B on the middle two."""
    a = told(
        "A",
        DAYS,
        [100, 110, 99, 120],
        [100, 101, 102, 103],
        [[100] * 4] * 2,
        [[100, 90, 95, 98]] * 3,
    )
    b = told("B", DAYS[1:3], [100, 80], [100, 90], [[100, 100]] * 2, [[100, 130]] * 3)
    return [a, b]


def test_equal_parts_by_hand(two):
    """B's part is cash before its first day and what it came to after its last."""
    whole = pooled(two, ["A", "B"], ["C"], "stock")
    every = whole["groups"]["all"]
    assert list(whole["groups"]) == ["all"] and whole["left_out"] == ["C"]
    assert every["dates"] == [str(day) for day in DAYS]
    assert every["policies"]["greedy"]["equity"] == [100, 105, 89.5, 100]
    assert every["policies"]["buy_and_hold"]["equity"] == [100, 100.5, 96, 96.5]
    assert every["random"]["equity"]["p50"] == [100, 95, 112.5, 114]
    sharpe = metrics(np.array([100, 105, 89.5, 100]), "standard", "stock")["sr"]
    assert every["policies"]["greedy"]["metrics"]["standard"]["sr"] == sharpe
    assert every["ahead_of_buy_and_hold"] == 1  # A
    assert (whole["start"], whole["end"]) == ("2024-01-02", "2024-01-05")


def test_pairs_by_hand(two):
    whole = pooled(two, ["A", "B"], [], "stock")
    of_a = np.array([0.10, -0.10, 120 / 99 - 1]) - np.array([0.01, 1 / 101, 1 / 102])
    of_b = np.array([-0.20 + 0.10])
    told = whole["groups"]["all"]["paired"]
    assert told["pairs"] == 4 and told["days"] == 3
    assert told["mean"] == pytest.approx(np.concatenate([of_a, of_b]).mean(), rel=1e-12)
    assert whole["symbols"]["B"]["paired"]["standard_error"] is None
    # Of one symbol each day is a cluster: the error of a mean of independent numbers.
    error = whole["symbols"]["A"]["paired"]["standard_error"]
    assert error == pytest.approx(of_a.std(ddof=1) / np.sqrt(3), rel=1e-12)


def test_held_out_symbols_are_told_apart(two):
    whole = pooled(two, ["A"], [], "stock")
    assert whole["held_out"] == ["B"]
    groups = whole["groups"]
    assert {name: group["symbols"] for name, group in groups.items()} == {
        "all": ["A", "B"],
        "learnt": ["A"],
        "held_out": ["B"],
    }
    assert groups["held_out"]["policies"]["greedy"]["equity"] == [100, 80]
    assert list(pooled(two, [], [], "stock")["groups"]) == ["all"]


@given(st.integers(2, 5), st.integers(2, 12), st.integers(0, 10_000))
def test_clustered_errors_are_the_sandwich(symbols, days, seed):
    """(X'X)^-1 sum_g X_g' u_g u_g' X_g (X'X)^-1 G / (G - 1) of a regression on a constant."""
    random = np.random.default_rng(seed)
    own = [
        np.sort(random.choice(days, random.integers(2, days + 1), replace=False))
        for _ in range(symbols)
    ]
    differences = [random.normal(size=len(some)) for some in own]
    told = paired(differences, own)
    y, cluster = np.concatenate(differences), np.concatenate(own)
    x = np.ones((len(y), 1))
    u = y - y.mean()
    meat = sum(
        x[cluster == g].T @ np.outer(u[cluster == g], u[cluster == g]) @ x[cluster == g]
        for g in np.unique(cluster)
    )
    bread, count = np.linalg.inv(x.T @ x), len(np.unique(cluster))
    error = np.sqrt((bread @ meat @ bread)[0, 0] * count / (count - 1))
    assert told["standard_error"] == pytest.approx(error, rel=1e-9)


def test_a_symbol_told_twice_tells_no_more():
    """Two symbols that move as one are one: a plain error would be smaller by the root of 2."""
    differences, days = np.random.default_rng(0).normal(size=50), np.arange(50)
    once, twice = paired([differences], [days]), paired([differences] * 2, [days] * 2)
    assert twice["standard_error"] == pytest.approx(once["standard_error"], rel=1e-12)


def test_days_without_an_equity():
    equity = np.array([[1.0, 2.0], [3.0, 4.0]])
    own = np.array(["2024-01-03", "2024-01-05"], "datetime64[D]")
    assert _on_days(equity, own, DAYS).tolist() == [[1, 1, 1, 2], [3, 3, 3, 4]]


def test_returns_after_ruin_are_none():
    assert returns(np.array([100.0, 50.0, 0.0, 0.0])).tolist() == [-0.5, -1.0, 0.0]
