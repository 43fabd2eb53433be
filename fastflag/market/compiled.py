"""The simulator's compiled part: what happens to an account, and the constants that it reads.

Every rule is a scalar function of one account. `step_nb` loops over accounts; `rollout_nb` takes
many through a day together, rule by rule, and equals its steps bit for bit.

All of it lies in this one file, because Numba's cache of a kernel watches only the file it is in.
"""

import math
from typing import NamedTuple

import numpy as np

from fastflag.market.machine_code import kernel

# Without the NumPy error model each division is checked: a quarter slower.
_kernel = kernel(nogil=True, error_model="numpy")
SELL, HOLD, BUY = 0, 1, 2
HISTORY = 10
"""Past steps that an account remembers, for prompts."""
COLUMNS = ("open", "close", "mark", "split", "dividend", "tradable", "payable")
"""Of `Bars.table`."""
OPEN, CLOSE, MARK, SPLIT, DIVIDEND, TRADABLE, PAYABLE = range(len(COLUMNS))
PROFIT_STEP = 0.005
PROFIT_LIMIT = 40
HELD_BUCKETS = (0, 1, 2, 3, 5, 10, 20, 40)
PROFITS = 2 * PROFIT_LIMIT + 1
CODES = 1 + 2 * PROFITS * len(HELD_BUCKETS)
"""Number of account codes: flat, and (side, open profit, days held)."""
_MOST_STEPS, _LATER_BUCKETS = float(PROFIT_LIMIT), HELD_BUCKETS[1:]
NEXT_OPEN, NEXT_CLOSE, SAME_CLOSE = 0, 1, 2

# A deviation below this part of the starting cash is rounding (float64 equity moves by 1e-16 of
# itself at a constant price), and a Sharpe ratio of rounding errors is noise of order 1.
_ZERO_DEVIATION = 1e-12


class Rules(NamedTuple):
    """The config as the kernels take it.

    Numba pickles the classes of a kernel's arguments (this one, `Arrays`, `Outputs`) by name into
    its cache, and a cache that names a class which is gone can't be read: don't rename them.
    """

    fill: int
    long_short: bool
    log_return: bool
    reinvest: bool
    fee: float
    slippage: float
    lot: float
    ruin: float


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


# The account --------------------------------------------------------------------------------------


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
def _growth_nb(dividend, close):
    """Shares held after a dividend that bought shares at `close`, for each held before."""
    return 1.0 + dividend / close


@_kernel
def _reinvest_nb(position, day, dividend, close, rules):
    """Puts the dividend that was paid in cash after the close of `day` into shares at the next
    close, `close`, where the position is still the one of that night.

    With lots the entry is divided by the growth as without, because open profit is the total
    return, and what is too little for a lot stays in the cash.
    """
    if position.opened > day:
        return position
    growth = _growth_nb(dividend, close)
    shares, paid = position.shares * growth, position.shares * dividend
    cash = position.cash - paid
    if rules.lot > 0.0:
        whole = np.trunc(paid / close / rules.lot) * rules.lot
        shares = position.shares + whole
        cash = position.cash - whole * close
        if position.shares > 0.0:
            cash = max(cash, 0.0)
    return _Position(cash, shares, position.entry / growth, position.opened, position.fees)


@_kernel
def _sharpe_nb(count, mean, m2, starting_cash):
    if count < 2:
        return 0.0
    deviation = math.sqrt(m2 / (count - 1))
    return mean / deviation if deviation > _ZERO_DEVIATION * starting_cash else 0.0


@_kernel
def _night_nb(table, day, rules):
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
        table[day + 1, PAYABLE if rules.reinvest else DIVIDEND],
        table[day + 1, TRADABLE] != 0.0,
    )


@_kernel
def _settle_nb(account, position, order, mark, rules):
    """An account marked with its new position: (account, ruined)."""
    equity = position.cash
    if position.shares != 0.0:
        equity = equity + position.shares * mark
    profit = equity - account.equity
    count = account.count + 1
    delta = profit - account.mean
    mean = account.mean + delta / count
    m2 = account.m2 + delta * (profit - mean)
    sharpe = _sharpe_nb(count, mean, m2, account.starting_cash)
    alive = equity > rules.ruin * account.starting_cash
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
    return account, not alive


