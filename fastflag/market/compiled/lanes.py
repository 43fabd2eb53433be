"""Many accounts through a day together, rule by rule; each rule a loop over a scalar function."""

import numpy as np

from fastflag.market.compiled.account import (
    effective_nb,
    execute_nb,
    fresh_nb,
    load_nb,
    log_return_nb,
    overnight_nb,
    past_nb,
    reinvest_nb,
    settle_nb,
    store_nb,
)
from fastflag.market.compiled.codes import code_nb
from fastflag.market.compiled.constants import (
    HISTORY,
    MARK,
    NEXT_OPEN,
    SAME_CLOSE,
    Account,
    Position,
)
from fastflag.market.compiled.kernel import kernel
from fastflag.market.compiled.random import uniform_nb

# Accounts that a rollout takes through a day together, rule by rule. Each rule is a loop over lanes
# around its scalar function. LLVM vectorises these loops (with AVX-512, three times the steps a
# second of account by account) only if (1) all numbers lie in two buffers at constant offsets, so
# that nothing need be checked for overlap, and (2) look-ups and logarithms have loops of their own.
# 256 lanes fit a core's L1 cache. The stride is 264, not 256: powers of two collide in it.
LANES = 256
_STRIDE = LANES + 8
_FLOATS = range(0, (11 + 2 * HISTORY) * _STRIDE, _STRIDE)
_START, _CASH, _SHARES, _ENTRY, _EQUITY, _FEES, _MEAN, _M2, _SHARPE, _BEFORE, REWARD = _FLOATS[:11]
_REWARDS, _EQUITIES = _FLOATS[11], _FLOATS[11 + HISTORY]
_WHOLES = range(0, (8 + HISTORY) * _STRIDE, _STRIDE)
_OPENED, _PENDING, _COUNT, ALIVE, _ORDER, ACTION, RUINED, _OLDEST = _WHOLES[:8]
_ACTIONS = _WHOLES[8]
NUM_FLOATS, NUM_WHOLES = len(_FLOATS) * _STRIDE, len(_WHOLES) * _STRIDE


@kernel()
def _get_nb(floats, wholes, lane):
    return Account(
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
        wholes[ALIVE + lane] != 0,
    )


@kernel()
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
    wholes[ALIVE + lane] = np.int64(account.alive)


@kernel()
def _position_nb(floats, wholes, lane):
    return Position(
        floats[_CASH + lane],
        floats[_SHARES + lane],
        floats[_ENTRY + lane],
        wholes[_OPENED + lane],
        floats[_FEES + lane],
    )


@kernel()
def _move_nb(floats, wholes, lane, position):
    floats[_CASH + lane] = position.cash
    floats[_SHARES + lane] = position.shares
    floats[_ENTRY + lane] = position.entry
    wholes[_OPENED + lane] = position.opened
    floats[_FEES + lane] = position.fees


@kernel()
def gather_nb(arrays, first, size, floats, wholes):
    """Returns how many are closed."""
    closed = np.int64(0)
    for lane in range(size):
        b = first + lane
        account = load_nb(arrays, b)
        floats[_START + lane] = account.starting_cash
        _put_nb(floats, wholes, lane, account)
        wholes[_OLDEST + lane] = 0
        rewards, equities, actions = past_nb(arrays, b)
        for place in range(HISTORY):
            floats[_REWARDS + place * _STRIDE + lane] = rewards[place]
            floats[_EQUITIES + place * _STRIDE + lane] = equities[place]
            wholes[_ACTIONS + place * _STRIDE + lane] = actions[place]
        closed += np.int64(not account.alive)
    return closed


@kernel()
def scatter_nb(arrays, first, size, floats, wholes):
    for lane in range(size):
        b = first + lane
        store_nb(arrays, b, _get_nb(floats, wholes, lane))
        rewards, equities, actions = past_nb(arrays, b)
        for newer in range(HISTORY):
            place = (wholes[_OLDEST + lane] + newer) % HISTORY
            rewards[newer] = floats[_REWARDS + place * _STRIDE + lane]
            equities[newer] = floats[_EQUITIES + place * _STRIDE + lane]
            actions[newer] = wholes[_ACTIONS + place * _STRIDE + lane]


@kernel()
def restart_lanes_nb(size, floats, wholes):
    for lane in range(size):
        _put_nb(floats, wholes, lane, fresh_nb(floats[_START + lane]))
    floats[_REWARDS:] = np.nan
    wholes[_ACTIONS:] = -1


@kernel()
def uniform_lanes_nb(size, streams, step, uniforms):
    for lane in range(size):
        uniforms[lane] = uniform_nb(streams[lane], step)


@kernel()
def _sample_nb(cdf, row, uniform):
    """Inverse CDF. u x total < total and a repeated value of the CDF is an empty interval, so an
    action of probability 0 can't be drawn, whatever the CDF was rounded to."""
    x = uniform * cdf[row, 2]
    return np.int64(x >= cdf[row, 0]) + np.int64(x >= cdf[row, 1])


