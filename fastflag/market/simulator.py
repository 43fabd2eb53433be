"""One account per environment, traded on one symbol's daily bars.

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

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import config as numba_config

from fastflag.config import SimulatorConfig
from fastflag.market.accounts import Accounts
from fastflag.market.bars import Bars
from fastflag.market.compiled.account import step_nb
from fastflag.market.compiled.codes import codes_nb, reachable_nb
from fastflag.market.compiled.constants import (
    BUY,
    CODES,
    HELD_BUCKETS,
    HISTORY,
    HOLD,
    NEXT_CLOSE,
    NEXT_OPEN,
    PROFIT_LIMIT,
    PROFIT_STEP,
    PROFITS,
    SAME_CLOSE,
    SELL,
    Outputs,
    Rules,
)
from fastflag.market.compiled.lanes import LANES
from fastflag.market.compiled.random import uniforms_nb
from fastflag.market.compiled.rollout import equities_nb, rollout_nb

__all__ = [
    "ACTIONS",
    "BUY",
    "CODES",
    "HISTORY",
    "HOLD",
    "PROFIT_STEP",
    "SELL",
    "account_code",
    "allowed",
    "allowed_codes",
    "decode",
    "equities",
    "growth",
    "reachable",
    "rollout",
    "side_of",
    "step",
    "uniform",
]

ACTIONS = ("Sell", "Hold", "Buy")
_FILLS = {"next_open": NEXT_OPEN, "next_close": NEXT_CLOSE, "same_close": SAME_CLOSE}


def _rules_of(config: SimulatorConfig) -> Rules:
    """The config as the kernels take it; its ranges were checked when it was made."""
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


def step(
    bars: Bars, config: SimulatorConfig, accounts: Accounts, day: np.ndarray, action: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Moves account b from the close of `day[b]` to the next, in place: (reward, terminated) [B].

    An action that is not allowed counts as Hold; closed accounts do nothing and earn 0. Raises
    ValueError for a day without a next one or an unknown action.
    """
    days = np.ascontiguousarray(np.broadcast_to(day, len(accounts)), dtype=np.int64)
    actions = np.ascontiguousarray(np.broadcast_to(action, len(accounts)), dtype=np.int64)
    _check_days(bars, days, 1)
    if actions.size and (actions.min() < SELL or actions.max() > BUY):
        raise ValueError(f"actions must lie in {SELL}..{BUY}")
    rewards, terminated = np.empty(len(accounts)), np.empty(len(accounts), np.bool_)
    step_nb(bars.table, _rules_of(config), accounts.views(), days, actions, rewards, terminated)
    return rewards, terminated


def growth(bars: Bars, config: SimulatorConfig, opened: int, day: int) -> float:
    """Shares at the close of `day` for each held since the close of `opened`, but for lots."""
    after = slice(opened + 1, day + 1)
    shares = np.prod(bars.split[after])
    if config.dividends == "reinvest":
        paid = np.flatnonzero(bars.payable[after]) + opened + 1
        shares = shares * np.prod(1.0 + bars.payable[paid] / bars.close[paid])
    return float(shares)


def _check_days(bars: Bars, days: np.ndarray, following: int) -> None:
    if days.size and (days.min() < 0 or days.max() + following >= len(bars)):
        raise ValueError(f"days must lie in 0..{len(bars) - 1 - following}")


def _allowed_sides(bars: Bars, config: SimulatorConfig, side: np.ndarray, day: Any) -> np.ndarray:
    side = np.asarray(side)
    _check_days(bars, np.asarray(day), 0)
    tradable = np.broadcast_to(bars.tradable[day], side.shape)
    either = config.positions == "long_short"
    mask = np.ones((*side.shape, len(ACTIONS)), np.bool_)
    mask[..., SELL] = tradable & (either | (side > 0))
    mask[..., BUY] = tradable & (either | (side == 0))
    return mask