@_kernel
def _log_return_nb(account, before, rules):
    """Of equity since it was `before`, ruin at its bound."""
    return math.log(max(account.equity, rules.ruin * account.starting_cash) / before)


# LLVM leaves this one a call, which costs a seventh of the throughput.
@kernel(nogil=True, error_model="numpy", inline="always")
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
    if rules.reinvest and night.dividend != 0.0:
        position = _reinvest_nb(position, night.day, night.dividend, night.next_close, rules)

    settled, ruined = _settle_nb(account, position, order, night.next_mark, rules)
    if rules.log_return:
        return settled, _log_return_nb(settled, account.equity, rules), ruined
    return settled, settled.sharpe - account.sharpe, ruined


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
    steps = np.int64(min(abs(profit) / PROFIT_STEP, _MOST_STEPS) + 0.5)
    steps = PROFIT_LIMIT + (steps if profit > 0.0 else -steps)
    bucket = 0
    for bound in _LATER_BUCKETS:
        bucket += np.int64(day - opened >= bound)
    row = np.int64(shares > 0.0) * PROFITS + steps
    return 1 + row * len(HELD_BUCKETS) + bucket


# Many accounts ------------------------------------------------------------------------------------


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
def _remember_nb(past, reward, equity, action):
    rewards, equities, actions = past
    for place in range(HISTORY - 1):
        rewards[place] = rewards[place + 1]
        equities[place], actions[place] = equities[place + 1], actions[place + 1]
    rewards[-1], equities[-1], actions[-1] = reward, equity, action


@_kernel
def step_nb(table, rules, arrays, days, actions, rewards, terminated):
    for b in range(days.size):
        rewards[b], terminated[b] = 0.0, False
        account = _load_nb(arrays, b)
        if account.alive:
            night = _night_nb(table, days[b], rules)
            action = _effective_nb(rules, account.shares, night.tradable, actions[b])
            account, reward, ruined = _advance_nb(night, rules, account, action)
            _store_nb(arrays, b, account)
            _remember_nb(_past_nb(arrays, b), reward, account.equity, action)
            rewards[b], terminated[b] = reward, ruined


# Account codes ------------------------------------------------------------------------------------


@_kernel
def codes_nb(table, arrays, days, codes):
    for b in range(days.size):
        codes[b] = _code_nb(
            arrays.shares[b],
            arrays.entry[b],
            np.int64(arrays.opened[b]),
            table[days[b], MARK],
            days[b],
        )


@_kernel
def _kept_entry_nb(table, rules, day, entry):
    """The entry at the close of `day` of a position that had `entry` at the close before."""
    entry = entry / table[day, SPLIT]
    if rules.reinvest and table[day, PAYABLE] != 0.0:
        entry = entry / _growth_nb(table[day, PAYABLE], table[day, CLOSE])
    return entry


@_kernel
def _mark_path_nb(table, rules, reached, first, start, side, entry, opened):
    """Marks the codes of a position held from day first + start on; `entry` is that day's."""
    for place in range(start, len(reached)):
        day = first + place
        if place > start:
            entry = _kept_entry_nb(table, rules, day, entry)
        # Fills wait for a bar, so from here on there is a mark.
        reached[place, _code_nb(side, entry, opened, table[day, MARK], day)] = True


@_kernel
def _mark_entry_nb(table, rules, reached, first, place, side):
    """Marks what a position entered on day first + place shows at the closes it lives to see."""
    day = first + place
    price = table[day, OPEN if rules.fill == NEXT_OPEN else CLOSE]
    _, entry = _entry_nb(price, side, rules)
    if rules.fill != SAME_CLOSE:
        _mark_path_nb(table, rules, reached, first, place, side, entry, day)
    elif place + 1 < len(reached):
        entry = _kept_entry_nb(table, rules, day + 1, entry)
        _mark_path_nb(table, rules, reached, first, place + 1, side, entry, day)


