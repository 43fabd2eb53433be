"""The loop. What the algorithm is, in the order of an update:

1. The environments' moments are known before the policy acts, for prices don't react to trades. So
   are the texts that accounts can be shown there: prompts, each of them once.
2. One forward pass of the trained layers over those prompts is a table: prompt -> probabilities of
   the actions, and a value. The frozen layers' part of it is computed once and kept.
3. Every environment steps through that table, a look-up a step; no model is called.
4. Advantages are GAE's over the sampled actions, or r + gamma V(s') - V(s) of every action
   (advantage.py, lesson.py).
5. Samples of equal prompt and action are added up with their weights (lesson.py). The loss (PPO's
   clipped one, or REINFORCE's, with value, entropy and KL terms) gathers their rows from the table
   of step 2 (objective.py).
6. Its backward pass is the gradient that one forward pass for each environment step would give,
   added up: the first ratio is exactly 1. AdamW steps; further epochs evaluate their prompts anew
   (update.py, step.py).
"""

import time
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastflag.config import TrainConfig
from fastflag.files import InputError
from fastflag.learn.batch import start_all
from fastflag.learn.checkpoint import (
    read_checkpoint,
    restore_accounts,
    restore_optimizer,
    restore_policy,
    write_checkpoint,
)
from fastflag.learn.lesson import Lesson, estimate
from fastflag.learn.progress import Log, PhaseTimer, Proving
from fastflag.learn.prove import prove_for, with_implementations
from fastflag.learn.rollout import rollout
from fastflag.learn.run import (
    as_it_began,
    build,
    check_claim,
    claim,
    fingerprints,
    training_spans,
    updates_done,
    with_dtype,
    with_periods,
)
from fastflag.learn.update import make_optimizer, set_learning_rates, update
from fastflag.market import streams
from fastflag.market.accounts import Columns
from fastflag.market.bars import Market
from fastflag.market.calendar import ANNUAL_DAYS
from fastflag.model.weights import Weights
from fastflag.policy.table import Policy
from fastflag.prompt.world import World


def train(
    config: TrainConfig, market: Market, weights: Weights, run: Path, resume: bool
) -> tuple[World, Policy]:
    """Trains into RUN/, from its checkpoint with `resume` where it has one.

    Raises InputError for a run that is in the way, belongs to another configuration or model, or
    a configuration that fits neither data nor model.
    """
    if config.updates < 1:
        raise InputError(
            f"total_timesteps {config.total_timesteps} is less than one update of "
            f"{config.rollout.num_envs} x {config.rollout.num_steps}, config"
        )
    config = as_it_began(with_periods(config, market), run, resume)
    # Before anything of this process is on the GPU.
    with Proving() as proving:
        proof = prove_for(config, weights.config, updates_done(run, resume), proving)
    config = with_implementations(with_dtype(config, weights.config), proof)
    check_claim(run, config, resume)
    world, policy = build(config, market, weights)
    spans, test_spans = training_spans(world, config), world.within(config.data.test)
    policy.check_length(world.prompter.longest([*chain(*spans, *test_spans)]))
    optimizer = make_optimizer(policy, config.algorithm)
    accounts = start_all(config.rollout, world.task.start)
    annual = ANNUAL_DAYS[market.calendar]
    phase = PhaseTimer()
    with claim(run, config, resume, fingerprints(config, market)) as resumes:
        start = 0
        if resumes:
            checkpoint = read_checkpoint(run)
            restore_policy(checkpoint, policy, weights.fingerprint, run)
            restore_optimizer(checkpoint, optimizer, run)
            groups, kind = config.rollout.start_groups, type(accounts[0])
            accounts = restore_accounts(checkpoint, groups, run, kind)
            start = checkpoint.updates
        print(f"news: {world.prompter.training_news(spans)}", flush=True)
        with Log(run, start, config.updates) as log:
            for done in range(start, config.updates):
                began = time.perf_counter()
                factor = set_learning_rates(optimizer, config.algorithm, done, config.updates)
                work = partial(
                    one_update, policy, optimizer, world, spans, accounts, config, done, phase
                )
                accounts, lesson, statistics = policy.recompute.attempt(work)
                statistics["learning_rate"] = config.algorithm.learning_rate * factor
                elapsed = time.perf_counter() - began
                log.add(_record(done, lesson, accounts, annual, statistics, elapsed, phase.take()))
                updates = done + 1
                if updates % config.checkpoint_every == 0 or updates == config.updates:
                    write_checkpoint(run, updates, weights.fingerprint, policy, optimizer, accounts)
                    policy.trunk.cache.flush()
    return world, policy


def one_update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    world: World,
    spans: list[range],
    accounts: Sequence[Columns],
    config: TrainConfig,
    done: int,
    phase: PhaseTimer,
) -> tuple[list[Columns], Lesson, dict[str, float]]:
    """One more update, where `done` are done: where the accounts are then, what was learnt from,
    and the statistics of learning it.

    `accounts` stay as they are: where memory runs out before the first gradient step, it is made
    again.
    """
    accounts = [group.take(np.arange(len(group))) for group in accounts]
    table, batches = rollout(policy, world, spans, accounts, config, done, phase)
    lesson = estimate(table, batches, config.algorithm, phase)
    with phase("update"):
        seed = streams.shuffles(config.seed, done)
        statistics = update(policy, optimizer, table, lesson, config.algorithm, seed)
    return accounts, lesson, statistics


def _record(
    done: int,
    lesson: Lesson,
    accounts: Sequence[Columns],
    annual: int,
    statistics: dict[str, float],
    elapsed: float,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """One line of metrics.jsonl. `return` is the mean sum of rewards of an environment over the
    update's steps, `sharpe` the mean Sharpe ratio of the episodes so far, annualised."""
    sharpe = np.concatenate([group.sharpe for group in accounts]).mean() * np.sqrt(annual)
    return {
        "step": done,
        "env_steps": (done + 1) * lesson.env_steps,
        "return": lesson.reward / sum(map(len, accounts)),
        "sharpe": float(sharpe),
        "distinct_prompts": len(lesson.prompts.pairs),
        "steps_per_second": lesson.env_steps / elapsed,
        "seconds": seconds,
    } | statistics
