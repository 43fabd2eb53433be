"""One decision: what the policy would do at the close of one day."""

from typing import Any

import numpy as np
import torch

from fastflag.evaluate.episodes import greedy
from fastflag.files import InputError
from fastflag.market.accounts import Accounts
from fastflag.market.bars import LEAST, MOST, Market
from fastflag.market.calendar import date_of
from fastflag.policy.table import Policy
from fastflag.prompt.world import World


@torch.no_grad()
def decide(
    policy: Policy,
    world: World,
    date: str,
    position: str = "flat",
    entry: float = 0.0,
    since: str = "",
) -> dict[str, Any]:
    """The most probable action at the close of `date`, with every action's probability and the
    value of the state. Reads nothing after that close.

    `position` is flat, long or short; one that is held was entered on the day `since` at the price
    `entry`, in shares of that day: splits since then, and dividends where the run reinvests them,
    are accounted for. Raises InputError for a day that is not in the data, and for a position that
    is incomplete or can't be held.
    """
    if position not in ("flat", "long", "short"):
        raise InputError(f"a position is flat, long or short, not {position!r}, --position")
    task = world.single
    if len(world.market.symbols) > 1:
        known = ", ".join(world.market.symbols)
        raise InputError(f"a decision is of one symbol of {known}: name it, --symbol")
    day = _day(world.market, date, "--date")
    if entry and not LEAST <= entry <= MOST:
        raise InputError(f"not a price ({LEAST:g} to {MOST:g}), --entry {entry}")
    if position == "flat":
        if entry or since:
            raise InputError("a flat position has no entry: give --position, --entry or --since")
        accounts = task.start(1)
    else:
        accounts = _holding(world, day, position, entry, since)
    prompts, row = world.shown(accounts, day)
    table = policy.evaluate(prompts, policy.running.current())
    probabilities, actions = table.probabilities[row], task.actions
    return {
        "date": str(world.market.dates[day]),
        "action": actions[greedy(probabilities, 0)[0]],
        "probabilities": dict(zip(actions, probabilities[0].tolist(), strict=True)),
        "value": float(table.value[row[0]]),
    }


def _holding(world: World, day: int, position: str, entry: float, since: str) -> Accounts:
    """One account at the close of `day` that put all its cash into a position."""
    task = world.single
    if position == "short" and task.rules.positions == "long_flat":
        raise InputError("the run's policy never sells short (long_flat), --position short")
    if not entry:
        raise InputError(f"a {position} position needs the price it was entered at, --entry")
    if not since:
        raise InputError(f"a {position} position needs the day it was entered on, --since")
    opened = _day(world.market, since, "--since")
    if opened > day:
        raise InputError(f"{since} is after the decision's day, --since")
    if not task.bars.tradable[opened]:
        raise InputError(f"nothing traded on {since}, --since")
    side = 1 if position == "long" else -1
    shares_of_one = task.growth(opened, day)
    accounts = task.start(1)
    accounts.enter(np.array([side]), np.array([entry / shares_of_one]), np.array([opened]))
    accounts.equity = accounts.cash + accounts.shares * task.bars.mark[day]
    return accounts


def _day(market: Market, date: str, flag: str) -> int:
    found = np.flatnonzero(market.dates == date_of(date, flag))
    if not len(found):
        first, last = market.dates[[0, -1]]
        raise InputError(f"{date} is not a day of the data ({first} to {last}), {flag}")
    return int(found[0])