@_kernel
def reachable_nb(table, rules, first, arrays, reached):
    reached[:, 0] = True
    for b in range(arrays.shares.size):
        if arrays.shares[b] != 0.0:
            side, opened = np.sign(arrays.shares[b]), np.int64(arrays.opened[b])
            _mark_path_nb(table, rules, reached, first, 0, side, arrays.entry[b], opened)
    for place in range(0 if rules.fill == SAME_CLOSE else 1, len(reached)):
        if table[first + place, TRADABLE] != 0.0:
            _mark_entry_nb(table, rules, reached, first, place, 1.0)
            if rules.long_short:
                _mark_entry_nb(table, rules, reached, first, place, -1.0)


# Random numbers -----------------------------------------------------------------------------------

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
def _stream_nb(seed, env):
    """Key of an environment's random numbers: environment i of seed s is environment 0 of s + i."""
    return _mix_nb(np.uint64(seed) + np.uint64(env) + _GOLDEN)


@_kernel
def _uniform_nb(stream, step):
    """The step's number in [0, 1)."""
    return np.float64(_mix_nb(stream + _GOLDEN * np.uint64(step)) >> _S11) * 2.0**-53


@_kernel
def uniforms_nb(seed, envs, step, values):
    for b in range(envs.size):
        values[b] = _uniform_nb(_stream_nb(seed, envs[b]), step)


# Rollout ------------------------------------------------------------------------------------------


class Outputs(NamedTuple):
    row: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    valid: np.ndarray
    next_row: np.ndarray


# Accounts that a rollout takes through a day together, rule by rule. Each rule is a loop over lanes
# around its scalar function. LLVM makes vector code of it (where there is AVX-512, three times the
# steps a second of account by account) on these terms: the numbers lie in two buffers at constant
# distances, so that nothing need be checked for overlap, and what can't be vectorised (looking up
# in a table, the logarithm) has a loop of its own. 256 lanes fit a core's first cache; at distances
# that are powers of two they would lie over one another in it.
LANES = 256
_STRIDE = LANES + 8
_FLOATS = range(0, (11 + 2 * HISTORY) * _STRIDE, _STRIDE)
_START, _CASH, _SHARES, _ENTRY, _EQUITY, _FEES, _MEAN, _M2, _SHARPE, _BEFORE, _REWARD = _FLOATS[:11]
_REWARDS, _EQUITIES = _FLOATS[11], _FLOATS[11 + HISTORY]
_WHOLES = range(0, (8 + HISTORY) * _STRIDE, _STRIDE)
_OPENED, _PENDING, _COUNT, _ALIVE, _ORDER, _ACTION, _RUINED, _OLDEST = _WHOLES[:8]
_ACTIONS = _WHOLES[8]
_NUM_FLOATS, _NUM_WHOLES = len(_FLOATS) * _STRIDE, len(_WHOLES) * _STRIDE


@_kernel
def _get_nb(floats, wholes, lane):
    return _Account(
        floats[_START + lane],
        floats[_CASH + lane],
        floats[_SHARES + lane],
        floats[_ENTRY + lane],
        wholes[_OPENED + lane],
        wholes[_PENDING + lane],
        floats[_EQUITY + lane],
        floats[_FEES + lane],
        wholes[_COUNT + lane],
        floats[_MEAN + lane],
        floats[_M2 + lane],
        floats[_SHARPE + lane],
        wholes[_ALIVE + lane] != 0,
    )


@_kernel
def _put_nb(floats, wholes, lane, account):
    floats[_CASH + lane] = account.cash
    floats[_SHARES + lane] = account.shares
    floats[_ENTRY + lane] = account.entry
    wholes[_OPENED + lane] = account.opened
    wholes[_PENDING + lane] = account.pending
    floats[_EQUITY + lane] = account.equity
    floats[_FEES + lane] = account.fees
    wholes[_COUNT + lane] = account.count
    floats[_MEAN + lane] = account.mean
    floats[_M2 + lane] = account.m2
    floats[_SHARPE + lane] = account.sharpe
    wholes[_ALIVE + lane] = np.int64(account.alive)


