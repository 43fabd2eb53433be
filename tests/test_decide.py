"""decide against the backtest that lived through the same days."""

import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
from small import make_opinionated, small_config, small_market, small_world

from fastflag.config import PromptConfig, SimulatorConfig
from fastflag.evaluate import episodes
from fastflag.evaluate.decide import decide
from fastflag.files import InputError
from fastflag.market.tasks.single import BUY, HOLD, SELL, Single

DAYS = range(4, 36)
PRICES = ("open", "high", "low", "close")


def split_market():
    """A market with a 2:1 split, a reverse split, dividends and a day without a bar."""
    market = small_market()
    split = np.ones_like(market.split)
    split[12], split[25] = 2.0, 0.25
    prices = {name: getattr(market, name) / np.cumprod(split)[:, None] for name in PRICES}
    for values in prices.values():
        values[20] = np.nan
    dividend = np.zeros_like(split)
    dividend[[8, 14, 29]] = 0.05 * prices["close"][[8, 14, 29]]
    return dataclasses.replace(market, split=split, dividend=dividend, **prices)


@pytest.fixture(scope="module")
def small(tiny_model):
    """(a market, and its world and policy by position mode; "cash": by it and paid in cash)"""
    market, made = split_market(), {}
    free = {"fee_bps": 0.0, "slippage_bps": 0.0}
    for name, rules in {
        "long_flat": SimulatorConfig(**free),
        "long_short": SimulatorConfig(positions="long_short", **free),
        "cash": SimulatorConfig(dividends="cash", **free),
    }.items():
        config = small_config(tiny_model, simulator=rules, prompt=PromptConfig(window=2))
        world, policy, _ = small_world(config, market)
        make_opinionated(policy)
        made[name] = (world, policy)
    return market, made


def lived_through(world, policy, choose):
    """The episode, and the account as it was at each decision."""
    accounts = {}
    real = Single.step

    def step(task, account, day, action):
        """A day is lived through in guesses first: the last time counts. Accounts that centre the
        features step at many moments at once."""
        if not np.ndim(day):
            accounts[day] = {name: array[0] for name, array in account.arrays().items()}
        return real(task, account, day, action)

    with mock.patch.object(Single, "step", step):
        return episodes.run_episodes(policy, world, DAYS, 1, choose), list(accounts.values())


def long_over_a_split(positions):
    """Long from the first day to the 14th, then flat; where it may, short from the 18th on."""

    def choose(probabilities, number):
        if positions != "long_short":
            action = {0: BUY, 14: SELL}.get(number, HOLD)
        else:
            action = BUY if number < 14 else HOLD if number < 18 else SELL
        return np.array([action if probabilities[0, action] > 0 else HOLD], np.int8)

    return choose


@pytest.mark.parametrize("positions", ["long_flat", "long_short", "cash"])
def test_decides_as_the_backtest_did(positions, small):
    """Each day's account, told by its entry price as paid on the day, gives the same row."""
    market, made = small
    world, policy = made[positions]
    lived, accounts = lived_through(world, policy, long_over_a_split(positions))
    sides = set()
    for number, account in enumerate(accounts):
        day, held = DAYS[number], {}
        side = int(np.sign(account["shares"]))
        if side:
            opened = int(account["opened"])
            after = slice(opened + 1, day + 1)
            since_then = np.prod(market.split[after])
            if positions != "cash":
                yields = market.dividend[after] / market.close[after]
                since_then *= np.prod(1 + np.nan_to_num(yields))
            held = {
                "position": "long" if side > 0 else "short",
                "entry": float(account["entry"] * since_then),
                "since": str(market.dates[opened]),
            }
        document = decide(policy, world, str(market.dates[day]), **held)
        assert list(document["probabilities"].values()) == lived.probabilities[0, number].tolist()
        assert document["date"] == str(market.dates[day])
        sides.add(side)
    assert sides == ({0, 1, -1} if positions == "long_short" else {0, 1})


