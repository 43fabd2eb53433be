"""The task `single`: each account trades one symbol, all of it or nothing, once a day.

A decision is made at the close of day t; `step` takes the account to the close of day t + 1:

1. The order is the one still waiting, else the action where day t has a bar.
2. `same_close` fills it at the close of day t.
3. Overnight, day t + 1's split multiplies the shares and its dividend is paid (shorts pay it).
4. `next_open` and `next_close` fill it at day t + 1's price; without a bar the order waits, because
   tomorrow's missing bar must not be known today.
5. `reinvest`: the dividend of a position held overnight and still held goes into it at the close.
6. The account is marked at the close (without a bar: at the last one), profit = change of equity.
7. At or below `ruin` x starting cash the account is closed for good.

With `cash` a dividend is idle until a position is next opened. With `reinvest`:

- Shares are multiplied by 1 + dividend / close at the close of the ex-day, free of fee and
  slippage, whatever the fill: the formula of `recover_splits_and_dividends`. A short sells that
  many more, which pays what it owes. `entry` is divided by the same.
- So from the first close that sees it, a long is worth its value there x adjusted close / adjusted
  close there, and a short owes that. Open profit is the total return.
- Who leaves a position on the ex-day has its dividend in cash, before the fill.
- A dividend of a day without a bar comes with the next bar: nothing can be bought before.
- With lots whole lots are bought, the rest stays cash (shorts pay it of theirs); `entry` is divided
  as without lots, so that what a prompt tells does not depend on the account's size.

The rules are compiled, in compiled/account.py. Money is float64.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fastflag.config import SimulatorConfig
from fastflag.market.accounts import Accounts
from fastflag.market.bars import Bars
from fastflag.market.compiled.account import step_nb
from fastflag.market.compiled.codes import codes_nb, reachable_nb
from fastflag.market.compiled.constants import (
    BUY,
    CODES,
    HOLD,
    NEXT_CLOSE,
    NEXT_OPEN,
    SAME_CLOSE,
    SELL,
    Outputs,
    Rules,
)
from fastflag.market.compiled.lanes import LANES
from fastflag.market.compiled.rollout import equities_nb, rollout_nb
from fastflag.market.random_numbers import seed_bits
from fastflag.market.task import Steps, Timeline
from fastflag.market.tasks.account_codes import side_of
from fastflag.market.tasks.rolling import checked_cdf, checked_moments, shared

__all__ = ["ACTIONS", "BUY", "HOLD", "SELL", "Single"]

ACTIONS = ("Sell", "Hold", "Buy")
_FILLS = {"next_open": NEXT_OPEN, "next_close": NEXT_CLOSE, "same_close": SAME_CLOSE}


@dataclass(frozen=True, eq=False)
class Single:
    """One symbol's bars or several's, one after another, and the rules. B accounts, M moments.

    A method raises ValueError for a moment that the bars don't have, or that has none after it in
    its span where one is needed.
    """

    codes: ClassVar[int] = CODES
    side_of = staticmethod(side_of)

    bars: Bars
    rules: SimulatorConfig
    timeline: Timeline

    @staticmethod
    def of(rules: SimulatorConfig, *symbols: Bars) -> "Single":
        """The bars of one symbol or several, each in a span of its own."""
        ends = np.cumsum([0, *map(len, symbols)]).tolist()
        spans = tuple(map(range, ends[:-1], ends[1:]))
        return Single(Bars.joined(symbols), rules, Timeline(spans))

    @property
    def actions(self) -> tuple[str, ...]:
        return ACTIONS

    @property
    def slots(self) -> int:
        return 1

    def start(self, count: int) -> Accounts:
        """Accounts that hold their starting cash and nothing else."""
        return Accounts.start(count, self.rules.cash)

    def step(
        self, accounts: Accounts, moment: np.ndarray | int, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Moves account b from `moment[b]` to the next, in place: (reward, terminated) [B].

        An action that is not allowed counts as Hold; closed accounts do nothing and earn 0. Raises
        ValueError for an unknown action too.
        """
        moments = self._moments(accounts, moment, following=1)
        actions = np.ascontiguousarray(np.broadcast_to(action, len(accounts)), dtype=np.int64)
        if actions.size and (actions.min() < SELL or actions.max() > BUY):
            raise ValueError(f"actions must lie in {SELL}..{BUY}")
        rewards, terminated = np.empty(len(accounts)), np.empty(len(accounts), np.bool_)
        coded, views = _coded(self.rules), accounts.views()
        step_nb(self.bars.matrix, coded, views, moments, actions, rewards, terminated)
        return rewards, terminated

    def growth(self, opened: int, moment: int) -> float:
        """Shares at `moment` for each held since the close of `opened`, but for lots."""
        bars, after = self.bars, slice(opened + 1, moment + 1)
        shares = np.prod(bars.split[after])
        if self.rules.dividends == "reinvest":
            paid = np.flatnonzero(bars.payable[after]) + opened + 1
            shares = shares * np.prod(1.0 + bars.payable[paid] / bars.close[paid])
        return float(shares)

    def allowed(
        self, moment: np.ndarray | int, side: np.ndarray, slot: np.ndarray | int | None = None
    ) -> np.ndarray:
        """Actions that would be executed, bool [n, 3], at `moment` (one or [n]) by accounts whose
        positions have the sign of `side` [n].

        Without a bar, only Hold. Else `long_flat`: Buy when flat, Sell when long; `long_short`:
        all.
        """
        self.timeline.check(np.asarray(moment))
        side = np.asarray(side)
        tradable = np.broadcast_to(self.bars.tradable[moment], side.shape)
        either = self.rules.positions == "long_short"
        mask = np.ones((*side.shape, len(ACTIONS)), np.bool_)
        mask[..., SELL] = tradable & (either | (side > 0))
        mask[..., BUY] = tradable & (either | (side == 0))
        return mask

    def code(self, accounts: Accounts, moment: np.ndarray | int) -> np.ndarray:
        """What a stepped prompt tells of each account at `moment` (one or [B]): int32 [B].

        0 is flat, else side, open profit over the entry price in `PROFIT_STEP` (half away from
        zero, at most `PROFIT_LIMIT` steps) and the largest of `HELD_BUCKETS` within the bars since
        the fill.
        """
        codes = np.empty(len(accounts), np.int32)
        codes_nb(self.bars.matrix, accounts.views(), self._moments(accounts, moment), codes)
        return codes

    def reachable(self, moments: range, accounts: Accounts) -> np.ndarray:
        """Codes that the accounts could show at each of `moments` under any actions:
        [len(moments), CODES].

        `moments[0]` is where the accounts are now. A superset: each position now held is kept
        throughout, and each side allowed is entered on each day with a bar.
        """
        self.timeline.check(np.array([moments[0]]), len(moments) - 1)
        reached = np.zeros((len(moments), CODES), np.bool_)
        coded, views = _coded(self.rules), accounts.views()
        reachable_nb(self.bars.matrix, coded, moments[0], views, reached)
        return reached

    def rollout(
        self,
        accounts: Accounts,
        moments: np.ndarray,
        restarts: np.ndarray,
        cdf: np.ndarray,
        row_of: np.ndarray,
        seed: int,
        first_env: int,
        first_step: int,
    ) -> Steps:
        """H steps of the accounts (in place), each action drawn from the row of what is shown.

        `moments` [H] are consecutive but at `restarts` [H], where every account starts anew before
        the step; `cdf` float64 [U, A] are cumulative probabilities, `row_of` int32 [M, CODES] their
        rows (-1: none). Account b's number at step h is `uniform(seed, first_env + b, first_step +
        h)`.

        The arrays are stored step by step. Numba's number of threads share many accounts; what
        comes out is the same. Raises RuntimeError where a state has no row or a row of `cdf` is not
        a cumulative distribution, ValueError for moments out of order too.
        """
        moments, restarts = checked_moments(self.timeline, moments, restarts)
        cdf = checked_cdf(cdf)
        row_of = np.ascontiguousarray(row_of, np.int32)
        shape = (len(moments), len(accounts))
        out = Outputs(
            row=np.empty(shape, np.int32),
            action=np.empty(shape, np.int8),
            reward=np.empty(shape),
            terminated=np.empty(shape, np.bool_),
            valid=np.empty(shape, np.bool_),
            next_row=np.empty(shape, np.int32),
        )
        world = self.bars.matrix, _coded(self.rules), accounts.views(), moments, restarts
        policy, random = (cdf, row_of), (seed_bits(seed), first_env, first_step)

        def run(part: range) -> tuple[int, int]:
            return rollout_nb(*world, *policy, *random, part.start, part.stop, out)

        for moment, code in shared(run, len(accounts), len(moments), LANES):
            if moment >= 0:
                raise RuntimeError(f"account code {code} has no prompt at moment {moment}")
        return Steps(**{name: array.T for name, array in out._asdict().items()})

    def equities(
        self, moments: range, episodes: int, seed: int, action: int | None = None
    ) -> np.ndarray:
        """Equity at each of `moments`, [episodes, len(moments)], of accounts that start at the
        first.

        They always take `action` (Hold where it is not allowed); with None each is drawn uniformly
        from the actions allowed, by `uniform(seed, episode, step)`. Raises ValueError for an
        unknown action too.
        """
        if not len(moments) or moments.step != 1:
            raise ValueError(f"moments must be consecutive, not {moments}")
        self.timeline.check(np.array([moments[0]]), len(moments) - 1)
        if action is not None and not SELL <= action <= BUY:
            raise ValueError(f"actions must lie in {SELL}..{BUY}")
        fixed = -1 if action is None else int(action)
        equity = np.empty((episodes, len(moments)))
        coded, cash = _coded(self.rules), float(self.rules.cash)
        equities_nb(self.bars.matrix, coded, cash, moments[0], seed_bits(seed), fixed, equity)
        return equity

    def _moments(
        self, accounts: Accounts, moment: np.ndarray | int, following: int = 0
    ) -> np.ndarray:
        """One for each account, int64 [B]."""
        moments = np.ascontiguousarray(np.broadcast_to(moment, len(accounts)), dtype=np.int64)
        self.timeline.check(moments, following)
        return moments


def _coded(config: SimulatorConfig) -> Rules:
    """The rules as the kernels take them, words as codes; their ranges were checked before."""
    return Rules(
        fill=_FILLS[config.fill],
        long_short=config.positions == "long_short",
        log_return=config.reward == "log_return",
        reinvest=config.dividends == "reinvest",
        fee=config.fee_bps / 10_000.0,
        slippage=config.slippage_bps / 10_000.0,
        lot=float(config.lot),
        ruin=float(config.ruin),
    )
