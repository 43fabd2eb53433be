"""A trained policy on held-out days, beside buy-and-hold and random policies.

Shapes: B episodes, n days (n - 1 decisions).
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastflag.config import TrainConfig
from fastflag.evaluate.episodes import Chooser, Episodes, greedy, run_episodes, sampler
from fastflag.evaluate.pooled import pooled
from fastflag.files import InputError, write_atomic
from fastflag.learn.run import learnt_symbols
from fastflag.market.bars import Market
from fastflag.market.metrics import CONVENTIONS, metrics
from fastflag.market.periods import days_of, split_days
from fastflag.market.tasks.baselines import fixed_action_equity, random_equities
from fastflag.market.tasks.single import BUY
from fastflag.policy.table import Policy
from fastflag.prompt.world import World

RANDOM_EPISODES = 1000
# Told apart from the seed of training, whose environments draw the first numbers of its streams.
_SAMPLED = 0x5A3B_1E00_0000


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


def _first_greedy(others: Chooser) -> Chooser:
    """The first episode greedily and the others by `others`, in one pass: each day's prompts are
    then one batch."""
    return lambda probabilities, number: np.concatenate(
        [greedy(probabilities[:1], number), others(probabilities[1:], number)]
    )


def backtest(
    policy: Policy,
    world: World,
    config: TrainConfig,
    split: str,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Any]:
    """The document that RUN/backtest.json holds: of one symbol, or of several as `pooled` has them,
    on training days without those that are held out whole. Raises InputError as `period_of` and
    `World.within` do."""
    spans = world.within(period_of(world.market, config, split), "--split")
    learnt = learnt_symbols(config, world.market)
    some = world.market.symbols if split != "train" else learnt
    documents = [
        _of_symbol(policy, world, symbol, span, config, split, track)
        for symbol, span in zip(world.market.symbols, spans, strict=True)
        if symbol in some
    ]
    return documents[0] if len(documents) == 1 else pooled(documents, learnt, world.market.calendar)


def _of_symbol(
    policy: Policy,
    world: World,
    symbol: str,
    days: range,
    config: TrainConfig,
    split: str,
    track: Callable[[Iterable[int]], Iterable[int]],
) -> dict[str, Any]:
    """One symbol's, alone with the policy at its moments `days`."""
    episodes = config.backtest_episodes
    chooser = _first_greedy(sampler(world.seed ^ _SAMPLED, episodes))
    both = run_episodes(policy, world, days, 1 + episodes, chooser, track)
    best, sampled = both.part(slice(0, 1)), both.part(slice(1, None))
    random = random_equities(world.task, days, RANDOM_EPISODES, world.seed)
    held = fixed_action_equity(world.task, days, BUY)
    dates = world.dates(days)
    calendar = world.market.each[world.market.column(symbol)].calendar

    def all_metrics(equity: np.ndarray) -> dict[str, dict[str, Any]]:
        return {name: _finite(metrics(equity, name, calendar)) for name in CONVENTIONS}

    sampled_metrics = [all_metrics(equity) for equity in sampled.equity]
    greedy_metrics = all_metrics(best.equity[0])
    sharpes = np.array([_sharpe(metrics(equity, "standard", calendar)) for equity in random])
    sampled_sharpes = [_sharpe(entry["standard"]) for entry in sampled_metrics]
    return {
        "symbol": symbol,
        "action_names": list(world.task.actions),
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
        "close": [_number(price) for price in world.task.bars.close[days.start : days.stop]],
        "news": {
            str(date): list(headlines)
            for day, date in zip(days, dates, strict=True)
            if (headlines := sum(world.prompter.headlines(day), ()))
        },
        "policies": {
            "greedy": {
                "equity": best.equity[0].tolist(),
                "actions": [world.task.actions[action] for action in best.action[0]],
                "probabilities": best.probabilities[0].tolist(),
                "position": np.sign(best.shares[0]).astype(int).tolist(),
                "metrics": greedy_metrics,
            },
            "buy_and_hold": {"equity": held.tolist(), "metrics": all_metrics(held)},
        },
        "sampled": {
            "episodes": episodes,
            "equity": _bands(sampled.equity),
            "metrics": _spread(sampled_metrics),
        },
        "random": {
            "episodes": RANDOM_EPISODES,
            "equity": _bands(random),
            "sharpe": {f"p{q:02}": float(np.percentile(sharpes, q)) for q in (5, 50, 95, 99)},
            "sharpes": sharpes.tolist(),
            "percentile": {
                "greedy": _percentile(_sharpe(greedy_metrics["standard"]), sharpes),
                "sampled_median": _percentile(float(np.median(sampled_sharpes)), sharpes),
            },
        },
        "trades": _trades(best, world, days, dates),
    }


def write_backtest(run: Path, document: dict[str, Any]) -> None:
    write_atomic(run / "backtest.json", json.dumps(document, indent=1, allow_nan=False))


def _percentile(value: float, others: np.ndarray) -> float:
    """Percent of `others` that `value` beats."""
    return float((others < value).mean() * 100)


def _sharpe(values: dict[str, Any]) -> float:
    """A policy that never traded has no Sharpe ratio; it ranks as one that earned nothing."""
    sharpe = values["sr"]
    return 0.0 if sharpe is None or math.isnan(sharpe) else sharpe


def _bands(equity: np.ndarray) -> dict[str, list[float]]:
    """[B, n] -> the 5th, 50th and 95th percentile of each day."""
    return {f"p{q:02}": np.percentile(equity, q, axis=0).tolist() for q in (5, 50, 95)}


def _spread(entries: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Mean and percentiles of each metric over episodes; those without a value do not count."""
    spread: dict[str, dict[str, Any]] = {}
    for convention, names in entries[0].items():
        spread[convention] = {}
        for name in names:
            values = [e[convention][name] for e in entries if e[convention][name] is not None]
            spread[convention][name] = _summary(np.array(values, float)) if values else None
    return spread


def _summary(values: np.ndarray) -> dict[str, float]:
    percentiles = {f"p{q:02}": float(np.percentile(values, q)) for q in (5, 50, 95)}
    return {"mean": float(values.mean())} | percentiles


def _trades(lived: Episodes, world: World, days: range, dates: np.ndarray) -> list[dict[str, Any]]:
    """The fills by which the first account's position changed sign: the day's open or close, before
    slippage, and the shares held after it. Ruin closes an account without one."""
    fill, bars = world.task.rules.fill, world.task.bars
    price = bars.open if fill == "next_open" else bars.close
    delay = 0 if fill == "same_close" else 1
    side = np.sign(lived.shares[0]).astype(int)
    return [
        {
            "date": str(dates[number + delay]),
            "action": "Buy" if side[number + 1] > side[number] else "Sell",
            "price": _number(price[days[number + delay]]),
            "shares": float(lived.shares[0, number + 1]),
        }
        for number in np.flatnonzero((np.diff(side) != 0) & lived.alive[0, 1:]).tolist()
    ]


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: float) -> float | None:
    """JSON has no NaN: None where a figure is not defined."""
    return float(value) if math.isfinite(value) else None
