"""A slow, obvious twin of the task `portfolio`, from the rules: shares, prices, a bisection."""

import math

import numpy as np
from oracles import days_of, random_bars, sharpe

from fastflag.market.bars import Bars, Market

UNITS = {"Out": 0.0, "Neutral": 1.0, "Over": 2.0, "Short": -1.0}


def market_of(columns):
    """A market of the K assets' (open, close, split, dividend, tradable)."""
    open_, close, split, dividend, _ = (
        np.stack(each, axis=1) for each in zip(*columns, strict=True)
    )
    dates = np.busday_offset(np.datetime64("2001-01-01"), np.arange(len(open_)))
    return Market(
        dates.astype("datetime64[D]"),
        tuple(f"S{k}" for k in range(len(columns))),
        open_,
        np.maximum(open_, close),
        np.minimum(open_, close),
        close,
        np.full(open_.shape, np.nan),
        split,
        dividend,
    )


def random_market(seed, assets, days=30, **nuisances):
    return market_of([random_bars(1000 * seed + k, days, **nuisances) for k in range(assets)])


class Account:
    """One account that holds all assets of a market."""

    def __init__(self, market, config, bars_a_year=252):
        self.assets = [days_of(Bars.from_market(market, name)) for name in market.symbols]
        self.config = config
        self.slots = range(len(self.assets))
        self.cost = (config.fee_bps + config.slippage_bps) / 10_000
        self.borrow = config.borrow_bps / 10_000 / bars_a_year
        self.cash = self.equity = config.cash
        self.shares = [0.0] * len(self.slots)
        self.basis = [0.0] * len(self.slots)  # paid for what is held, or brought in by it
        self.waiting = [None] * len(self.slots)
        self.profits = []
        self.sharpe = 0.0
        self.costs = 0.0
        self.gains = 0.0  # of prices and dividends, without costs
        self.alive = True
        self.turnover = 0.0

    def bar(self, k, day):
        return self.assets[k][day]["close"] is not None

    def mark(self, k, day):
        while day >= 0 and not self.bar(k, day):
            split = self.assets[k][day]["split"]
            return self.mark(k, day - 1) / split
        return self.assets[k][day]["close"] if day >= 0 else math.nan

    def worth(self, k, day):
        return self.shares[k] * self.mark(k, day) if self.shares[k] else 0.0

    def due(self, k, day):
        """What a share of `day` is paid: dividends of days without a bar come with the next one."""
        days = self.assets[k]
        if not self.bar(k, day):
            return 0.0
        total, shares = days[day]["dividend"], 1.0
        while day > 0 and not self.bar(k, day - 1):
            shares *= days[day]["split"]
            day -= 1
            total += days[day]["dividend"] / shares
        return total

    def without(self, k, day):
        """Days without a bar up to `day`; 0 where there was none before."""
        count = 0
        while day >= 0 and not self.bar(k, day):
            count, day = count + 1, day - 1
        return count if day >= 0 else 0

    def allowed(self, k, day):
        if not self.bar(k, day) or day % self.config.rebalance_every:
            return ["Keep"]
        names = ["Keep", "Neutral", "Over"]
        if self.shares[k]:
            names = ["Out", *names]
        if self.config.positions == "long_short":
            names.append("Short")
        return names

    def step(self, day, actions):
        """-> (reward, terminated, what was done)."""
        if not self.alive:
            return 0.0, False, ["Keep"] * len(self.slots)
        actions = [a if a in self.allowed(k, day) else "Keep" for k, a in enumerate(actions)]
        for k, action in enumerate(actions):
            if self.waiting[k] is None:
                self.waiting[k] = UNITS.get(action)
        before, sharpe_before = self.equity, self.sharpe
        worth_before = [self.worth(k, day) for k in self.slots]
        traded = []
        if self.config.fill == "same_close":
            traded = self.fill(day, "close")
            worth_before = [self.worth(k, day) for k in self.slots]

        after = day + 1
        for k in self.slots:
            self.shares[k] *= self.assets[k][after]["split"]
        flow = 0.0  # of cash into assets
        if self.config.fill != "same_close":
            name = "open" if self.config.fill == "next_open" else "close"
            filled = [k for k in self.slots if self.bar(k, after) and self.waiting[k] is not None]
            for k in filled:
                paid = self.shares[k] * self.due(k, after)
                value = self.shares[k] * self.assets[k][after][name]
                if value:
                    self.basis[k] *= value / (value + paid)
                self.cash += paid
                self.gains += paid
            held = [self.shares[k] for k in self.slots]
            traded = self.fill(after, name)
            for k in traded:
                flow += (self.shares[k] - held[k]) * self.assets[k][after][name]
        for k in self.slots:
            reinvests = k not in traded or self.config.fill == "same_close"
            if reinvests and self.shares[k] and self.bar(k, after):
                self.shares[k] *= 1 + self.due(k, after) / self.assets[k][after]["close"]

        owed = sum(max(-self.worth(k, after), 0.0) for k in self.slots)
        for k in self.slots:
            if self.without(k, after) == self.config.delisted_after:
                lost = self.config.delisting_loss * self.worth(k, after)
                owed -= max(-self.worth(k, after), 0.0)
                self.gains -= lost
                paid = self.worth(k, after) - lost
                self.cash += paid
                flow -= self.worth(k, after)
                self.shares[k], self.basis[k], self.waiting[k] = 0.0, 0.0, None
        worth = [self.worth(k, after) for k in self.slots]
        self.gains += sum(worth) - sum(worth_before) - flow
        self.cash -= self.borrow * owed
        self.costs += self.borrow * owed
        self.equity = self.cash + sum(worth)

        self.profits.append(self.equity - before)
        self.sharpe = sharpe(self.profits, self.config.cash)
        floor = self.config.ruin * self.config.cash
        reward = self.sharpe - sharpe_before
        if self.config.reward == "log_return":
            reward = math.log(max(self.equity, floor) / before)
        if self.equity <= floor:
            self.alive = False
            self.equity = self.cash = max(self.equity, 0.0)
            self.shares = [0.0] * len(self.slots)
            self.waiting = [None] * len(self.slots)
        return reward, not self.alive, actions

    def fill(self, day, name):
        """Fills what waits at the day's prices. -> the assets that were traded"""
        traded = [k for k in self.slots if self.waiting[k] is not None and self.bar(k, day)]
        if not traded:
            return []
        price = {k: self.assets[k][day][name] for k in traded}
        held = {k: self.shares[k] * price[k] for k in traded}
        kept = []
        for k in self.slots:
            if k not in traded:
                if self.bar(k, day) and self.shares[k]:
                    due = 0.0 if self.config.fill == "same_close" else self.due(k, day)
                    kept.append(self.shares[k] * (self.assets[k][day][name] + due))
                else:
                    kept.append(self.worth(k, day))
        equity = self.cash + sum(held.values()) + sum(kept)
        free = equity - sum(map(abs, kept))
        if abs(free) <= 1e-12 * equity:  # rounding
            free = 0.0
        units = sum(abs(self.waiting[k]) for k in traded)
        share = {}
        for k in traded:
            share[k] = self.waiting[k] / units if units else 0.0
            most = self.config.max_weight * equity / free if free > 0 else 0.0
            share[k] = math.copysign(min(abs(share[k]), most), share[k])

        def spare(x):
            return free - x - self.cost * sum(abs(share[k] * x - held[k]) for k in traded)

        low, high = 0.0, max(free, 0.0)
        if spare(0.0) < 0:
            high = 0.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if spare(middle) > 0 else (low, middle)
        for k in traded:
            self.trade(k, share[k] * high, held[k], price[k])
            self.waiting[k] = None
        return traded

    def trade(self, k, target, held, price):
        cost = self.cost * abs(target - held)
        self.cash -= target - held + cost
        self.costs += cost
        self.turnover += abs(target - held)
        if target == 0 or target * held < 0:
            self.basis[k] = 0.0
            held_of_side = 0.0
        else:
            held_of_side = held
        added = abs(target) - abs(held_of_side)
        if added > 0:
            self.basis[k] += added * (1 + math.copysign(self.cost, target))
        elif target:
            self.basis[k] *= target / held
        self.shares[k] = target / price

    def ratio(self, k, day):
        return abs(self.worth(k, day)) / self.basis[k] if self.shares[k] else 1.0
