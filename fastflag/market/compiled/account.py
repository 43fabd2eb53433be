"""What happens to an account. Every rule is a scalar function of one account; `step_nb` loops over
accounts, and lanes.py takes many through a day together with the same functions."""

import math

import numpy as np

from fastflag.market.compiled.constants import (
    BUY,
    CLOSE,
    DIVIDEND,
    HISTORY,
    HOLD,
    MARK,
    NEXT_OPEN,
    OPEN,
    PAYABLE,
    SAME_CLOSE,
    SPLIT,
    TRADABLE,
    ZERO_DEVIATION,
    Account,
    Night,
    Position,
)
from fastflag.market.compiled.kernel import kernel


@kernel()
def entry_nb(price, side, rules):
    """(price filled at, effective price per share) of a position opened at `price`."""
    filled = price * (1.0 + side * rules.slippage)
    return filled, filled * (1.0 + side * rules.fee)


@kernel()
def _close_nb(position, price, side, rules):
    filled = price * (1.0 - side * rules.slippage)
    size = abs(position.shares)
    fee = size * filled * rules.fee
    cash = position.cash + position.shares * filled - fee
    fees = position.fees + fee + size * price * rules.slippage
    return Position(cash, 0.0, 0.0, np.int64(-1), fees)


@kernel()
def _open_nb(position, price, side, day, rules):
    """All cash into a position, fee included: n x filled x (1 + fee) = cash on either side.

    So a short is worth exactly the equity that is left after its fee.
    """
    filled, entry = entry_nb(price, side, rules)
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
    return Position(cash, side * size, entry, np.int64(day), fees)


@kernel()
def _side_nb(shares):
    return np.int64(shares > 0.0) - np.int64(shares < 0.0)


@kernel()
def execute_nb(position, order, price, day, rules):
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


@kernel()
def overnight_nb(position, split, dividend, mark, rules):
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
    return Position(cash + shares * dividend, shares, entry, opened, position.fees)


@kernel()
def growth_nb(dividend, close):
    """Shares held after a dividend that bought shares at `close`, for each held before."""
    return 1.0 + dividend / close


@kernel()
def reinvest_nb(position, day, dividend, close, rules):
    """Puts the dividend that was paid in cash after the close of `day` into shares at the next
    close, `close`, where the position is still the one of that night.

    With lots the entry is divided by the growth as without, because open profit is the total
    return, and what is too little for a lot stays in the cash.
    """
    if position.opened > day:
        return position
    growth = growth_nb(dividend, close)
    shares, paid = position.shares * growth, position.shares * dividend
    cash = position.cash - paid
    if rules.lot > 0.0:
        whole = np.trunc(paid / close / rules.lot) * rules.lot
        shares = position.shares + whole
        cash = position.cash - whole * close
        if position.shares > 0.0:
            cash = max(cash, 0.0)
    return Position(cash, shares, position.entry / growth, position.opened, position.fees)


@kernel()
def sharpe_nb(count, mean, m2, starting_cash):
    if count < 2:
        return 0.0
    deviation = math.sqrt(m2 / (count - 1))
    return mean / deviation if deviation > ZERO_DEVIATION * starting_cash else 0.0


@kernel()
def night_nb(bars, day, rules):
    """What an account meets between the closes of `day` and day + 1."""
    return Night(
        day,
        bars[day, CLOSE],
        bars[day, MARK],
        bars[day, TRADABLE] != 0.0,
        bars[day + 1, OPEN],
        bars[day + 1, CLOSE],
        bars[day + 1, MARK],
        bars[day + 1, SPLIT],
        bars[day + 1, PAYABLE if rules.reinvest else DIVIDEND],
        bars[day + 1, TRADABLE] != 0.0,
    )


@kernel()
def settle_nb(account, position, order, mark, rules):
    """An account marked with its new position: (account, ruined)."""
    equity = position.cash
    if position.shares != 0.0:
        equity = equity + position.shares * mark
    profit = equity - account.equity
    count = account.count + 1
    delta = profit - account.mean
    mean = account.mean + delta / count
    m2 = account.m2 + delta * (profit - mean)
    sharpe = sharpe_nb(count, mean, m2, account.starting_cash)
    alive = equity > rules.ruin * account.starting_cash
    if not alive:
        equity = max(equity, 0.0)
        position = Position(equity, 0.0, 0.0, np.int64(-1), position.fees)
        order = np.int64(-1)
    account = Account(
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


@kernel()
def log_return_nb(account, before, rules):
    """Of equity since it was `before`, ruin at its bound."""
    return math.log(max(account.equity, rules.ruin * account.starting_cash) / before)


# LLVM leaves this one a call, which costs a seventh of the throughput.
@kernel(inline="always")
def advance_nb(night, rules, account, action):
    """One account from one close to the next: (account, reward, terminated)."""
    position = Position(account.cash, account.shares, account.entry, account.opened, account.fees)
    order = account.pending
    if order < 0 and night.tradable:
        order = np.int64(action)
    if rules.fill == SAME_CLOSE and order >= 0:
        position = execute_nb(position, order, night.close, night.day, rules)
        order = np.int64(-1)
    position = overnight_nb(position, night.split, night.dividend, night.mark, rules)
    if order >= 0 and night.next_tradable:
        price = night.next_open if rules.fill == NEXT_OPEN else night.next_close
        position = execute_nb(position, order, price, night.day + 1, rules)
        order = np.int64(-1)
    if rules.reinvest and night.dividend != 0.0:
        position = reinvest_nb(position, night.day, night.dividend, night.next_close, rules)

    settled, ruined = settle_nb(account, position, order, night.next_mark, rules)
    if rules.log_return:
        return settled, log_return_nb(settled, account.equity, rules), ruined
    return settled, settled.sharpe - account.sharpe, ruined


@kernel()
def effective_nb(rules, shares, tradable, action):
    """`action`, or Hold where it is not allowed."""
    fits = rules.long_short or (shares == 0.0) == (action == BUY)
    return np.int64(action) if tradable and fits else np.int64(HOLD)


@kernel()
def fresh_nb(starting_cash):
    return Account(
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


@kernel()
def load_nb(arrays, b):
    return Account(
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


@kernel()
def store_nb(arrays, b, account):
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


@kernel()
def past_nb(arrays, b):
    return arrays.rewards[b], arrays.equities[b], arrays.actions[b]


@kernel()
def _remember_nb(past, reward, equity, action):
    rewards, equities, actions = past
    for place in range(HISTORY - 1):
        rewards[place] = rewards[place + 1]
        equities[place], actions[place] = equities[place + 1], actions[place + 1]
    rewards[-1], equities[-1], actions[-1] = reward, equity, action


@kernel()
def step_nb(bars, rules, arrays, days, actions, rewards, terminated):
    for b in range(days.size):
        rewards[b], terminated[b] = 0.0, False
        account = load_nb(arrays, b)
        if account.alive:
            night = night_nb(bars, days[b], rules)
            action = effective_nb(rules, account.shares, night.tradable, actions[b])
            account, reward, ruined = advance_nb(night, rules, account, action)
            store_nb(arrays, b, account)
            _remember_nb(past_nb(arrays, b), reward, account.equity, action)
            rewards[b], terminated[b] = reward, ruined