def allowed(bars: Bars, config: SimulatorConfig, shares: np.ndarray, day: Any) -> np.ndarray:
    """Actions that the simulator would execute, bool [B, 3], at the close of `day` (one or [B]).

    Without a bar, only Hold. Else `long_flat`: Buy when flat, Sell when long; `long_short`: all.
    """
    return _allowed_sides(bars, config, np.sign(shares), day)


def account_code(bars: Bars, accounts: Accounts, day: Any) -> np.ndarray:
    """What a stepped prompt tells of each account at the close of `day` (one or [B]): int32 [B].

    0 is flat, else side, open profit over the entry price in `PROFIT_STEP` (half away from zero,
    at most `PROFIT_LIMIT` steps) and the largest of `HELD_BUCKETS` within the bars since the fill.
    """
    days = np.ascontiguousarray(np.broadcast_to(day, len(accounts)), dtype=np.int64)
    _check_days(bars, days, 0)
    codes = np.empty(len(accounts), np.int32)
    codes_nb(bars.table, accounts.views(), days, codes)
    return codes


def decode(code: int) -> tuple[int, int, int]:
    """(side in -1, 0, 1; profit in steps; bars held) of an account code; ValueError for no code."""
    if not 0 <= code < CODES:
        raise ValueError(f"account codes lie in 0..{CODES - 1}, not {code}")
    if code == 0:
        return 0, 0, 0
    row, bucket = divmod(int(code) - 1, len(HELD_BUCKETS))
    long, steps = divmod(row, PROFITS)
    return 2 * long - 1, steps - PROFIT_LIMIT, HELD_BUCKETS[bucket]


_SIDE_OF_CODE = np.array([decode(code)[0] for code in range(CODES)], np.int8)


def side_of(codes: np.ndarray) -> np.ndarray:
    """-1, 0 or 1 of each of `codes` [n]: int8 [n]."""
    return _SIDE_OF_CODE[codes]


def allowed_codes(bars: Bars, config: SimulatorConfig, day: Any, codes: np.ndarray) -> np.ndarray:
    """`allowed` of accounts that show `codes` [n]: bool [n, 3]."""
    return _allowed_sides(bars, config, side_of(codes), day)


def reachable(bars: Bars, config: SimulatorConfig, days: range, accounts: Accounts) -> np.ndarray:
    """Codes that the accounts could show at each of `days` under any actions: [len(days), CODES].

    `days[0]` is where the accounts are now. A superset: each position now held is kept throughout,
    and each side allowed is entered on each day with a bar.
    """
    _check_days(bars, np.array([days[0], days[-1]]), 0)
    reached = np.zeros((len(days), CODES), np.bool_)
    reachable_nb(bars.table, _rules_of(config), days[0], accounts.views(), reached)
    return reached


def _seed_bits(seed: int) -> np.uint64:
    """`seed` as the kernels take it: modulo 2^64."""
    return np.uint64(int(seed) % 2**64)


def uniform(seed: int, env: np.ndarray, step: int) -> np.ndarray:
    """Random numbers in [0, 1) that depend on (seed + env, step) and nothing else: float64 [B]."""
    envs = np.ascontiguousarray(np.atleast_1d(env), dtype=np.int64)
    values = np.empty(envs.size)
    uniforms_nb(_seed_bits(seed), envs, step, values)
    return values


_THREADED_STEPS = 2**18


