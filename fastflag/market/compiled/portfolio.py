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
    OUT,
    PAID,
    SHORT,
    TO_FILL,
)

# 64 lanes of 16 assets fit a core's L1 cache. The stride is no power of two: these collide in it.
LANES = 64
STRIDE = LANES + 8
_OWN = range(0, 18 * STRIDE, STRIDE)
_START, _CASH, EQUITY, _COSTS, _COUNT, _MEAN, _M2, _SHARPE, ALIVE = _OWN[:9]
_FREE, _LONGS, _SHORTS, _UNITS, _WEALTH, _TOP, _SLOPE, REWARD, RUINED = _OWN[9:]
_SLOT = range(0, 6 * STRIDE, STRIDE)
HOLDING, RATIO, PENDING, ORDER, _HELD, _SHARE = _SLOT
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
def order_nb(size, at, is_open, actions, owns, slots):
    """What is done of each lane's action on one asset, and the units it orders: NaN keeps."""
    for lane in range(size):
        action = actions[lane]
        none_to_leave = action == OUT and slots[at + HOLDING + lane] == 0.0
        open_for = is_open and owns[ALIVE + lane] != 0.0
        action = action if open_for and not none_to_leave else np.int64(KEEP)
        actions[lane] = action
        units = 0.0 if action == OUT else np.float64(action - KEEP)
        units = -1.0 if action == SHORT else units
        slots[at + ORDER + lane] = np.nan if action == KEEP else units


@kernel()
def _enter_nb(size, at, night, owns, slots):
    """What of one asset is traded in this night, at what it is worth before; the rest is kept."""
    filled, to_fill, paid = night[FILLED] != 0.0, night[TO_FILL], night[PAID]
    for lane in range(size):
        holding, pending = slots[at + HOLDING + lane], slots[at + PENDING + lane]
        order = slots[at + ORDER + lane] if np.isnan(pending) else pending
        traded = filled and not np.isnan(order)
        slots[at + PENDING + lane] = np.nan if filled else order
        held, worth = holding * to_fill, holding * (to_fill + paid)
        slots[at + ORDER + lane] = order if traded else np.nan
        slots[at + _HELD + lane] = held if traded else 0.0
        slots[at + _SHARE + lane] = order if traded else 0.0
        owns[_FREE + lane] += worth if traded else 0.0
        owns[_LONGS + lane] += 0.0 if traded else max(worth, 0.0)
        owns[_SHORTS + lane] += 0.0 if traded else max(-worth, 0.0)
        owns[_UNITS + lane] += abs(order) if traded else 0.0


@kernel()
def _share_nb(size, assets, owns, slots, rules):
    """Units -> shares of what is free for those that are traded, none above the cap; and this as it
    is before costs.

    The cap is of equity before costs: a share of what is free is a smaller part of all after costs
    than before, so the cap holds then too.
    """
    for lane in range(size):
        equity = owns[_FREE + lane] + owns[_LONGS + lane] - owns[_SHORTS + lane]
        # What a short brought in is bound while it is kept, and as much again.
        free = max(owns[_FREE + lane] - 2.0 * owns[_SHORTS + lane], 0.0)
        owns[_WEALTH + lane] = free
        owns[_TOP + lane] = rules.max_weight * equity / free if free > 0.0 else 0.0
        units = owns[_UNITS + lane]
        owns[_SLOPE + lane] = 1.0 / units if units > 0.0 else 0.0
    for k in range(assets):
        at = k * BLOCK
        for lane in range(size):
            share = slots[at + _SHARE + lane] * owns[_SLOPE + lane]
            most = owns[_TOP + lane]
            slots[at + _SHARE + lane] = max(min(share, most), -most)