@kernel()
def sample_lanes_nb(size, wholes, cdf, rows, uniforms):
    for lane in range(size):
        # Unsigned: an index that could count from the end costs a test.
        wholes[ACTION + lane] = _sample_nb(cdf, np.uint64(rows[lane]), uniforms[lane])


@kernel()
def order_lanes_nb(size, floats, wholes, tradable, rules):
    """What is done of the drawn action, and the order for the night; closed accounts hold."""
    for lane in range(size):
        open_for = tradable and wholes[ALIVE + lane] != 0
        action = effective_nb(rules, floats[_SHARES + lane], open_for, wholes[ACTION + lane])
        wholes[ACTION + lane] = action
        pending = wholes[_PENDING + lane]
        wholes[_ORDER + lane] = action if open_for and pending < 0 else pending


@kernel()
def _execute_lanes_nb(size, floats, wholes, price, day, rules):
    for lane in range(size):
        position = _position_nb(floats, wholes, lane)
        order = wholes[_ORDER + lane]
        if order >= 0:
            position = execute_nb(position, order, price, day, rules)
        _move_nb(floats, wholes, lane, position)
        wholes[_ORDER + lane] = -1


@kernel()
def _overnight_lanes_nb(size, floats, wholes, night, rules):
    for lane in range(size):
        position = _position_nb(floats, wholes, lane)
        position = overnight_nb(position, night.split, night.dividend, night.mark, rules)
        _move_nb(floats, wholes, lane, position)


@kernel()
def _reinvest_lanes_nb(size, floats, wholes, night, rules):
    for lane in range(size):
        position = _position_nb(floats, wholes, lane)
        position = reinvest_nb(position, night.day, night.dividend, night.next_close, rules)
        _move_nb(floats, wholes, lane, position)


@kernel()
def _settle_open_nb(account, position, order, mark, rules):
    """`settle_nb`, or nothing where the account is closed."""
    settled, ruined = settle_nb(account, position, order, mark, rules)
    return (settled, ruined) if account.alive else (account, False)


@kernel()
def _settle_lanes_nb(size, floats, wholes, mark, rules):
    """Returns how many were ruined."""
    ruins = np.int64(0)
    for lane in range(size):
        before = _get_nb(floats, wholes, lane)
        position, order = _position_nb(floats, wholes, lane), wholes[_ORDER + lane]
        account, ruined = _settle_open_nb(before, position, order, mark, rules)
        _put_nb(floats, wholes, lane, account)
        floats[_BEFORE + lane] = before.equity
        floats[REWARD + lane] = account.sharpe - before.sharpe
        wholes[RUINED + lane] = np.int64(ruined)
        ruins += np.int64(ruined)
    return ruins


@kernel()
def _log_return_lanes_nb(size, floats, wholes, rules):
    for lane in range(size):
        account = _get_nb(floats, wholes, lane)
        change = log_return_nb(account, floats[_BEFORE + lane], rules)
        was_open = account.alive or wholes[RUINED + lane] != 0
        floats[REWARD + lane] = change if was_open else 0.0


@kernel()
def remember_lanes_nb(size, floats, wholes, place, valid):
    """Past steps lie in a ring; that of an account which was closed stays as it was."""
    rewards, equities = _REWARDS + place * _STRIDE, _EQUITIES + place * _STRIDE
    actions, following = _ACTIONS + place * _STRIDE, (place + 1) % HISTORY
    for lane in range(size):
        if valid[lane]:
            floats[rewards + lane] = floats[REWARD + lane]
            floats[equities + lane] = floats[_EQUITY + lane]
    for lane in range(size):
        if valid[lane]:
            wholes[actions + lane] = wholes[ACTION + lane]
            wholes[_OLDEST + lane] = following


@kernel()
def _code_lanes_nb(size, floats, wholes, mark, day, codes):
    for lane in range(size):
        shares, entry = floats[_SHARES + lane], floats[_ENTRY + lane]
        codes[lane] = code_nb(shares, entry, wholes[_OPENED + lane], mark, day)


@kernel()
def row_lanes_nb(size, floats, wholes, bars, row_of, day, codes, rows):
    """Finds the row of what each lane shows at the close of `day`; returns a code that has none,
    or -1."""
    _code_lanes_nb(size, floats, wholes, bars[day, MARK], day, codes)
    row_of_code = row_of[day]
    for lane in range(size):
        rows[lane] = row_of_code[np.uint64(codes[lane])]
    missing = np.int64(-1)
    for lane in range(size):
        missing = max(missing, codes[lane] if rows[lane] < 0 else np.int64(-1))
    return missing


@kernel()
def copy_lanes_nb(size, numbers, start, column):
    for lane in range(size):
        column[lane] = numbers[start + lane]


@kernel()
def night_lanes_nb(size, floats, wholes, night, rules):
    """All lanes from one close to the next, as `advance_nb` takes one account; returns how many
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
