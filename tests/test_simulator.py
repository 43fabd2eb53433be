import dataclasses
import gzip
import itertools
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import oracles
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastflag.config import SimulatorConfig
from fastflag.files import InputError
from fastflag.market.accounts import Accounts
from fastflag.market.bars import Bars
from fastflag.market.compiled import lanes
from fastflag.market.compiled.constants import CODES, HISTORY
from fastflag.market.random_numbers import uniform
from fastflag.market.tasks import rolling
from fastflag.market.tasks.account_codes import decode, side_of
from fastflag.market.tasks.single import ACTIONS, BUY, HOLD, SELL, Single

FILLS = ("next_open", "next_close", "same_close")
POSITIONS = ("long_flat", "long_short")
MODES = list(itertools.product(FILLS, POSITIONS))
FREE = {"fee_bps": 0.0, "slippage_bps": 0.0}

configs = st.builds(
    SimulatorConfig,
    fill=st.sampled_from(FILLS),
    positions=st.sampled_from(POSITIONS),
    reward=st.sampled_from(("sharpe", "log_return")),
    dividends=st.sampled_from(("reinvest", "cash")),
    fee_bps=st.sampled_from((0.0, 7.0, 300.0)),
    slippage_bps=st.sampled_from((0.0, 11.0)),
    lot=st.sampled_from((0.0, 1.0, 100.0)),
    cash=st.sampled_from((100_000.0, 997.0)),
)
markets = st.builds(
    oracles.random_bars,
    seed=st.integers(0, 10**6),
    days=st.integers(2, 40),
    missing=st.sampled_from((0.0, 0.2, 0.7)),
    split=st.sampled_from((0.0, 0.2)),
    dividend=st.sampled_from((0.0, 0.3)),
    volatility=st.sampled_from((0.01, 0.1, 0.6)),
).map(lambda columns: Bars.from_columns(*columns))
examples = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def bars_of(close, open=None, split=None, dividend=None):
    close = np.array(close, float)
    return Bars.from_columns(
        close if open is None else np.array(open, float),
        close,
        np.ones(len(close)) if split is None else np.array(split, float),
        np.zeros(len(close)) if dividend is None else np.array(dividend, float),
        np.isfinite(close),
    )


def run(bars, config, actions, start=0):
    """Every account's arrays after each step, and the rewards: actions [B, S]."""
    accounts = Accounts.start(len(actions), config.cash)
    states, rewards = [], []
    for s, action in enumerate(actions.T):
        reward, _ = Single.of(config, bars).step(accounts, start + s, action)
        rewards.append(reward)
        states.append({k: v.copy() for k, v in accounts.arrays().items()})
    return states, np.array(rewards).T


def one(bars, config, *actions):
    """One account after `actions` from day 0 on, its values as scalars, and its rewards."""
    states, rewards = run(bars, config, np.array([actions]))
    return {k: v[0] for k, v in states[-1].items()}, rewards[0]


def assert_same(arrays, others):
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


# Against the oracle -----------------------------------------------------------------------------


