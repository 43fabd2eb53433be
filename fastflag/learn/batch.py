"""What environments live in, and what they did there.

Shapes: B environments, H steps, U prompts, A actions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fastflag.config import RolloutConfig, SimulatorConfig
from fastflag.files import InputError
from fastflag.market.accounts import Accounts
from fastflag.market.bars import Bars
from fastflag.market.schedule import schedule
from fastflag.prompt.prompter import Prompter
from fastflag.prompt.prompts import PromptSet

Phase = Callable[[str], AbstractContextManager[None]]
"""Times what is done inside, under a name."""


@dataclass(frozen=True)
class World:
    """What environments live in: one symbol's bars, the rules, the prompts."""

    bars: Bars
    simulator: SimulatorConfig
    prompter: Prompter
    seed: int


@dataclass(frozen=True)
class Branches:
    """Where every action would have led from each state."""

    next_row: np.ndarray  # [B, H, A] int32
    reward: np.ndarray  # [B, H, A] float64
    terminated: np.ndarray  # [B, H, A] bool


@dataclass(frozen=True)
class Batch:
    """Every step of some environments; rows are those of `prompts`."""

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
    branches: Branches | None


@dataclass(frozen=True)
class Group:
    """Environments that live the same days."""

    accounts: Accounts
    first_env: int
    first_step: int
    day: np.ndarray  # [H]
    restart: np.ndarray  # [H] bool
    last: np.ndarray  # [H] bool

    def episodes(self, cash: float) -> list[tuple[range, Accounts]]:
        """The stretches of consecutive days that it lives through, the state after the last
        decision included, each with the accounts that enter it."""
        starts = [0, *(int(at) for at in np.flatnonzero(self.restart) if at > 0)]
        ends = [*starts[1:], len(self.day)]
        fresh = Accounts.start(1, cash)
        stretches = []
        for start, end in zip(starts, ends, strict=True):
            days = range(int(self.day[start]), int(self.day[end - 1]) + 2)
            stretches.append((days, fresh if self.restart[start] else self.accounts))
        return stretches

    def slices(self, size: int) -> list["Group"]:
        """The same in parts of `size` environments; their accounts are views of these."""
        arrays = self.accounts.arrays()
        return [
            replace(
                self,
                accounts=Accounts(
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


def start_groups(
    world: World, days: range, accounts: list[Accounts], num_steps: int, step: int
) -> list[Group]:
    """The groups of update number `step`, and the days that each lives."""
    first = step * num_steps
    groups = []
    for number, some in enumerate(accounts):
        lived = schedule(days, world.simulator.horizon, world.seed, number, first, num_steps)
        groups.append(Group(some, number * len(some), first, *lived))
    return groups


def days_of(world: World, groups: list[Group]) -> list[int]:
    """The days that the groups see, sorted, those after their last decisions included."""
    episodes = (episode for group in groups for episode in group.episodes(world.simulator.cash))
    return sorted({day for lived, _ in episodes for day in lived})
