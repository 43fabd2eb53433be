"""Wall-clock time to learn something: FastFLAG beside transformers + PEFT, SmolLM2-135M.

    python -m bench.learn [--json] [--tasks planted msft] [--envs 16 128 512] [--dtype auto]

Two tasks: a held-out Sharpe ratio on a market whose headlines tell the next day (`planted:`), and
a training Sharpe ratio on MSFT's 64 warm-up days (InvestorBench's file, named by
FASTFLAG_INVESTORBENCH or in ../shared/data/investorbench). Both loops have the same gradient, so
after the same environment steps they are at the same place: one learning curve is run for each
number of environments, and the plain loop's time is its environment steps at the seconds a step
that the plain loop takes, measured after the run on 64 steps. Each then counts with the number of
environments that is fastest for it. FastFLAG begins with cold caches; scoring is not timed.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.measure.loop import Trainer, seconds
from bench.measure.results import Row, publish
from bench.rivals.peft_loop import Baseline, Fastest
from fastflag.config import (
    AlgorithmConfig,
    DataConfig,
    PolicyConfig,
    PromptConfig,
    RolloutConfig,
    SimulatorConfig,
    TrainConfig,
)
from fastflag.evaluate.backtest import backtest
from fastflag.market.bars import Market
from fastflag.market.calendar import ANNUAL_DAYS
from fastflag.market.sources import load
from fastflag.model.arithmetic import DTYPES

_TRAIN_DAYS, _TEST_DAYS = 128, 250
_MOST_UPDATES = 160
_SCORED_EVERY = 2


@dataclass(frozen=True)
class Task:
    name: str
    target: float  # annualised Sharpe ratio
    market: Market
    configuration: Callable[[int, str], TrainConfig]  # of environments and a dtype
    score: Callable[[Trainer], float]


def planted() -> Task:
    """Twice the Sharpe ratio of always long, on days that were not trained on."""
    source = DataConfig(f"planted:days={_TRAIN_DAYS + _TEST_DAYS},seed=1,drift=0.0003")
    market = load(source)
    dates = market.dates

    def configuration(envs: int, dtype: str) -> TrainConfig:
        return TrainConfig(
            data=dataclasses.replace(
                source,
                train=f"{dates[0]}..{dates[_TRAIN_DAYS - 1]}",
                test=f"{dates[_TRAIN_DAYS]}..{dates[-1]}",
            ),
            prompt=PromptConfig(window=3, news_tokens=48),
            simulator=SimulatorConfig(fee_bps=0, slippage_bps=0, reward="log_return", horizon=15),
            policy=PolicyConfig(trunk_disk_mb=0, dtype=dtype),
            rollout=RolloutConfig(num_envs=envs, num_steps=15, start_groups=min(envs, 8)),
            algorithm=AlgorithmConfig(learning_rate=1e-3, layer_learning_rate=1e-4, gamma=0.0),
            backtest_episodes=1,
        )

    def score(trainer: Trainer) -> float:
        document = backtest(trainer.policy, trainer.world, market, trainer.config, "test")
        return document["policies"]["greedy"]["metrics"]["standard"]["sr"] or 0.0

    return Task("planted, held out", 3.2, market, configuration, score)


def msft() -> Task | None:
    """The mean Sharpe ratio of the training episodes; nothing is claimed of other days."""
    folder = os.environ.get("FASTFLAG_INVESTORBENCH", "../shared/data/investorbench")
    file = Path(folder) / "msft.json"
    if not file.exists():
        return None
    data = DataConfig(data=f"investorbench:{file}", train="2020-07-01..2020-09-30")
    market = load(data)
    annual = ANNUAL_DAYS[market.calendar]

    def configuration(envs: int, dtype: str) -> TrainConfig:
        return TrainConfig(
            data=data,
            policy=PolicyConfig(trunk_disk_mb=0, dtype=dtype),
            rollout=RolloutConfig(num_envs=envs, num_steps=63),
        )

    def score(trainer: Trainer) -> float:
        sharpe = np.concatenate([group.sharpe for group in trainer.accounts])
        return float(sharpe.mean() * np.sqrt(annual))

    return Task("msft, training days", 3.0, market, configuration, score)


@dataclass(frozen=True)
class Reached:
    envs: int
    updates: int
    env_steps: int
    ours: float  # seconds
    plain: float
    reached: bool
    fastest: Fastest


def reach(task: Task, envs: int, dtype: str, fastest: Fastest | None) -> Reached:
    """Trains until the target is reached, or not. `fastest` is how the plain loop is."""
    config = task.configuration(envs, dtype)
    trainer = Trainer(config, task.market)
    ours, score, update = 0.0, -math.inf, 0
    while score < task.target and update < _MOST_UPDATES:
        ours += sum(seconds(trainer.update) for _ in range(_SCORED_EVERY))
        update += _SCORED_EVERY
        score = task.score(trainer)
        print(f"{task.name}: {envs} environments, update {update}: {score:.2f}", file=sys.stderr)
    baseline = Baseline(trainer, fastest)
    count = update * envs * config.rollout.num_steps
    plain = count * min(baseline.seconds_of_a_step(envs) for _ in range(2))
    reached = score >= task.target
    return Reached(envs, update, count, ours, plain, reached, baseline.fastest)


def rows_of(task: Task, numbers: list[int], dtype: str) -> list[Row]:
    tried: list[Reached] = []
    # The largest first: of few environments' samples no large batch can be tried.
    for envs in sorted(numbers, reverse=True):
        tried.append(reach(task, envs, dtype, tried[-1].fastest if tried else None))
    found = [one for one in tried if one.reached]
    rows = [
        Row(
            f"{task.name}: Sharpe {task.target}",
            f"{one.envs} environments",
            "fastflag",
            one.ours,
            "s",
            note=f"not reached in {one.updates} updates",
        )
        for one in tried
        if not one.reached
    ]
    for one in found:
        shape, note = f"{one.envs} environments", f"{one.updates} updates, {one.env_steps} steps"
        what = f"{task.name}: Sharpe {task.target}"
        ratio = one.plain / one.ours
        scaled = f"{note}, scaled from 64 steps"
        rows.append(Row(what, shape, "hf + peft", one.plain, "s", note=scaled))
        rows.append(Row(what, shape, "fastflag", one.ours, "s", ratio, "hf + peft", note))
    if found:
        plain, ours = min(one.plain for one in found), min(one.ours for one in found)
        what, shape = f"{task.name}: Sharpe {task.target}", "each at its best"
        note = f"of {', '.join(str(one.envs) for one in tried)} environments"
        rows.append(Row(what, shape, "fastflag", ours, "s", plain / ours, "hf + peft", note))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    makers = {"planted": planted, "msft": msft}
    parser.add_argument("--tasks", nargs="+", choices=[*makers], default=[*makers])
    parser.add_argument("--envs", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="FastFLAG's")
    chosen = parser.parse_args()
    tasks = [task for name in chosen.tasks if (task := makers[name]())]
    rows = [row for task in tasks for row in rows_of(task, chosen.envs, chosen.dtype)]
    publish("learn", rows, chosen.json)


if __name__ == "__main__":
    main()
