"""Dividends: reinvested, holding earns the adjusted close's return; in cash, as it always was."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import oracles
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_simulator import FILLS, FREE, MODES, bars_of, one, run

from fastflag import cli
from fastflag.config import DataConfig, SimulatorConfig
from fastflag.market.adjusted import recover_splits_and_dividends
from fastflag.market.bars import Bars
from fastflag.market.sources import SAMPLES, load
from fastflag.market.tasks.baselines import fixed_action_equity
from fastflag.market.tasks.single import ACTIONS, BUY, HOLD, SELL, Single

LONG_SHORT = {"positions": "long_short", **FREE}

random_columns = st.builds(
    oracles.random_bars,
    seed=st.integers(0, 10**6),
    days=st.integers(2, 60),
    missing=st.sampled_from((0.0, 0.2, 0.6)),
    split=st.sampled_from((0.0, 0.2)),
    dividend=st.sampled_from((0.1, 0.6)),
    volatility=st.sampled_from((0.01, 0.1, 0.3)),
)
rules = {
    "fill": st.sampled_from(FILLS),
    "fee_bps": st.sampled_from((0.0, 30.0)),
    "slippage_bps": st.sampled_from((0.0, 20.0)),
    "ruin": st.just(1e-9),  # a reverse split that no price follows is a loss of 90%
}


def adjusted_closes(columns):
    """[T]: at every bar the close x the shares that one share has become. A dividend buys shares at
    the close of its day or, where that has no bar, of the next that has one."""
    _, close, split, dividend, tradable = columns
    adjusted, shares, waiting = np.full(len(close), np.nan), 1.0, 0.0
    for day in range(len(close)):
        shares *= split[day]
        waiting += shares * dividend[day]
        if tradable[day]:
            shares += waiting / close[day]
            waiting = 0.0
            adjusted[day] = shares * close[day]
    return adjusted


def days_held(bars):
    """The days with a bar at whose close the position is seen that was ordered on the first."""
    return np.flatnonzero(bars.tradable)[1:]


# The adjusted close ------------------------------------------------------------------------------


@given(random_columns, st.builds(SimulatorConfig, **rules))
def test_holding_earns_the_adjusted_closes_return(columns, config):
    """And open profit is that of the account, whose cash is all in the position."""
    bars, adjusted = Bars.from_columns(*columns), adjusted_closes(columns)
    days = days_held(bars)
    equity = fixed_action_equity(Single.of(config, bars), range(len(bars)), BUY)
    if len(days):
        earned, wanted = equity[days] / equity[days[0]], adjusted[days] / adjusted[days[0]]
        np.testing.assert_allclose(earned, wanted, rtol=1e-12)
    for day, state in enumerate(run(bars, config, np.full((1, len(bars) - 1), BUY))[0], 1):
        assert state["equity"][0] == equity[day]
        if state["shares"][0]:
            total = equity[day] / config.cash
            assert bars.mark[day] / state["entry"][0] == pytest.approx(total, rel=1e-12)


@given(random_columns, st.builds(SimulatorConfig, positions=st.just("long_short"), **rules))
def test_a_short_loses_what_the_adjusted_close_earns(columns, config):
    """Of what it owed at the first close that sees it; until it is ruined."""
    bars, adjusted = Bars.from_columns(*columns), adjusted_closes(columns)
    states, _ = run(bars, config, np.full((1, len(bars) - 1), SELL))
    days = days_held(bars)
    days = days[[bool(states[day - 1]["alive"][0]) for day in days]]
    if not len(days):
        return
    equity = np.array([states[day - 1]["equity"][0] for day in days])
    owed = -states[days[0] - 1]["shares"][0] * bars.close[days[0]]
    growth = adjusted[days] / adjusted[days[0]]
    wanted = equity[0] - owed * (growth - 1)
    assert (np.abs(equity - wanted) <= 1e-12 * owed * np.maximum(growth, 1)).all()


@given(random_columns)
def test_holding_earns_what_the_adjusted_closes_of_a_file_say(columns):
    """From prices to the stream of splits and dividends, and through the simulator."""
    open_, close, split, dividend, tradable = (column[columns[4]] for column in columns)
    if len(close) < 3:
        return
    dividend = 0.02 * dividend * close  # above the 1e-6 that pass for rounding
    adjusted = adjusted_closes((open_, close, split, dividend, tradable))
    stream = recover_splits_and_dividends(close, adjusted)
    bars = Bars.from_columns(open_, close, *stream, tradable)
    for fill in FILLS:
        config = SimulatorConfig(fill=fill, ruin=1e-9, **FREE)
        equity = fixed_action_equity(Single.of(config, bars), range(len(bars)), BUY)
        np.testing.assert_allclose(equity[1:] / equity[1], adjusted[1:] / adjusted[1], rtol=1e-11)


@pytest.mark.parametrize("symbol", SAMPLES)
def test_metrics_of_a_sample_are_its_adjusted_closes(symbol, capsys):
    stocks = pytest.importorskip("bokeh_sampledata.stocks")
    adjusted = np.array(getattr(stocks, symbol)["adj_close"])
    cli.main(["metrics", "--data", f"sample:{symbol}", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["cr"] == pytest.approx(100 * (adjusted[-1] / adjusted[0] - 1), rel=1e-12)
    returns = pd.Series(adjusted).pct_change().dropna()
    assert told["sr"] == pytest.approx(returns.mean() / returns.std() * 252**0.5, rel=1e-10)


@pytest.fixture(scope="session")
def stockbench():
    """StockBench's bars; without them the tests that need them are skipped."""
    beside = Path(__file__).resolve().parents[1] / "../shared/data/stockbench"
    path = Path(os.environ.get("FASTFLAG_STOCKBENCH", beside)) / "bars.csv"
    if not path.is_file():
        pytest.skip(f"no StockBench data, {path}: set FASTFLAG_STOCKBENCH to its folder")
    return path


