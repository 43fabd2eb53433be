"""Table + simulator -> Batch: what many environments did over the same days.

Shapes: B environments, H steps, U prompts, D days, A actions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastflag.config import RolloutConfig, SimulatorConfig
from fastflag.files import InputError
from fastflag.learn.reference import reference_accounts
from fastflag.market import simulator
from fastflag.market.simulator import Accounts, Bars
from fastflag.market.tasks import schedule
from fastflag.policy.table import Policy, Table
from fastflag.prompt.template import Prompter
from fastflag.prompt.tokens import PromptSet, merge

Phase = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class World:
    """What environments live in: one symbol's bars, the rules, the prompts."""

    bars: Bars
    simulator: SimulatorConfig
    prompter: Prompter
    seed: int


@dataclass(frozen=True)
class Batch:
    """Every step of every environment; rows are those of `prompts`."""

    prompts: PromptSet
    initial: Tensor  # [U, A], log-probabilities of the untrained policy
    row: np.ndarray  # [B, H] int32, the state decided in
    next_row: np.ndarray  # [B, H] int32, the state it led to, before any restart
    action: np.ndarray  # [B, H] int8
    reward: np.ndarray  # [B, H] float64
    terminated: np.ndarray  # [B, H] bool
    truncated: np.ndarray  # [B, H] bool
    valid: np.ndarray  # [B, H] bool, False from ruin to the next restart


@dataclass(frozen=True)
class _Group:
    """Environments that live the same days."""

    accounts: Accounts
    first_env: int
    first_step: int
    day: np.ndarray  # [H]
    restart: np.ndarray  # [H] bool
    last: np.ndarray  # [H] bool


def start_accounts(config: RolloutConfig, cash: float) -> list[Accounts]:
    """One Accounts a start group.

    Raises InputError where the environments do not divide into the groups.
    """
    size, rest = divmod(config.num_envs, config.start_groups)
    if rest:
        raise InputError(
            f"num_envs {config.num_envs} must be a multiple of start_groups "
            f"{config.start_groups}, --num-envs"
        )
    return [Accounts.start(size, cash) for _ in range(config.start_groups)]


def rollout(
    policy: Policy,
    world: World,
    days: range,
    accounts: list[Accounts],
    config: RolloutConfig,
    step: int,
    phase: Phase,
) -> tuple[Table, Batch]:
    """Steps every environment num_steps times over `days` under the policy.

    `accounts` move in place. The table has every row that the batch names, with gradient.
    """
    groups = [
        _Group(
            group_accounts,
            number * len(group_accounts.cash),
            step * config.num_steps,
            *schedule(
                days,
                world.simulator.horizon,
                world.seed,
                number,
                step * config.num_steps,
                config.num_steps,
            ),
        )
        for number, group_accounts in enumerate(accounts)
    ]
    if world.prompter.config.account == "exact":
        with phase("rollout"), torch.no_grad():
            prompts, parts = _daily(policy, world, groups)
        with phase("evaluate"):
            table = policy.evaluate(prompts)
    else:
        with phase("evaluate"):
            prompts, row_of = _reachable_prompts(world, groups)
            table = policy.evaluate(prompts)
        with phase("rollout"):
            cdf = table.probabilities.cumsum(1)
            parts = [_from_table(world, group, cdf, row_of) for group in groups]
    initial = policy.initial_log_probabilities(prompts)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return table, Batch(prompts, initial, **joined)


def prompts_now(
    prompter: Prompter, bars: Bars, accounts: Accounts, day: int
) -> tuple[PromptSet, np.ndarray]:
    """The distinct prompts of these accounts at the close of `day`, and each account's row [B]."""
    if prompter.config.account == "exact":
        return prompter.exact_prompts(day, accounts)
    days = np.full(len(accounts.cash), day)
    codes = simulator.account_code(bars, accounts, days)
    present = np.zeros((1, simulator.CODES), dtype=bool)
    present[0, codes] = True
    prompts, row_of = prompter.stepped_prompts([day], present)
    return prompts, row_of[day, codes]