def rollout(
    bars: Bars,
    config: SimulatorConfig,
    accounts: Accounts,
    days: np.ndarray,
    restarts: np.ndarray,
    cdf: np.ndarray,
    row_of: np.ndarray,
    seed: int,
    first_env: int,
    first_step: int,
) -> dict[str, np.ndarray]:
    """S steps of B accounts (in place), each action drawn from the row of what the account shows.

    `days` [S] are consecutive but at `restarts` [S], where every account starts anew before the
    step; `cdf` float64 [R, 3] are cumulative probabilities, `row_of` int32 [T, CODES] their rows
    (-1: none). Account b's number at step s is `uniform(seed, first_env + b, first_step + s)`.

    -> [B, S] each, stored step by step: `row` int32, `action` int8, `reward`, `terminated` (ruined
    in this step), `valid` (False after ruin until the next restart: Hold, reward 0), `next_row`
    int32 (of the state reached, before any restart). Numba's number of threads share many
    accounts; what comes out is the same. Raises RuntimeError where a state has no row or a row of
    `cdf` is not a cumulative distribution, ValueError for days out of range or out of order.
    """
    days = np.ascontiguousarray(days, np.int64)
    restarts = np.ascontiguousarray(restarts, np.bool_)
    _check_days(bars, days, 1)
    if np.any((np.diff(days) != 1) & ~restarts[1:]):
        raise ValueError("days must be consecutive between restarts")
    cdf = np.ascontiguousarray(cdf, np.float64)
    row_of = np.ascontiguousarray(row_of, np.int32)
    _check_cdf(cdf)
    shape = (len(days), len(accounts))
    out = Outputs(
        row=np.empty(shape, np.int32),
        action=np.empty(shape, np.int8),
        reward=np.empty(shape),
        terminated=np.empty(shape, np.bool_),
        valid=np.empty(shape, np.bool_),
        next_row=np.empty(shape, np.int32),
    )
    table, rules, arrays = bars.table, _rules_of(config), accounts.views()
    policy, random = (cdf, row_of), (_seed_bits(seed), first_env, first_step)

    def run(part: range) -> tuple[int, int]:
        return rollout_nb(
            table, rules, arrays, days, restarts, *policy, *random, part.start, part.stop, out
        )

    parts = _parts(len(accounts), len(days))
    with ThreadPoolExecutor(len(parts)) as pool:
        ends = list(pool.map(run, parts)) if len(parts) > 1 else [run(parts[0])]
    for day, code in ends:
        if day >= 0:
            raise RuntimeError(f"account code {code} has no prompt on day {day}")
    return {name: array.T for name, array in out._asdict().items()}


def _parts(accounts: int, steps: int) -> list[range]:
    """The accounts of each thread: one below `_THREADED_STEPS`, and blocks of lanes stay whole."""
    # Not get_num_threads, which starts Numba's threads, and PyTorch then counts as many for itself:
    # its results depend on that number.
    threads = numba_config.NUMBA_NUM_THREADS if accounts * steps >= _THREADED_STEPS else 1
    size = max(-(-accounts // (threads * LANES)), 1) * LANES
    return [range(first, min(first + size, accounts)) for first in range(0, accounts, size)]


def _check_cdf(cdf: np.ndarray) -> None:
    rising = (cdf[:, 0] >= 0) & (cdf[:, 1] >= cdf[:, 0]) & (cdf[:, 2] >= cdf[:, 1])
    valid = rising & (cdf[:, 2] > 0) & (cdf[:, 2] < np.inf)
    if not valid.all():
        row = int(np.argmin(valid))
        raise RuntimeError(f"row {row} of the policy is no distribution: {cdf[row]}")


def equities(
    bars: Bars,
    config: SimulatorConfig,
    days: range,
    episodes: int,
    seed: int,
    action: int | None = None,
) -> np.ndarray:
    """Equity at the close of each day, [episodes, len(days)], of accounts that start on `days[0]`.

    They always take `action` (Hold where it is not allowed); with None each is drawn uniformly from
    the actions allowed, by `uniform(seed, episode, step)`. Raises ValueError for days that the
    bars don't have or an unknown action.
    """
    if not (len(days) and days[0] >= 0 and days[-1] < len(bars) and days.step == 1):
        raise ValueError(f"days must be consecutive and lie in 0..{len(bars) - 1}")
    if action is not None and not SELL <= action <= BUY:
        raise ValueError(f"actions must lie in {SELL}..{BUY}")
    fixed = -1 if action is None else int(action)
    equity = np.empty((episodes, len(days)))
    equities_nb(
        bars.table, _rules_of(config), float(config.cash), days[0], _seed_bits(seed), fixed, equity
    )
    return equity