@kernel()
def _after_costs_nb(size, assets, owns, slots, rules):
    """Solves x = free - cost x sum |share x - held|: what is left of the free part after costs.

    The difference of both sides rises with x and is convex and linear in pieces. Newton's method
    from above therefore falls from piece to piece to the root, which it hits exactly: as many
    rounds as there are pieces at most, mostly two. A lane that is there stays there, to the bit.
    """
    cost, falling = rules.cost, True
    for lane in range(size):
        # Without the bound at 0 the root is the same but where all must be left.
        owns[_UNITS + lane] = owns[_FREE + lane] - 2.0 * owns[_SHORTS + lane]
    while falling:
        for lane in range(size):
            owns[_TOP + lane], owns[_SLOPE + lane] = owns[_UNITS + lane], 1.0
        for k in range(assets):
            at = k * BLOCK
            for lane in range(size):
                held, share = slots[at + _HELD + lane], slots[at + _SHARE + lane]
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
def _trade_nb(size, at, night, owns, slots, rules):
    """One asset to its target, or kept; then to the night's close. `ratio` is what a position is
    worth over what was paid for it (of a short over what it brought in), dividends included."""
    cost, growth, after = rules.cost, night[GROWTH], night[AFTER]
    total = night[TO_FILL] + night[PAID]
    for lane in range(size):
        held, target = slots[at + _HELD + lane], slots[at + _SHARE + lane] * owns[_WEALTH + lane]
        change = target - held
        owns[_FREE + lane] -= target
        owns[_TOP + lane] += abs(change)

        holding, ratio = slots[at + HOLDING + lane], slots[at + RATIO + lane]
        side = 1.0 if target > 0.0 else -1.0
        stays = held if held * side > 0.0 else 0.0
        at_fill = ratio * total if stays != 0.0 else 1.0
        added = target - stays
        bought = target * at_fill / (stays + added * (1.0 + side * cost) * at_fill)
        traded_ratio = bought if added * side > 0.0 else at_fill

        traded = not np.isnan(slots[at + ORDER + lane])
        holding = target * after if traded else holding * growth
        ratio = traded_ratio * after if traded else ratio * growth
        slots[at + HOLDING + lane] = holding
        slots[at + RATIO + lane] = ratio if holding != 0.0 else 1.0
        owns[_LONGS + lane] += max(holding, 0.0)
        owns[_SHORTS + lane] += max(-holding, 0.0)


@kernel()
def _pay_out_nb(size, at, owns, slots):
    """A delisted asset's holding becomes cash, and an order that waits is none."""
    for lane in range(size):
        holding = slots[at + HOLDING + lane]
        owns[_FREE + lane] += holding
        owns[_LONGS + lane] -= max(holding, 0.0)
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
        equity = cash + (owns[_LONGS + lane] - owns[_SHORTS + lane])
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
        owns[_WEALTH + lane] = before
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
            change = math.log(max(owns[EQUITY + lane], least) / owns[_WEALTH + lane])
            owns[REWARD + lane] = change if was_open else 0.0
    return ruins


@kernel()
def night_nb(size, night, owns, slots, rules):
    """All lanes from one close to the next with the orders in ORDER; returns how many were ruined.

    `night` [K, COLUMNS].
    """
    assets = night.shape[0]
    for lane in range(size):
        owns[_FREE + lane] = owns[_CASH + lane]
        owns[_LONGS + lane] = owns[_SHORTS + lane] = owns[_UNITS + lane] = 0.0
    for k in range(assets):
        _enter_nb(size, k * BLOCK, night[k], owns, slots)
    _share_nb(size, assets, owns, slots, rules)
    if rules.cost > 0.0:
        _after_costs_nb(size, assets, owns, slots, rules)
    for lane in range(size):
        owns[_LONGS + lane] = owns[_SHORTS + lane] = owns[_TOP + lane] = 0.0
    for k in range(assets):
        _trade_nb(size, k * BLOCK, night[k], owns, slots, rules)
    for lane in range(size):
        cash = owns[_FREE + lane] - rules.cost * owns[_TOP + lane]
        owns[_FREE + lane] = cash if rules.long_short else max(cash, 0.0)
    for k in range(assets):
        if night[k, GONE] != 0.0:
            _pay_out_nb(size, k * BLOCK, owns, slots)
    return _settle_nb(size, assets, owns, slots, rules)
