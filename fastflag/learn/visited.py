"""A rollout that evaluates prompts as they are visited: day by day, each of them once.

Shapes: B environments, H steps, U prompts, A actions.
"""

from dataclasses import replace

import numpy as np

from fastflag.learn.batch import Group, Phase, World
from fastflag.learn.decision import branch, choose, prompts_now
from fastflag.learn.reference import reference_accounts
from fastflag.market import simulator
from fastflag.market.accounts import Accounts
from fastflag.market.simulator import ACTIONS
from fastflag.policy.table import Policy, Table
from fastflag.prompt.tokens import PromptSet, merge


def live_day_by_day(
    policy: Policy, world: World, groups: list[Group], branches: bool, phase: Phase
) -> tuple[Table, PromptSet, list[dict[str, np.ndarray]]]:
    """Evaluates the prompts of a day when its accounts are known; with `branches` also those of the
    day after whatever they do. -> all rows, their prompts, a batch's arrays for each group."""
    with phase("evaluate"):
        visited = _Visited(policy, _reference_prompts(world, groups))
    parts = [_empty_part(group, branches) for group in groups]
    now: list[np.ndarray] = [np.empty(0)] * len(groups)  # the rows that accounts are in, [B] each
    with policy.unpacked():
        for step in range(len(groups[0].day)):
            for group in groups:
                group.accounts.reset(np.full(len(group.accounts), group.restart[step]))
            fresh = [n for n, group in enumerate(groups) if step == 0 or group.restart[step]]
            with phase("evaluate"):
                shown = [(groups[n].accounts, int(groups[n].day[step])) for n in fresh]
                for n, row in zip(fresh, visited.observe(world, shown), strict=True):
                    now[n] = row
            with phase("rollout"):
                after = []
                for group, part, row in zip(groups, parts, now, strict=True):
                    part["row"][:, step] = row
                    after += _act(world, group, part, step, visited, branches)
            with phase("evaluate"):
                # Of each group where it went, after where each action leads.
                rows = visited.observe(world, after)
            each = len(after) // len(groups)
            for n, part in enumerate(parts):
                *of_branches, now[n] = rows[n * each : (n + 1) * each]
                part["next_row"][:, step] = now[n]
                for action, row in enumerate(of_branches):
                    part["branch_next_row"][:, step, action] = row
    with phase("evaluate"):
        table, prompts = visited.table()
    return table, prompts, parts


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
        self.log_probabilities = self._tables[0].detached
        """[U, A] fp32, likewise."""

    def observe(self, world: World, shown: list[tuple[Accounts, int]]) -> list[np.ndarray]:
        """The rows [B] in the table to come of what each of the accounts shows at the close of its
        day; prompts not met before are evaluated, all at once."""
        if not shown:
            return []
        sets = [prompts_now(world.prompter, world.bars, *some) for some in shown]
        prompts, places = merge([prompts for prompts, _ in sets])
        rows = self._rows(prompts)
        return [rows[place[row]] for (_, row), place in zip(sets, places, strict=True)]

    def _rows(self, prompts: PromptSet) -> np.ndarray:
        keys = prompts.keys()
        new = [number for number, key in enumerate(keys) if key not in self._row_of]
        if new:
            some, _ = prompts.subset(np.array(new))
            table = self._policy.evaluate(some, self._tables[0].statistics, self._days)
            self._sets.append(some)
            self._tables.append(table)
            self._row_of |= {keys[number]: len(self._row_of) + n for n, number in enumerate(new)}
            self.probabilities = np.concatenate([self.probabilities, table.probabilities])
            self.log_probabilities = np.concatenate([self.log_probabilities, table.detached])
        return np.array([self._row_of[key] for key in keys])

    def table(self) -> tuple[Table, PromptSet]:
        """All rows, with their gradient, and the prompts that they are of."""
        return Table.joined(self._tables), merge(self._sets)[0]


def _empty_part(group: Group, branches: bool) -> dict[str, np.ndarray]:
    shape = (len(group.accounts), len(group.day))
    part = {
        "row": np.zeros(shape, np.int32),
        "next_row": np.zeros(shape, np.int32),
        "action": np.zeros(shape, np.int8),
        "log_probability": np.zeros(shape, np.float32),
        "reward": np.zeros(shape),
        "terminated": np.zeros(shape, bool),
        "valid": np.zeros(shape, bool),
        "truncated": np.broadcast_to(group.last, shape),
    }
    if branches:
        each = (*shape, len(ACTIONS))
        part["branch_next_row"] = np.zeros(each, np.int32)
        part["branch_reward"], part["branch_terminated"] = np.zeros(each), np.zeros(each, bool)
    return part


def _act(
    world: World,
    group: Group,
    part: dict[str, np.ndarray],
    step: int,
    visited: _Visited,
    branches: bool,
) -> list[tuple[Accounts, int]]:
    """One step of a group from the rows that its accounts are in; returns what is to be observed:
    with `branches` where each action would have led, then where it went."""
    row, day = part["row"][:, step], int(group.day[step])
    environments = group.first_env + np.arange(len(group.accounts))
    uniform = simulator.uniform(world.seed, environments, group.first_step + step)
    part["valid"][:, step] = group.accounts.alive
    after: list[Accounts] = []
    if branches:
        after, reward, terminated = branch(world, group.accounts, day)
        part["branch_reward"][:, step], part["branch_terminated"][:, step] = reward, terminated
    action = choose(visited.probabilities[row], uniform)
    part["reward"][:, step], part["terminated"][:, step] = simulator.step(
        world.bars, world.simulator, group.accounts, day, action
    )
    # What a closed account does is Hold, as in a rollout from the table.
    action = np.where(part["valid"][:, step], action, simulator.HOLD)
    part["action"][:, step] = action
    part["log_probability"][:, step] = visited.log_probabilities[row, action]
    return [(some, day + 1) for some in (*after, group.accounts)]


def _reference_prompts(world: World, groups: list[Group]) -> PromptSet:
    """The prompts that centre the features of a rollout, all of them reference; of every day that
    it sees there is one at least."""
    episodes = [episode for group in groups for episode in group.episodes(world.simulator.cash)]
    days = sorted({day for lived, _ in episodes for day in lived})
    accounts, of_day = reference_accounts(world.bars, world.simulator, days)
    of_each = [accounts.take(np.flatnonzero(of_day == day)) for day in days]
    sets = [
        prompts_now(world.prompter, world.bars, some, day)[0]
        for some, day in zip(of_each, days, strict=True)
    ]
    prompts, _ = merge(sets)
    return replace(prompts, reference=np.arange(len(prompts.pairs), dtype=np.int32))
