"""What environments did, and which of them live the same moments.

Shapes: B environments, H steps, U prompts, K slots (of a task of one symbol at a time the axis is
not there), A actions, W ways, one a slot and action (learn/decision.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from torch import Tensor

from fastflag.config import RolloutConfig
from fastflag.files import InputError
from fastflag.market.accounts import Accounts, Columns
from fastflag.market.schedule import schedule
from fastflag.market.task import Steps
from fastflag.prompt.prompts import PromptSet
from fastflag.prompt.world import World

_Accounts = TypeVar("_Accounts", bound=Columns)
Phase = Callable[[str], AbstractContextManager[None]]
"""Times what is done inside, under a name."""


@dataclass(frozen=True)
class Branches:
    """Where every way would have led from each state."""

    next_row: np.ndarray  # [B, H, W, K] int32
    reward: np.ndarray  # [B, H, W] float64
    terminated: np.ndarray  # [B, H, W] bool

    @staticmethod
    def empty(environments: int, steps: int, actions: int) -> "Branches":
        shape = (environments, steps, actions)
        return Branches(np.zeros(shape, np.int32), np.zeros(shape), np.zeros(shape, bool))

    @staticmethod
    def joined(parts: Sequence["Branches"]) -> "Branches":
        """The environments of each part after those of the one before."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return Branches(*map(np.concatenate, columns))


Lived = tuple[Steps, Branches | None]
"""What a group did, and what it might have done, where that is asked for."""


@dataclass(frozen=True)
class Batch:
    """Every step of some environments; rows are those of `prompts`."""

    prompts: PromptSet
    initial: Tensor  # [U, A], log-probabilities of the untrained policy
    steps: Steps
    log_probability: np.ndarray  # [B, H, K] fp32, of the action, as it was drawn
    truncated: np.ndarray  # [B, H] bool
    branches: Branches | None


@dataclass(frozen=True)
class Group:
    """Environments that live the same moments."""

    accounts: Columns
    first_env: int
    first_step: int
    moment: np.ndarray  # [H]
    restart: np.ndarray  # [H] bool
    last: np.ndarray  # [H] bool

    def episodes(self, fresh: Columns) -> Iterator[tuple[range, Columns]]:
        """The stretches of consecutive moments that it lives through, the state after the last
        decision included, each with the accounts that enter it: its own, or after a restart
        `fresh`."""
        starts = [0, *(int(at) for at in np.flatnonzero(self.restart) if at > 0)]
        ends = [*starts[1:], len(self.moment)]
        for start, end in zip(starts, ends, strict=True):
            moments = range(int(self.moment[start]), int(self.moment[end - 1]) + 2)
            yield moments, fresh if self.restart[start] else self.accounts

    def slices(self, size: int) -> list["Group"]:
        """The same in parts of `size` environments; their accounts are views of these."""
        arrays = self.accounts.arrays()
        return [
            replace(
                self,
                accounts=type(self.accounts)(
                    **{name: array[at : at + size] for name, array in arrays.items()}
                ),
                first_env=self.first_env + at,
            )
            for at in range(0, len(self.accounts), size)
        ]

    def copy(self) -> "Group":
        """The same with accounts of its own."""
        return replace(self, accounts=self.accounts.take(np.arange(len(self.accounts))))


def start_accounts(config: RolloutConfig, cash: float) -> list[Accounts]:
    """One Accounts a start group, of the task `single`."""
    return start_all(config, lambda size: Accounts.start(size, cash))


def start_all(config: RolloutConfig, start: Callable[[int], _Accounts]) -> list[_Accounts]:
    """The accounts of each start group, as a task starts so many.

    Raises InputError where the environments do not divide into the groups.
    """
    size, rest = divmod(config.num_envs, config.start_groups)
    if rest:
        raise InputError(
            f"num_envs {config.num_envs} must be a multiple of start_groups "
            f"{config.start_groups}, --num-envs"
        )
    return [start(size) for _ in range(config.start_groups)]


def start_groups(
    world: World, spans: Sequence[range], accounts: Sequence[Columns], num_steps: int, done: int
) -> list[Group]:
    """The groups of an update before which `done` were, and the moments of `spans` that each
    lives."""
    first, horizon = done * num_steps, world.task.rules.horizon
    groups = []
    for number, some in enumerate(accounts):
        lived = schedule(spans, horizon, world.seed, number, first, num_steps)
        groups.append(Group(some, number * len(some), first, *lived))
    return groups


def episodes_of(world: World, groups: list[Group]) -> Iterator[tuple[range, Columns]]:
    """The episodes of all groups."""
    fresh = world.task.start(1)
    return (episode for group in groups for episode in group.episodes(fresh))


def moments_of(world: World, groups: list[Group]) -> list[int]:
    """The moments that the groups see, sorted, those after their last decisions included."""
    return sorted({moment for lived, _ in episodes_of(world, groups) for moment in lived})
