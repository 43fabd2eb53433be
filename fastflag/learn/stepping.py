"""Environments that step through a table: the task's rollout, and where each action leads.

Shapes: B environments, H steps, U rows of the table, M moments, K slots (of a task of one symbol at
a time the axis is not there), A actions.
"""

from typing import Any

import numpy as np

from fastflag.learn.batch import Branches, Group, Lived
from fastflag.learn.decision import branch
from fastflag.market.accounts import Columns
from fastflag.market.task import Task
from fastflag.prompt.world import World, of_codes


def step_through(
    world: World, group: Group, cdf: np.ndarray, row_of: np.ndarray, branches: bool
) -> Lived:
    """What `group` does, its accounts moved in place; with `branches` also where every action would
    have led.

    cdf [U, A] float64, cumulative; row_of [M, K, CODES] int32.
    """
    before = group.accounts.take(np.arange(len(group.accounts))) if branches else None
    steps = world.task.rollout(
        group.accounts,
        group.moment,
        group.restart,
        cdf,
        row_of,
        world.seed,
        group.first_env,
        group.first_step,
    )
    if before is None:
        return steps, None
    return steps, _branches(world.task, group, before, steps.action, row_of)


def _branches(
    task: Task[Any], group: Group, accounts: Columns, action: np.ndarray, row_of: np.ndarray
) -> Branches:
    """Lives the recorded actions again, and at each step every other one."""
    steps = []
    for step, moment in enumerate(group.moment):
        accounts.reset(np.full(len(accounts), group.restart[step]))
        after, reward, terminated = branch(task, accounts, moment, action[:, step])
        codes = (task.code(there, moment + 1) for there in after)
        rows = [row_of[moment + 1][of_codes(some)] for some in codes]
        steps.append((np.stack(rows, 1), reward, terminated))
        task.step(accounts, moment, action[:, step])
    return Branches(*(np.stack(column, 1) for column in zip(*steps, strict=True)))
