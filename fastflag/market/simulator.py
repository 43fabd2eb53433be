"""One account per environment, traded on one symbol's daily bars.

A decision is made at the close of day t; `step` takes the account to the close of day t + 1:

1. The order is the one still waiting, else the action where day t has a bar.
2. `same_close` fills it at the close of day t.
3. Overnight, day t + 1's split multiplies the shares and its dividend is paid (shorts pay it).
4. `next_open` and `next_close` fill it at day t + 1's price; without a bar the order waits, because
   tomorrow's missing bar must not be known today.
5. The account is marked at the close (without a bar: at the last one), profit = change of equity.
6. At or below `ruin` x starting cash the account is closed for good.

Every kernel is a scalar function of one account; `step` and `rollout` only loop over it, so a
rollout equals its steps bit for bit. Money is float64.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import njit

from fastflag.config import SimulatorConfig

if TYPE_CHECKING:
    from fastflag.market.bars import Market

# Kernels that call one another lie in this one file, because Numba's cache of a kernel watches only
# the file it is in. Without the NumPy error model each division is checked: a quarter slower.
_kernel = njit(cache=True, nogil=True, error_model="numpy")

ACTIONS = ("Sell", "Hold", "Buy")
SELL, HOLD, BUY = 0, 1, 2
HISTORY = 10
"""Past steps that an account remembers, for prompts."""

PROFIT_STEP = 0.005
PROFIT_LIMIT = 40
HELD_BUCKETS = (0, 1, 2, 3, 5, 10, 20, 40)
_PROFITS = 2 * PROFIT_LIMIT + 1
CODES = 1 + 2 * _PROFITS * len(HELD_BUCKETS)
"""Number of account codes: flat, and (side, open profit, days held)."""
_BUCKET_OF_HELD = np.searchsorted(HELD_BUCKETS, np.arange(HELD_BUCKETS[-1] + 1), side="right") - 1

NEXT_OPEN, NEXT_CLOSE, SAME_CLOSE = 0, 1, 2
_FILLS = {"next_open": NEXT_OPEN, "next_close": NEXT_CLOSE, "same_close": SAME_CLOSE}

# A deviation below this part of the starting cash is rounding (float64 equity moves by 1e-16 of
# itself at a constant price), and a Sharpe ratio of rounding errors is noise of order 1.
_ZERO_DEVIATION = 1e-12

_COLUMNS = ("open", "close", "mark", "split", "dividend", "tradable")
OPEN, CLOSE, MARK, SPLIT, DIVIDEND, TRADABLE = range(len(_COLUMNS))


@dataclass(frozen=True, eq=False)
class Bars:
    """One symbol's bars, all [T]; raw prices, NaN where there is no bar.

    `mark` is the close, or on days without a bar the last mark divided by the day's split (NaN
    before the first bar). `split` multiplies shares before the open, `dividend` is cash per
    (post-split) share paid before the open. Raises ValueError for columns of unequal length.
    """

    open: np.ndarray
    close: np.ndarray
    mark: np.ndarray
    split: np.ndarray
    dividend: np.ndarray
    tradable: np.ndarray
    """bool."""
    table: np.ndarray = field(init=False, repr=False)
    """The columns side by side, [T, 6] float64, as the kernels read them."""

    def __post_init__(self) -> None:
        for name in _COLUMNS:
            column = np.asarray(getattr(self, name), np.bool_ if name == "tradable" else np.float64)
            if column.shape != (len(self.close),):
                raise ValueError(f"bars.{name} has shape {column.shape}, not {(len(self.close),)}")
            object.__setattr__(self, name, column)
        table = np.column_stack([getattr(self, name) for name in _COLUMNS])
        object.__setattr__(self, "table", table)

    @classmethod
    def from_columns(
        cls,
        open: np.ndarray,
        close: np.ndarray,
        split: np.ndarray,
        dividend: np.ndarray,
        tradable: np.ndarray,
    ) -> "Bars":
        """Bars with their marks worked out."""
        close, split = np.asarray(close, float), np.asarray(split, float)
        mark = np.full(len(close), np.nan)
        last = np.nan
        for day in range(len(close)):
            last = close[day] if tradable[day] else last / split[day]
            mark[day] = last
        return cls(open, close, mark, split, dividend, tradable)

    @classmethod
    def from_market(cls, market: "Market", symbol: str) -> "Bars":
        """The bars of `symbol`; InputError where the market has no such symbol."""
        n = market.column(symbol)
        prices = (market.open, market.high, market.low, market.close)
        tradable = np.logical_and.reduce([np.isfinite(price[:, n]) for price in prices])
        return cls.from_columns(
            market.open[:, n],
            market.close[:, n],
            market.split[:, n],
            market.dividend[:, n],
            tradable,
        )

    def __len__(self) -> int:
        return len(self.close)


class _Arrays(NamedTuple):
    """`Accounts` as the kernels see it: the same names, the same arrays."""

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


@dataclass
class Accounts:
    """B accounts; arrays [B], histories [B, HISTORY] with the newest step last."""

    starting_cash: np.ndarray
    cash: np.ndarray
    shares: np.ndarray
    """Negative when short."""
    entry: np.ndarray
    """Effective price per share (fee and slippage in it), split-adjusted; 0 when flat."""
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

    def reset(self, mask: np.ndarray) -> None:
        """Starts the accounts in `mask` [B] (bool) anew, in place."""
        _reset_nb(self._views(), np.asarray(mask, np.bool_))

    def enter(self, side: np.ndarray, price: np.ndarray, day: np.ndarray) -> None:
        """Puts the equity of accounts that hold cash alone into a position, in place and free of
        costs: `side` [B] -1, 0 or 1, `price` and `day` [B] where it is entered."""
        held = side != 0
        self.shares[held] = (side * self.cash / price)[held]
        self.cash[held] *= 1.0 - side[held]
        self.entry[held], self.opened[held] = price[held], day[held]

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name: the accounts' own, not copies."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Accounts":
        """Accounts from copies of what `arrays()` gave.

        Raises ValueError for a missing or unknown name, a wrong shape or a wrong dtype.
        """
        if set(arrays) != set(_Arrays._fields):
            raise ValueError(f"accounts need {sorted(_Arrays._fields)}, not {sorted(arrays)}")
        expected = cls.start(len(arrays["cash"]), 1.0).arrays()
        for name, array in expected.items():
            given = arrays[name]
            if given.shape != array.shape or given.dtype != array.dtype:
                raise ValueError(
                    f"accounts.{name} is {given.dtype}{given.shape}, not {array.dtype}{array.shape}"
                )
            array[...] = given
        return cls(**expected)

    def take(self, rows: np.ndarray) -> "Accounts":
        """Copies of the accounts in `rows`."""
        return Accounts(**{name: array[rows].copy() for name, array in self.arrays().items()})

    def __len__(self) -> int:
        return len(self.cash)

    def _views(self) -> _Arrays:
        return _Arrays(*(getattr(self, name) for name in _Arrays._fields))


class _Rules(NamedTuple):
    """The config as the kernels take it.

    Numba pickles the classes of a kernel's arguments (this one, `_Arrays`, `_Outputs`) by name into
    its cache, and a cache that names a class which is gone can't be read: don't rename them.
    """

    fill: int
    long_short: bool
    log_return: bool
    fee: float
    slippage: float
    lot: float
    ruin: float


def _rules_of(config: SimulatorConfig) -> _Rules:
    """The config as the kernels take it; its ranges were checked when it was made."""
    return _Rules(
        fill=_FILLS[config.fill],
        long_short=config.positions == "long_short",
        log_return=config.reward == "log_return",
        fee=config.fee_bps / 10_000.0,
        slippage=config.slippage_bps / 10_000.0,
        lot=float(config.lot),
        ruin=float(config.ruin),
    )


class _Position(NamedTuple):
    cash: float
    shares: float
    entry: float
    opened: int
    fees: float


class _Night(NamedTuple):
    day: int
    close: float
    mark: float
    tradable: bool
    next_open: float
    next_close: float
    next_mark: float
    split: float
    dividend: float
    next_tradable: bool


class _Account(NamedTuple):
    starting_cash: float
    cash: float
    shares: float
    entry: float
    opened: int
    pending: int
    equity: float
    fees: float
    count: int
    mean: float
    m2: float
    sharpe: float
    alive: bool


# The account ------------------------------------------------------------------------------------


@_kernel
def _entry_nb(price, side, rules):
    """(price filled at, effective price per share) of a position opened at `price`."""
    filled = price * (1.0 + side * rules.slippage)
    return filled, filled * (1.0 + side * rules.fee)


@_kernel
def _close_nb(position, price, side, rules):
    filled = price * (1.0 - side * rules.slippage)
    size = abs(position.shares)
    fee = size * filled * rules.fee
    cash = position.cash + position.shares * filled - fee
    fees = position.fees + fee + size * price * rules.slippage
    return _Position(cash, 0.0, 0.0, np.int64(-1), fees)


@_kernel
def _open_nb(position, price, side, day, rules):
    """All cash into a position, fee included: n x filled x (1 + fee) = cash on either side.

    So a short is worth exactly the equity that is left after its fee.
    """
    filled, entry = _entry_nb(price, side, rules)
    cost = filled * (1.0 + rules.fee)
    size = position.cash / cost
    if rules.lot > 0.0:
        size = math.floor(size / rules.lot) * rules.lot
    if not size > 0.0:
        return position
    fee = size * filled * rules.fee
    if side < 0:
        cash = position.cash + size * filled - fee
    elif rules.lot > 0.0:
        cash = max(position.cash - size * cost, 0.0)
    else:
        cash = 0.0
    fees = position.fees + fee + size * price * rules.slippage
    return _Position(cash, side * size, entry, np.int64(day), fees)


@_kernel
def _side_nb(shares):
    return np.int64(shares > 0.0) - np.int64(shares < 0.0)


@_kernel
def _execute_nb(position, order, price, day, rules):
    side = _side_nb(position.shares)
    target = np.int64(order) - 1
    if not rules.long_short:
        target = side if order == HOLD else max(target, 0)
    if target == side:
        return position
    if side != 0:
        position = _close_nb(position, price, side, rules)
    if target != 0:
        position = _open_nb(position, price, target, day, rules)
    return position


@_kernel
def _overnight_nb(position, split, dividend, mark, rules):
    """The day's split and dividend; part lots after a split are paid out at `mark` / split."""
    cash, shares, entry, opened = position.cash, position.shares, position.entry, position.opened
    if split != 1.0:
        shares = shares * split
        entry = entry / split
        if rules.lot > 0.0 and shares != 0.0:
            whole = np.trunc(shares / rules.lot) * rules.lot
            cash = cash + (shares - whole) * (mark / split)
            shares = whole
            if shares == 0.0:
                entry, opened = 0.0, np.int64(-1)
    return _Position(cash + shares * dividend, shares, entry, opened, position.fees)


