"""What happens to portfolios in a night: K assets and cash. These loops are the rules' definition;
a step of given orders and a rollout from a table run the same ones.

Many accounts go through a night together, a lane each: every rule is a loop over lanes, for one
asset after another, and LLVM vectorises it. What an account has of its own lies in `owns`, what it
has of each asset in `slots`: a field is a block of lanes, and an asset's fields lie together.
"""

import math

import numpy as np

from fastflag.market.compiled.account import sharpe_nb
from fastflag.market.compiled.kernel import kernel
from fastflag.market.compiled.portfolio_constants import (
    AFTER,
    FILLED,
    GONE,
    GROWTH,
    KEEP,
    OPEN,
    OUT,
    PAID,
    SHORT,
    TO_FILL,
)

# 64 lanes of 16 assets fit a core's L1 cache. The stride is no power of two: these collide in it.
LANES = 64
STRIDE = LANES + 8
_OWN = range(0, 19 * STRIDE, STRIDE)
_START, _CASH, EQUITY, _COSTS, _COUNT, _MEAN, _M2, _SHARPE, ALIVE = _OWN[:9]
_FREE, _VALUE, _SHORTS, _UNITS, _WEALTH, _TOP, _SLOPE, _BEFORE, REWARD, RUINED = _OWN[9:]
_SLOT = range(0, 5 * STRIDE, STRIDE)
HOLDING, RATIO, PENDING, ORDER, _HELD = _SLOT
# Less than this part of the equity is what rounding has left of nothing, and buys nothing.
_ROUNDING = 1e-12
NUM_OWNS, BLOCK = len(_OWN) * STRIDE, len(_SLOT) * STRIDE


@kernel()
def gather_nb(arrays, first, size, owns, slots):
    """Returns how many are closed."""
    closed = np.int64(0)
    for lane in range(size):
        b = first + lane
        owns[_START + lane] = arrays.starting_cash[b]
        owns[_CASH + lane] = arrays.cash[b]
        owns[EQUITY + lane] = arrays.equity[b]
        owns[_COSTS + lane] = arrays.costs[b]
        owns[_COUNT + lane] = arrays.count[b]
        owns[_MEAN + lane] = arrays.mean[b]
        owns[_M2 + lane] = arrays.m2[b]
        owns[_SHARPE + lane] = arrays.sharpe[b]
        owns[ALIVE + lane] = arrays.alive[b]
        closed += np.int64(not arrays.alive[b])
    for k in range(arrays.holding.shape[1]):
        for lane in range(size):
            slots[k * BLOCK + HOLDING + lane] = arrays.holding[first + lane, k]
            slots[k * BLOCK + RATIO + lane] = arrays.ratio[first + lane, k]
            slots[k * BLOCK + PENDING + lane] = arrays.pending[first + lane, k]
    return closed


@kernel()
def scatter_nb(arrays, first, size, owns, slots):
    for lane in range(size):
        b = first + lane
        arrays.cash[b] = owns[_CASH + lane]
        arrays.equity[b] = owns[EQUITY + lane]
        arrays.costs[b] = owns[_COSTS + lane]
        arrays.count[b] = np.int64(owns[_COUNT + lane])
        arrays.mean[b] = owns[_MEAN + lane]
        arrays.m2[b] = owns[_M2 + lane]
        arrays.sharpe[b] = owns[_SHARPE + lane]
        arrays.alive[b] = owns[ALIVE + lane] != 0.0
    for k in range(arrays.holding.shape[1]):
        for lane in range(size):
            arrays.holding[first + lane, k] = slots[k * BLOCK + HOLDING + lane]
            arrays.ratio[first + lane, k] = slots[k * BLOCK + RATIO + lane]
            arrays.pending[first + lane, k] = slots[k * BLOCK + PENDING + lane]