def compare(bars, config, seed, num_accounts=4):
    rng = np.random.default_rng(seed)
    days = oracles.days_of(bars)
    twins = [oracles.Account(days, config) for _ in range(num_accounts)]
    accounts = Accounts.start(num_accounts, config.cash)
    peak = config.cash
    for day in range(len(bars) - 1):
        action = rng.integers(0, 3, num_accounts)
        action = np.where(rng.random(num_accounts) < 0.3, HOLD, action)
        mask = Single.of(config, bars).allowed(day, np.sign(accounts.shares))
        codes = Single.of(config, bars).code(accounts, day)
        for b, twin in enumerate(twins):
            assert [ACTIONS[a] for a in np.flatnonzero(mask[b])] == twin.allowed(day)
            assert decode(codes[b]) == twin.shown(day)
        by_code = Single.of(config, bars).allowed(day, side_of(codes))
        np.testing.assert_array_equal(by_code, mask)

        reward, terminated = Single.of(config, bars).step(accounts, day, action)
        for b, twin in enumerate(twins):
            expected, ruined = twin.step(day, ACTIONS[action[b]])
            assert terminated[b] == ruined and accounts.alive[b] == twin.alive
            peak = max(peak, abs(twin.equity), abs(twin.cash))
            for name in ("cash", "equity", "fees", "shares", "entry"):
                value, wanted = getattr(accounts, name)[b], getattr(twin, name)
                scale = peak if name in ("cash", "equity", "fees") else abs(wanted)
                assert abs(value - wanted) <= 1e-12 * scale, (name, day, value, wanted)
            assert accounts.opened[b] == twin.opened
            waiting = -1 if twin.waiting is None else ACTIONS.index(twin.waiting)
            assert accounts.pending[b] == waiting
            assert accounts.count[b] == len(twin.profits)
            assert abs(accounts.mean[b] * accounts.count[b] - sum(twin.profits)) <= 1e-11 * peak
            tolerance = 1e-12 * max(1.0, abs(twin.sharpe))
            assert abs(accounts.sharpe[b] - twin.sharpe) <= tolerance
            assert abs(reward[b] - expected) <= 2 * tolerance + 1e-12
    for b, twin in enumerate(twins):
        recent = twin.actions[-HISTORY:]
        empty = HISTORY - len(recent)
        assert accounts.actions[b].tolist() == [-1] * empty + [ACTIONS.index(a) for a in recent]
        assert np.isnan(accounts.rewards[b, :empty]).all()
        assert np.isnan(accounts.equities[b, :empty]).all()
        np.testing.assert_allclose(
            accounts.equities[b, empty:], twin.equities[-HISTORY:], atol=1e-12 * peak
        )
        if twin.alive:
            balance = config.cash + twin.gains + twin.dividends - accounts.fees[b]
            assert abs(balance - accounts.equity[b]) <= 1e-11 * peak
    return twins


@examples
@given(markets, configs, st.integers(0, 10**6))
def test_equals_the_oracle(bars, config, seed):
    compare(bars, config, seed)


@pytest.mark.parametrize("dividends", ["reinvest", "cash"])
@pytest.mark.parametrize("fill,positions", MODES)
def test_equals_the_oracle_in_every_mode(fill, positions, dividends):
    fills = 0
    for case, (reward, fee, lot) in enumerate(
        itertools.product(("sharpe", "log_return"), (0.0, 25.0), (0.0, 1.0))
    ):
        config = SimulatorConfig(
            fill=fill,
            positions=positions,
            reward=reward,
            dividends=dividends,
            fee_bps=fee,
            slippage_bps=fee,
            lot=lot,
        )
        for seed in range(4):
            bars = Bars.from_columns(*oracles.random_bars(100 * case + seed, days=40))
            fills += sum(twin.fills for twin in compare(bars, config, seed))
    assert fills > 300


@examples
@given(markets, configs, st.integers(0, 10**6))
def test_equity_is_cash_and_shares_and_rewards_sum_to_the_sharpe_ratio(bars, config, seed):
    actions = np.random.default_rng(seed).integers(0, 3, (4, len(bars) - 1))
    states, rewards = run(bars, config, actions)
    for day, state in enumerate(states, 1):
        held = np.where(state["shares"] == 0, 0.0, state["shares"] * bars.mark[day])
        np.testing.assert_allclose(state["equity"], state["cash"] + held, rtol=1e-12)
        assert np.isfinite(state["equity"]).all() and np.isfinite(rewards).all()
        if config.positions == "long_flat":
            assert (state["cash"] >= 0).all() and (state["shares"] >= 0).all()
    last = states[-1]
    if config.reward == "sharpe":
        scale = np.maximum(1.0, np.abs(rewards).sum(1))
        assert (np.abs(rewards.sum(1) - last["sharpe"]) <= 1e-12 * scale).all()
    else:
        floor = config.ruin * config.cash
        total = np.log(np.maximum(last["equity"], floor) / config.cash)
        np.testing.assert_allclose(rewards.sum(1), total, atol=1e-11)


@examples
@given(markets, configs, st.integers(0, 10**6))
def test_a_masked_action_is_hold_and_an_allowed_one_executes(bars, config, seed):
    config = dataclasses.replace(config, lot=0.0)
    rng = np.random.default_rng(seed)
    accounts = Accounts.start(6, config.cash)
    for day in range(len(bars) - 1):
        shares = accounts.shares.copy()
        action = rng.integers(0, 3, 6)
        mask = Single.of(config, bars).allowed(day, np.sign(shares))[np.arange(6), action]
        twin = Accounts.from_arrays(accounts.arrays())
        Single.of(config, bars).step(accounts, day, action)
        Single.of(config, bars).step(twin, day, np.where(mask, action, HOLD))
        assert_same(accounts.arrays(), twin.arrays())
        filled = accounts.pending < 0
        executed = mask & filled & accounts.alive & bars.tradable[day]
        side = np.sign(accounts.shares)
        if config.positions == "long_short":
            # An account whose cash is gone at the fill opens nothing.
            ok = (side == action - 1) | (accounts.cash <= 0)
        else:
            ok = np.select([action == BUY, action == SELL], [side == 1, side == 0], True)
        assert ok[executed].all()


