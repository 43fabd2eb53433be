import itertools

import numpy as np
import oracles
import pytest

from fastflag.config import SimulatorConfig
from fastflag.files import InputError
from fastflag.market import streams
from fastflag.market.bars import Bars
from fastflag.market.random_numbers import uniform
from fastflag.market.schedule import schedule
from fastflag.market.tasks.baselines import fixed_action_equity, random_equities
from fastflag.market.tasks.single import ACTIONS, BUY, HOLD, SELL, Single

MODES = list(
    itertools.product(("next_open", "next_close", "same_close"), ("long_flat", "long_short"))
)


def test_episodes_follow_one_another():
    days = range(100, 130)
    day, restart, last = schedule([days], 7, seed=3, group=1, first_step=0, num_steps=70)
    assert np.flatnonzero(restart).tolist() == list(range(0, 70, 7))
    assert np.flatnonzero(last).tolist() == list(range(6, 70, 7))
    assert (np.diff(day)[~last[:-1]] == 1).all()
    assert day.min() >= 100 and day.max() + 1 <= 129
    assert len(set(day[restart])) > 3


def test_any_part_of_the_schedule_is_that_part():
    days = range(5, 60)
    whole = schedule([days], 9, 0, 2, 0, 100)
    for first, count in [(0, 1), (13, 40), (98, 2), (50, 0)]:
        part = schedule([days], 9, 0, 2, first, count)
        for got, wanted in zip(part, whole, strict=True):
            np.testing.assert_array_equal(got, wanted[first : first + count])


def test_a_long_horizon_covers_every_day():
    day, restart, last = schedule([range(10, 74)], 65, 1, 0, 0, 126)
    assert day.tolist() == [*range(10, 73)] * 2
    assert np.flatnonzero(restart).tolist() == [0, 63] and np.flatnonzero(last).tolist() == [
        62,
        125,
    ]


def test_start_days_are_uniform_and_differ_by_group_and_seed():
    days, episodes = range(20, 31), 20_000
    day, restart, _ = schedule([days], 3, 7, 0, 0, 3 * episodes)
    counts = np.bincount(day[restart] - 20)
    assert len(counts) == 8
    # The 99.99% point of chi-square with 7 degrees of freedom.
    assert ((counts - episodes / 8) ** 2 / (episodes / 8)).sum() < 29.9
    starts = day[restart][:50].tolist()
    for seed, group in ((8, 0), (7, 1)):
        other, restart, _ = schedule([days], 3, seed, group, 0, 150)
        assert other[restart].tolist() != starts


@pytest.mark.parametrize("days,horizon", [(range(4, 5), 3), (range(4, 4), 3), (range(9), 0)])
def test_an_episode_needs_a_decision(days, horizon):
    with pytest.raises(InputError, match="episode"):
        schedule([days], horizon, 0, 0, 0, 1)


@pytest.mark.parametrize("fill,positions", MODES)
def test_random_and_fixed_policies_equal_the_oracle(fill, positions):
    config = SimulatorConfig(fill=fill, positions=positions, ruin=0.3)
    bars = Bars.from_columns(*oracles.random_bars(8, days=30, volatility=0.15))
    days = range(4, 28)
    equities = random_equities(Single.of(config, bars), days, 12, seed=6)
    for episode, values in enumerate(equities):
        twin = oracles.Account(oracles.days_of(bars), config)
        wanted = [twin.equity]
        for s, day in enumerate(days[:-1]):
            choices = twin.allowed(day)
            if choices == ["Hold"]:
                action = "Hold"
            else:
                u = uniform(streams.random_policies(6), episode, s)[0]
                action = choices[int(u * len(choices))]
            twin.step(day, action)
            wanted.append(twin.equity)
        np.testing.assert_allclose(values, wanted, rtol=1e-12)
    for action in (SELL, HOLD, BUY):
        twin = oracles.Account(oracles.days_of(bars), config)
        wanted = [twin.equity]
        for day in days[:-1]:
            twin.step(day, ACTIONS[action])
            wanted.append(twin.equity)
        got = fixed_action_equity(Single.of(config, bars), days, action)
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_buy_and_hold_by_hand():
    close = np.array([10.0, 11, 9, 12])
    bars = Bars.from_columns(close - 0.5, close, np.ones(4), np.zeros(4), np.ones(4, bool))
    config = SimulatorConfig(fee_bps=10, slippage_bps=20)
    equity = fixed_action_equity(Single.of(config, bars), range(4), BUY)
    shares = 100_000 / (10.5 * 1.002 * 1.001)
    np.testing.assert_allclose(equity, [100_000, shares * 11, shares * 9, shares * 12], rtol=1e-14)
    assert (fixed_action_equity(Single.of(config, bars), range(4), HOLD) == 100_000).all()


def test_random_policies_use_every_action_and_each_has_its_own_seed():
    bars = Bars.from_columns(*oracles.random_bars(3, days=20, missing=0))
    config = SimulatorConfig(positions="long_short")
    equities = random_equities(Single.of(config, bars), range(20), 200, seed=1)
    assert (equities[:, 0] == config.cash).all()
    assert len(np.unique(equities[:, -1])) == 200
    # After one step: long, flat or short.
    assert len(np.unique(equities[:, 1])) == 3
    np.testing.assert_array_equal(
        random_equities(Single.of(config, bars), range(20), 5, seed=4), equities[3:8]
    )


def test_the_future_changes_nothing_before_it():
    open_, close, split, dividend, tradable = oracles.random_bars(4, days=20)
    bars = Bars.from_columns(open_, close, split, dividend, tradable)
    for day in range(20):
        factor = np.where(np.arange(20) > day, 2.5, 1.0)
        other = Bars.from_columns(
            open_ * factor, close * factor, split * factor, dividend, tradable
        )
        for positions in ("long_flat", "long_short"):
            config = SimulatorConfig(positions=positions)
            first = random_equities(Single.of(config, bars), range(20), 8, 0)[:, : day + 1]
            second = random_equities(Single.of(config, other), range(20), 8, 0)[:, : day + 1]
            np.testing.assert_array_equal(first, second)


def test_refusals():
    bars = Bars.from_columns(*oracles.random_bars(3, days=20))
    with pytest.raises(ValueError, match="moment"):
        random_equities(Single.of(SimulatorConfig(), bars), range(5, 21), 1, 0)
    with pytest.raises(ValueError, match="actions"):
        fixed_action_equity(Single.of(SimulatorConfig(), bars), range(5), 3)
