"""Table + simulator -> Batch: what many environments did over the same days.

Shapes: B environments, H steps, U prompts, D days, A actions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fastflag.config import RolloutConfig, SimulatorConfig
from fastflag.files import InputError
from fastflag.learn.reference import reference_accounts
from fastflag.market import simulator
from fastflag.market.accounts import Accounts, Bars
from fastflag.market.tasks import schedule
from fastflag.policy.table import Policy, Table
from fastflag.prompt.template import Prompter
from fastflag.prompt.tokens import PromptSet, merge

Phase = Callable[[str], AbstractContextManager[None]]

_MANY_STEPS = 2**20


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
    log_probability: np.ndarray  # [B, H] fp32, of the action, as it was drawn
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
    if _goes_day_by_day(policy, world, config):
        table, prompts, parts = _day_by_day(policy, world, groups, phase)
    else:
        with phase("evaluate"):
            prompts, row_of = _reachable_prompts(world, groups)
            table = policy.evaluate(prompts)
        with phase("rollout"):
            told = _told(table)
            cdf = table.probabilities.cumsum(1)
            parts = [_from_table(world, group, told, cdf, row_of) for group in groups]
    with phase("evaluate"):
        initial = policy.initial_log_probabilities(prompts)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return table, Batch(prompts, initial, **joined)


def _goes_day_by_day(policy: Policy, world: World, config: RolloutConfig) -> bool:
    """Whether prompts are evaluated as they are visited, and not all that can be reached at once.

    Exact accounts can't be listed. Of stepped ones 256 environments visit a third of what they
    could reach (63 days of AAPL): on a CPU, where work costs more than calls, that is a third of
    the work. A GPU takes one large call in less time than many small ones, and of a million steps
    few prompts are left out.
    """
    if world.prompter.config.account == "exact":
        return True
    return policy.device.type == "cpu" and config.num_envs * config.num_steps < _MANY_STEPS


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
    return prompts, row_of[0, codes]


def choose(probabilities: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Inverse-CDF samples of [B, A] probabilities, uniform [B] in [0, 1) -> actions [B] int8.

    An action of probability 0 is never chosen, whatever the rounding of the sum.
    """
    cdf = probabilities.cumsum(1)
    return (uniform[:, None] * cdf[:, -1:] >= cdf[:, :-1]).sum(1).astype(np.int8)


def _reachable_prompts(world: World, groups: list[_Group]) -> tuple[PromptSet, np.ndarray]:
    """Every (day, account text) that any environment could show, known before the policy acts, and
    the row of each, [T, CODES]."""
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
    row_of = np.full((len(world.bars), simulator.CODES), -1, np.int32)
    prompts, row_of[days] = world.prompter.stepped_prompts(days, present, reference)
    return prompts, row_of


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
    world: World,
    group: _Group,
    log_probabilities: np.ndarray,
    cdf: np.ndarray,
    row_of: np.ndarray,
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
    return part | {
        "log_probability": log_probabilities[part["row"], part["action"]],
        "truncated": np.broadcast_to(group.last, part["row"].shape),
    }


def _told(table: Table) -> np.ndarray:
    return table.log_probabilities.detach().cpu().numpy()


class _Visited:
    """The prompts met so far in a rollout, each evaluated once, all by one pass over the days and
    with the same statistics."""

    def __init__(self, policy: Policy, reference: PromptSet):
        self._policy = policy
        self._days = policy.read(reference.prefixes)
        self._sets = [reference]
        self._tables = [policy.evaluate(reference, days=self._days)]
        self._row_of = {key: row for row, key in enumerate(reference.keys())}
        self.probabilities = self._tables[0].probabilities
        """[U, A] of the rows so far, as in `Table`."""
        self.log_probabilities = _told(self._tables[0])
        """[U, A] fp32, likewise."""

    def rows(self, prompts: PromptSet) -> np.ndarray:
        """The row of each prompt [n] in the table to come; those not met before are evaluated."""
        keys = prompts.keys()
        new = [number for number, key in enumerate(keys) if key not in self._row_of]
        if new:
            some, _ = prompts.subset(np.array(new))
            table = self._policy.evaluate(some, self._tables[0].statistics, self._days)
            self._sets.append(some)
            self._tables.append(table)
            self._row_of |= {keys[number]: len(self._row_of) + n for n, number in enumerate(new)}
            self.probabilities = np.concatenate([self.probabilities, table.probabilities])
            self.log_probabilities = np.concatenate([self.log_probabilities, _told(table)])
        return np.array([self._row_of[key] for key in keys])

    def table(self) -> tuple[Table, PromptSet]:
        """All rows, with their gradient, and the prompts that they are of."""
        return Table.joined(self._tables), merge(self._sets)[0]


