"""Runs small enough to test: a planted market of a few days, a tiny model, a few accounts."""

import dataclasses
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fastflag.config import (
    AlgorithmConfig,
    DataConfig,
    PolicyConfig,
    PromptConfig,
    RolloutConfig,
    SimulatorConfig,
    TrainConfig,
)
from fastflag.learn.run import build
from fastflag.market.bars import Market
from fastflag.market.periods import split_days
from fastflag.market.planted import planted_market
from fastflag.model.weights import open_weights
from fastflag.policy.table import Policy
from fastflag.prompt.world import World

DAYS = 40
TRAIN_DAYS = 24


def small_market(**changes: Any) -> Market:
    return dataclasses.replace(planted_market(DAYS, seed=3), **changes)


DATES = [str(date) for date in small_market().dates]


def holey_market(missing=(7, 15)):
    """Missing bars, a split and a dividend within the training days."""
    market = small_market()
    columns = {name: getattr(market, name).copy() for name in ("open", "high", "low", "close")}
    for column in columns.values():
        column[list(missing)] = np.nan
        column[11:] /= 2
    split, dividend = market.split.copy(), market.dividend.copy()
    split[11], dividend[13] = 2.0, 0.3
    return small_market(split=split, dividend=dividend, **columns)


def small_config(model: Path | str, **changes: Any) -> TrainConfig:
    """`changes` are dotted names with __ for the dot: rollout__num_envs=4."""
    market = small_market()
    config = TrainConfig(
        data=DataConfig(
            train=f"{market.dates[0]}..{market.dates[TRAIN_DAYS - 1]}",
            test=f"{market.dates[TRAIN_DAYS]}..{market.dates[-1]}",
        ),
        prompt=PromptConfig(window=2, news_tokens=24),
        simulator=SimulatorConfig(horizon=9),
        policy=PolicyConfig(
            model=str(model), top_layers=1, trunk_weights="fp32", dtype="fp32", lora_rank=2
        ),
        rollout=RolloutConfig(num_envs=4, num_steps=6),
        algorithm=AlgorithmConfig(learning_rate=2e-2, layer_learning_rate=5e-3),
        total_timesteps=4 * 4 * 6,
        checkpoint_every=1,
        backtest_episodes=3,
    )
    return reduce(_with, changes.items(), config)


def as_kept(config: TrainConfig) -> TrainConfig:
    """As a run on a CPU keeps it: implementations that were left open are PyTorch's."""
    policy = dataclasses.replace(config.policy, kernels="torch", graphs="off")
    return dataclasses.replace(config, policy=policy)


def _with(config: Any, change: tuple[str, Any]) -> Any:
    name, value = change
    first, _, rest = name.partition("__")
    if rest:
        value = _with(getattr(config, first), (rest, value))
    return dataclasses.replace(config, **{first: value})


def write_csv(market: Market, path: Path) -> Path:
    """`market` as bars in `path` and news beside them."""
    names = ("open", "high", "low", "close", "volume")
    bars = {"date": market.dates} | {name: getattr(market, name)[:, 0] for name in names}
    pd.DataFrame(bars).to_csv(path, index=False)
    news = [(item.published, item.available, item.symbol, item.text) for item in market.news]
    columns = ["published", "available", "symbol", "text"]
    pd.DataFrame(news, columns=columns).to_csv(path.with_suffix(".news.csv"), index=False)
    return path


def small_world(config: TrainConfig, market: Market) -> tuple[World, Policy, range]:
    """(world, untrained policy, training days)."""
    world, policy = build(config, market, open_weights(config.policy.model))
    days, _ = split_days(market, config.data.train, config.data.test)
    return world, policy, days


def make_opinionated(policy: Policy, seed: int = 0) -> None:
    """Random weights where training starts from zeros: each prompt gets answers of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.05 * noise.to(parameter)
