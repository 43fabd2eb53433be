"""Who trades: accounts, as flat arrays. B accounts."""

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from fastflag.market.compiled.constants import HISTORY


class Arrays(NamedTuple):
    """`Accounts` as the kernels see it: the same names, the same arrays.

    Numba pickles the classes of a kernel's arguments by name into its cache: don't rename it.
    """

    starting_cash: np.ndarray
    cash: np.ndarray
    shares: np.ndarray
    entry: np.ndarray
    opened: np.ndarray
    pending: np.ndarray
    equity: np.ndarray
    fees: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray
    sharpe: np.ndarray
    alive: np.ndarray
    rewards: np.ndarray
    equities: np.ndarray
    actions: np.ndarray


# What an account starts with, besides its cash.
_FRESH = {
    "shares": 0.0,
    "entry": 0.0,
    "opened": -1,
    "pending": -1,
    "fees": 0.0,
    "count": 0,
    "mean": 0.0,
    "m2": 0.0,
    "sharpe": 0.0,
    "alive": True,
    "rewards": np.nan,
    "equities": np.nan,
    "actions": -1,
}


_Columns = TypeVar("_Columns", bound="Columns")


class Columns:
    """Arrays of B accounts: the fields of a dataclass, accounts along the first axis."""

    fresh: ClassVar[dict[str, Any]]
    """What an account starts with, besides its cash."""
    starting_cash: np.ndarray
    cash: np.ndarray
    equity: np.ndarray
    sharpe: np.ndarray
    alive: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name: the accounts' own, not copies."""
        return {field.name: getattr(self, field.name) for field in _fields(self)}

    def filled(self: _Columns, arrays: dict[str, np.ndarray]) -> _Columns:
        """These accounts with copies of what `arrays()` gave.

        Raises ValueError for a missing or unknown name, a wrong shape or a wrong dtype.
        """
        expected = self.arrays()
        if set(arrays) != set(expected):
            raise ValueError(f"accounts need {sorted(expected)}, not {sorted(arrays)}")
        for name, array in expected.items():
            given = arrays[name]
            if given.shape != array.shape or given.dtype != array.dtype:
                raise ValueError(
                    f"accounts.{name} is {given.dtype}{given.shape}, not {array.dtype}{array.shape}"
                )
            array[...] = given
        return self

    @classmethod
    @abstractmethod
    def from_arrays(cls: type[_Columns], arrays: dict[str, np.ndarray]) -> _Columns:
        """Accounts from copies of what `arrays()` gave; ValueError as `filled` raises it."""

    def take(self: _Columns, rows: np.ndarray) -> _Columns:
        """Copies of the accounts in `rows`."""
        return type(self)(**{name: array[rows].copy() for name, array in self.arrays().items()})

    def reset(self, mask: np.ndarray) -> None:
        """Starts the accounts in `mask` [B] (bool) anew, in place."""
        mask = np.asarray(mask, np.bool_)
        for name, value in self.fresh.items():
            getattr(self, name)[mask] = value
        self.cash[mask] = self.equity[mask] = self.starting_cash[mask]

    def __len__(self) -> int:
        return len(self.cash)


def _fields(columns: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(columns)


@dataclass
class Accounts(Columns):
    """B accounts; arrays [B], histories [B, HISTORY] with the newest step last."""

    fresh = _FRESH

    starting_cash: np.ndarray
    cash: np.ndarray
    shares: np.ndarray
    """Negative when short."""
    entry: np.ndarray
    """Effective price per share (fee and slippage in it), adjusted for splits and reinvested
    dividends since: mark / entry - 1 is a long's total return. 0 when flat."""
    opened: np.ndarray
    """int32, day of the fill; -1 when flat."""
    pending: np.ndarray
    """int8, the action that waits for a bar; -1 when none does."""
    equity: np.ndarray
    """Cash and shares at the last mark."""
    fees: np.ndarray
    """Fees and slippage paid so far."""
    count: np.ndarray
    """int64; with `mean` and `m2` (sum of squared deviations) Welford's state of step profits."""
    mean: np.ndarray
    m2: np.ndarray
    sharpe: np.ndarray
    """mean / deviation (ddof 1) of profit per step so far, unannualised; 0 while undefined."""
    alive: np.ndarray
    rewards: np.ndarray
    """NaN where there was no step yet, as in `equities`."""
    equities: np.ndarray
    actions: np.ndarray
    """int8; -1 where there was no step yet. An action that was not allowed counts as Hold."""

    @classmethod
    def start(cls, num_accounts: int, cash: float) -> "Accounts":
        """Accounts that hold `cash` and nothing else."""
        accounts = cls(
            starting_cash=np.full(num_accounts, float(cash)),
            cash=np.empty(num_accounts),
            shares=np.empty(num_accounts),
            entry=np.empty(num_accounts),
            opened=np.empty(num_accounts, np.int32),
            pending=np.empty(num_accounts, np.int8),
            equity=np.empty(num_accounts),
            fees=np.empty(num_accounts),
            count=np.empty(num_accounts, np.int64),
            mean=np.empty(num_accounts),
            m2=np.empty(num_accounts),
            sharpe=np.empty(num_accounts),
            alive=np.empty(num_accounts, np.bool_),
            rewards=np.empty((num_accounts, HISTORY)),
            equities=np.empty((num_accounts, HISTORY)),
            actions=np.empty((num_accounts, HISTORY), np.int8),
        )
        accounts.reset(np.ones(num_accounts, np.bool_))
        return accounts

    def enter(self, side: np.ndarray, price: np.ndarray, day: np.ndarray) -> None:
        """Puts the equity of accounts that hold cash alone into a position, in place and free of
        costs: `side` [B] -1, 0 or 1, `price` and `day` [B] where it is entered."""
        held = side != 0
        self.shares[held] = (side * self.cash / price)[held]
        self.cash[held] *= 1.0 - side[held]
        self.entry[held], self.opened[held] = price[held], day[held]

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Accounts":
        """Accounts from copies of what `arrays()` gave; ValueError as `filled` raises it."""
        return cls.start(len(arrays.get("cash", ())), 1.0).filled(arrays)

    def __repr__(self) -> str:
        return f"Accounts({len(self)})"

    def views(self) -> Arrays:
        return Arrays(*(getattr(self, name) for name in Arrays._fields))
