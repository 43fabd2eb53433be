"""Slow, obvious twins, written from the rules and not from the code they check."""

import math

import numpy as np


def days_of(bars):
    """The bars as one dict a day; open and close are None where there is no bar."""
    return [
        {
            "open": float(bars.open[t]) if bars.tradable[t] else None,
            "close": float(bars.close[t]) if bars.tradable[t] else None,
            "split": float(bars.split[t]),
            "dividend": float(bars.dividend[t]),
        }
        for t in range(len(bars))
    ]


def sharpe(profits, cash):
    """Mean over deviation (ddof 1); 0 for fewer than two, or if all are equal but for rounding."""
    if len(profits) < 2:
        return 0.0
    mean = math.fsum(profits) / len(profits)
    variance = math.fsum((p - mean) ** 2 for p in profits) / (len(profits) - 1)
    if math.sqrt(variance) <= 1e-12 * cash:
        return 0.0
    return mean / math.sqrt(variance)


class Account:
    """One account that trades one symbol."""

    def __init__(self, days, config):
        self.days = days
        self.config = config
        self.fee = config.fee_bps / 10_000
        self.slippage = config.slippage_bps / 10_000
        self.cash = config.cash
        self.shares = 0.0
        self.entry = 0.0
        self.opened = -1
        self.waiting = None
        self.equity = config.cash
        self.fees = 0.0
        self.profits = []
        self.sharpe = 0.0
        self.alive = True
        self.gains = 0.0  # of prices without costs
        self.dividends = 0.0
        self.fills = 0
        self.rewards = []
        self.equities = []
        self.actions = []

    def mark(self, day):
        """The last price, as of `day`."""
        if self.days[day]["close"] is not None:
            return self.days[day]["close"]
        if day == 0:
            return math.nan
        return self.mark(day - 1) / self.days[day]["split"]

    def due(self, day):
        """The dividend of a share held on `day`. Cash is paid at once; what is reinvested needs a
        bar, and comes with the next one from days without, a split making less of it a share."""
        if self.config.dividends == "cash":
            return self.days[day]["dividend"]
        if self.days[day]["close"] is None:
            return 0.0
        total, of_one = self.days[day]["dividend"], 1.0
        while day > 0 and self.days[day - 1]["close"] is None:
            of_one *= self.days[day]["split"]
            day -= 1
            total += self.days[day]["dividend"] / of_one
        return total

    def allowed(self, day):
        if self.days[day]["close"] is None:
            return ["Hold"]
        if self.config.positions == "long_short":
            return ["Sell", "Hold", "Buy"]
        return ["Hold", "Buy"] if self.shares == 0 else ["Sell", "Hold"]

    def step(self, day, action):
        """-> (reward, terminated)."""
        if not self.alive:
            return 0.0, False
        if action not in self.allowed(day):
            action = "Hold"
        before, sharpe_before = self.equity, self.sharpe
        today, tomorrow = self.days[day], self.days[day + 1]

        order = self.waiting
        if order is None and today["close"] is not None:
            order = action
        self.waiting = None
        if order is not None and self.config.fill == "same_close":
            self.fill(order, today["close"], day)
        owed = self.overnight(day, tomorrow)
        position = self.opened
        if order is not None and self.config.fill != "same_close":
            if tomorrow["close"] is None:
                self.waiting = order
            else:
                price = tomorrow["open" if self.config.fill == "next_open" else "close"]
                self.revalue(price, day + 1)
                self.fill(order, price, day + 1)
        self.revalue(self.mark(day + 1), day + 1)
        is_kept = self.shares != 0 and self.opened == position
        if self.config.dividends == "reinvest" and owed != 0 and is_kept:
            self.reinvest(owed, tomorrow["close"])

        self.equity = self.cash
        if self.shares != 0:
            self.equity += self.shares * self.mark(day + 1)
        self.profits.append(self.equity - before)
        self.sharpe = sharpe(self.profits, self.config.cash)
        floor = self.config.ruin * self.config.cash
        if self.config.reward == "sharpe":
            reward = self.sharpe - sharpe_before
        else:
            reward = math.log(max(self.equity, floor) / before)
        if self.equity <= floor:
            self.equity = max(self.equity, 0.0)
            self.cash = self.equity
            self.shares, self.entry, self.opened, self.waiting = 0.0, 0.0, -1, None
            self.alive = False
        self.rewards.append(reward)
        self.equities.append(self.equity)
        self.actions.append(action)
        return reward, not self.alive

    def revalue(self, price, day):
        """Counts the gain of the shares held since they were last valued."""
        if self.shares != 0:
            self.gains += self.shares * (price - self.valued)
        self.valued = price

    def overnight(self, day, tomorrow):
        """-> the dividend that was paid; negative: by the account."""
        if self.shares == 0:
            return 0.0
        self.shares *= tomorrow["split"]
        self.entry /= tomorrow["split"]
        price = self.mark(day) / tomorrow["split"]
        self.valued = price
        lot = self.config.lot
        if lot > 0 and tomorrow["split"] != 1:
            whole = int(self.shares / lot) * lot
            self.cash += (self.shares - whole) * price
            self.shares = whole
            if whole == 0:
                self.shares, self.entry, self.opened = 0.0, 0.0, -1
        owed = self.shares * self.due(day + 1)
        self.cash += owed
        self.dividends += owed
        return owed

    def reinvest(self, owed, price):
        """Buys shares for `owed`; one that is short and had to pay sells as many."""
        bought = owed / price
        self.entry *= self.shares / (self.shares + bought)
        if self.config.lot > 0:
            bought = int(bought / self.config.lot) * self.config.lot
        self.shares += bought
        self.cash -= bought * price
        if self.config.lot == 0 and self.shares > 0:
            assert abs(self.cash) < 1e-12 * self.shares * price
            self.cash = 0.0

    def fill(self, order, price, day):
        if self.config.positions == "long_flat":
            if order == "Buy" and self.shares == 0:
                self.buy_all(price, day)
            if order == "Sell" and self.shares > 0:
                self.leave(price)
        elif order == "Hold":
            self.leave(price)
        elif order == "Buy" and self.shares <= 0:
            self.leave(price)
            self.buy_all(price, day)
        elif order == "Sell" and self.shares >= 0:
            self.leave(price)
            self.short_all(price, day)

    def lots(self, shares):
        if self.config.lot == 0:
            return shares
        return math.floor(shares / self.config.lot) * self.config.lot

    def pay(self, shares, paid, price):
        self.fees += self.fee * shares * paid + shares * abs(paid - price)
        self.fills += 1

    def buy_all(self, price, day):
        paid = price * (1 + self.slippage)
        shares = self.lots(self.cash / (paid * (1 + self.fee))) if self.cash > 0 else 0
        if shares <= 0:
            return
        self.pay(shares, paid, price)
        self.cash -= shares * paid + self.fee * shares * paid
        if self.config.lot == 0 or self.cash < 0:
            assert abs(self.cash) < 1e-12 * shares * paid
            self.cash = 0.0
        self.shares, self.entry, self.opened = shares, paid * (1 + self.fee), day
        self.valued = price

    def short_all(self, price, day):
        paid = price * (1 - self.slippage)
        shares = self.lots(self.cash / (1 + self.fee) / paid) if self.cash > 0 else 0
        if shares <= 0:
            return
        self.pay(shares, paid, price)
        self.cash += shares * paid - self.fee * shares * paid
        self.shares, self.entry, self.opened = -shares, paid * (1 - self.fee), day
        self.valued = price

    def leave(self, price):
        if self.shares > 0:
            paid = price * (1 - self.slippage)
            self.pay(self.shares, paid, price)
            self.cash += self.shares * paid - self.fee * self.shares * paid
        if self.shares < 0:
            paid = price * (1 + self.slippage)
            self.pay(-self.shares, paid, price)
            self.cash -= -self.shares * paid + self.fee * -self.shares * paid
        self.shares, self.entry, self.opened = 0.0, 0.0, -1

    def shown(self, day):
        """(side, profit in half percents, largest bucket of days held) of the stepped prompt."""
        if self.shares == 0:
            return 0, 0, 0
        side = 1 if self.shares > 0 else -1
        profit = side * (self.mark(day) / self.entry - 1)
        steps = math.floor(abs(profit) / 0.005 + 0.5)
        steps = min(steps, 40) * (1 if profit > 0 else -1)
        held = max(b for b in (0, 1, 2, 3, 5, 10, 20, 40) if b <= day - self.opened)
        return side, steps, held


def splitmix(seed, env, step):
    """A number in [0, 1) from Python's integers."""
    limit, golden = 2**64, 0x9E3779B97F4A7C15

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % limit
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % limit
        return z ^ (z >> 31)

    return (mix((mix((seed + env + golden) % limit) + golden * step) % limit) >> 11) / 2**53


def random_bars(seed, days=30, missing=0.15, split=0.1, dividend=0.1, volatility=0.05):
    """Columns (open, close, split, dividend, tradable) of a random market with every nuisance."""
    rng = np.random.default_rng(seed)
    splits = np.where(rng.random(days) < split, rng.choice([2.0, 3.0, 1.5, 0.1], days), 1.0)
    dividends = np.where(rng.random(days) < dividend, rng.uniform(0.01, 1.0, days), 0.0)
    close = 80 * np.exp(np.cumsum(volatility * rng.standard_normal(days))) / np.cumprod(splits)
    open_ = close * np.exp(0.5 * volatility * rng.standard_normal(days))
    tradable = rng.random(days) >= missing
    gone = np.where(tradable, 1.0, np.nan)
    return open_ * gone, close * gone, splits, dividends, tradable
