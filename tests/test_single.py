"""The task `single` over several symbols, and its timeline."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import holey_market, small_market

from fastflag.config import SimulatorConfig
from fastflag.market.accounts import Accounts
from fastflag.market.bars import Bars
from fastflag.market.schedule import schedule
from fastflag.market.task import Steps, Timeline
from fastflag.market.tasks.baselines import random_equities
from fastflag.market.tasks.centring import centring_accounts
from fastflag.market.tasks.single import BUY, Single

RULES = SimulatorConfig(positions="long_short")
FIRST, SECOND = (
    Bars.from_market(market, market.symbols[0]) for market in (holey_market(), small_market())
)
BOTH = Single.of(RULES, FIRST, SECOND)
LATER = len(FIRST)  # the second symbol's first moment


def alone(bars):
    return Single.of(RULES, bars)


def test_a_timeline_knows_each_moments_span():
    timeline = Timeline((range(3), range(3, 5)))
    assert len(timeline) == 5
    assert timeline.first.tolist() == [0, 0, 0, 3, 3]
    assert timeline.last.tolist() == [2, 2, 2, 4, 4]
    timeline.check(np.array([0, 1, 3]), following=1)
    for moments, following in (([2], 1), ([4], 1), ([0], 3), ([3], 2), ([5], 0), ([-1], 0)):
        with pytest.raises(ValueError, match="moment"):
            timeline.check(np.array(moments), following)


@pytest.mark.parametrize(
    "spans", [(range(1, 3),), (range(3), range(4, 5)), (range(3), range(3, 3)), (range(0, 4, 2),)]
)
def test_spans_follow_one_another(spans):
    with pytest.raises(ValueError, match="spans"):
        Timeline(spans)


def test_a_symbol_beside_another_has_its_own_bars():
    """What is owed from the first symbol's last days is not paid in the second's first."""
    for name in ("mark", "payable", "split", "tradable"):
        joined = getattr(BOTH.bars, name)
        np.testing.assert_array_equal(joined[:LATER], getattr(FIRST, name))
        np.testing.assert_array_equal(joined[LATER:], getattr(SECOND, name))
    owing = Bars.from_columns(*np.ones((3, 2)), np.array([0.0, 5.0]), np.array([True, False]))
    assert Bars.joined([owing, SECOND]).payable.tolist() == [0.0, 0.0, *SECOND.payable]


def test_the_last_close_of_a_symbol_has_no_next():
    accounts = BOTH.start(1)
    for call in (
        lambda: BOTH.step(accounts, LATER - 1, np.array([BUY])),
        lambda: BOTH.reachable(range(LATER - 2, LATER + 1), accounts),
        lambda: BOTH.equities(range(LATER - 2, LATER + 1), 1, 0),
    ):
        with pytest.raises(ValueError, match="after it"):
            call()


@given(seed=st.integers(0, 2**32), day=st.integers(0, 30))
def test_accounts_live_in_the_second_symbol_as_in_it_alone(seed, day):
    """Steps, codes, what is reachable and what centres, to the bit."""
    random = np.random.default_rng(seed)
    accounts, expected = BOTH.start(8), BOTH.start(8)
    for at in range(day, day + 4):
        action = random.integers(0, 3, 8)
        done = BOTH.step(accounts, LATER + at, action)
        for one, other in zip(done, alone(SECOND).step(expected, at, action), strict=True):
            np.testing.assert_array_equal(one, other)
        codes = BOTH.code(accounts, LATER + at + 1)
        np.testing.assert_array_equal(codes, alone(SECOND).code(expected, at + 1))
    moments = range(LATER + day + 4, LATER + day + 7)
    reached = BOTH.reachable(moments, accounts)
    days = range(day + 4, day + 7)
    np.testing.assert_array_equal(reached, alone(SECOND).reachable(days, expected))


def test_baselines_are_those_of_the_symbol_alone():
    moments = range(LATER, LATER + len(SECOND))
    one = random_equities(BOTH, moments, 5, seed=3)
    np.testing.assert_array_equal(one, random_equities(alone(SECOND), range(40), 5, seed=3))


def test_what_centres_a_symbols_first_days_reads_no_other_symbol():
    """Holding periods are cycled over moments: asked where both timelines are at the same turn."""
    assert LATER % 4 == 0
    accounts, moment = centring_accounts(BOTH, range(LATER, LATER + 40))
    expected, day = centring_accounts(alone(SECOND), range(40))
    np.testing.assert_array_equal(moment, day + LATER)
    for name, array in accounts.arrays().items():
        other = getattr(expected, name)
        shifted = np.where(other >= 0, other + LATER, other) if name == "opened" else other
        np.testing.assert_array_equal(array, shifted, err_msg=name)


def test_an_episode_is_drawn_among_all_starts_of_all_symbols():
    """Starts uniformly over both spans; a span in which an episode does not fit has none."""
    spans = [range(0, 12), range(12, 15), range(15, 40)]
    moment, restart, last = schedule(spans, 6, 7, 0, 0, 6 * 4000)
    starts = moment[restart]
    assert set(starts) == {*range(6), *range(15, 34)}
    shares = np.bincount(starts)[[*range(6), *range(15, 34)]] / len(starts)
    np.testing.assert_allclose(shares, 1 / 25, atol=0.012)
    for at in np.flatnonzero(restart):
        lived = moment[at : at + 6]
        assert (np.diff(lived) == 1).all() and last[at + 5]
        assert any(lived[0] in span and lived[-1] + 1 in span for span in spans)


def test_a_rollout_over_two_symbols_is_a_loop_of_steps():
    """From the first symbol into the second by a restart; without one it is refused."""
    moments = np.concatenate([np.arange(30, 39), np.arange(LATER + 3, LATER + 9)])
    restarts = np.isin(moments, [30, LATER + 3])
    row_of = np.zeros((len(BOTH.timeline), BOTH.codes), np.int32)
    cdf = np.array([[0.3, 0.5, 1.0]])
    accounts, expected = BOTH.start(6), BOTH.start(6)
    steps = BOTH.rollout(accounts, moments, restarts, cdf, row_of, 0, 0, 0)
    for at, moment in enumerate(moments):
        expected.reset(np.full(6, restarts[at]))
        reward, terminated = BOTH.step(expected, moment, steps.action[:, at])
        np.testing.assert_array_equal(steps.reward[:, at], reward)
        np.testing.assert_array_equal(steps.terminated[:, at], terminated)
    for name, array in accounts.arrays().items():
        np.testing.assert_array_equal(array, getattr(expected, name), err_msg=name)
    with pytest.raises(ValueError, match="after it"):
        BOTH.rollout(accounts, np.arange(38, 41), np.zeros(3, bool), cdf, row_of, 0, 0, 0)


def test_steps_are_joined_by_accounts():
    parts = [Steps.empty(2, 3), Steps.empty(1, 3)]
    parts[1].reward[:] = 7.0
    joined = Steps.joined(parts)
    assert joined.reward.tolist() == [[0.0] * 3, [0.0] * 3, [7.0] * 3]
    assert joined.action.dtype == np.int8 and joined.row.dtype == np.int32


def test_accounts_start_with_the_rules_cash():
    assert BOTH.start(2).cash.tolist() == [RULES.cash] * 2
    assert isinstance(BOTH.start(1), Accounts)