@_kernel
def _position_nb(floats, wholes, lane):
    return _Position(
        floats[_CASH + lane],
        floats[_SHARES + lane],
        floats[_ENTRY + lane],
        wholes[_OPENED + lane],
        floats[_FEES + lane],
    )


@_kernel
def _move_nb(floats, wholes, lane, position):
    floats[_CASH + lane] = position.cash
    floats[_SHARES + lane] = position.shares
    floats[_ENTRY + lane] = position.entry
    wholes[_OPENED + lane] = position.opened
    floats[_FEES + lane] = position.fees


@_kernel
def _gather_nb(arrays, first, size, floats, wholes):
    """Returns how many are closed."""
    closed = np.int64(0)
    for lane in range(size):
        b = first + lane
        account = _load_nb(arrays, b)
        floats[_START + lane] = account.starting_cash
        _put_nb(floats, wholes, lane, account)
        wholes[_OLDEST + lane] = 0
        rewards, equities, actions = _past_nb(arrays, b)
        for place in range(HISTORY):
            floats[_REWARDS + place * _STRIDE + lane] = rewards[place]
            floats[_EQUITIES + place * _STRIDE + lane] = equities[place]
            wholes[_ACTIONS + place * _STRIDE + lane] = actions[place]
        closed += np.int64(not account.alive)
    return closed


@_kernel
def _scatter_nb(arrays, first, size, floats, wholes):
    for lane in range(size):
        b = first + lane
        _store_nb(arrays, b, _get_nb(floats, wholes, lane))
        rewards, equities, actions = _past_nb(arrays, b)
        for newer in range(HISTORY):
            place = (wholes[_OLDEST + lane] + newer) % HISTORY
            rewards[newer] = floats[_REWARDS + place * _STRIDE + lane]
            equities[newer] = floats[_EQUITIES + place * _STRIDE + lane]
            actions[newer] = wholes[_ACTIONS + place * _STRIDE + lane]


@_kernel
def _restart_lanes_nb(size, floats, wholes):
    for lane in range(size):
        _put_nb(floats, wholes, lane, _fresh_nb(floats[_START + lane]))
    floats[_REWARDS:] = np.nan
    wholes[_ACTIONS:] = -1


@_kernel
def _uniform_lanes_nb(size, streams, step, uniforms):
    for lane in range(size):
        uniforms[lane] = _uniform_nb(streams[lane], step)


@_kernel
def _sample_nb(cdf, row, uniform):
    """Inverse CDF. u x total < total and a repeated value of the CDF is an empty interval, so an
    action of probability 0 can't be drawn, whatever the CDF was rounded to."""
    x = uniform * cdf[row, 2]
    return np.int64(x >= cdf[row, 0]) + np.int64(x >= cdf[row, 1])


@_kernel
def _sample_lanes_nb(size, wholes, cdf, rows, uniforms):
    for lane in range(size):
        # Unsigned: an index that could count from the end costs a test.
        wholes[_ACTION + lane] = _sample_nb(cdf, np.uint64(rows[lane]), uniforms[lane])


@_kernel
def _order_lanes_nb(size, floats, wholes, tradable, rules):
    """What is done of the drawn action, and the order for the night; closed accounts hold."""
    for lane in range(size):
        open_for = tradable and wholes[_ALIVE + lane] != 0
        action = _effective_nb(rules, floats[_SHARES + lane], open_for, wholes[_ACTION + lane])
        wholes[_ACTION + lane] = action
        pending = wholes[_PENDING + lane]
        wholes[_ORDER + lane] = action if open_for and pending < 0 else pending


@_kernel
def _execute_lanes_nb(size, floats, wholes, price, day, rules):
    for lane in range(size):
        position = _position_nb(floats, wholes, lane)
        order = wholes[_ORDER + lane]
        if order >= 0:
            position = _execute_nb(position, order, price, day, rules)
        _move_nb(floats, wholes, lane, position)
        wholes[_ORDER + lane] = -1