@pytest.mark.parametrize("symbol", ["MSFT", "GS", "HD", "V", "AAPL", "AMGN", "UNH"])
def test_metrics_of_stockbench_are_its_adjusted_closes(symbol, stockbench, capsys):
    """Four of them have a bar every day, three have a gap of a week."""
    frame = pd.read_csv(stockbench)
    adjusted = frame.loc[frame.symbol == symbol, "adj_close"].to_numpy()
    cli.main(["metrics", "--data", f"csv:{stockbench}", "--symbol", symbol, "--json"])
    told = json.loads(capsys.readouterr().out)
    # Gains below 1e-6 are taken for rounding of the file.
    assert told["cr"] == pytest.approx(100 * (adjusted[-1] / adjusted[0] - 1), abs=1e-4)
    market = load(DataConfig(data=f"csv:{stockbench}", symbol=symbol))
    bars = Bars.from_market(market, symbol)
    for fill in FILLS:
        config = SimulatorConfig(fill=fill, **FREE)
        equity = fixed_action_equity(Single.of(config, bars), range(len(bars)), BUY)[bars.tradable]
        np.testing.assert_allclose(equity[1:] / equity[1], adjusted[1:] / adjusted[1], rtol=1e-6)


# By hand -----------------------------------------------------------------------------------------


def test_a_dividend_buys_shares_at_the_close():
    bars = bars_of([10, 10, 12.5], dividend=[0, 0, 0.5])
    long, _ = one(bars, SimulatorConfig(fill="next_close", **FREE), BUY, HOLD)
    assert (long["shares"], long["cash"]) == (pytest.approx(10_400, rel=1e-15), 0.0)
    assert long["equity"] == pytest.approx(130_000, rel=1e-15)
    assert long["entry"] == pytest.approx(10 / 1.04, rel=1e-15) and long["opened"] == 1


def test_a_short_sells_what_pays_the_dividend():
    bars = bars_of([10, 10, 12.5], dividend=[0, 0, 0.5])
    short, _ = one(bars, SimulatorConfig(fill="next_close", **LONG_SHORT), SELL, SELL)
    assert short["shares"] == pytest.approx(-10_400, rel=1e-15)
    assert short["cash"] == pytest.approx(200_000, rel=1e-15)
    assert short["equity"] == pytest.approx(70_000, rel=1e-15)
    assert short["entry"] == pytest.approx(10 / 1.04, rel=1e-15)


