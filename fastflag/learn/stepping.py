"""Environments that step through a table: the simulator's rollout, and where each action leads.

Shapes: B environments, H steps, R rows of the table, T days of the market, A actions.
"""

import numpy as np

from fastflag.learn.batch import Group, World
from fastflag.learn.decision import branch
from fastflag.market import simulator
from fastflag.market.accounts import Accounts


def step_through(
    world: World, group: Group, cdf: np.ndarray, row_of: np.ndarray, branches: bool
) -> dict[str, np.ndarray]:
    """What `group` does, its accounts moved in place: arrays [B, H] as `simulator.rollout` gives
    them, with `branches` also [B, H, A] of where every action would have led.

    cdf [R, A] float64, cumulative; row_of [T, CODES] int32.
    """
    before = group.accounts.take(np.arange(len(group.accounts))) if branches else None
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
    if before is not None:
        part |= _branches(world, group, before, part["action"], row_of)
    return part


def _branches(
    world: World, group: Group, accounts: Accounts, action: np.ndarray, row_of: np.ndarray
) -> dict[str, np.ndarray]:
    """Lives the recorded actions again, and at each step every other one."""
    steps = []
    for step, day in enumerate(group.day):
        accounts.reset(np.full(len(accounts), group.restart[step]))
        after, reward, terminated = branch(world, accounts, day)
        codes = [simulator.account_code(world.bars, there, day + 1) for there in after]
        steps.append((row_of[day + 1, np.stack(codes, 1)], reward, terminated))
        simulator.step(world.bars, world.simulator, accounts, day, action[:, step])
    names = ("branch_next_row", "branch_reward", "branch_terminated")
    columns = zip(*steps, strict=True)
    return {name: np.stack(column, 1) for name, column in zip(names, columns, strict=True)}