@_kernel
def _overnight_lanes_nb(size, floats, wholes, night, rules):
    for lane in range(size):
        position = _position_nb(floats, wholes, lane)
        position = _overnight_nb(position, night.split, night.dividend, night.mark, rules)
        _move_nb(floats, wholes, lane, position)


@_kernel
def _reinvest_lanes_nb(size, floats, wholes, night, rules):
    for lane in range(size):
        position = _position_nb(floats, wholes, lane)
        position = _reinvest_nb(position, night.day, night.dividend, night.next_close, rules)
        _move_nb(floats, wholes, lane, position)


@_kernel
def _settle_open_nb(account, position, order, mark, rules):
    """`_settle_nb`, or nothing where the account is closed."""
    settled, ruined = _settle_nb(account, position, order, mark, rules)
    return (settled, ruined) if account.alive else (account, False)


@_kernel
def _settle_lanes_nb(size, floats, wholes, mark, rules):
    """Returns how many were ruined."""
    ruins = np.int64(0)
    for lane in range(size):
        before = _get_nb(floats, wholes, lane)
        position, order = _position_nb(floats, wholes, lane), wholes[_ORDER + lane]
        account, ruined = _settle_open_nb(before, position, order, mark, rules)
        _put_nb(floats, wholes, lane, account)
        floats[_BEFORE + lane] = before.equity
        floats[_REWARD + lane] = account.sharpe - before.sharpe
        wholes[_RUINED + lane] = np.int64(ruined)
        ruins += np.int64(ruined)
    return ruins


@_kernel
def _log_return_lanes_nb(size, floats, wholes, rules):
    for lane in range(size):
        account = _get_nb(floats, wholes, lane)
        change = _log_return_nb(account, floats[_BEFORE + lane], rules)
        was_open = account.alive or wholes[_RUINED + lane] != 0
        floats[_REWARD + lane] = change if was_open else 0.0


@_kernel
def _remember_lanes_nb(size, floats, wholes, place, valid):
    """Past steps lie in a ring; that of an account which was closed stays as it was."""
    rewards, equities = _REWARDS + place * _STRIDE, _EQUITIES + place * _STRIDE
    actions, following = _ACTIONS + place * _STRIDE, (place + 1) % HISTORY
    for lane in range(size):
        if valid[lane]:
            floats[rewards + lane] = floats[_REWARD + lane]
            floats[equities + lane] = floats[_EQUITY + lane]
    for lane in range(size):
        if valid[lane]:
            wholes[actions + lane] = wholes[_ACTION + lane]
            wholes[_OLDEST + lane] = following


@_kernel
def _code_lanes_nb(size, floats, wholes, mark, day, codes):
    for lane in range(size):
        shares, entry = floats[_SHARES + lane], floats[_ENTRY + lane]
        codes[lane] = _code_nb(shares, entry, wholes[_OPENED + lane], mark, day)


@_kernel
def _row_lanes_nb(size, floats, wholes, table, row_of, day, codes, rows):
    """Finds the row of what each lane shows at the close of `day`; returns a code that has none,
    or -1."""
    _code_lanes_nb(size, floats, wholes, table[day, MARK], day, codes)
    row_of_code = row_of[day]
    for lane in range(size):
        rows[lane] = row_of_code[np.uint64(codes[lane])]
    missing = np.int64(-1)
    for lane in range(size):
        missing = max(missing, codes[lane] if rows[lane] < 0 else np.int64(-1))
    return missing


@_kernel
def _copy_lanes_nb(size, numbers, start, column):
    for lane in range(size):
        column[lane] = numbers[start + lane]