def choose(probabilities: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Inverse-CDF samples of [B, A] probabilities, uniform [B] in [0, 1) -> actions [B] int8.

    An action of probability 0 is never chosen, whatever the rounding of the sum.
    """
    cdf = probabilities.cumsum(1)
    return (uniform[:, None] * cdf[:, -1:] >= cdf[:, :-1]).sum(1).astype(np.int8)


def _reachable_prompts(world: World, groups: list[_Group]) -> tuple[PromptSet, np.ndarray]:
    """Every (day, account text) that any environment could show, known before the policy acts."""
    reached: dict[int, np.ndarray] = {}
    for group in groups:
        for days, accounts in _episodes(world, group):
            codes = simulator.reachable(world.bars, world.simulator, days, accounts)
            for day, row in zip(days, codes, strict=True):
                reached[day] = reached.get(day, False) | row
    days = sorted(reached)
    present = np.stack([reached[day] for day in days])
    accounts, of_day = reference_accounts(world.bars, world.simulator, days)
    codes = simulator.account_code(world.bars, accounts, of_day)
    reference = np.zeros_like(present)
    reference[np.searchsorted(days, of_day), codes] = True
    return world.prompter.stepped_prompts(days, present, reference)


def _episodes(world: World, group: _Group) -> list[tuple[range, Accounts]]:
    """The stretches of consecutive days a group lives through, the state after the last decision
    included, each with the accounts that enter it."""
    starts = [0, *(int(at) for at in np.flatnonzero(group.restart) if at > 0)]
    ends = [*starts[1:], len(group.day)]
    fresh = Accounts.start(1, world.simulator.cash)
    stretches = []
    for start, end in zip(starts, ends, strict=True):
        days = range(int(group.day[start]), int(group.day[end - 1]) + 2)
        stretches.append((days, fresh if group.restart[start] else group.accounts))
    return stretches


def _from_table(
    world: World, group: _Group, cdf: np.ndarray, row_of: np.ndarray
) -> dict[str, np.ndarray]:
    part = simulator.rollout(
        world.bars,
        world.simulator,
        group.accounts,
        group.day,
        group.restart,
        cdf,
        row_of,
        world.seed,
        group.first_env,
        group.first_step,
    )
    return part | {"truncated": np.broadcast_to(group.last, part["row"].shape)}


def _daily(
    policy: Policy, world: World, groups: list[_Group]
) -> tuple[PromptSet, list[dict[str, np.ndarray]]]:
    """Day by day, for accounts whose texts can't be listed before they are lived.

    Features are centred on the reference prompts of all the days to come, as the update does.
    So the probabilities drawn from are the table's but for the rounding of smaller products.
    """
    reference = _exact_reference(world, groups)
    statistics = policy.evaluate(reference).statistics
    sets: list[tuple[PromptSet, np.ndarray]] = []
    parts = []
    for group in groups:
        count, steps = len(group.accounts.cash), len(group.day)
        part = {
            "row": np.zeros((count, steps), np.int32),
            "next_row": np.zeros((count, steps), np.int32),
            "action": np.zeros((count, steps), np.int8),
            "reward": np.zeros((count, steps)),
            "terminated": np.zeros((count, steps), bool),
            "valid": np.zeros((count, steps), bool),
            "truncated": np.broadcast_to(group.last, (count, steps)),
            # Which set a step's rows are of, until they are merged.
            "set": np.zeros(steps, np.int64),
            "next_set": np.zeros(steps, np.int64),
        }
        environments = group.first_env + np.arange(count)
        for step in range(steps):
            day = int(group.day[step])
            if group.restart[step]:
                group.accounts.reset(np.ones(count, bool))
            if step == 0 or group.restart[step]:
                sets.append(prompts_now(world.prompter, world.bars, group.accounts, day))
            prompts, row = sets[-1]
            probabilities = policy.evaluate(prompts, statistics).probabilities[row]
            uniform = simulator.uniform(world.seed, environments, group.first_step + step)
            part["set"][step] = len(sets) - 1
            part["row"][:, step] = row
            part["valid"][:, step] = group.accounts.alive
            part["action"][:, step] = choose(probabilities, uniform)
            part["reward"][:, step], part["terminated"][:, step] = simulator.step(
                world.bars,
                world.simulator,
                group.accounts,
                np.full(count, day),
                part["action"][:, step].copy(),
            )
            sets.append(prompts_now(world.prompter, world.bars, group.accounts, day + 1))
            part["next_set"][step] = len(sets) - 1
            part["next_row"][:, step] = sets[-1][1]
        parts.append(part)
    merged, rows = merge([*(prompts for prompts, _ in sets), reference])
    for part in parts:
        for name in ("", "next_"):
            owners = part.pop(f"{name}set")
            for step, owner in enumerate(owners):
                part[f"{name}row"][:, step] = rows[owner][part[f"{name}row"][:, step]]
    return merged, parts


def _exact_reference(world: World, groups: list[_Group]) -> PromptSet:
    """The prompts that centre the features of exact accounts, all of them reference."""
    days = sorted({day for group in groups for days, _ in _episodes(world, group) for day in days})
    accounts, of_day = reference_accounts(world.bars, world.simulator, days)
    sets = [
        world.prompter.exact_prompts(day, accounts.take(np.flatnonzero(of_day == day)))[0]
        for day in days
    ]
    prompts, _ = merge(sets)
    return replace(prompts, reference=np.arange(len(prompts.pairs), dtype=np.int32))
