"""A trained policy's portfolio on held-out days, beside portfolios that need no model.

Shapes: K assets, n days (n - 1 decisions).
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from fastflag.config import TrainConfig
from fastflag.evaluate.episodes import Episodes, first_greedy, run_episodes, sampler
from fastflag.evaluate.statistics import Equities, all_metrics, judged, paired, returns
from fastflag.market import streams
from fastflag.market.tasks.portfolio import Portfolio
from fastflag.market.tasks.portfolio_baselines import (
    buy_and_hold_equity,
    equal_weight_equity,
    inverse_volatility_equity,
    random_equities,
)
from fastflag.policy.table import Policy
from fastflag.prompt.world import World

_OTHERS = {
    "equal_weight": equal_weight_equity,
    "inverse_volatility": inverse_volatility_equity,
}


def backtest_portfolio(
    policy: Policy,
    world: World,
    days: range,
    config: TrainConfig,
    split: str,
    random_episodes: int,
    track: Callable[[Iterable[int]], Iterable[int]],
) -> dict[str, Any]:
    """The document that RUN/backtest.json holds, of the moments `days`."""
    market, task = world.market, world.task
    assert isinstance(task, Portfolio)
    drawn = sampler(streams.sampled_episodes(world.seed), config.backtest_episodes)
    chooser = first_greedy(drawn)
    both = run_episodes(policy, world, days, 1 + config.backtest_episodes, chooser, track)
    best = both.part(slice(0, 1))
    equities = Equities(
        greedy=best.equity[0],
        held=buy_and_hold_equity(task, days),
        sampled=both.equity[1:],
        random=random_equities(task, days, random_episodes, world.seed),
    )
    others = {name: equity(task, days) for name, equity in _OTHERS.items()}
    dates, parts = world.dates(days), judged(equities, market.calendar)
    parts["policies"]["greedy"] |= _lived(best, task)
    parts["policies"] |= {
        name: {"equity": equity.tolist(), "metrics": all_metrics(equity, market.calendar)}
        for name, equity in others.items()
    }
    rules = config.simulator
    return {
        "task": "portfolio",
        "symbol": f"a portfolio of {task.slots}",
        "assets": list(task.symbols),
        "action_names": list(task.actions),
        "split": split,
        "start": str(dates[0]),
        "end": str(dates[-1]),
        "positions": task.rules.positions,
        "fill": rules.fill,
        "dividends": rules.dividends,
        "anonymised": config.prompt.anonymise,
        "fee_bps": rules.fee_bps,
        "slippage_bps": rules.slippage_bps,
        "dates": [str(date) for date in dates],
        "news": _news(world, task, days, dates),
        "paired": {
            name: paired([returns(best.equity[0]) - returns(equity)], [dates[1:]])
            for name, equity in {"buy_and_hold": equities.held, **others}.items()
        },
        **parts,
    }


def _lived(best: Episodes, task: Portfolio) -> dict[str, Any]:
    """What the one account did: its orders and what they were drawn from, [n - 1, K]; the part of
    its equity in each asset at each close, [n, K]."""
    equity = best.equity[0][:, None]
    weights = np.divide(best.shares[0], equity, out=np.zeros_like(best.shares[0]), where=equity > 0)
    return {
        "actions": [[task.actions[action] for action in each] for each in best.action[0]],
        "probabilities": best.probabilities[0].tolist(),
        "weights": weights.tolist(),
    }


def _news(world: World, task: Portfolio, days: range, dates: np.ndarray) -> dict[str, list[str]]:
    """What the prompts told of each asset, by its name and day."""
    return {
        f"{symbol} {date}": list(told)
        for day, date in zip(days, dates, strict=True)
        for slot, symbol in enumerate(task.symbols)
        if (told := sum(world.prompter.headlines(day, slot), ()))
    }