# By hand ----------------------------------------------------------------------------------------


def test_buying_pays_fee_and_slippage_out_of_the_cash():
    config = SimulatorConfig(fee_bps=10.0, slippage_bps=20.0, cash=1000.0)
    account, _ = one(bars_of([90, 101], open=[90, 100]), config, BUY)
    paid = 100 * 1.002
    assert account["cash"] == 0.0
    assert account["shares"] == pytest.approx(1000 / (paid * 1.001), rel=1e-15)
    assert account["entry"] == pytest.approx(paid * 1.001, rel=1e-15)
    assert account["equity"] == pytest.approx(account["shares"] * 101, rel=1e-15)
    costs = account["shares"] * (paid * 0.001 + 0.2)
    assert account["fees"] == pytest.approx(costs, rel=1e-13)
    assert account["equity"] == pytest.approx(1000 + account["shares"] * 1 - costs, rel=1e-14)


def test_lots_are_whole_and_the_rest_stays_cash():
    config = SimulatorConfig(fee_bps=100.0, slippage_bps=0.0, cash=1000.0, lot=3.0)
    account, _ = one(bars_of([40, 40, 50]), config, BUY, HOLD)
    assert (account["shares"], account["cash"]) == (24.0, pytest.approx(1000 - 24 * 40.4))
    poor = dataclasses.replace(config, cash=100.0)
    account, rewards = one(bars_of([40, 40, 50]), poor, BUY, BUY)
    assert (account["shares"], account["cash"], account["fees"]) == (0.0, 100.0, 0.0)
    assert account["entry"] == 0.0 and account["opened"] == -1 and not rewards.any()


def test_a_short_is_worth_the_equity_after_its_fee():
    config = SimulatorConfig(
        positions="long_short", fill="next_close", fee_bps=50.0, slippage_bps=30.0, cash=1000.0
    )
    account, _ = one(bars_of([20, 25]), config, SELL)
    sold = 25 * 0.997
    assert -account["shares"] * sold == pytest.approx(1000 / 1.005, rel=1e-14)
    assert account["cash"] + account["shares"] * sold == pytest.approx(
        -account["shares"] * sold, rel=1e-14
    )
    assert account["entry"] == pytest.approx(sold * 0.995, rel=1e-15)


@pytest.mark.parametrize(
    "fill,price,opened", [("next_open", 11, 1), ("next_close", 12, 1), ("same_close", 10, 0)]
)
def test_where_an_order_is_filled(fill, price, opened):
    bars = bars_of([10, 12], open=[9, 11])
    account, _ = one(bars, SimulatorConfig(fill=fill, **FREE), BUY)
    assert account["entry"] == price and account["opened"] == opened
    assert account["equity"] == pytest.approx(100_000 * 12 / price, rel=1e-15)


def test_an_order_waits_for_a_bar_and_nothing_else_is_heard():
    bars = bars_of([10, np.nan, np.nan, 20, 21])
    config = SimulatorConfig(positions="long_short", fill="next_close", **FREE)
    waiting, _ = one(bars, config, BUY, SELL)
    assert waiting["pending"] == BUY and waiting["shares"] == 0
    account, _ = one(bars, config, BUY, SELL, SELL)
    assert account["entry"] == 20 and account["opened"] == 3 and account["pending"] == -1
    assert account["actions"][-3:].tolist() == [BUY, HOLD, HOLD]
    with_hold, _ = one(bars_of([10, 11, np.nan, 20]), config, BUY, HOLD, HOLD)
    assert with_hold["shares"] == 0 and with_hold["equity"] == pytest.approx(100_000 * 20 / 11)


def test_hold_without_a_bar_keeps_a_short():
    bars = bars_of([10, 10, np.nan, 8])
    config = SimulatorConfig(positions="long_short", fill="same_close", **FREE)
    account, _ = one(bars, config, SELL, SELL, HOLD)
    assert account["shares"] < 0 and account["equity"] == pytest.approx(120_000)