def test_reinvesting_is_free_of_costs():
    bars = bars_of([10, 10, 10], dividend=[0, 0, 0.5])
    config = SimulatorConfig(fill="next_close", fee_bps=100.0, slippage_bps=50.0)
    before, _ = one(bars, config, BUY)
    after, _ = one(bars, config, BUY, HOLD)
    assert after["fees"] == before["fees"] > 0
    assert after["equity"] == pytest.approx(1.05 * before["equity"], rel=1e-14)


@pytest.mark.parametrize(("fill", "price"), [("next_open", 11), ("next_close", 12)])
def test_who_sells_on_the_ex_day_has_the_dividend_in_cash(fill, price):
    bars = bars_of([10, 10, 12], open=[10, 10, 11], dividend=[0, 0, 0.5])
    account, _ = one(bars, SimulatorConfig(fill=fill, **FREE), BUY, SELL)
    assert account["cash"] == account["equity"] == 10_000 * (price + 0.5)
    # One that turns goes short with it, and owes no dividend.
    turned, _ = one(bars, SimulatorConfig(fill=fill, **LONG_SHORT), BUY, SELL)
    assert turned["shares"] == pytest.approx(-10_000 * (price + 0.5) / price, rel=1e-15)


def test_same_close_sells_before_the_ex_day_or_after_the_dividend():
    bars = bars_of([10, 10, 12, 12], dividend=[0, 0, 0.5, 0])
    config = SimulatorConfig(fill="same_close", **FREE)
    assert one(bars, config, BUY, SELL)[0]["cash"] == 100_000
    assert one(bars, config, BUY, HOLD, SELL)[0]["cash"] == pytest.approx(125_000, rel=1e-15)


@pytest.mark.parametrize("fill", ["next_open", "next_close"])
def test_who_buys_on_the_ex_day_has_no_dividend(fill):
    bars = bars_of([10, 10, 10], dividend=[0, 0.5, 0])
    for action, rules in ((BUY, FREE), (SELL, LONG_SHORT)):
        account, _ = one(bars, SimulatorConfig(fill=fill, **rules), action, action)
        assert abs(account["shares"]) == 10_000 and account["equity"] == 100_000


def test_whole_lots_are_bought_and_the_rest_stays_cash():
    bars = bars_of([10, 10, 10, 20], dividend=[0, 0, 0.37, 0])
    config = SimulatorConfig(fill="next_close", lot=1.0, cash=1005.0, **FREE)
    account, _ = one(bars, config, BUY, HOLD)
    assert account["shares"] == 103 and account["cash"] == pytest.approx(5 + 7)
    assert account["equity"] == pytest.approx(1042)
    assert account["entry"] == pytest.approx(10 / 1.037)
    assert one(bars, config, BUY, HOLD, HOLD)[0]["equity"] == pytest.approx(103 * 20 + 12)
    short = SimulatorConfig(fill="next_close", lot=1.0, cash=1005.0, **LONG_SHORT)
    account, _ = one(bars, short, SELL, SELL)
    assert account["shares"] == -103 and account["cash"] == pytest.approx(2005 - 37 + 30)
    assert account["equity"] == pytest.approx(1005 - 37)


def test_lots_that_take_the_whole_dividend_leave_no_debt_of_rounding():
    """5 x 70.47 is 352.35, and in float64 more than 100 x 3.5235."""
    bars = bars_of([10, 10, 70.47], dividend=[0, 0, 3.5235])
    config = SimulatorConfig(fill="next_close", lot=1.0, cash=1000.0, **FREE)
    account, _ = one(bars, config, BUY, HOLD)
    assert (account["shares"], account["cash"]) == (105.0, 0.0)


def test_a_dividend_of_a_day_without_a_bar_comes_with_the_next_bar():
    """Of 10,000 shares a dividend of 1, a 2:1 split after it, and another dividend of 0.25: they
    come to 0.75 for each of 20,000 shares, at a close of 5."""
    nothing = np.nan
    bars = bars_of(
        [10, 10, nothing, nothing, 5, 6], split=[1, 1, 1, 2, 1, 1], dividend=[0, 0, 1, 0, 0.25, 0]
    )
    np.testing.assert_array_equal(bars.payable, [0, 0, 0, 0, 0.75, 0])
    config = SimulatorConfig(fill="next_close", **FREE)
    states, _ = run(bars, config, np.array([[BUY, HOLD, HOLD, HOLD, HOLD]]))
    equity = [state["equity"][0] for state in states]
    assert equity == pytest.approx([100_000, 100_000, 100_000, 115_000, 138_000], rel=1e-15)
    assert states[2]["shares"] == 20_000 and states[3]["shares"] == pytest.approx(23_000)
    # An order that waited is filled with the dividend paid.
    account, _ = one(bars, config, BUY, SELL, HOLD, HOLD)
    assert account["equity"] == account["cash"] == 115_000