@_kernel
def _sharpe_nb(count, mean, m2, starting_cash):
    if count < 2:
        return 0.0
    deviation = math.sqrt(m2 / (count - 1))
    return mean / deviation if deviation > _ZERO_DEVIATION * starting_cash else 0.0


@_kernel
def _night_nb(table, day):
    """What an account meets between the closes of `day` and day + 1."""
    return _Night(
        day,
        table[day, CLOSE],
        table[day, MARK],
        table[day, TRADABLE] != 0.0,
        table[day + 1, OPEN],
        table[day + 1, CLOSE],
        table[day + 1, MARK],
        table[day + 1, SPLIT],
        table[day + 1, DIVIDEND],
        table[day + 1, TRADABLE] != 0.0,
    )


# LLVM leaves this one a call, which costs a seventh of the throughput.
@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _advance_nb(night, rules, account, action):
    """One account from one close to the next: (account, reward, terminated)."""
    position = _Position(account.cash, account.shares, account.entry, account.opened, account.fees)
    order = account.pending
    if order < 0 and night.tradable:
        order = np.int64(action)
    if rules.fill == SAME_CLOSE and order >= 0:
        position = _execute_nb(position, order, night.close, night.day, rules)
        order = np.int64(-1)
    position = _overnight_nb(position, night.split, night.dividend, night.mark, rules)
    if order >= 0 and night.next_tradable:
        price = night.next_open if rules.fill == NEXT_OPEN else night.next_close
        position = _execute_nb(position, order, price, night.day + 1, rules)
        order = np.int64(-1)

    equity = position.cash
    if position.shares != 0.0:
        equity = equity + position.shares * night.next_mark
    profit = equity - account.equity
    count = account.count + 1
    delta = profit - account.mean
    mean = account.mean + delta / count
    m2 = account.m2 + delta * (profit - mean)
    sharpe = _sharpe_nb(count, mean, m2, account.starting_cash)
    floor = rules.ruin * account.starting_cash
    if rules.log_return:
        reward = math.log(max(equity, floor) / account.equity)
    else:
        reward = sharpe - account.sharpe
    alive = equity > floor
    if not alive:
        equity = max(equity, 0.0)
        position = _Position(equity, 0.0, 0.0, np.int64(-1), position.fees)
        order = np.int64(-1)
    account = _Account(
        account.starting_cash,
        position.cash,
        position.shares,
        position.entry,
        position.opened,
        order,
        equity,
        position.fees,
        count,
        mean,
        m2,
        sharpe,
        alive,
    )
    return account, reward, not alive