def test_the_same_side_again_costs_nothing():
    bars = bars_of([10, 11, 12, 13, 14])
    config = SimulatorConfig(positions="long_short", fee_bps=100.0)
    once, _ = one(bars, config, BUY)
    often, _ = one(bars, config, BUY, BUY, BUY, BUY)
    assert once["fees"] == often["fees"] and once["shares"] == often["shares"]


def test_the_reward_is_the_change_of_the_sharpe_ratio():
    close = [10, 11, 10.5, 12, 13, 12.2]
    config = SimulatorConfig(fill="same_close", **FREE)
    _, rewards = one(bars_of(close), config, BUY, *[HOLD] * 4)
    profit = np.diff(close) * 10_000
    sharpe = [0.0] + [profit[:n].mean() / profit[:n].std(ddof=1) for n in range(2, 6)]
    np.testing.assert_allclose(rewards, np.diff([0.0, *sharpe]), rtol=1e-12, atol=1e-13)


def test_hold_from_cash_earns_exactly_nothing_and_actions_matter():
    bars = Bars.from_columns(*oracles.random_bars(5, days=30))
    for fill, positions in MODES:
        config = SimulatorConfig(fill=fill, positions=positions)
        actions = np.repeat([[SELL], [HOLD], [BUY]], 29, axis=1)
        states, rewards = run(bars, config, actions)
        assert not rewards[HOLD].any() and states[-1]["equity"][HOLD] == config.cash
        assert states[-1]["equity"][BUY] != config.cash
        if positions == "long_short":
            assert states[-1]["equity"][SELL] not in states[-1]["equity"][[HOLD, BUY]]


def test_a_constant_price_is_no_sharpe_ratio():
    close = np.full(30, 33.33)
    split = np.ones(30)
    split[[5, 9]] = 3.0, 0.7
    config = SimulatorConfig(fill="next_close", **FREE)
    bars = bars_of(close / np.cumprod(split), split=split)
    _, rewards = one(bars, config, BUY, *[HOLD] * 28)
    assert not rewards.any()


def stocks(symbol):
    path = files("bokeh_sampledata") / "_data" / "stocks.csv.gz"
    with path.open("rb") as file, gzip.open(file) as table:
        frame = pd.read_csv(table)
    frame.columns = [name.lower().replace(" ", "_") for name in frame.columns]
    return frame[frame.ticker == symbol].set_index("date")


@pytest.mark.parametrize("lot", [0.0, 1.0])
def test_the_split_of_aapl_makes_no_jump(lot):
    frame = stocks("AAPL").loc["2005-02-18":"2005-03-04"]
    ratio = frame.adj_close / frame.close
    factor = (ratio / ratio.shift(1)).fillna(1.0)
    split = np.where(factor > 1.5, 2.0, 1.0)
    assert split.sum() == len(frame) + 1 and split[list(frame.index).index("2005-02-28")] == 2
    bars = bars_of(frame.close, open=frame.open, split=split)
    config = SimulatorConfig(fill="same_close", lot=lot, **FREE)
    states, _ = run(bars, config, np.array([[BUY] + [HOLD] * (len(frame) - 2)]))
    equity = np.array([s["equity"][0] for s in states])
    adjusted = frame.close.to_numpy() * np.cumprod(split)
    share = 1 if lot == 0 else states[0]["shares"][0] * adjusted[0] / config.cash
    wanted = config.cash * (1 + share * (adjusted[1:] / adjusted[0] - 1))
    np.testing.assert_allclose(equity, wanted, rtol=1e-12)
    split_day = list(frame.index).index("2005-02-28") - 1
    move = equity[split_day] / equity[split_day - 1] - 1
    assert move == pytest.approx(2 * 44.86 / 88.99 - 1, rel=1e-2 if lot else 1e-12)


def test_a_reverse_split_pays_part_lots_out():
    bars = bars_of([10, 10, 100, 100], split=[1, 1, 0.1, 1])
    config = SimulatorConfig(fill="next_close", lot=1.0, cash=157.0, **FREE)
    account, _ = one(bars, config, BUY, HOLD)
    assert (account["shares"], account["cash"], account["entry"]) == (1.0, 57.0, 100.0)
    small = dataclasses.replace(config, cash=57.0)
    account, _ = one(bars, small, BUY, HOLD)
    assert (account["shares"], account["cash"], account["opened"]) == (0.0, 57.0, -1)