@kernel()
def restart_nb(size, assets, owns, slots):
    for lane in range(size):
        owns[_CASH + lane] = owns[EQUITY + lane] = owns[_START + lane]
        owns[_COSTS + lane] = owns[_COUNT + lane] = owns[_MEAN + lane] = 0.0
        owns[_M2 + lane] = owns[_SHARPE + lane] = 0.0
        owns[ALIVE + lane] = 1.0
    for k in range(assets):
        for lane in range(size):
            _empty_nb(slots, k * BLOCK + lane)


@kernel()
def _empty_nb(slots, at):
    slots[at + HOLDING], slots[at + RATIO], slots[at + PENDING] = 0.0, 1.0, np.nan


@kernel()
def _order_of_nb(action, holding, is_open):
    """(what is done of an action, the units that it orders: NaN keeps)."""
    action = np.int64(KEEP) if action == OUT and holding == 0.0 else action
    action = action if is_open else np.int64(KEEP)
    units = 0.0 if action == OUT else np.float64(action - KEEP)
    units = -1.0 if action == SHORT else units
    return action, (np.nan if action == KEEP else units)


@kernel()
def order_nb(size, night, actions, owns, slots):
    """What is done of `actions` [K x STRIDE], in place, and ordered; closed accounts keep."""
    for k in range(night.shape[0]):
        at, here, is_open = k * BLOCK, k * STRIDE, night[k, OPEN] != 0.0
        for lane in range(size):
            open_for = is_open and owns[ALIVE + lane] != 0.0
            holding = slots[at + HOLDING + lane]
            action, units = _order_of_nb(actions[here + lane], holding, open_for)
            actions[here + lane] = action
            slots[at + ORDER + lane] = units


@kernel()
def _entered_nb(holding, pending, order, is_filled, to_fill, total):
    """(what waits, what is traded, its worth before, what it frees, worth of what is kept)."""
    order = order if np.isnan(pending) else pending
    traded = is_filled and not np.isnan(order)
    waiting = np.nan if is_filled else order
    worth = holding * total
    if traded:
        return waiting, order, holding * to_fill, worth, 0.0
    return waiting, np.nan, 0.0, 0.0, worth


@kernel()
def _enter_nb(size, night, long_short, owns, slots):
    """What of each asset is traded in this night, at what it is worth before; the rest is kept."""
    for lane in range(size):
        owns[_FREE + lane] = owns[_CASH + lane]
        owns[_VALUE + lane] = owns[_SHORTS + lane] = owns[_UNITS + lane] = 0.0
    for k in range(night.shape[0]):
        at, is_filled, to_fill = k * BLOCK, night[k, FILLED] != 0.0, night[k, TO_FILL]
        total = to_fill + night[k, PAID]
        for lane in range(size):
            pending, order, held, freed, kept = _entered_nb(
                slots[at + HOLDING + lane],
                slots[at + PENDING + lane],
                slots[at + ORDER + lane],
                is_filled,
                to_fill,
                total,
            )
            slots[at + PENDING + lane] = pending
            slots[at + ORDER + lane] = order
            slots[at + _HELD + lane] = held
            owns[_FREE + lane] += freed
            owns[_VALUE + lane] += kept
            owns[_UNITS + lane] += 0.0 if np.isnan(order) else abs(order)
        if long_short:
            for lane in range(size):
                worth = slots[at + HOLDING + lane] * total
                kept = np.isnan(slots[at + ORDER + lane])
                owns[_SHORTS + lane] += max(-worth, 0.0) if kept else 0.0