@_kernel
def _effective_nb(rules, shares, tradable, action):
    """`action`, or Hold where it is not allowed."""
    fits = rules.long_short or (shares == 0.0) == (action == BUY)
    return np.int64(action) if tradable and fits else np.int64(HOLD)


@_kernel
def _code_nb(shares, entry, opened, mark, day):
    if shares == 0.0:
        return np.int64(0)
    change = mark / entry - 1.0
    profit = change if shares > 0.0 else -change
    steps = np.int64(min(math.floor(abs(profit) / PROFIT_STEP + 0.5), PROFIT_LIMIT))
    steps = PROFIT_LIMIT + (steps if profit > 0.0 else -steps)
    held = min(max(day - opened, 0), HELD_BUCKETS[-1])
    row = np.int64(shares > 0.0) * _PROFITS + steps
    return 1 + row * len(HELD_BUCKETS) + _BUCKET_OF_HELD[held]


# Many accounts ----------------------------------------------------------------------------------


@_kernel
def _fresh_nb(starting_cash):
    return _Account(
        starting_cash,
        starting_cash,
        0.0,
        0.0,
        np.int64(-1),
        np.int64(-1),
        starting_cash,
        0.0,
        np.int64(0),
        0.0,
        0.0,
        0.0,
        True,
    )


