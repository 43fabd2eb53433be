"""A trained policy on held-out days, beside buy-and-hold and random policies.

Shapes: B episodes, n days (n - 1 decisions).
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastflag.config import TrainConfig
from fastflag.evaluate.episodes import Episodes, first_greedy, run_episodes, sampler
from fastflag.evaluate.pooled import Tested, pooled
from fastflag.evaluate.portfolio_backtest import backtest_portfolio
from fastflag.evaluate.statistics import Equities, finite_or_none, judged
from fastflag.files import InputError, write_atomic
from fastflag.learn.run import learnt_symbols
from fastflag.market import streams
from fastflag.market.bars import Market
from fastflag.market.periods import days_of, split_days
from fastflag.market.tasks.baselines import fixed_action_equity, random_equities
from fastflag.market.tasks.portfolio import Portfolio
from fastflag.market.tasks.single import BUY
from fastflag.policy.table import Policy
from fastflag.prompt.world import World

RANDOM_EPISODES = 1000
# Between the seeds of two symbols: more than there are episodes, which follow one another.
_SEEDS_APART = 1 << 32


def period_of(market: Market, config: TrainConfig, split: str) -> str:
    """The dates START..END of a split: train, test, or START..END.

    Raises InputError for another word, and for dates outside the data.
    """
    if split in ("train", "test"):
        train, test = split_days(market, config.data.train, config.data.test)
        days = train if split == "train" else test
    elif ".." in split:
        days = days_of(market, split, "--split")
    else:
        raise InputError(f"{split!r} is neither train, test nor START..END, --split")
    if len(days) < 2:
        raise InputError(f"a backtest needs two days, --split {split}")
    return f"{market.dates[days[0]]}..{market.dates[days[-1]]}"


def backtest(
    policy: Policy,
    world: World,
    config: TrainConfig,
    split: str,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Any]:
    """The document that RUN/backtest.json holds: of one symbol, or of several as `pooled` has them,
    on training days without those that are held out whole, or of a portfolio. Raises InputError as
    `period_of` does, and where no symbol is left or has two bars."""
    market, learnt = world.market, learnt_symbols(config, world.market)
    period = period_of(market, config, split)
    if isinstance(world.task, Portfolio):
        (days,) = world.within(period)
        return backtest_portfolio(policy, world, days, config, split, RANDOM_EPISODES, track)
    some = learnt if split == "train" else market.symbols
    if not some:
        names = ", ".join(market.symbols)
        raise InputError(f"{names} is held out: it has no training days, --split train")
    spans = {n: days for n, days in enumerate(world.within(period)) if market.symbols[n] in some}
    if len(market.symbols) == 1:
        return _of_symbol(policy, world, 0, spans[0], config, split, track)[0]
    bars = world.single.bars
    enough = {n: days for n, days in spans.items() if bars.tradable[days].sum() > 1}
    left_out = [market.symbols[n] for n in spans if n not in enough]
    if not enough:
        raise InputError(f"fewer than 2 bars of {', '.join(left_out)}, --split {period}")
    tested = [
        _of_symbol(policy, world, n, days, config, split, track) for n, days in enough.items()
    ]
    return pooled(tested, learnt, left_out, market.calendar)


def _of_symbol(
    policy: Policy,
    world: World,
    number: int,
    days: range,
    config: TrainConfig,
    split: str,
    track: Callable[[Iterable[int]], Iterable[int]],
) -> Tested:
    """One symbol's, alone with the policy at its moments `days`."""
    market, task = world.market.each[number], world.single
    # Each symbol's chances are its own: drawn by the same numbers they would rise and fall as one.
    seed = world.seed + number * _SEEDS_APART
    drawn = sampler(streams.sampled_episodes(seed), config.backtest_episodes)
    chooser = first_greedy(drawn)
    both = run_episodes(policy, world, days, 1 + config.backtest_episodes, chooser, track)
    best = both.part(slice(0, 1))
    equities = Equities(
        greedy=best.equity[0],
        held=fixed_action_equity(task, days, BUY),
        sampled=both.equity[1:],
        random=random_equities(task, days, RANDOM_EPISODES, seed),
    )
    dates, parts = world.dates(days), judged(equities, market.calendar)
    parts["policies"]["greedy"] |= {
        "actions": [task.actions[action] for action in best.action[0]],
        "probabilities": best.probabilities[0].tolist(),
        "position": np.sign(best.shares[0]).astype(int).tolist(),
    }
    document = {
        "symbol": market.symbols[0],
        "action_names": list(task.actions),
        "split": split,
        "start": str(dates[0]),
        "end": str(dates[-1]),
        "positions": config.simulator.positions,
        "fill": config.simulator.fill,
        "dividends": config.simulator.dividends,
        "anonymised": config.prompt.anonymise,
        "fee_bps": config.simulator.fee_bps,
        "slippage_bps": config.simulator.slippage_bps,
        "dates": [str(date) for date in dates],
        "close": [finite_or_none(price) for price in task.bars.close[days.start : days.stop]],
        "news": {
            str(date): list(headlines)
            for day, date in zip(days, dates, strict=True)
            if (headlines := sum(world.prompter.headlines(day), ()))
        },
        **parts,
        "trades": _trades(best, world, days, dates),
    }
    return document, equities


def write_backtest(run: Path, document: dict[str, Any]) -> None:
    write_atomic(run / "backtest.json", json.dumps(document, indent=1, allow_nan=False))


def _trades(lived: Episodes, world: World, days: range, dates: np.ndarray) -> list[dict[str, Any]]:
    """The fills by which the first account's position changed sign: the day's open or close, before
    slippage, and the shares held after it. Ruin closes an account without one."""
    fill, bars = world.single.rules.fill, world.single.bars
    price = bars.open if fill == "next_open" else bars.close
    delay = 0 if fill == "same_close" else 1
    side = np.sign(lived.shares[0]).astype(int)
    return [
        {
            "date": str(dates[number + delay]),
            "action": "Buy" if side[number + 1] > side[number] else "Sell",
            "price": finite_or_none(price[days[number + delay]]),
            "shares": float(lived.shares[0, number + 1]),
        }
        for number in np.flatnonzero((np.diff(side) != 0) & lived.alive[0, 1:]).tolist()
    ]