@pytest.mark.parametrize("reward", ["sharpe", "log_return"])
@pytest.mark.parametrize("jump", [1.995, 2.0, 1e9])
def test_ruin_closes_the_account_for_good(reward, jump):
    bars = bars_of([10, 10, 10 * jump, 5, 20, 5])
    config = SimulatorConfig(positions="long_short", fill="next_close", reward=reward)
    accounts = Accounts.start(2, config.cash)
    Single.of(config, bars).step(accounts, 0, np.array([SELL, HOLD]))
    got, terminated = Single.of(config, bars).step(accounts, 1, np.array([SELL, HOLD]))
    equity = accounts.equity[0]
    assert terminated.tolist() == [True, False] and accounts.alive.tolist() == [False, True]
    assert np.isfinite(got).all() and got[0] < 0 and 0 <= equity <= 1000
    assert accounts.shares[0] == 0 and accounts.cash[0] == equity
    before = accounts.arrays()
    before = {k: v[0].copy() for k, v in before.items()}
    for day in (2, 3, 4):
        got, terminated = Single.of(config, bars).step(accounts, day, np.array([BUY, BUY]))
        assert got[0] == 0 and not terminated[0]
    assert_same(before, {k: v[0] for k, v in accounts.arrays().items()})
    accounts.reset(np.array([True, False]))
    fresh = Accounts.start(1, config.cash).arrays()
    assert_same(
        {k: v[0] for k, v in fresh.items()}, {k: v[0] for k, v in accounts.arrays().items()}
    )
    assert accounts.shares[1] > 0


def test_refusals():
    bars = bars_of([10, 11])
    accounts = Accounts.start(1, 1000.0)
    for change in ({"fee_bps": -1.0}, {"slippage_bps": 1e4}, {"lot": -1.0}, {"ruin": 0.0}):
        with pytest.raises(InputError, match=next(iter(change))):
            Single.of(SimulatorConfig(**change), bars).step(accounts, 0, np.array([HOLD]))
    config = SimulatorConfig()
    with pytest.raises(ValueError, match="moment"):
        Single.of(config, bars).step(accounts, 1, np.array([HOLD]))
    with pytest.raises(ValueError, match="actions"):
        Single.of(config, bars).step(accounts, 0, np.array([3]))
    with pytest.raises(ValueError, match="open"):
        Bars(np.ones(2), *[np.ones(3)] * 4, np.ones(3, bool), np.ones(3))
    with pytest.raises(ValueError, match="cash"):
        Accounts.from_arrays(accounts.arrays() | {"cash": np.zeros((1, 2))})
    with pytest.raises(ValueError, match="codes"):
        decode(CODES)


def test_codes_decode_to_distinct_states():
    states = [decode(code) for code in range(CODES)]
    assert len(set(states)) == CODES and states[0] == (0, 0, 0)
    assert {s[0] for s in states} == {-1, 0, 1}


def test_bars_of_a_market():
    bars_module = pytest.importorskip("fastflag.market.bars")
    close = np.array([[10.0, 1], [np.nan, 2], [12, 3]])
    high = close.copy()
    high[2, 0] = np.nan
    market = bars_module.Market(
        dates=np.array(["2020-01-01", "2020-01-02", "2020-01-03"], "datetime64[D]"),
        symbols=("A", "B"),
        open=close,
        high=high,
        low=close,
        close=close,
        volume=np.ones((3, 2)),
        split=np.array([[1.0, 1], [2, 1], [1, 1]]),
        dividend=np.zeros((3, 2)),
        news=(),
    )
    bars = Bars.from_market(market, "A")
    assert bars.tradable.tolist() == [True, False, False]
    assert bars.mark.tolist() == [10, 5, 5] and bars.split.tolist() == [1, 2, 1]
    assert Bars.from_market(market, "B").tradable.all()


# No look-ahead ----------------------------------------------------------------------------------


def perturbed(columns, day, how):
    """The same bars up to `day`, others after it."""
    open_, close, split, dividend, tradable = (column.copy() for column in columns)
    after = slice(day + 1, None)
    if how == "scale":
        for column in (open_, close, dividend):
            column[after] *= 3.7
        split[after] = 5.0
    else:
        open_[after], close[after], tradable[after] = np.nan, np.nan, False
    return Bars.from_columns(open_, close, split, dividend, tradable)