@_kernel
def _load_nb(arrays, b):
    return _Account(
        arrays.starting_cash[b],
        arrays.cash[b],
        arrays.shares[b],
        arrays.entry[b],
        np.int64(arrays.opened[b]),
        np.int64(arrays.pending[b]),
        arrays.equity[b],
        arrays.fees[b],
        arrays.count[b],
        arrays.mean[b],
        arrays.m2[b],
        arrays.sharpe[b],
        arrays.alive[b],
    )


@_kernel
def _store_nb(arrays, b, account):
    arrays.cash[b] = account.cash
    arrays.shares[b] = account.shares
    arrays.entry[b] = account.entry
    arrays.opened[b] = account.opened
    arrays.pending[b] = account.pending
    arrays.equity[b] = account.equity
    arrays.fees[b] = account.fees
    arrays.count[b] = account.count
    arrays.mean[b] = account.mean
    arrays.m2[b] = account.m2
    arrays.sharpe[b] = account.sharpe
    arrays.alive[b] = account.alive


@_kernel
def _past_nb(arrays, b):
    return arrays.rewards[b], arrays.equities[b], arrays.actions[b]


@_kernel
def _forget_nb(past):
    rewards, equities, actions = past
    rewards[:], equities[:], actions[:] = np.nan, np.nan, -1


@_kernel
def _remember_nb(past, place, reward, equity, action):
    rewards, equities, actions = past
    rewards[place], equities[place], actions[place] = reward, equity, action


