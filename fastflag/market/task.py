"""What every task has in common: when something is decided, and what a rollout leaves behind.

A moment is a place in the timeline: at the close of a bar of one symbol. Moments of several symbols
stand one after another, each symbol's in a span of its own, so that a moment's number names its
symbol too, and an episode is a range inside one span.

Shapes: M moments, N symbols, B accounts, K slots, H steps, A actions, U rows of a policy's table. A
task with slots, as a portfolio's assets, shows each of them and asks an action of each; `Single`,
which has one, leaves the axis K out of codes, actions, rows and `row_of`; its arrays are of the
same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Protocol, TypeVar

import numpy as np

from fastflag.market.accounts import Columns


@dataclass(frozen=True, eq=False)
class Timeline:
    """The moments of one symbol or several. Raises ValueError where the spans don't follow one
    another from 0 on, or one has no moment."""

    spans: tuple[range, ...]
    """N, each symbol's moments."""
    symbol: np.ndarray = field(init=False, repr=False)
    """[M] int64, which of the spans a moment lies in."""
    first: np.ndarray = field(init=False, repr=False)
    """[M] int64, the first moment of each moment's span."""
    last: np.ndarray = field(init=False, repr=False)
    """[M] int64, likewise."""

    def __post_init__(self) -> None:
        ends = [0, *(span.stop for span in self.spans)]
        for span, end in zip(self.spans, ends, strict=False):
            if span.start != end or span.step != 1 or not len(span):
                raise ValueError(f"spans must follow one another, not {self.spans}")
        lengths = [len(span) for span in self.spans]
        object.__setattr__(self, "symbol", np.repeat(np.arange(len(lengths)), lengths))
        object.__setattr__(self, "first", np.repeat(ends[:-1], lengths))
        object.__setattr__(self, "last", np.repeat(ends[1:], lengths) - 1)

    def __len__(self) -> int:
        return len(self.first)

    def check(self, moments: np.ndarray, following: int = 0) -> None:
        """Raises ValueError where one of `moments` [n] is none, or has not as many `following` in
        its span."""
        if not moments.size:
            return
        if moments.min() < 0 or moments.max() >= len(self):
            raise ValueError(f"moments must lie in 0..{len(self) - 1}")
        if np.any(self.last[moments] - moments < following):
            raise ValueError(f"a moment needs {following} after it in its span")


@dataclass(frozen=True, eq=False)
class Steps:
    """What B accounts did in H steps; all [B, H], of rows and actions [B, H, K]. Rows are those of
    the table that was read."""

    row: np.ndarray
    """int32, of what the account showed when it decided."""
    next_row: np.ndarray
    """int32, of the state that the step led to, before any restart."""
    action: np.ndarray
    """int8, as it was executed."""
    reward: np.ndarray
    """float64"""
    terminated: np.ndarray
    """bool: ruined in this step."""
    valid: np.ndarray
    """bool; False from ruin to the next restart, where an account holds and earns 0."""

    def __repr__(self) -> str:
        return "Steps({} accounts, {} steps)".format(*self.row.shape)

    @staticmethod
    def empty(accounts: int, steps: int) -> "Steps":
        """Of a task with one slot."""
        dtypes = (np.int32, np.int32, np.int8, np.float64, np.bool_, np.bool_)
        return Steps(*(np.zeros((accounts, steps), dtype) for dtype in dtypes))

    @staticmethod
    def joined(parts: Sequence["Steps"]) -> "Steps":
        """The accounts of each part after those of the one before."""
        if len(parts) == 1:
            return parts[0]
        columns = ([getattr(part, each.name) for part in parts] for each in fields(Steps))
        return Steps(*map(np.concatenate, columns))


_Accounts = TypeVar("_Accounts", bound=Columns)


class TaskRules(Protocol):
    """What is set of every task."""

    @property
    def positions(self) -> str: ...

    @property
    def cash(self) -> float:
        """What an account starts with."""
        ...

    @property
    def horizon(self) -> int:
        """Decisions in an episode."""
        ...


class Task(Protocol[_Accounts]):
    """Bars, rules and the kernel that lives by them: what always travels together.

    What an account shows of a slot at a moment is a code; texts and rows of a table are found by
    it. The slots' actions are drawn on their own, so that their log-probabilities add up, and what
    is allowed in one depends on no other.
    """

    codes: ClassVar[int]
    """What a stepped text can say of a slot."""

    @property
    def rules(self) -> TaskRules: ...

    @property
    def timeline(self) -> Timeline: ...

    @property
    def actions(self) -> tuple[str, ...]:
        """A names, the table's columns."""
        ...

    @property
    def slots(self) -> int:
        """K"""
        ...

    def start(self, count: int) -> _Accounts: ...

    def code(self, accounts: _Accounts, moment: np.ndarray | int) -> np.ndarray:
        """-> int32 [B, K]"""
        ...

    def side_of(self, codes: np.ndarray) -> np.ndarray:
        """-1, 0 or 1 of what is held, of each of `codes` [...]: int8 [...]."""
        ...

    def allowed(
        self, moment: np.ndarray | int, side: np.ndarray, slot: np.ndarray | int | None = None
    ) -> np.ndarray:
        """Actions that would be executed, bool [n, A], at `moment` in `slot` by the sides [n] of
        what is held; without `slot` of all of them, [n, K, A] by [n, K]."""
        ...

    def reachable(self, moments: range, accounts: _Accounts) -> np.ndarray:
        """Codes that `accounts` could show under any actions, bool [len(moments), K, codes]."""
        ...

    def step(
        self, accounts: _Accounts, moment: np.ndarray | int, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """By actions [B, K] from each moment to the next, in place: (reward, terminated) [B]."""
        ...

    def rollout(
        self,
        accounts: _Accounts,
        moments: np.ndarray,
        restarts: np.ndarray,
        cdf: np.ndarray,
        row_of: np.ndarray,
        seed: int,
        first_env: int,
        first_step: int,
    ) -> Steps:
        """Many steps, each slot's action drawn from a table by its row, `row_of` [M, K, codes]:
        equals `step` bit for bit. Slot k's number at step h is the one of step h x K + k."""
        ...