def _day_by_day(
    policy: Policy, world: World, groups: list[_Group], phase: Phase
) -> tuple[Table, PromptSet, list[dict[str, np.ndarray]]]:
    """Evaluates the prompts of a day when its accounts are known."""
    with phase("evaluate"):
        visited = _Visited(policy, _reference_prompts(world, groups))
    parts = [_empty_part(group) for group in groups]
    now: list[np.ndarray] = [np.empty(0)] * len(groups)  # the rows that accounts are in, [B] each
    with policy.unpacked():
        for step in range(len(groups[0].day)):
            for group in groups:
                group.accounts.reset(np.full(len(group.accounts), group.restart[step]))
            fresh = [n for n, group in enumerate(groups) if step == 0 or group.restart[step]]
            with phase("evaluate"):
                _observe(visited, world, groups, fresh, step, 0, now)
            with phase("rollout"):
                for group, part, row in zip(groups, parts, now, strict=True):
                    part["row"][:, step] = row
                    _act(world, group, part, step, visited)
            with phase("evaluate"):
                _observe(visited, world, groups, list(range(len(groups))), step, 1, now)
            for part, row in zip(parts, now, strict=True):
                part["next_row"][:, step] = row
    with phase("evaluate"):
        table, prompts = visited.table()
    return table, prompts, parts


def _observe(
    visited: _Visited,
    world: World,
    groups: list[_Group],
    chosen: list[int],
    step: int,
    ahead: int,
    now: list[np.ndarray],
) -> None:
    """Puts into `now` the rows of what the accounts of each chosen group show at its day of `step`,
    or at the next one (`ahead` 1)."""
    if not chosen:
        return
    bars, prompter = world.bars, world.prompter
    days = [int(groups[number].day[step]) + ahead for number in chosen]
    accounts = [groups[number].accounts for number in chosen]
    sets = [
        prompts_now(prompter, bars, some, day) for some, day in zip(accounts, days, strict=True)
    ]
    prompts, places = merge([prompts for prompts, _ in sets])
    rows = visited.rows(prompts)
    for number, (_, row), place in zip(chosen, sets, places, strict=True):
        now[number] = rows[place[row]]


def _empty_part(group: _Group) -> dict[str, np.ndarray]:
    shape = (len(group.accounts), len(group.day))
    return {
        "row": np.zeros(shape, np.int32),
        "next_row": np.zeros(shape, np.int32),
        "action": np.zeros(shape, np.int8),
        "log_probability": np.zeros(shape, np.float32),
        "reward": np.zeros(shape),
        "terminated": np.zeros(shape, bool),
        "valid": np.zeros(shape, bool),
        "truncated": np.broadcast_to(group.last, shape),
    }


def _act(
    world: World, group: _Group, part: dict[str, np.ndarray], step: int, visited: _Visited
) -> None:
    """One step of a group from the rows that its accounts are in."""
    row = part["row"][:, step]
    environments = group.first_env + np.arange(len(group.accounts))
    uniform = simulator.uniform(world.seed, environments, group.first_step + step)
    part["valid"][:, step] = group.accounts.alive
    action = choose(visited.probabilities[row], uniform)
    part["reward"][:, step], part["terminated"][:, step] = simulator.step(
        world.bars, world.simulator, group.accounts, group.day[step], action
    )
    # What a closed account does is Hold, as in a rollout from the table.
    action = np.where(part["valid"][:, step], action, simulator.HOLD)
    part["action"][:, step] = action
    part["log_probability"][:, step] = visited.log_probabilities[row, action]


def _lived_days(world: World, groups: list[_Group]) -> list[int]:
    return sorted({day for group in groups for days, _ in _episodes(world, group) for day in days})


def _reference_prompts(world: World, groups: list[_Group]) -> PromptSet:
    """The prompts that centre the features of a rollout, all of them reference; of every day that
    it sees there is one at least."""
    days = _lived_days(world, groups)
    accounts, of_day = reference_accounts(world.bars, world.simulator, days)
    of_each = [accounts.take(np.flatnonzero(of_day == day)) for day in days]
    sets = [
        prompts_now(world.prompter, world.bars, some, day)[0]
        for some, day in zip(of_each, days, strict=True)
    ]
    prompts, _ = merge(sets)
    return replace(prompts, reference=np.arange(len(prompts.pairs), dtype=np.int32))
