"""Table + simulator -> batches: what many environments did over the same days.

Shapes: B environments, H steps, U prompts, T days of the market, A actions.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from fastflag.config import TrainConfig
from fastflag.learn.batch import Batch, Branches, Group, Phase, World, start_groups
from fastflag.learn.day_by_day import live_day_by_day
from fastflag.learn.speculation import distinct_prompts, reference_codes, visited_prompts
from fastflag.learn.stepping import step_through
from fastflag.market import simulator
from fastflag.market.accounts import Accounts
from fastflag.policy.table import Policy, Table
from fastflag.prompt.prompts import PromptSet

_MANY_STEPS = 2**15
# Steps that are simulated before what they teach is added up: 2^22 take 0.4 GB until then, and with
# all actions 1.1 GB.
_PIECE_STEPS = 2**22


def rollout(
    policy: Policy,
    world: World,
    days: range,
    accounts: list[Accounts],
    config: TrainConfig,
    step: int,
    phase: Phase,
) -> tuple[Table, Iterator[Batch]]:
    """Steps every environment num_steps times over `days` under the policy.

    `accounts` move in place, as the batches are taken: one batch, or, where the steps are too many
    to keep and the update needs no more than their sums, one after another of some environments.
    The table has every row that they name, with gradient.
    """
    groups = start_groups(world, days, accounts, config.rollout.num_steps, step)
    branches = config.algorithm.estimator == "all-actions"
    if world.prompter.config.account == "exact":
        table, prompts, parts = live_day_by_day(policy, world, groups, branches, phase)
        with phase("evaluate"):
            initial = policy.initial_log_probabilities(prompts)
        return table, iter([_joined(prompts, initial, parts)])
    with phase("evaluate"):
        if _speculates(policy, config):
            table, prompts, row_of = visited_prompts(policy, world, groups, branches)
        else:
            prompts, row_of = _reachable_prompts(world, groups)
            table = policy.evaluate(prompts)
        initial = policy.initial_log_probabilities(prompts)
    parts = _from_table(world, groups, table, row_of, branches, phase)
    if config.algorithm.one_step and _steps(config) > _PIECE_STEPS:
        return table, (_joined(prompts, initial, [part]) for part in parts)
    return table, iter([_joined(prompts, initial, list(parts))])


def _speculates(policy: Policy, config: TrainConfig) -> bool:
    """Whether visited prompts are looked for, and not all that can be reached evaluated at once.

    256 environments visit a third of what they could reach (63 days of AAPL). A GPU takes one large
    evaluation in less time than several small ones.
    """
    return policy.device.type == "cpu" and _steps(config) < _MANY_STEPS


def _steps(config: TrainConfig) -> int:
    """Environment steps of an update."""
    return config.rollout.num_envs * config.rollout.num_steps


def _joined(prompts: PromptSet, initial: Tensor, parts: list[dict[str, np.ndarray]]) -> Batch:
    """Parts of one batch, the environments of each after those of the one before."""
    whole = parts[0]
    if len(parts) > 1:
        whole = {name: np.concatenate([part[name] for part in parts]) for name in whole}
    names = [name for name in whole if name.startswith("branch_")]
    found = {name.removeprefix("branch_"): whole.pop(name) for name in names}
    return Batch(prompts, initial, **whole, branches=Branches(**found) if found else None)


def _reachable_prompts(world: World, groups: list[Group]) -> tuple[PromptSet, np.ndarray]:
    """Every (day, account text) that any environment could show, known before the policy acts, and
    the row of each, [T, CODES]."""
    reached: dict[int, np.ndarray] = {}
    for group in groups:
        for days, accounts in group.episodes(world.simulator.cash):
            codes = simulator.reachable(world.bars, world.simulator, days, accounts)
            for day, row in zip(days, codes, strict=True):
                reached[day] = reached.get(day, False) | row
    days = sorted(reached)
    present = np.stack([reached[day] for day in days])
    row_of = np.full((len(world.bars), simulator.CODES), -1, np.int32)
    prompts, row_of[days] = distinct_prompts(world, days, present, reference_codes(world, days))
    return prompts, row_of


def _from_table(
    world: World,
    groups: list[Group],
    table: Table,
    row_of: np.ndarray,
    branches: bool,
    phase: Phase,
) -> Iterator[dict[str, np.ndarray]]:
    """A rollout's arrays, of a number of environments at a time."""
    cdf = table.probabilities.cumsum(1)
    for group in groups:
        for some in group.slices(max(_PIECE_STEPS // len(group.day), 1)):
            with phase("rollout"):
                part = step_through(world, some, cdf, row_of, branches)
                part["log_probability"] = table.detached[part["row"], part["action"]]
                part["truncated"] = np.broadcast_to(some.last, part["row"].shape)
            yield part
