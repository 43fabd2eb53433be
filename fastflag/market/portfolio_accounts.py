"""Who holds portfolios: accounts, as flat arrays. B accounts, K assets."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastflag.market.accounts import Columns


class PortfolioArrays(NamedTuple):
    """`PortfolioAccounts` as the kernels see it: the same names, the same arrays.

    Numba pickles the classes of a kernel's arguments by name into its cache: don't rename it.
    """

    starting_cash: np.ndarray
    cash: np.ndarray
    equity: np.ndarray
    costs: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray
    sharpe: np.ndarray
    alive: np.ndarray
    holding: np.ndarray
    ratio: np.ndarray
    pending: np.ndarray


# What an account starts with, besides its cash.
_FRESH = {
    "costs": 0.0,
    "count": 0,
    "mean": 0.0,
    "m2": 0.0,
    "sharpe": 0.0,
    "alive": True,
    "holding": 0.0,
    "ratio": 1.0,
    "pending": np.nan,
}


@dataclass
class PortfolioAccounts(Columns):
    """B accounts; arrays [B], those of assets [B, K]."""

    fresh = _FRESH

    starting_cash: np.ndarray
    cash: np.ndarray
    equity: np.ndarray
    """Cash and holdings at the last marks."""
    costs: np.ndarray
    """Fees, slippage and borrowing paid so far."""
    count: np.ndarray
    """int64; with `mean` and `m2` (sum of squared deviations) Welford's state of step profits."""
    mean: np.ndarray
    m2: np.ndarray
    sharpe: np.ndarray
    """mean / deviation (ddof 1) of profit per step so far, unannualised; 0 while undefined."""
    alive: np.ndarray
    holding: np.ndarray
    """[B, K] what is held of each asset is worth at its last mark; negative: short."""
    ratio: np.ndarray
    """[B, K] that over what was paid for it, costs included (of a short: over what it brought in),
    dividends counted; 1 where nothing is held."""
    pending: np.ndarray
    """[B, K] target units that wait for a bar; NaN: none do."""

    @classmethod
    def start(cls, num_accounts: int, assets: int, cash: float) -> "PortfolioAccounts":
        """Accounts that hold `cash` and nothing else."""
        of_slots = (num_accounts, assets)
        accounts = cls(
            starting_cash=np.full(num_accounts, float(cash)),
            cash=np.empty(num_accounts),
            equity=np.empty(num_accounts),
            costs=np.empty(num_accounts),
            count=np.empty(num_accounts, np.int64),
            mean=np.empty(num_accounts),
            m2=np.empty(num_accounts),
            sharpe=np.empty(num_accounts),
            alive=np.empty(num_accounts, np.bool_),
            holding=np.empty(of_slots),
            ratio=np.empty(of_slots),
            pending=np.empty(of_slots),
        )
        accounts.reset(np.ones(num_accounts, np.bool_))
        return accounts

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "PortfolioAccounts":
        """Accounts from copies of what `arrays()` gave; ValueError as `filled` raises it."""
        shape = np.shape(arrays.get("holding", np.empty((0, 0))))
        if len(shape) != 2:
            raise ValueError(f"accounts.holding has {len(shape)} axes, not 2")
        return cls.start(*shape, cash=1.0).filled(arrays)

    def views(self) -> PortfolioArrays:
        return PortfolioArrays(*(getattr(self, name) for name in PortfolioArrays._fields))