def test_cash_is_idle_until_the_next_purchase():
    bars = bars_of([10, 10, 10, 10, 20], dividend=[0, 0, 0.5, 0, 0])
    config = SimulatorConfig(fill="next_close", dividends="cash", **FREE)
    long, _ = one(bars, config, BUY, HOLD)
    assert long["cash"] == 5_000 and long["equity"] == 105_000 and long["entry"] == 10
    assert one(bars, config, BUY, HOLD, HOLD, HOLD)[0]["equity"] == 205_000
    short = SimulatorConfig(fill="next_close", dividends="cash", **LONG_SHORT)
    assert one(bars, short, SELL, SELL)[0]["equity"] == 95_000


BUYS_AND_SELLS = [
    [BUY, HOLD, HOLD, HOLD, HOLD, HOLD, SELL, BUY, HOLD, HOLD, HOLD],
    [BUY, BUY, SELL, SELL, SELL, SELL, BUY, BUY, BUY, HOLD, SELL],
    [SELL, SELL, SELL, SELL, SELL, SELL, SELL, BUY, BUY, BUY, BUY],
]


@pytest.mark.parametrize("dividends", ["cash", "reinvest"])
@pytest.mark.parametrize("lot", [0.0, 7.0])
@pytest.mark.parametrize("fill,positions", MODES)
def test_a_dividend_goes_where_the_rules_say(fill, positions, lot, dividends):
    """Around a split, days without a bar and fills, with costs: the oracle, written from the rules,
    has the same equity each day, and the other rule another at the end."""
    bars = bars_of(
        [10, 10.5, 11.25, np.nan, np.nan, 6.5, 6.25, 7.0, 6.75, np.nan, 7.5, 7.25],
        open=[10, 10.25, 11, np.nan, np.nan, 6.75, 6.5, 6.75, 7, np.nan, 7.25, 7.5],
        split=[1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1],
        dividend=[0, 0, 0.25, 0.5, 0, 0.125, 0, 0, 0.375, 0.1, 0, 0],
    )
    config = SimulatorConfig(fill=fill, positions=positions, lot=lot, dividends=dividends)
    states, _ = run(bars, config, np.array(BUYS_AND_SELLS))
    ends = []
    for rule in ("cash", "reinvest"):
        ruled = dataclasses.replace(config, dividends=rule)
        twins = [oracles.Account(oracles.days_of(bars), ruled) for _ in BUYS_AND_SELLS]
        for day, state in enumerate(states):
            for twin, actions in zip(twins, BUYS_AND_SELLS, strict=True):
                twin.step(day, ACTIONS[actions[day]])
            if rule == dividends:
                wanted = [twin.equity for twin in twins]
                np.testing.assert_allclose(state["equity"], wanted, rtol=1e-12)
        ends.append([twin.equity for twin in twins])
    assert max(abs(cash / other - 1) for cash, other in zip(*ends, strict=True)) > 1e-4


# What others make of it --------------------------------------------------------------------------


@pytest.mark.parametrize("dividends", ["reinvest", "cash"])
@pytest.mark.parametrize("fill,positions", MODES)
def test_growth_is_what_the_entry_is_divided_by(fill, positions, dividends):
    bars = Bars.from_columns(*oracles.random_bars(4, days=40, split=0.1, dividend=0.4))
    config = SimulatorConfig(fill=fill, positions=positions, dividends=dividends)
    states, _ = run(bars, config, np.full((1, 39), BUY))
    held = [(day, state) for day, state in enumerate(states, 1) if state["opened"][0] >= 0]
    opened = int(held[0][1]["opened"][0])
    growth = [Single.of(config, bars).growth(opened, day) for day, _ in held]
    entry = [state["entry"][0] for _, state in held]
    np.testing.assert_allclose(entry, entry[0] * growth[0] / np.array(growth), rtol=1e-13)
    assert Single.of(config, bars).growth(opened, opened) == 1