@pytest.mark.parametrize("dividends", ["reinvest", "cash"])
@pytest.mark.parametrize("how", ["scale", "missing"])
@pytest.mark.parametrize("fill,positions", MODES)
def test_nothing_depends_on_the_future(fill, positions, how, dividends):
    config = SimulatorConfig(fill=fill, positions=positions, dividends=dividends, lot=1.0)
    columns = oracles.random_bars(17, days=16, missing=0.3, split=0.2, dividend=0.4)
    bars = Bars.from_columns(*columns)
    actions = np.random.default_rng(3).integers(0, 3, (32, 15))
    states, rewards = run(bars, config, actions)
    reached = Single.of(config, bars).reachable(range(16), Accounts.start(1, config.cash))
    for day in range(15):
        other = perturbed(columns, day, how)
        other_states, other_rewards = run(other, config, actions)
        np.testing.assert_array_equal(rewards[:, :day], other_rewards[:, :day])
        other_reached = Single.of(config, other).reachable(
            range(16), Accounts.start(1, config.cash)
        )
        np.testing.assert_array_equal(reached[: day + 1], other_reached[: day + 1])
        for t in range(1, day + 1):
            assert_same(states[t - 1], other_states[t - 1])
            accounts = Accounts.from_arrays(states[t - 1])
            seen, other_seen = (
                (
                    Single.of(config, some).code(accounts, t),
                    Single.of(config, some).allowed(t, np.sign(accounts.shares)),
                )
                for some in (bars, other)
            )
            np.testing.assert_array_equal(seen[0], other_seen[0])
            np.testing.assert_array_equal(seen[1], other_seen[1])


# Reachable --------------------------------------------------------------------------------------


@examples
@given(markets, configs, st.integers(0, 10**6), st.integers(0, 39))
def test_every_visited_code_is_reachable(bars, config, seed, carried):
    rng = np.random.default_rng(seed)
    accounts = Accounts.start(48, config.cash)
    start = min(carried, len(bars) - 1)
    for day in range(start):
        Single.of(config, bars).step(accounts, day, rng.integers(0, 3, 48))
    reached = Single.of(config, bars).reachable(range(start, len(bars)), accounts)
    assert reached[:, 0].all()
    for day in range(start, len(bars)):
        assert reached[day - start, Single.of(config, bars).code(accounts, day)].all()
        if day + 1 < len(bars):
            Single.of(config, bars).step(accounts, day, rng.integers(0, 3, 48))


def test_reachable_is_small():
    bars = Bars.from_columns(*oracles.random_bars(1, days=64, missing=0, split=0, volatility=0.02))
    start = Accounts.start(1, 1.0)
    reached = Single.of(SimulatorConfig(), bars).reachable(range(64), start)
    assert reached[0].sum() == 1 and reached[1].sum() == 2
    assert reached.sum(1).max() <= 64


# Random numbers and rollouts --------------------------------------------------------------------


def test_uniform_is_splitmix64():
    for seed, env, step in [(0, 0, 0), (3, 5, 7), (2**63, 1, 10**12), (-1, 0, 2)]:
        assert uniform(seed, env, step)[0] == oracles.splitmix(seed % 2**64, env, step)
    values = np.concatenate([uniform(9, np.arange(1000), s) for s in range(100)])
    assert values.min() >= 0 and values.max() < 1 and len(np.unique(values)) == len(values)
    assert uniform(4, 6, 9) == uniform(10, 0, 9)
    grid = values.reshape(100, 1000)
    assert abs(np.corrcoef(grid[0], grid[1])[0, 1]) < 0.1
    assert abs(np.corrcoef(grid[:, 0], grid[:, 1])[0, 1]) < 0.4


def policy_for(bars, config, days, accounts, seed=0):
    """A random policy over what is reachable in `days`: (cdf, row_of)."""
    reached = Single.of(config, bars).reachable(days, accounts)
    place, code = np.nonzero(reached)
    row_of = np.full((len(bars), CODES), -1, np.int32)
    row_of[np.array(days)[place], code] = np.arange(len(place))
    mask = Single.of(config, bars).allowed(np.array(days)[place], side_of(code))
    weights = np.random.default_rng(seed).dirichlet(np.ones(3), len(place)) * mask
    return np.cumsum(weights / weights.sum(1, keepdims=True), axis=1), row_of


def roll(bars, config, accounts, days, restarts, policy, **changes):
    arguments = {"seed": 11, "first_env": 0, "first_step": 5} | changes
    return vars(Single.of(config, bars).rollout(accounts, days, restarts, *policy, **arguments))