def test_a_split_since_the_entry_is_no_loss(small):
    """The price paid before a 2:1 split is worth half as much a share after it; a dividend of 5%
    that was reinvested counts as profit."""
    market, made = small
    world, policy = made["long_flat"]
    day, before, after = (str(market.dates[number]) for number in (14, 11, 12))
    paid = float(market.open[11, 0])
    told = decide(policy, world, day, "long", paid, before)
    wrongly = decide(policy, world, day, "long", paid, after)
    assert told["probabilities"] != wrongly["probabilities"]
    accounts = accounts_told(decide, policy, world, day, "long", paid, before)
    assert accounts.entry[0] == pytest.approx(paid / 2 / 1.05, rel=1e-15)
    on_the_day = accounts_told(decide, policy, world, day, "long", paid, after)
    assert on_the_day.entry[0] == pytest.approx(paid / 1.05, rel=1e-15)
    worth = world.task.rules.cash * market.close[14, 0] * 2 * 1.05 / paid
    assert accounts.equity[0] == pytest.approx(worth, rel=1e-12)


def test_a_short_position_owes_what_it_sold(small):
    market, made = small
    world, policy = made["long_short"]
    day, got, cash = str(market.dates[30]), float(market.close[30, 0]), world.task.rules.cash
    accounts = accounts_told(decide, policy, world, day, "short", got, day)
    assert accounts.equity[0] == pytest.approx(cash, rel=1e-12)
    assert accounts.shares[0] == pytest.approx(-cash / got, rel=1e-12)
    assert accounts.cash[0] == 2 * cash


def accounts_told(call, *arguments):
    """The accounts that a decision's prompt is made of."""
    seen = []

    def code(task, accounts, day, real=Single.code):
        seen.append(accounts)
        return real(task, accounts, day)

    with mock.patch.object(Single, "code", code):
        call(*arguments)
    return seen[0]


def test_a_day_without_a_bar_can_only_be_held(small):
    market, made = small
    for world, policy in made.values():
        document = decide(policy, world, str(market.dates[20]))
        assert document["action"] == "Hold"
        assert document["probabilities"] == {"Sell": 0.0, "Hold": 1.0, "Buy": 0.0}
        assert math.isfinite(document["value"])


def test_the_most_probable_action_is_taken(small):
    market, made = small
    world, policy = made["long_short"]
    seen = set()
    for date in market.dates[5:]:
        document = decide(policy, world, str(date))
        best = max(document["probabilities"], key=document["probabilities"].get)
        assert document["action"] == best
        seen.add(best)
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("position", "entry", "since", "told"),
    [
        ("short", 50.0, 4, r"never sells short \(long_flat\), --position short"),
        ("long", 0.0, 4, "needs the price it was entered at, --entry"),
        ("long", -3.0, 4, r"not a price \(1e-15 to 1e\+15\), --entry -3.0"),
        ("long", math.nan, 4, r"not a price \(1e-15 to 1e\+15\), --entry nan"),
        ("long", 1e-320, 4, r"not a price .*, --entry 1e-320"),
        ("flat", math.nan, None, r"not a price \(1e-15 to 1e\+15\), --entry nan"),
        ("long", math.inf, 4, r"not a price \(1e-15 to 1e\+15\), --entry inf"),
        ("long", 50.0, None, "needs the day it was entered on, --since"),
        ("long", 50.0, 31, "is after the decision's day, --since"),
        ("long", 50.0, 20, "nothing traded on .*, --since"),
        ("flat", 50.0, None, "a flat position has no entry"),
        ("flat", 0.0, 4, "a flat position has no entry"),
    ],
)
def test_refused_positions(position, entry, since, told, small):
    market, made = small
    world, policy = made["long_flat"]
    since = str(market.dates[since]) if since is not None else ""
    with pytest.raises(InputError, match=told):
        decide(policy, world, str(market.dates[30]), position, entry, since)


def test_entered_on_the_day_itself(small):
    market, made = small
    world, policy = made["long_flat"]
    date = str(market.dates[30])
    document = decide(policy, world, date, "long", float(market.open[30, 0]), date)
    assert document["probabilities"]["Buy"] == 0 < document["probabilities"]["Sell"]


@pytest.mark.parametrize("date", ["2001-01-06", "1990-01-01", "today", "2001-01", "", "2001-13-01"])
def test_refused_days(date, small):
    market, made = small
    world, policy = made["long_flat"]
    with pytest.raises(InputError, match="--date"):
        decide(policy, world, date)
    with pytest.raises(InputError, match="--since"):
        decide(policy, world, str(market.dates[30]), "long", 50.0, date)