@_kernel
def _rotate_nb(array, oldest):
    """Rotates `array` in place so that what lies at `oldest` comes first."""
    for _ in range(oldest):
        first = array[0]
        for place in range(array.size - 1):
            array[place] = array[place + 1]
        array[array.size - 1] = first


@_kernel
def _order_nb(past, oldest):
    rewards, equities, actions = past
    _rotate_nb(rewards, oldest)
    _rotate_nb(equities, oldest)
    _rotate_nb(actions, oldest)


@_kernel
def _reset_nb(arrays, mask):
    for b in range(mask.size):
        if mask[b]:
            _store_nb(arrays, b, _fresh_nb(arrays.starting_cash[b]))
            _forget_nb(_past_nb(arrays, b))


@_kernel
def _step_nb(table, rules, arrays, days, actions, rewards, terminated):
    for b in range(days.size):
        rewards[b], terminated[b] = 0.0, False
        account = _load_nb(arrays, b)
        if account.alive:
            night = _night_nb(table, days[b])
            action = _effective_nb(rules, account.shares, night.tradable, actions[b])
            account, reward, ruined = _advance_nb(night, rules, account, action)
            _store_nb(arrays, b, account)
            past = _past_nb(arrays, b)
            _remember_nb(past, 0, reward, account.equity, action)
            _order_nb(past, 1)
            rewards[b], terminated[b] = reward, ruined


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
    _step_nb(bars.table, _rules_of(config), accounts._views(), days, actions, rewards, terminated)
    return rewards, terminated


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


# Account codes ----------------------------------------------------------------------------------


@_kernel
def _codes_nb(table, arrays, days, codes):
    for b in range(days.size):
        codes[b] = _code_nb(
            arrays.shares[b],
            arrays.entry[b],
            np.int64(arrays.opened[b]),
            table[days[b], MARK],
            days[b],
        )


def account_code(bars: Bars, accounts: Accounts, day: Any) -> np.ndarray:
    """What a stepped prompt tells of each account at the close of `day` (one or [B]): int32 [B].

    0 is flat, else side, open profit over the entry price in `PROFIT_STEP` (half away from zero,
    at most `PROFIT_LIMIT` steps) and the largest of `HELD_BUCKETS` within the bars since the fill.
    """
    days = np.ascontiguousarray(np.broadcast_to(day, len(accounts)), dtype=np.int64)
    _check_days(bars, days, 0)
    codes = np.empty(len(accounts), np.int32)
    _codes_nb(bars.table, accounts._views(), days, codes)
    return codes


def decode(code: int) -> tuple[int, int, int]:
    """(side in -1, 0, 1; profit in steps; bars held) of an account code; ValueError for no code."""
    if not 0 <= code < CODES:
        raise ValueError(f"account codes lie in 0..{CODES - 1}, not {code}")
    if code == 0:
        return 0, 0, 0
    row, bucket = divmod(int(code) - 1, len(HELD_BUCKETS))
    long, steps = divmod(row, _PROFITS)
    return 2 * long - 1, steps - PROFIT_LIMIT, HELD_BUCKETS[bucket]


_SIDE_OF_CODE = np.array([decode(code)[0] for code in range(CODES)], np.int8)


def side_of(codes: np.ndarray) -> np.ndarray:
    """-1, 0 or 1 of each of `codes` [n]: int8 [n]."""
    return _SIDE_OF_CODE[codes]


def allowed_codes(bars: Bars, config: SimulatorConfig, day: Any, codes: np.ndarray) -> np.ndarray:
    """`allowed` of accounts that show `codes` [n]: bool [n, 3]."""
    return _allowed_sides(bars, config, side_of(codes), day)


@_kernel
def _mark_path_nb(table, reached, first, start, side, entry, opened):
    """Marks the codes of a position held from day first + start on; `entry` is that day's."""
    for place in range(start, len(reached)):
        day = first + place
        if place > start:
            entry = entry / table[day, SPLIT]
        # Fills wait for a bar, so from here on there is a mark.
        reached[place, _code_nb(side, entry, opened, table[day, MARK], day)] = True