def case_of(fill, positions, seed=2, size=64, **rules):
    """A market wild enough for ruin, 33 steps with a restart in between, and carried accounts."""
    config = SimulatorConfig(fill=fill, positions=positions, ruin=0.4, **rules)
    bars = Bars.from_columns(*oracles.random_bars(seed, days=40, volatility=0.2))
    days = np.concatenate([np.arange(3, 15), np.arange(9, 30)])
    restarts = np.zeros(len(days), bool)
    restarts[12] = True
    accounts = Accounts.start(size, config.cash)
    rng = np.random.default_rng(seed)
    for day in range(3):
        Single.of(config, bars).step(accounts, day, rng.integers(0, 3, size))
    policy = policy_for(bars, config, range(3, 32), accounts)
    return bars, config, accounts, days, restarts, policy


LANES = lanes.LANES
SIZES = [1, 7, LANES - 1, LANES + 3, 2 * LANES]


@pytest.mark.parametrize(
    "rules", [{}, {"reward": "log_return"}, {"lot": 10.0}, {"dividends": "cash"}], ids=str
)
@pytest.mark.parametrize("fill,positions", MODES)
def test_a_rollout_is_a_loop_of_steps(fill, positions, rules):
    equals_its_steps(case_of(fill, positions, **rules), ruin=positions == "long_short")


@pytest.mark.parametrize("size", SIZES)
def test_any_number_of_accounts_is_a_loop_of_steps(size):
    equals_its_steps(case_of("next_open", "long_short", size=size), ruin=size > 1)


def equals_its_steps(case, ruin):
    bars, config, accounts, days, restarts, policy = case
    size = len(accounts)
    cdf, row_of = policy
    stepped = Accounts.from_arrays(accounts.arrays())
    out = roll(bars, config, accounts, days, restarts, policy)
    for s, (day, restart) in enumerate(zip(days, restarts, strict=True)):
        if restart:
            stepped.reset(np.ones(size, bool))
        row = row_of[day, Single.of(config, bars).code(stepped, day)]
        u = uniform(11, np.arange(size), 5 + s) * cdf[row, 2]
        action = np.array(
            [np.searchsorted(cdf[r], x, "right") for r, x in zip(row, u, strict=True)]
        )
        alive = stepped.alive.copy()
        reward, terminated = Single.of(config, bars).step(stepped, day, action)
        np.testing.assert_array_equal(out["row"][:, s], row)
        np.testing.assert_array_equal(out["valid"][:, s], alive)
        np.testing.assert_array_equal(out["action"][:, s], np.where(alive, action, HOLD))
        np.testing.assert_array_equal(out["reward"][:, s], reward)
        np.testing.assert_array_equal(out["terminated"][:, s], terminated)
        next_row = row_of[day + 1, Single.of(config, bars).code(stepped, day + 1)]
        np.testing.assert_array_equal(out["next_row"][:, s], next_row)
    assert_same(accounts.arrays(), stepped.arrays())
    assert not ruin or out["terminated"].any()
    dead = ~out["valid"]
    assert not out["reward"][dead].any() and not dead[:, restarts].any()


@pytest.mark.parametrize("fill,positions", MODES)
def test_an_environment_alone_is_itself_in_the_batch(fill, positions):
    bars, config, accounts, days, restarts, policy = case_of(fill, positions)
    before = {k: v.copy() for k, v in accounts.arrays().items()}
    out = roll(bars, config, accounts, days, restarts, policy)
    for b in (0, 1, 17, 63):
        single = Accounts.from_arrays({k: v[b : b + 1] for k, v in before.items()})
        alone = roll(bars, config, single, days, restarts, policy, first_env=b)
        for name, array in alone.items():
            np.testing.assert_array_equal(array[0], out[name][b], err_msg=name)
        assert_same(single.arrays(), {k: v[b : b + 1] for k, v in accounts.arrays().items()})
        single = Accounts.from_arrays({k: v[b : b + 1] for k, v in before.items()})
        alone = roll(bars, config, single, days, restarts, policy, seed=11 + b)
        np.testing.assert_array_equal(alone["action"][0], out["action"][b])