@kernel()
def _share_nb(size, assets, owns, slots, rules):
    """Units -> shares of what is free, none above the cap, for those that are traded; and the
    wealth that is free, as it is before costs.

    The cap is of equity before costs: a share of what is free is a smaller part of all after costs
    than before, so the cap holds then too.
    """
    for lane in range(size):
        equity = owns[_FREE + lane] + owns[_VALUE + lane]
        # What a short brought in is bound while it is kept, and as much again.
        free = owns[_FREE + lane] - 2.0 * owns[_SHORTS + lane]
        free = free if abs(free) > _ROUNDING * equity else 0.0
        units = owns[_UNITS + lane]
        owns[_BEFORE + lane], owns[_WEALTH + lane] = free, max(free, 0.0)
        owns[_TOP + lane] = rules.max_weight * equity / free if free > 0.0 else 0.0
        owns[_SLOPE + lane] = 1.0 / units if units > 0.0 else 0.0
    for k in range(assets):
        at = k * BLOCK
        for lane in range(size):
            most, kept = owns[_TOP + lane], np.isnan(slots[at + ORDER + lane])
            share = max(min(slots[at + ORDER + lane] * owns[_SLOPE + lane], most), -most)
            slots[at + ORDER + lane] = np.nan if kept else share


@kernel()
def _after_costs_nb(size, assets, owns, slots, rules):
    """Solves x = free - cost x sum |share x - held|: what is left of the free part after costs.

    The difference of both sides rises with x and is convex and linear in pieces. Newton's method
    from above therefore falls from piece to piece to the root, which it hits exactly: as many
    rounds as there are pieces at most. A lane that is there stays there, to the bit.
    Where even x = 0 costs more than is free, all is left and x is 0.
    """
    cost, falling = rules.cost, True
    while falling:
        for lane in range(size):
            owns[_TOP + lane], owns[_SLOPE + lane] = owns[_BEFORE + lane], 1.0
        for k in range(assets):
            at = k * BLOCK
            for lane in range(size):
                held, share = slots[at + _HELD + lane], slots[at + ORDER + lane]
                share = 0.0 if np.isnan(share) else share
                side = cost if share * owns[_WEALTH + lane] >= held else -cost
                owns[_TOP + lane] += side * held
                owns[_SLOPE + lane] += side * share
        fell = np.int64(0)
        for lane in range(size):
            wealth = max(owns[_TOP + lane] / owns[_SLOPE + lane], 0.0)
            fell += np.int64(wealth < owns[_WEALTH + lane])
            owns[_WEALTH + lane] = min(owns[_WEALTH + lane], wealth)
        falling = fell > 0


@kernel()
def _ratio_nb(target, held, ratio, cost):
    """The ratio of a position that `held` at `ratio` becomes. What is bought beside it gives a mean
    of both, what is left keeps its own."""
    side = 1.0 if target > 0.0 else -1.0
    stays = held if held * side > 0.0 else 0.0
    ratio = ratio if stays != 0.0 else 1.0
    added = target - stays
    mean = target * ratio / (stays + added * (1.0 + side * cost) * ratio)
    return mean if added * side > 0.0 else ratio


@kernel()
def _trade_nb(size, night, owns, slots, rules):
    """Each asset to its target, or kept; then to the night's close. Leaves the cash in _FREE."""
    cost = rules.cost
    for lane in range(size):
        owns[_VALUE + lane] = owns[_SHORTS + lane] = owns[_TOP + lane] = 0.0
    for k in range(night.shape[0]):
        at, growth, after = k * BLOCK, night[k, GROWTH], night[k, AFTER]
        total = night[k, TO_FILL] + night[k, PAID]
        for lane in range(size):
            held, share = slots[at + _HELD + lane], slots[at + ORDER + lane]
            holding, ratio = slots[at + HOLDING + lane], slots[at + RATIO + lane]
            kept = np.isnan(share)
            target = 0.0 if kept else share * owns[_WEALTH + lane]
            traded_ratio = _ratio_nb(target, held, ratio * total, cost)
            holding = holding * growth if kept else target * after
            ratio = ratio * growth if kept else traded_ratio * after
            ratio = ratio if holding != 0.0 else 1.0
            slots[at + HOLDING + lane] = holding
            slots[at + RATIO + lane] = ratio
            owns[_FREE + lane] -= target
            owns[_TOP + lane] += abs(target - held)
            owns[_VALUE + lane] += holding
        if rules.long_short:
            for lane in range(size):
                owns[_SHORTS + lane] += max(-slots[at + HOLDING + lane], 0.0)
    for lane in range(size):
        cash = owns[_FREE + lane] - cost * owns[_TOP + lane]
        owns[_FREE + lane] = cash if rules.long_short else max(cash, 0.0)


