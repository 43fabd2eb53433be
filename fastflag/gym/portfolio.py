"""The task `portfolio` in numbers. B accounts, M moments, K assets, F columns."""

from dataclasses import dataclass, replace

import numpy as np
from gymnasium.spaces import MultiDiscrete

from fastflag.config import PortfolioConfig, SimulatorConfig
from fastflag.gym.observe import observe_portfolio_nb
from fastflag.gym.spaces import (
    NEWS_BUCKETS,
    Column,
    bounds,
    days_in,
    market_columns,
    market_numbers,
    market_of,
)
from fastflag.market.bars import MARKET_COLUMNS, Hours, Market
from fastflag.market.compiled.portfolio_constants import GROWTH
from fastflag.market.portfolio_accounts import PortfolioAccounts
from fastflag.market.tasks.portfolio import Portfolio

_SLOT = (
    Column("weight", -2.0, 2.0),
    Column("profit", -1.0, 1.0),
    Column("waiting", 0.0, 1.0),
    Column("units", -1.0, 2.0),
)
_ACCOUNT = (
    Column("cash", -2.0, 2.0),
    Column("growth", -2.0, 2.0),
    Column("sharpe", -1.0, 1.0),
    Column("left", 0.0, 1.0),
)
_RULES = PortfolioConfig()


@dataclass(frozen=True, eq=False)
class PortfolioView:
    """What an account of `Portfolio` is shown, may do and is told, and where its episodes lie.

    Columns are those of `market_numbers` of each asset, of each slot and of the account:

    weight
        Part of the equity; negative: short.
    profit
        Of what is held, as a part of what was paid for it.
    waiting, units
        1 where an order waits for a bar, and the units it orders.
    cash
        Part of the equity.
    growth, sharpe, left
        As in `SingleView`.
    """

    task: Portfolio
    dates: np.ndarray
    """[M] datetime64[D]"""
    spans: tuple[range, ...]
    horizon: int
    columns: tuple[Column, ...]
    market: np.ndarray
    """[M, columns of the market] float32"""

    @staticmethod
    def of(
        market: Market | str = "sample:AAPL,IBM,MSFT",
        *,
        rules: PortfolioConfig = _RULES,
        period: str = "",
        horizon: int = SimulatorConfig.horizon,
        news_buckets: int = NEWS_BUCKETS,
    ) -> "PortfolioView":
        """Of all symbols of a market, or of a data source as `--data` names it.

        period: where the episodes lie, START..END; empty: everywhere.
        horizon: decisions in an episode; shorter periods give shorter ones.

        Raises InputError for what a file or a period has wrong.
        """
        found = market_of(market)
        task = Portfolio.of(rules, found)
        days = days_in(found, period)
        of_market = [
            Column(f"{symbol} {column.name}", column.low, column.high)
            for symbol in found.symbols
            for column in market_columns(news_buckets)
        ]
        numbers = [market_numbers(_alone(found, k), news_buckets) for k in range(task.slots)]
        columns = (*of_market, *_slot_columns(found.symbols), *_ACCOUNT)
        return PortfolioView(task, found.dates, (days,), horizon, columns, np.hstack(numbers))

    @property
    def actions(self) -> MultiDiscrete:
        return MultiDiscrete([len(self.task.actions)] * self.task.slots)

    def observe(
        self, accounts: PortfolioAccounts, moment: np.ndarray, left: np.ndarray
    ) -> np.ndarray:
        """[B, F] float32, of accounts at `moment` [B] with `left` [B] of their episode."""
        numbers = np.empty((len(accounts), len(self.columns)), np.float32)
        low_high = bounds(self.columns[self.market.shape[1] :])
        observe_portfolio_nb(self.market, accounts.views(), moment, left, *low_high, numbers)
        return numbers

    def masks(self, accounts: PortfolioAccounts, moment: np.ndarray) -> np.ndarray:
        """Actions that would be executed, [B, K, A] bool."""
        return self.task.allowed(moment, np.sign(accounts.holding).astype(np.int64))

    def texts(self, accounts: PortfolioAccounts, moment: np.ndarray) -> list[str]:
        """None: a portfolio's prompts are not written yet."""
        return []

    def label(self, moment: int) -> str:
        """Date and symbols."""
        return f"{self.dates[moment]} {' '.join(self.task.symbols)}"

    def prices(self, moments: range) -> np.ndarray:
        """[len(moments), K], of 1 at the first, dividends reinvested."""
        growth = self.task.nights[moments.start : moments.stop - 1, :, GROWTH]
        return np.cumprod(np.vstack([np.ones(self.task.slots), growth]), axis=0)


def _slot_columns(symbols: tuple[str, ...]) -> tuple[Column, ...]:
    return tuple(
        column._replace(name=f"{symbol} {column.name}") for symbol in symbols for column in _SLOT
    )


def _alone(market: Market, k: int) -> Market:
    """Asset k on all days of the market, with its closing times: `Market.of` keeps the days on
    which the asset has a row, and takes its calendar from its own bars."""
    columns = {name: getattr(market, name)[:, k : k + 1] for name in MARKET_COLUMNS}
    hours = Hours(market.calendar, market.hours.close)
    return replace(
        market, symbols=market.symbols[k : k + 1], rows=None, hours=hours, others=(), **columns
    )
