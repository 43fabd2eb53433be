"""Environments' episodes: which moments each lives, and its account. B environments.

An environment's k-th episode begins where `schedule.drawn` says for (its seed, k), whatever others
do. So neither the number of environments nor the way they are reset changes one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Space

from fastflag.gym.spaces import Column
from fastflag.market.schedule import drawn, starts_of

# Seeds of Gymnasium's own are larger than a counted number's may be.
_SEEDS = 2**63


class View(Protocol):
    """What accounts of a task are shown, may do and are told. `accounts` are the task's own."""

    @property
    def task(self) -> Any: ...

    @property
    def spans(self) -> tuple[range, ...]:
        """Where episodes lie."""
        ...

    @property
    def horizon(self) -> int:
        """Decisions in an episode."""
        ...

    @property
    def columns(self) -> tuple[Column, ...]:
        """F, what an observation holds."""
        ...

    @property
    def actions(self) -> Space: ...

    def observe(self, accounts: Any, moment: np.ndarray, left: np.ndarray) -> np.ndarray:
        """[B, F] float32, by the part of the episode that is `left` [B]."""
        ...

    def masks(self, accounts: Any, moment: np.ndarray) -> np.ndarray:
        """Actions that would be executed, bool [B, A] or [B, K, A]."""
        ...

    def texts(self, accounts: Any, moment: np.ndarray) -> list[str]:
        """B prompts, or none."""
        ...

    def label(self, moment: int) -> str:
        """A moment in a line of text."""
        ...

    def prices(self, moments: range) -> np.ndarray:
        """[len(moments), N] of as many lines of a picture."""
        ...


class Moves(NamedTuple):
    """Of one step, all [B]."""

    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class Episodes:
    """The state of B environments; arrays [B].

    moment: where each decides next.
    ended: its episode is over.
    """

    def __init__(self, view: View, count: int, recorded: bool):
        """`recorded`: equities are kept, to be drawn. Raises InputError where no episode fits."""
        self.view = view
        self._starts, self.length = starts_of(view.spans, view.horizon)
        self._accounts = view.task.start(count)
        self._seed = np.zeros(count, np.int64)
        self._episode = np.full(count, -1)
        self.start = np.full(count, self._starts[0])
        self.moment = self.start.copy()
        self.ended = np.ones(count, np.bool_)
        self.last_action = np.full(self.masks().shape[:-1], -1)
        self.equity = np.full((count, self.length + 1), np.nan) if recorded else None
        """[B, decisions + 1], at each close of the episode so far."""

    def __len__(self) -> int:
        return len(self.moment)

    def seed(self, seeds: Sequence[int | None]) -> None:
        """Each environment's, B; None keeps it and its count of episodes."""
        for b, seed in enumerate(seeds):
            if seed is not None:
                self._seed[b], self._episode[b] = seed % _SEEDS, -1

    def reset(self, mask: np.ndarray) -> None:
        """Begins the next episode of those in `mask` [B] bool."""
        self._enter(mask)
        self._accounts.reset(mask)
        self._record()

    def step(self, action: np.ndarray, resting: np.ndarray) -> Moves:
        """By actions [B, or B x K] of all but those `resting` [B] bool, which begin their next
        episode and earn 0. Raises ResetNeeded where another's
        episode is over, and ValueError for an unknown action or another shape."""
        if np.any(self.ended & ~resting):
            raise ResetNeeded("an episode is over: reset its environment first")
        action = np.asarray(action)
        if action.shape != self.last_action.shape:
            raise ValueError(f"actions are {action.shape}, not {self.last_action.shape}")
        some_rest = resting.any()
        if some_rest:
            self._enter(resting)
            self._accounts.alive[resting] = False  # a closed account does nothing and earns 0
        self.last_action[...] = action
        reward, terminated = self.view.task.step(self._accounts, self.moment, action)
        self.moment += ~resting
        if some_rest:
            self._accounts.reset(resting)
        self._record()
        truncated = (self.moment - self.start == self.length) & ~terminated
        self.ended = terminated | truncated
        return Moves(reward, terminated, truncated)

    def observations(self) -> np.ndarray:
        """[B, F] float32, new each time."""
        left = 1.0 - (self.moment - self.start) / self.length
        return self.view.observe(self._accounts, self.moment, left)

    def masks(self) -> np.ndarray:
        """Actions that would be executed, [B, A] or [B, K, A] bool."""
        return self.view.masks(self._accounts, self.moment)

    def infos(self) -> dict[str, Any]:
        """Arrays [B, ...], new each time: action_mask int8, equity, moment, and prompt where the
        view has texts."""
        infos: dict[str, Any] = {
            "action_mask": self.masks().astype(np.int8),
            "equity": self._accounts.equity.copy(),
            "moment": self.moment.copy(),
        }
        if texts := self.view.texts(self._accounts, self.moment):
            infos["prompt"] = np.array(texts, object)
        return infos

    def _record(self) -> None:
        if self.equity is not None:
            passed = self.moment - self.start
            self.equity[np.arange(len(self)), passed] = self._accounts.equity

    def _enter(self, mask: np.ndarray) -> None:
        self._episode[mask] += 1
        for episode in np.unique(self._episode[mask]).tolist():
            those = mask & (self._episode == episode)
            self.start[those] = drawn(self._starts, 0, self._seed[those], episode)
        self.moment[mask] = self.start[mask]
        self.ended[mask] = False
        self.last_action[mask] = -1
