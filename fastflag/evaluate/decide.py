"""One decision: what the policy would do at the close of one day."""

from typing import Any

import numpy as np
import torch

from fastflag.evaluate.backtest import greedy
from fastflag.files import InputError
from fastflag.learn.rollout import World, prompts_now
from fastflag.market.bars import Market
from fastflag.market.simulator import ACTIONS, Accounts
from fastflag.policy.table import Policy


@torch.no_grad()
def decide(
    policy: Policy,
    world: World,
    market: Market,
    date: str,
    position: str = "flat",
    entry: float = 0.0,
    since: str = "",
) -> dict[str, Any]:
    """The most probable action at the close of `date`, with every action's probability and the
    value of the state. Reads nothing after that close.

    `position` is flat, long or short, entered at price `entry` on the day `since`. Raises
    InputError for a day that is not in the data or a position that is not told whole.
    """
    day = _day(market, date, "--date")
    accounts = Accounts.start(1, world.simulator.cash)
    if position != "flat":
        if not entry > 0:
            raise InputError(
                f"a {position} position needs the price it was entered at, --entry {entry}"
            )
        opened = _day(market, since, "--since")
        if opened > day:
            raise InputError(f"entered after the decision, --since {since}")
        side = 1 if position == "long" else -1
        accounts.cash[0] = 0.0 if side > 0 else 2 * world.simulator.cash
        accounts.shares[0] = side * world.simulator.cash / entry
        accounts.entry[0], accounts.opened[0] = entry, opened
        accounts.equity[0] = accounts.cash[0] + accounts.shares[0] * world.bars.mark[day]
    prompts, row = prompts_now(world.prompter, world.bars, accounts, day)
    table = policy.evaluate(prompts, policy.running.current())
    probabilities = table.probabilities[row]
    return {
        "date": str(market.dates[day]),
        "action": ACTIONS[greedy(probabilities, 0)[0]],
        "probabilities": dict(zip(ACTIONS, probabilities[0].tolist(), strict=True)),
        "value": float(table.value[row[0]]),
    }


def _day(market: Market, date: str, flag: str) -> int:
    try:
        found = np.flatnonzero(market.dates == np.datetime64(date, "D"))
    except ValueError:
        raise InputError(f"not a date (YYYY-MM-DD): {date!r}, {flag}") from None
    if not len(found):
        raise InputError(f"{date} is not a day of the data, {flag}")
    return int(found[0])
