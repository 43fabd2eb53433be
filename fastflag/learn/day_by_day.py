"""A rollout of exact accounts, whose prompts can't be listed before: day by day, each once.

Shapes: B environments, H steps, U prompts, A actions.
"""

import numpy as np

from fastflag.learn.batch import Branches, Group, Lived, Phase, moments_of
from fastflag.learn.decision import branch, choose
from fastflag.learn.visited import Visited
from fastflag.market.accounts import Columns
from fastflag.market.random_numbers import uniform
from fastflag.market.task import Steps
from fastflag.market.tasks.single import HOLD
from fastflag.policy.table import Policy, Table
from fastflag.prompt.prompts import PromptSet, merge
from fastflag.prompt.world import World


def live_day_by_day(
    policy: Policy, world: World, groups: list[Group], branches: bool, phase: Phase
) -> tuple[Table, PromptSet, list[Lived]]:
    """Evaluates the prompts of a day when its accounts are known; with `branches` also those of the
    day after whatever they do. -> all rows, their prompts, what each group did."""
    with phase("evaluate"):
        visited = Visited(policy, world.centring_prompts(moments_of(world, groups)))
    parts = [_empty_part(world, group, branches) for group in groups]
    now: list[np.ndarray] = [np.empty(0)] * len(groups)  # the rows that accounts are in, [B] each
    with policy.trunk.unpacked():
        for step in range(len(groups[0].moment)):
            for group in groups:
                group.accounts.reset(np.full(len(group.accounts), group.restart[step]))
            fresh = [n for n, group in enumerate(groups) if step == 0 or group.restart[step]]
            with phase("evaluate"):
                shown = [(groups[n].accounts, int(groups[n].moment[step])) for n in fresh]
                for n, row in zip(fresh, _observe(visited, world, shown), strict=True):
                    now[n] = row
            with phase("rollout"):
                after = []
                for group, part, row in zip(groups, parts, now, strict=True):
                    part[0].row[:, step] = row
                    after += _act(world, group, part, step, visited)
            with phase("evaluate"):
                # Of each group where it went, after where each action leads.
                rows = _observe(visited, world, after)
            each = len(after) // len(groups)
            for n, (steps, ways) in enumerate(parts):
                *of_branches, now[n] = rows[n * each : (n + 1) * each]
                steps.next_row[:, step] = now[n]
                if ways is not None:
                    ways.next_row[:, step] = np.stack(of_branches, 1)
    with phase("evaluate"):
        table, prompts = visited.table()
    return table, prompts, parts


def _empty_part(world: World, group: Group, branches: bool) -> Lived:
    shape = (len(group.accounts), len(group.moment))
    ways = Branches.empty(*shape, len(world.task.actions)) if branches else None
    return Steps.empty(*shape), ways


def _act(
    world: World, group: Group, part: Lived, step: int, visited: Visited
) -> list[tuple[Columns, int]]:
    """One step of a group from the rows that its accounts are in; returns what is to be observed:
    with branches where each action would have led, then where it went."""
    steps, ways = part
    row, moment = steps.row[:, step], int(group.moment[step])
    environments = group.first_env + np.arange(len(group.accounts))
    drawn = uniform(world.seed, environments, group.first_step + step)
    alive = steps.valid[:, step] = group.accounts.alive
    after: list[Columns] = []
    action = choose(visited.probabilities[row], drawn)
    if ways is not None:
        after, reward, terminated = branch(world.task, group.accounts, moment, action)
        ways.reward[:, step], ways.terminated[:, step] = reward, terminated
    # What a closed account does is Hold, as in a rollout from the table.
    steps.action[:, step] = np.where(alive, action, HOLD)
    reward, terminated = world.task.step(group.accounts, moment, action)
    steps.reward[:, step], steps.terminated[:, step] = reward, terminated
    return [(some, moment + 1) for some in (*after, group.accounts)]


def _observe(visited: Visited, world: World, shown: list[tuple[Columns, int]]) -> list[np.ndarray]:
    """The rows [B] in the table to come of what each of the accounts shows at its moment; prompts
    not met before are evaluated, all at once."""
    if not shown:
        return []
    sets = [world.shown(*some) for some in shown]
    prompts, places = merge([prompts for prompts, _ in sets])
    rows = visited.rows(prompts)
    return [rows[place[row]] for (_, row), place in zip(sets, places, strict=True)]
