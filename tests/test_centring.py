"""The accounts whose prompts centre the features."""

import numpy as np
import pytest
from small import holey_market, small_market

from fastflag.config import SimulatorConfig
from fastflag.market.accounts import Accounts
from fastflag.market.bars import Bars
from fastflag.market.tasks.centring import centring_accounts
from fastflag.market.tasks.single import Single

RULES = {
    "long_flat": SimulatorConfig(),
    "long_short": SimulatorConfig(positions="long_short", fill="same_close"),
}


def bars_of(market):
    return Bars.from_market(market, market.symbols[0])


@pytest.mark.parametrize("positions", RULES)
def test_each_side_has_an_account_on_every_day(positions):
    bars, days = bars_of(small_market()), range(1, 24)
    accounts, of_day = centring_accounts(Single.of(RULES[positions], bars), days)
    sides = np.sign(accounts.shares).astype(int)
    expected = {"long_flat": [0, 1], "long_short": [-1, 0, 1]}[positions]
    for day in days:
        assert sorted(sides[of_day == day]) == expected
    assert len(accounts) == len(of_day) == len(days) * len(expected)


@pytest.mark.parametrize("positions", RULES)
def test_a_position_is_entered_at_a_close_and_kept(positions):
    """Against a replay of one account, with splits, dividends and days without a bar."""
    market, rules = holey_market(), RULES[positions]
    bars = bars_of(market)
    accounts, of_day = centring_accounts(Single.of(rules, bars), [23, 22, 9, 4, 5])
    for b, day in enumerate(of_day.tolist()):
        held = min([1, 3, 10, 30][day % 4], day)
        side = int(np.sign(accounts.shares[b]))
        one = Accounts.start(1, rules.cash)
        if side:
            price = bars.mark[day - held]
            one.shares[0] = side * rules.cash / price
            one.cash[0] = rules.cash - one.shares[0] * price
            one.entry[0], one.opened[0] = price, day - held
        for past in range(day - held, day):
            Single.of(rules, bars).step(one, past, 1 + side)
        for name, array in one.arrays().items():
            np.testing.assert_array_equal(array[0], getattr(accounts, name)[b], err_msg=name)
    assert len({tuple(code) for code in Single.of(rules, bars).code(accounts, of_day)[:, None]}) > 5


def test_a_day_has_the_same_accounts_whatever_other_days_are_asked_for():
    bars, rules = bars_of(small_market()), RULES["long_short"]
    many, day_of_many = centring_accounts(Single.of(rules, bars), range(24))
    few, day_of_few = centring_accounts(Single.of(rules, bars), [17, 3])
    for day in (3, 17):
        one, other = (
            a.take(np.flatnonzero(d == day)).arrays()
            for a, d in ((many, day_of_many), (few, day_of_few))
        )
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_before_the_first_bar_all_are_flat():
    bars = bars_of(small_market())
    late = np.arange(len(bars)) >= 6
    close = np.where(late, bars.close, np.nan)
    bars = Bars.from_columns(close, close, bars.split, bars.dividend, late)
    accounts, of_day = centring_accounts(Single.of(RULES["long_flat"], bars), range(24))
    assert (accounts.shares[of_day < 6] == 0).all()
    assert (accounts.cash[of_day < 6] == RULES["long_flat"].cash).all()
    assert (accounts.shares[of_day >= 6] > 0).any()


def test_the_first_day_alone():
    task = Single.of(RULES["long_flat"], bars_of(small_market()))
    accounts, of_day = centring_accounts(task, [0])
    assert of_day.tolist() == [0, 0] and np.sign(accounts.shares).tolist() == [0, 1]
    assert accounts.opened.tolist() == [-1, 0]
