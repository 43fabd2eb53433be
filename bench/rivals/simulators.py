"""The vector environment of `single` in plain NumPy: what one writes first. B environments.

It knows less than the task does: long or flat, fills at the next open, the Sharpe ratio's change as
reward, no missing bars, splits, dividends, lots or text. What it does, it does as the task does.
"""

from typing import Any

import numpy as np

from fastflag.gym.single import SingleView
from fastflag.market.schedule import drawn, starts_of


class NumPyEnvs:
    """Same-step autoreset; `reset` and `step` return what `MarketVectorEnv`'s do, without masks of
    infos."""

    def __init__(self, view: SingleView, count: int):
        self.view, self.rules = view, view.task.rules
        bars = view.task.bars
        self.open, self.close = bars.open, bars.close
        self.fee, self.slippage = self.rules.fee_bps / 1e4, self.rules.slippage_bps / 1e4
        self.starts, self.length = starts_of(view.spans, view.horizon)
        self.low, self.high = view_bounds(view)
        self.seed = np.arange(count)
        self.episode = np.full(count, -1)
        self.start, self.moment = np.zeros((2, count), np.int64)
        columns = ("cash", "shares", "entry", "opened", "equity", "count", "mean", "m2", "sharpe")
        self.account = {name: np.zeros(count) for name in columns}

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
        self._begin(np.ones(len(self.seed), bool))
        return self._observations(), self._infos()

    def step(self, action: np.ndarray) -> tuple:
        own, t = self.account, self.moment
        price, mark, before = self.open[t + 1], self.close[t + 1], own["sharpe"]
        buys, sells = (action == 2) & (own["shares"] == 0), (action == 0) & (own["shares"] > 0)
        paid = price * (1 + self.slippage)
        got = own["shares"] * price * (1 - self.slippage) * (1 - self.fee)
        bought = own["cash"] / (paid * (1 + self.fee))
        own["cash"] = np.where(buys, 0.0, own["cash"] + np.where(sells, got, 0.0))
        own["shares"] = np.where(buys, bought, np.where(sells, 0.0, own["shares"]))
        own["entry"] = np.where(buys, paid * (1 + self.fee), np.where(sells, 0.0, own["entry"]))
        own["opened"] = np.where(buys, t + 1, own["opened"])
        equity = own["cash"] + own["shares"] * mark
        profit = equity - own["equity"]
        own["equity"], own["count"] = equity, own["count"] + 1
        delta = profit - own["mean"]
        own["mean"] = own["mean"] + delta / own["count"]
        own["m2"] = own["m2"] + delta * (profit - own["mean"])
        deviation = np.sqrt(own["m2"] / np.maximum(own["count"] - 1, 1))
        known = (own["count"] > 1) & (deviation > 1e-12 * self.rules.cash)
        own["sharpe"] = np.where(known, own["mean"] / np.where(known, deviation, 1.0), 0.0)
        terminated = equity <= self.rules.ruin * self.rules.cash
        self.moment = t + 1
        truncated = (self.moment - self.start == self.length) & ~terminated
        ended, final, reward = terminated | truncated, {}, own["sharpe"] - before
        if ended.any():
            last = np.full(len(t), None, object)
            observations = self._observations()
            for b in np.flatnonzero(ended):
                last[b] = observations[b]
            final = {"final_obs": last}
            self._begin(ended)
        return self._observations(), reward, terminated, truncated, self._infos() | final

    def _begin(self, mask: np.ndarray) -> None:
        self.episode[mask] += 1
        for episode in np.unique(self.episode[mask]).tolist():
            those = mask & (self.episode == episode)
            self.start[those] = drawn(self.starts, 0, self.seed[those], episode)
        self.moment = np.where(mask, self.start, self.moment)
        for name, column in self.account.items():
            fresh = self.rules.cash if name in ("cash", "equity") else 0.0
            self.account[name] = np.where(mask, fresh, column)

    def _observations(self) -> np.ndarray:
        own, t, market = self.account, self.moment, self.view.market
        long = own["shares"] > 0
        profit = np.where(long, self.close[t] / np.where(long, own["entry"], 1.0) - 1, 0.0)
        held = np.where(long, t - own["opened"], 0.0) / 40
        growth = np.log(np.maximum(own["equity"], 1e-300) / self.rules.cash)
        left = 1.0 - (t - self.start) / self.length
        none = np.zeros(len(t))
        account = np.stack([long, profit, held, none, none, growth, own["sharpe"], left], axis=1)
        numbers = np.empty((len(t), len(self.view.columns)), np.float32)
        numbers[:, : market.shape[1]] = market[t]
        numbers[:, market.shape[1] :] = np.clip(account, self.low, self.high)
        return numbers

    def _infos(self) -> dict[str, Any]:
        long = self.account["shares"] > 0
        mask = np.stack([long, np.ones(len(long), bool), ~long], axis=1).astype(np.int8)
        equity, moment = self.account["equity"].copy(), self.moment.copy()
        return {"action_mask": mask, "equity": equity, "moment": moment}


def view_bounds(view: SingleView) -> tuple[np.ndarray, np.ndarray]:
    """Lows and highs of the account's columns."""
    own = view.columns[view.market.shape[1] :]
    return np.array([each.low for each in own]), np.array([each.high for each in own])