@_kernel
def _mark_entry_nb(table, rules, reached, first, place, side):
    """Marks what a position entered on day first + place shows at the closes it lives to see."""
    day = first + place
    price = table[day, OPEN if rules.fill == NEXT_OPEN else CLOSE]
    _, entry = _entry_nb(price, side, rules)
    if rules.fill != SAME_CLOSE:
        _mark_path_nb(table, reached, first, place, side, entry, day)
    elif place + 1 < len(reached):
        entry = entry / table[day + 1, SPLIT]
        _mark_path_nb(table, reached, first, place + 1, side, entry, day)


@_kernel
def _reachable_nb(table, rules, first, arrays, reached):
    reached[:, 0] = True
    for b in range(arrays.shares.size):
        if arrays.shares[b] != 0.0:
            side, opened = np.sign(arrays.shares[b]), np.int64(arrays.opened[b])
            _mark_path_nb(table, reached, first, 0, side, arrays.entry[b], opened)
    for place in range(0 if rules.fill == SAME_CLOSE else 1, len(reached)):
        if table[first + place, TRADABLE] != 0.0:
            _mark_entry_nb(table, rules, reached, first, place, 1.0)
            if rules.long_short:
                _mark_entry_nb(table, rules, reached, first, place, -1.0)


def reachable(bars: Bars, config: SimulatorConfig, days: range, accounts: Accounts) -> np.ndarray:
    """Codes that the accounts could show at each of `days` under any actions: [len(days), CODES].

    `days[0]` is where the accounts are now. A superset: each position now held is kept throughout,
    and each side allowed is entered on each day with a bar.
    """
    _check_days(bars, np.array([days[0], days[-1]]), 0)
    reached = np.zeros((len(days), CODES), np.bool_)
    _reachable_nb(bars.table, _rules_of(config), days[0], accounts._views(), reached)
    return reached


# Random numbers ---------------------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


@_kernel
def _mix_nb(z):
    """splitmix64's output function (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@_kernel
def stream_nb(seed, env):
    """Key of an environment's random numbers: environment i of seed s is environment 0 of s + i."""
    return _mix_nb(np.uint64(seed) + np.uint64(env) + _GOLDEN)


@_kernel
def uniform_nb(stream, step):
    """The step's number in [0, 1)."""
    return np.float64(_mix_nb(stream + _GOLDEN * np.uint64(step)) >> _S11) * 2.0**-53


@_kernel
def _uniforms_nb(seed, envs, step, values):
    for b in range(envs.size):
        values[b] = uniform_nb(stream_nb(seed, envs[b]), step)


def _seed_bits(seed: int) -> np.uint64:
    """`seed` as the kernels take it: modulo 2^64."""
    return np.uint64(int(seed) % 2**64)


def uniform(seed: int, env: np.ndarray, step: int) -> np.ndarray:
    """Random numbers in [0, 1) that depend on (seed + env, step) and nothing else: float64 [B]."""
    envs = np.ascontiguousarray(np.atleast_1d(env), dtype=np.int64)
    values = np.empty(envs.size)
    _uniforms_nb(_seed_bits(seed), envs, step, values)
    return values


# Rollout ----------------------------------------------------------------------------------------


class _Outputs(NamedTuple):
    row: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    valid: np.ndarray
    next_row: np.ndarray


@_kernel
def _sample_nb(cdf, row, uniform):
    """Inverse CDF. u x total < total and a repeated value of the CDF is an empty interval, so an
    action of probability 0 can't be drawn, whatever the CDF was rounded to."""
    x = uniform * cdf[row, 2]
    return np.int64(x >= cdf[row, 0]) + np.int64(x >= cdf[row, 1])


@_kernel
def _row_nb(table, row_of, account, day):
    """(row of what the account shows at the close of `day`, its code)."""
    code = _code_nb(account.shares, account.entry, account.opened, table[day, MARK], day)
    return np.int64(row_of[day, code]), code