def test_a_rollout_in_parts_is_the_rollout():
    bars, config, accounts, days, restarts, policy = case_of("next_open", "long_short")
    parts = Accounts.from_arrays(accounts.arrays())
    whole = roll(bars, config, accounts, days, restarts, policy)
    for part in (slice(0, 7), slice(7, 20), slice(20, None)):
        first_step = 5 + part.start
        out = roll(bars, config, parts, days[part], restarts[part], policy, first_step=first_step)
        for name, array in out.items():
            np.testing.assert_array_equal(array, whole[name][:, part], err_msg=name)
    assert_same(accounts.arrays(), parts.arrays())


def test_threads_share_a_rollout_and_change_nothing(monkeypatch):
    one = case_of("next_open", "long_short", size=5 * LANES + 9)
    shared = Accounts.from_arrays(one[2].arrays())
    out = roll(*one)
    monkeypatch.setattr(rolling, "_THREADED_STEPS", 1)
    for threads, parts in [(2, 2), (4, 3), (100, 6)]:
        monkeypatch.setattr(rolling.numba_config, "NUMBA_NUM_THREADS", threads)
        several = Accounts.from_arrays(shared.arrays())
        assert len(rolling.parts_of(len(several), 33, LANES)) == parts
        for name, array in roll(*one[:2], several, *one[3:]).items():
            np.testing.assert_array_equal(array, out[name], err_msg=name)
        assert_same(several.arrays(), one[2].arrays())


def test_they_leave_pytorchs_number_of_threads_alone():
    """A run that is resumed must not have another one than the run that it goes on from."""
    code = (
        "import torch; from fastflag.market.tasks import rolling\n"
        "assert len(rolling.parts_of(10**6, 10, 256)) == 3\n"
        "print(torch.get_num_threads())"
    )
    variables = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "3"}
    root = Path(rolling.__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=root, capture_output=True, text=True
    )
    assert done.stdout == "1\n", done.stderr


PROBABILITIES = [(0.2, 0.5, 0.3), (0.0, 0.9, 0.1), (0.4, 0.0, 0.6), (1 / 3, 2 / 3, 0.0), (0, 1, 0)]


@pytest.mark.parametrize("probabilities", PROBABILITIES)
@pytest.mark.parametrize("total", [1.0, 0.7])
def test_sampling_frequencies(probabilities, total):
    bars = bars_of([10, 10])
    config = SimulatorConfig(positions="long_short")
    cdf = np.cumsum([probabilities], axis=1) * total
    row_of = np.zeros((2, CODES), np.int32)
    days, restarts = np.zeros(200, int), np.ones(200, bool)
    out = roll(bars, config, Accounts.start(5000, 1e5), days, restarts, (cdf, row_of))
    counts = np.bincount(out["action"].ravel(), minlength=3)
    expected = np.array(probabilities) * 1e6
    assert not counts[expected == 0].any()
    some = expected > 0
    # The 99.99% point of chi-square with 2 degrees of freedom.
    assert ((counts - expected)[some] ** 2 / expected[some]).sum() < 18.4


def test_an_action_of_probability_zero_is_not_drawn_at_the_edge():
    # The largest number below 1, against distributions whose rounded total is not 1.
    u = 1.0 - 2.0**-53
    rng = np.random.default_rng(0)
    for scale in np.exp(rng.normal(0, 3, 500)):
        first = rng.random() * scale
        cdf = np.array([[first, scale, scale], [0.0, 0.0, scale], [scale, scale, scale]])
        drawn = [int(lanes._sample_nb(cdf, row, u)) for row in range(3)]
        assert drawn == [1, 2, 0]
        assert [int(lanes._sample_nb(cdf, row, 0.0)) for row in range(3)] == [0, 2, 0]


def test_rollout_refuses_what_can_not_be():
    bars, config, accounts, days, restarts, (cdf, row_of) = case_of("next_open", "long_flat")
    absent = row_of.copy()
    absent[14, 0] = -1
    with pytest.raises(RuntimeError, match="code 0 has no prompt at moment 14"):
        roll(bars, config, accounts, days, restarts, (cdf, absent))
    broken = cdf.copy()
    broken[4] = np.nan
    with pytest.raises(RuntimeError, match="row 4"):
        roll(bars, config, accounts, days, restarts, (broken, row_of))
    with pytest.raises(ValueError, match="consecutive"):
        roll(bars, config, accounts, days, np.zeros_like(restarts), (cdf, row_of))
    with pytest.raises(ValueError, match="moment"):
        roll(bars, config, accounts, np.array([39]), np.array([True]), (cdf, row_of))
