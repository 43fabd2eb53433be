"""A rollout of exact accounts, whose prompts can't be listed before: day by day, each once.

Shapes: B environments, H steps, U prompts, A actions.
"""

from dataclasses import replace

import numpy as np

from fastflag.learn.batch import Group, Phase, World, days_of
from fastflag.learn.decision import branch, choose, prompts_now
from fastflag.learn.reference import reference_accounts
from fastflag.learn.visited import Visited
from fastflag.market import simulator
from fastflag.market.accounts import Accounts
from fastflag.market.simulator import ACTIONS
from fastflag.policy.table import Policy, Table
from fastflag.prompt.prompts import PromptSet, merge


def live_day_by_day(
    policy: Policy, world: World, groups: list[Group], branches: bool, phase: Phase
) -> tuple[Table, PromptSet, list[dict[str, np.ndarray]]]:
    """Evaluates the prompts of a day when its accounts are known; with `branches` also those of the
    day after whatever they do. -> all rows, their prompts, a batch's arrays for each group."""
    with phase("evaluate"):
        visited = Visited(policy, _reference_prompts(world, groups))
    parts = [_empty_part(group, branches) for group in groups]
    now: list[np.ndarray] = [np.empty(0)] * len(groups)  # the rows that accounts are in, [B] each
    with policy.trunk.unpacked():
        for step in range(len(groups[0].day)):
            for group in groups:
                group.accounts.reset(np.full(len(group.accounts), group.restart[step]))
            fresh = [n for n, group in enumerate(groups) if step == 0 or group.restart[step]]
            with phase("evaluate"):
                shown = [(groups[n].accounts, int(groups[n].day[step])) for n in fresh]
                for n, row in zip(fresh, _observe(visited, world, shown), strict=True):
                    now[n] = row
            with phase("rollout"):
                after = []
                for group, part, row in zip(groups, parts, now, strict=True):
                    part["row"][:, step] = row
                    after += _act(world, group, part, step, visited, branches)
            with phase("evaluate"):
                # Of each group where it went, after where each action leads.
                rows = _observe(visited, world, after)
            each = len(after) // len(groups)
            for n, part in enumerate(parts):
                *of_branches, now[n] = rows[n * each : (n + 1) * each]
                part["next_row"][:, step] = now[n]
                for action, row in enumerate(of_branches):
                    part["branch_next_row"][:, step, action] = row
    with phase("evaluate"):
        table, prompts = visited.table()
    return table, prompts, parts


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
    visited: Visited,
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
    days = days_of(world, groups)
    accounts, of_day = reference_accounts(world.bars, world.simulator, days)
    of_each = [accounts.take(np.flatnonzero(of_day == day)) for day in days]
    sets = [
        prompts_now(world.prompter, world.bars, some, day)[0]
        for some, day in zip(of_each, days, strict=True)
    ]
    prompts, _ = merge(sets)
    return replace(prompts, reference=np.arange(len(prompts.pairs), dtype=np.int32))


def _observe(visited: Visited, world: World, shown: list[tuple[Accounts, int]]) -> list[np.ndarray]:
    """The rows [B] in the table to come of what each of the accounts shows at the close of its
    day; prompts not met before are evaluated, all at once."""
    if not shown:
        return []
    sets = [prompts_now(world.prompter, world.bars, *some) for some in shown]
    prompts, places = merge([prompts for prompts, _ in sets])
    rows = visited.rows(prompts)
    return [rows[place[row]] for (_, row), place in zip(sets, places, strict=True)]