@_kernel
def _rollout_nb(
    table, rules, arrays, days, restarts, cdf, row_of, seed, first_env, first_step, out
):
    """-> (day, code) of the first state without a row, or (-1, -1)."""
    # Each access to a tuple's array counts its references: once here, not once a step.
    rows, actions, rewards, terminated, valid, next_rows = out
    for b in range(arrays.cash.size):
        account, oldest = _load_nb(arrays, b), 0
        past = _past_nb(arrays, b)
        stream = stream_nb(seed, first_env + b)
        row = np.int64(-1)
        for s in range(days.size):
            day = days[s]
            if restarts[s]:
                account, oldest = _fresh_nb(account.starting_cash), 0
                _forget_nb(past)
            if restarts[s] or s == 0:
                row, code = _row_nb(table, row_of, account, day)
                if row < 0:
                    return day, code
            rows[b, s], valid[b, s] = row, account.alive
            action, reward, ruined = np.int64(HOLD), 0.0, False
            if account.alive:
                night = _night_nb(table, day)
                action = _sample_nb(cdf, row, uniform_nb(stream, first_step + s))
                action = _effective_nb(rules, account.shares, night.tradable, action)
                account, reward, ruined = _advance_nb(night, rules, account, action)
                _remember_nb(past, oldest, reward, account.equity, action)
                oldest = oldest + 1 if oldest < HISTORY - 1 else 0
            actions[b, s], rewards[b, s], terminated[b, s] = action, reward, ruined
            row, code = _row_nb(table, row_of, account, day + 1)
            if row < 0:
                return day + 1, code
            next_rows[b, s] = row
        _store_nb(arrays, b, account)
        _order_nb(past, oldest)
    return np.int64(-1), np.int64(-1)


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

    -> [B, S] each: `row` int32, `action` int8, `reward`, `terminated` (ruined in this step),
    `valid` (False after ruin until the next restart: Hold, reward 0), `next_row` int32 (of the
    state reached, before any restart). Raises RuntimeError where a state has no row or a row of
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
    shape = (len(accounts), len(days))
    out = _Outputs(
        row=np.empty(shape, np.int32),
        action=np.empty(shape, np.int8),
        reward=np.empty(shape),
        terminated=np.empty(shape, np.bool_),
        valid=np.empty(shape, np.bool_),
        next_row=np.empty(shape, np.int32),
    )
    day, code = _rollout_nb(
        bars.table,
        _rules_of(config),
        accounts._views(),
        days,
        restarts,
        cdf,
        row_of,
        _seed_bits(seed),
        first_env,
        first_step,
        out,
    )
    if day >= 0:
        raise RuntimeError(f"account code {code} has no prompt on day {day}")
    return out._asdict()


def _check_cdf(cdf: np.ndarray) -> None:
    rising = (cdf[:, 0] >= 0) & (cdf[:, 1] >= cdf[:, 0]) & (cdf[:, 2] >= cdf[:, 1])
    valid = rising & (cdf[:, 2] > 0) & (cdf[:, 2] < np.inf)
    if not valid.all():
        row = int(np.argmin(valid))
        raise RuntimeError(f"row {row} of the policy is no distribution: {cdf[row]}")


@_kernel
def _equities_nb(table, rules, starting_cash, first, seed, fixed, equity):
    for episode in range(equity.shape[0]):
        account, stream = _fresh_nb(starting_cash), stream_nb(seed, episode)
        equity[episode, 0] = account.equity
        for place in range(1, equity.shape[1]):
            if account.alive:
                night = _night_nb(table, first + place - 1)
                action = np.int64(fixed)
                if fixed < 0:
                    u = uniform_nb(stream, place - 1)
                    if rules.long_short:
                        action = np.int64(u * 3.0)
                    else:
                        action = np.int64(u * 2.0) + (HOLD if account.shares == 0.0 else SELL)
                action = _effective_nb(rules, account.shares, night.tradable, action)
                account, _, _ = _advance_nb(night, rules, account, action)
            equity[episode, place] = account.equity


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
    _equities_nb(
        bars.table, _rules_of(config), float(config.cash), days[0], _seed_bits(seed), fixed, equity
    )
    return equity
