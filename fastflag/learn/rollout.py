"""Table + simulator -> batches: what many environments did over the same moments.

Shapes: B environments, H steps, U prompts, M moments, A actions; K slots of a portfolio.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from fastflag.config import TrainConfig
from fastflag.learn.batch import Batch, Branches, Group, Lived, Phase, episodes_of, start_groups
from fastflag.learn.day_by_day import live_day_by_day
from fastflag.learn.speculation import visited_prompts
from fastflag.learn.stepping import step_through
from fastflag.market.accounts import Columns
from fastflag.market.task import Steps
from fastflag.policy.table import Policy, Table
from fastflag.prompt.prompts import PromptSet
from fastflag.prompt.world import World

_MANY_STEPS = 2**15
# Steps that are simulated before what they teach is added up: 2^22 take 0.4 GB until then, and with
# all actions 1.1 GB.
_PIECE_STEPS = 2**22


def rollout(
    policy: Policy,
    world: World,
    spans: Sequence[range],
    accounts: Sequence[Columns],
    config: TrainConfig,
    done: int,
    phase: Phase,
) -> tuple[Table, Iterator[Batch]]:
    """Steps every environment num_steps times over the moments of `spans` under the policy.

    `accounts` move in place, as the batches are taken: one batch, or, where the steps are too many
    to keep and the update needs no more than their sums, one after another of some environments.
    The table has every row that they name, with gradient.
    """
    groups = start_groups(world, spans, accounts, config.rollout.num_steps, done)
    branches = config.algorithm.estimator == "all-actions"
    if world.prompter.config.account == "exact":
        table, prompts, parts = live_day_by_day(policy, world, groups, branches, phase)
        with phase("evaluate"):
            initial = policy.initial_log_probabilities(prompts)
        lived = list(zip(groups, parts, strict=True))
        return table, iter([_batch(table, prompts, initial, lived, phase)])
    with phase("evaluate"):
        if _speculates(policy, world, config):
            table, prompts, row_of = visited_prompts(policy, world, groups, branches)
        else:
            prompts, row_of = world.possible(episodes_of(world, groups))
            table = policy.evaluate(prompts)
        initial = policy.initial_log_probabilities(prompts)
    parts = _from_table(world, groups, table, row_of, branches, phase)
    if config.algorithm.one_step and _steps(config) > _PIECE_STEPS:
        return table, (_batch(table, prompts, initial, [part], phase) for part in parts)
    return table, iter([_batch(table, prompts, initial, list(parts), phase)])


def _speculates(policy: Policy, world: World, config: TrainConfig) -> bool:
    """Whether visited prompts are looked for, and not all that can be reached evaluated at once.

    256 environments visit a third of what they could reach (63 days of AAPL). A GPU takes one large
    evaluation in less time than several small ones. Of a portfolio's slot hundreds of codes can be
    reached, for its weight hangs on all others.
    """
    few = policy.device.type == "cpu" and _steps(config) < _MANY_STEPS
    return few or world.task.slots > 1


def _steps(config: TrainConfig) -> int:
    """Environment steps of an update."""
    return config.rollout.num_envs * config.rollout.num_steps


def _batch(
    table: Table,
    prompts: PromptSet,
    initial: Tensor,
    parts: list[tuple[Group, Lived]],
    phase: Phase,
) -> Batch:
    """One batch of what groups did, the environments of each after those of the one before."""
    with phase("rollout"):
        steps = Steps.joined([steps for _, (steps, _) in parts])
        ways = [ways for _, (_, ways) in parts if ways is not None]
        truncated = [np.broadcast_to(group.last, lived.valid.shape) for group, (lived, _) in parts]
        return Batch(
            prompts,
            initial,
            steps,
            log_probability=table.detached[steps.row, steps.action],
            truncated=np.concatenate(truncated),
            branches=Branches.joined(ways) if ways else None,
        )


def _from_table(
    world: World,
    groups: list[Group],
    table: Table,
    row_of: np.ndarray,
    branches: bool,
    phase: Phase,
) -> Iterator[tuple[Group, Lived]]:
    """What the groups do, a number of environments at a time."""
    cdf = table.probabilities.cumsum(1)
    for group in groups:
        for some in group.slices(max(_PIECE_STEPS // len(group.moment) // world.task.slots, 1)):
            with phase("rollout"):
                lived = step_through(world, some, cdf, row_of, branches)
            yield some, lived
