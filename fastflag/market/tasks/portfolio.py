"""The task `portfolio`: each account holds K assets and cash. Each asset is a slot with an action.

A decision is made at the close of day t; `step` takes the account to the close of day t + 1:

1. An action orders target units: Out 0, Neutral 1, Over 2, and with `long_short` Short -1. Keep
   orders nothing. Where an asset has no bar, and off the days of rebalancing, there is Keep alone.
2. `same_close` fills at the close of day t, `next_open` and `next_close` at day t + 1's price. An
   asset without a bar then is kept, and its order waits for the next bar.
3. A fill divides what is free, cash and the holdings of the assets that are traded, among these by
   their units: each gets its units' share of all units', at most `max_weight` of the equity. The
   rest is cash. With `long_short` shares are of the units' sizes, and what is free is the equity
   less the size of what is kept, so that no order gears the account.
4. Costs are a part of what is traded, and shares are of what is left after them: x solves
   x = free - cost x sum over assets of |share x - held|. Where all assets are traded it is the
   fixed point mu = 1 - cost x sum |mu w' - w| of the weights before (w) and after (w').
5. What is kept is not touched: weights drift, dividends buy more of the asset at the close of the
   ex-day, free of costs. That of an asset that is traded on its ex-day is free for the fill.
6. Borrowing what is short costs `borrow_bps` a year of its value at the close.
7. An asset is taken to be delisted when it has had no bar for `delisted_after` days: what is held
   of it is paid out. Single assets' bars end an episode nowhere: the others go on.
8. At or below `ruin` x starting cash the account is closed for good.

The rules are compiled, in compiled/portfolio.py. Money is float64.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fastflag.config import PortfolioConfig
from fastflag.market.bars import Bars, Market
from fastflag.market.calendar import ANNUAL_DAYS
from fastflag.market.compiled.portfolio import LANES
from fastflag.market.compiled.portfolio_codes import codes_nb, reachable_nb
from fastflag.market.compiled.portfolio_constants import (
    CODES,
    KEEP,
    NEUTRAL,
    OPEN,
    OUT,
    OVER,
    SHORT,
    PortfolioOutputs,
    PortfolioRules,
)
from fastflag.market.compiled.portfolio_rollout import equities_nb, rollout_nb, step_nb
from fastflag.market.portfolio_accounts import PortfolioAccounts
from fastflag.market.random_numbers import seed_bits
from fastflag.market.task import Steps, Timeline
from fastflag.market.tasks.nights import nights_of
from fastflag.market.tasks.rolling import checked_cdf, checked_moments, shared
from fastflag.market.tasks.slot_codes import side_of

__all__ = ["ACTIONS", "KEEP", "NEUTRAL", "OUT", "OVER", "SHORT", "Portfolio"]

ACTIONS = ("Out", "Keep", "Neutral", "Over", "Short")


def actions_of(positions: str) -> tuple[str, ...]:
    """Four, with `long_short` five."""
    return ACTIONS if positions == "long_short" else ACTIONS[:SHORT]


@dataclass(frozen=True, eq=False)
class Portfolio:
    """K assets' nights and the rules. B accounts, M moments, which are the market's days.

    A method raises ValueError for a moment that the market doesn't have, or that has none after it
    where one is needed.
    """

    codes: ClassVar[int] = CODES
    side_of = staticmethod(side_of)

    symbols: tuple[str, ...]
    """K"""
    rules: PortfolioConfig
    nights: np.ndarray
    """[M, K, COLUMNS], as `nights_of` makes them."""
    first_bars: np.ndarray
    """[K] int64, the moment of each asset's first bar; M where it has none."""
    bars_a_year: int
    timeline: Timeline

    @staticmethod
    def of(rules: PortfolioConfig, market: Market) -> "Portfolio":
        """All symbols of a market."""
        assets = [Bars.from_market(market, symbol) for symbol in market.symbols]
        timeline = Timeline((range(len(market.dates)),))
        first = [np.append(np.flatnonzero(bars.tradable), len(timeline))[0] for bars in assets]
        return Portfolio(
            market.symbols,
            rules,
            nights_of(assets, rules),
            np.array(first),
            ANNUAL_DAYS[market.calendar],
            timeline,
        )

    @property
    def actions(self) -> tuple[str, ...]:
        return actions_of(self.rules.positions)

    @property
    def slots(self) -> int:
        return len(self.symbols)

    def start(self, count: int) -> PortfolioAccounts:
        """Accounts that hold their starting cash and nothing else."""
        return PortfolioAccounts.start(count, self.slots, self.rules.cash)

    def step(
        self, accounts: PortfolioAccounts, moment: np.ndarray | int, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Moves account b from `moment[b]` to the next, in place, by `action` [B, K]: (reward,
        terminated) [B].

        An action that is not allowed counts as Keep; closed accounts do nothing and earn 0. Raises
        ValueError for an unknown action too.
        """
        moments = self._moments(accounts, moment, following=1)
        actions = np.array(np.broadcast_to(action, accounts.holding.shape), np.int64, order="C")
        if actions.size and (actions.min() < 0 or actions.max() >= len(self.actions)):
            raise ValueError(f"actions must lie in 0..{len(self.actions) - 1}")
        rewards, terminated = np.empty(len(accounts)), np.empty(len(accounts), np.bool_)
        views = accounts.views()
        step_nb(self.nights, self._rules(), views, moments, actions, rewards, terminated)
        return rewards, terminated

    def allowed(
        self, moment: np.ndarray | int, side: np.ndarray, slot: np.ndarray | int | None = None
    ) -> np.ndarray:
        """Actions that would be executed, bool [..., A], at `moment` in `slot` where what is held
        has the sign of `side`; the three are broadcast. Without `slot`, `side` is [..., K].

        Keep always; where the slot is open for orders Neutral, Over and Short too, and Out where
        something is held. No slot's actions bear on another's.
        """
        self.timeline.check(np.asarray(moment))
        if slot is None:
            slot, moment = np.arange(self.slots), np.asarray(moment)[..., None]
        moment, side, slot = np.broadcast_arrays(moment, side, slot)
        is_open = self.nights[moment, slot, OPEN] != 0.0
        mask = np.repeat(is_open[..., None], len(self.actions), axis=-1)
        mask[..., KEEP] = True
        mask[..., OUT] &= side != 0
        return mask

    def code(self, accounts: PortfolioAccounts, moment: np.ndarray | int) -> np.ndarray:
        """What a stepped prompt tells of each slot: int32 [B, K].

        0 is nothing held, else side, weight in quarters of one K-th of equity (one at least, at
        most `WEIGHT_LIMIT`) and open profit in steps of 2% (at most `PROFIT_LIMIT` of them), both
        half away from zero.
        """
        self._moments(accounts, moment)
        codes = np.empty(accounts.holding.shape, np.int32)
        codes_nb(accounts.views(), codes)
        return codes

    def reachable(self, moments: range, accounts: PortfolioAccounts) -> np.ndarray:
        """Codes that the accounts could show at each of `moments` under any actions:
        [len(moments), K, CODES].

        `moments[0]` is where the accounts are now. A superset: of each asset all weights, with all
        profits between the least and the greatest that any purchases could have.
        """
        self.timeline.check(np.array([moments[0]]), len(moments) - 1)
        reached = np.zeros((len(moments), self.slots, CODES), np.bool_)
        reachable_nb(self.nights, self._rules(), moments[0], accounts.views(), reached)
        return reached

    def rollout(
        self,
        accounts: PortfolioAccounts,
        moments: np.ndarray,
        restarts: np.ndarray,
        cdf: np.ndarray,
        row_of: np.ndarray,
        seed: int,
        first_env: int,
        first_step: int,
    ) -> Steps:
        """H steps of the accounts (in place), each slot's action drawn on its own from the row of
        what the slot shows.

        `moments` and `restarts` [H] and `cdf` float64 [R, A] as in `Single.rollout`; `row_of` int32
        [M, K, CODES]. The number of account b's slot k at step h is `uniform(seed, first_env + b,
        (first_step + h) x K + k)`. Rows and actions are [B, H, K]. Raises as `Single.rollout` does.
        """
        moments, restarts = checked_moments(self.timeline, moments, restarts)
        cdf = checked_cdf(cdf)
        row_of = np.ascontiguousarray(row_of, np.int32)
        steps, count = len(moments), len(accounts)
        out = PortfolioOutputs(
            row=np.empty((steps, self.slots, count), np.int32),
            action=np.empty((steps, self.slots, count), np.int8),
            reward=np.empty((steps, count)),
            terminated=np.empty((steps, count), np.bool_),
            valid=np.empty((steps, count), np.bool_),
            next_row=np.empty((steps, self.slots, count), np.int32),
        )
        world = self.nights, self._rules(), accounts.views(), moments, restarts
        policy, random = (cdf, row_of), (seed_bits(seed), first_env, first_step)

        def run(part: range) -> tuple[int, int, int]:
            return rollout_nb(*world, *policy, *random, part.start, part.stop, out)

        for moment, slot, code in shared(run, count, steps, LANES):
            if moment >= 0:
                name = self.symbols[slot]
                raise RuntimeError(f"code {code} of {name} has no prompt at moment {moment}")
        arrays = out._asdict().items()
        return Steps(**{name: np.moveaxis(array, -1, 0) for name, array in arrays})

    def equities(
        self, moments: range, episodes: int, seed: int, units: np.ndarray | None = None
    ) -> np.ndarray:
        """Equity at each of `moments`, [episodes, len(moments)], of accounts that start at the
        first.

        They order `units` [len(moments) - 1, K] (NaN keeps, and so does a slot that is not open for
        orders); with None each slot's action is drawn uniformly from those allowed, by
        `uniform(seed, episode, step x K + slot)`.
        """
        if not len(moments) or moments.step != 1:
            raise ValueError(f"moments must be consecutive, not {moments}")
        self.timeline.check(np.array([moments[0]]), len(moments) - 1)
        orders = np.empty((0, 0)) if units is None else np.ascontiguousarray(units, np.float64)
        if units is not None and orders.shape != (len(moments) - 1, self.slots):
            raise ValueError(f"units are {orders.shape}, not {(len(moments) - 1, self.slots)}")
        equity, views = np.empty((episodes, len(moments))), self.start(episodes).views()
        world = self.nights, self._rules(), views, moments[0]
        equities_nb(*world, seed_bits(seed), orders, equity)
        return equity

    def _rules(self) -> PortfolioRules:
        """The config as the kernels take it; its ranges were checked when it was made."""
        config = self.rules
        return PortfolioRules(
            long_short=config.positions == "long_short",
            log_return=config.reward == "log_return",
            cost=(config.fee_bps + config.slippage_bps) / 10_000.0,
            borrow=config.borrow_bps / 10_000.0 / self.bars_a_year,
            max_weight=float(config.max_weight),
            ruin=float(config.ruin),
        )

    def _moments(
        self, accounts: PortfolioAccounts, moment: np.ndarray | int, following: int = 0
    ) -> np.ndarray:
        """One for each account, int64 [B]."""
        moments = np.ascontiguousarray(np.broadcast_to(moment, len(accounts)), dtype=np.int64)
        self.timeline.check(moments, following)
        return moments