@kernel()
def _pay_out_nb(size, at, owns, slots):
    """A delisted asset's holding becomes cash, and an order that waits is none."""
    for lane in range(size):
        holding = slots[at + HOLDING + lane]
        owns[_FREE + lane] += holding
        owns[_VALUE + lane] -= holding
        owns[_SHORTS + lane] -= max(-holding, 0.0)
        _empty_nb(slots, at + lane)


@kernel()
def _settle_nb(size, assets, owns, slots, rules):
    """Marks all lanes that are open; returns how many were ruined."""
    ruins = np.int64(0)
    for lane in range(size):
        alive = owns[ALIVE + lane] != 0.0
        borrowed = rules.borrow * owns[_SHORTS + lane]
        cash = owns[_FREE + lane] - borrowed
        equity = cash + owns[_VALUE + lane]
        before = owns[EQUITY + lane]
        profit = equity - before
        count = owns[_COUNT + lane] + 1.0
        delta = profit - owns[_MEAN + lane]
        mean = owns[_MEAN + lane] + delta / count
        m2 = owns[_M2 + lane] + delta * (profit - mean)
        sharpe = sharpe_nb(count, mean, m2, owns[_START + lane])
        ruined = alive and not equity > rules.ruin * owns[_START + lane]
        cash = max(equity, 0.0) if ruined else cash
        equity = max(equity, 0.0) if ruined else equity
        owns[REWARD + lane] = sharpe - owns[_SHARPE + lane] if alive else 0.0
        owns[_CASH + lane] = cash if alive else owns[_CASH + lane]
        owns[EQUITY + lane] = equity if alive else before
        owns[_COSTS + lane] += rules.cost * owns[_TOP + lane] + borrowed if alive else 0.0
        owns[_COUNT + lane] = count if alive else owns[_COUNT + lane]
        owns[_MEAN + lane] = mean if alive else owns[_MEAN + lane]
        owns[_M2 + lane] = m2 if alive else owns[_M2 + lane]
        owns[_SHARPE + lane] = sharpe if alive else owns[_SHARPE + lane]
        owns[ALIVE + lane] = 1.0 if alive and not ruined else 0.0
        owns[RUINED + lane] = 1.0 if ruined else 0.0
        owns[_BEFORE + lane] = before
        ruins += np.int64(ruined)
    if ruins:
        for lane in range(size):
            if owns[RUINED + lane] != 0.0:
                for k in range(assets):
                    _empty_nb(slots, k * BLOCK + lane)
    if rules.log_return:
        for lane in range(size):
            was_open = owns[ALIVE + lane] != 0.0 or owns[RUINED + lane] != 0.0
            least = rules.ruin * owns[_START + lane]
            change = math.log(max(owns[EQUITY + lane], least) / owns[_BEFORE + lane])
            owns[REWARD + lane] = change if was_open else 0.0
    return ruins


@kernel()
def night_nb(size, night, owns, slots, rules):
    """All lanes from one close to the next with the orders in ORDER; returns how many were ruined.

    `night` [K, COLUMNS].
    """
    assets = night.shape[0]
    _enter_nb(size, night, rules.long_short, owns, slots)
    _share_nb(size, assets, owns, slots, rules)
    if rules.cost > 0.0:
        _after_costs_nb(size, assets, owns, slots, rules)
    _trade_nb(size, night, owns, slots, rules)
    for k in range(assets):
        if night[k, GONE] != 0.0:
            _pay_out_nb(size, k * BLOCK, owns, slots)
    return _settle_nb(size, assets, owns, slots, rules)