@_kernel
def _night_lanes_nb(size, floats, wholes, night, rules):
    """All lanes from one close to the next, as `_advance_nb` takes one account; returns how many
    were ruined."""
    if rules.fill == SAME_CLOSE:
        _execute_lanes_nb(size, floats, wholes, night.close, night.day, rules)
    if night.split != 1.0 or night.dividend != 0.0:
        _overnight_lanes_nb(size, floats, wholes, night, rules)
    if night.next_tradable and rules.fill != SAME_CLOSE:
        price = night.next_open if rules.fill == NEXT_OPEN else night.next_close
        _execute_lanes_nb(size, floats, wholes, price, night.day + 1, rules)
    if rules.reinvest and night.dividend != 0.0:
        _reinvest_lanes_nb(size, floats, wholes, night, rules)
    ruins = _settle_lanes_nb(size, floats, wholes, night.next_mark, rules)
    if rules.log_return:
        _log_return_lanes_nb(size, floats, wholes, rules)
    return ruins


@_kernel
def rollout_nb(
    table, rules, arrays, days, restarts, cdf, row_of, seed, first_env, first_step, first, end, out
):
    """Accounts first to end - 1. -> (day, code) of a state without a row, or (-1, -1)."""
    # Each access to a tuple's array counts its references: once here, not once a step.
    rows, actions, rewards, terminated, valid, next_rows = out
    floats, wholes = np.empty(_NUM_FLOATS), np.empty(_NUM_WHOLES, np.int64)
    streams, uniforms = np.empty(LANES, np.uint64), np.empty(LANES)
    codes = np.empty(LANES, np.int64)
    for start in range(first, end, LANES):
        size = min(LANES, end - start)
        here = slice(start, start + size)
        closed = _gather_nb(arrays, start, size, floats, wholes)
        for lane in range(size):
            streams[lane] = _stream_nb(seed, first_env + start + lane)
        for s in range(days.size):
            day, row, was_open = days[s], rows[s, here], valid[s, here]
            night = _night_nb(table, day, rules)
            if restarts[s]:
                _restart_lanes_nb(size, floats, wholes)
                closed = 0
            if restarts[s] or s == 0:
                missing = _row_lanes_nb(size, floats, wholes, table, row_of, day, codes, row)
                if missing >= 0:
                    return day, missing
            else:
                row[:] = next_rows[s - 1, here]
            # Mostly nobody is closed, and one value for all is written faster than 256.
            was_open[:] = True
            if closed:
                _copy_lanes_nb(size, wholes, _ALIVE, was_open)
            _uniform_lanes_nb(size, streams, first_step + s, uniforms)
            _sample_lanes_nb(size, wholes, cdf, row, uniforms)
            _order_lanes_nb(size, floats, wholes, night.tradable, rules)
            _copy_lanes_nb(size, wholes, _ACTION, actions[s, here])
            ruins = _night_lanes_nb(size, floats, wholes, night, rules)
            closed += ruins
            terminated[s, here] = False
            if ruins:
                _copy_lanes_nb(size, wholes, _RUINED, terminated[s, here])
            _copy_lanes_nb(size, floats, _REWARD, rewards[s, here])
            _remember_lanes_nb(size, floats, wholes, s % HISTORY, was_open)
            missing = _row_lanes_nb(
                size, floats, wholes, table, row_of, day + 1, codes, next_rows[s, here]
            )
            if missing >= 0:
                return day + 1, missing
        _scatter_nb(arrays, start, size, floats, wholes)
    return np.int64(-1), np.int64(-1)


@_kernel
def equities_nb(table, rules, starting_cash, first, seed, fixed, equity):
    for episode in range(equity.shape[0]):
        account, stream = _fresh_nb(starting_cash), _stream_nb(seed, episode)
        equity[episode, 0] = account.equity
        for place in range(1, equity.shape[1]):
            if account.alive:
                night = _night_nb(table, first + place - 1, rules)
                action = np.int64(fixed)
                if fixed < 0:
                    u = _uniform_nb(stream, place - 1)
                    if rules.long_short:
                        action = np.int64(u * 3.0)
                    else:
                        action = np.int64(u * 2.0) + (HOLD if account.shares == 0.0 else SELL)
                action = _effective_nb(rules, account.shares, night.tradable, action)
                account, _, _ = _advance_nb(night, rules, account, action)
            equity[episode, place] = account.equity
