"""FastFLAG's own loop as it is measured: the demo's days and prompts, an update at a time.

FASTFLAG_BENCH_MODEL and FASTFLAG_BENCH_DATA name another model and other bars of the same days, for
a machine without the demo's (standin.py makes both).
"""

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable

import torch

from fastflag.config import PRESETS, TrainConfig
from fastflag.learn.batch import start_accounts
from fastflag.learn.lesson import Lesson, estimate
from fastflag.learn.progress import PhaseTimer
from fastflag.learn.rollout import rollout
from fastflag.learn.run import build
from fastflag.learn.train import one_update
from fastflag.learn.update import make_optimizer
from fastflag.market.bars import Market
from fastflag.market.periods import split_days
from fastflag.market.sources import load
from fastflag.model.arithmetic import resolved
from fastflag.model.weights import open_weights
from fastflag.policy.table import Table

STEPS = 63  # of an environment's episode and update


def configuration(envs: int, dtype: str = "auto", account: str = "stepped") -> TrainConfig:
    """64 days of AAPL in prompts of about 150 + 14 tokens; one environment lives 40 of them, which
    is the paper's setting. Exact accounts are written in the paper's layout."""
    demo = given(PRESETS["demo"])
    steps = 40 if envs == 1 else STEPS
    layout = "default" if account == "stepped" else "paper"
    return dataclasses.replace(
        demo,
        prompt=dataclasses.replace(demo.prompt, window=16, account=account, layout=layout),
        policy=dataclasses.replace(demo.policy, dtype=dtype),
        simulator=dataclasses.replace(demo.simulator, horizon=steps),
        rollout=dataclasses.replace(demo.rollout, num_envs=envs, num_steps=steps),
    )


def given(config: TrainConfig) -> TrainConfig:
    """The configuration with the environment's model and bars, and a trunk that this machine can
    store: NF4 is quantised by bitsandbytes."""
    policy, data = config.policy, config.data
    stored = policy.trunk_weights if importlib.util.find_spec("bitsandbytes") else "bf16"
    model = os.environ.get("FASTFLAG_BENCH_MODEL", policy.model)
    bars = os.environ.get("FASTFLAG_BENCH_DATA", data.data)
    return dataclasses.replace(
        config,
        policy=dataclasses.replace(policy, model=model, trunk_weights=stored),
        data=dataclasses.replace(data, data=bars),
    )


class Trainer:
    """FastFLAG's loop, an update at a time."""

    def __init__(self, config: TrainConfig, market: Market | None = None):
        market = market or load(config.data)
        self.weights = open_weights(config.policy.model)
        policy = resolved(config.policy, self.weights.config)
        self.config = config = dataclasses.replace(config, policy=policy)
        self.world, self.policy = build(config, market, self.weights)
        self.days, _ = split_days(market, config.data.train, config.data.test)
        self.optimizer = make_optimizer(self.policy, config.algorithm)
        self.accounts = start_accounts(config.rollout, config.simulator.cash)
        self.phase, self.updates = PhaseTimer(), 0

    def every_step(self) -> tuple[Table, Lesson]:
        """A rollout whose samples are not added up, in the place of an update."""
        algorithm = dataclasses.replace(self.config.algorithm, minibatch_size=10**9)
        config = dataclasses.replace(self.config, algorithm=algorithm)
        table, batches = rollout(
            self.policy, self.world, [self.days], self.accounts, config, self.updates, self.phase
        )
        self.updates += 1
        return table, estimate(table, batches, algorithm, self.phase)

    def update(self) -> dict[str, float]:
        self.accounts, _, statistics = one_update(
            self.policy,
            self.optimizer,
            self.world,
            [self.days],
            self.accounts,
            self.config,
            self.updates,
            self.phase,
        )
        self.updates += 1
        return statistics


def seconds(work: Callable[[], object]) -> float:
    """Until the device is done, too."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
