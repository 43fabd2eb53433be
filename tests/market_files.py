"""A made-up stock as vendors' files have it: raw prices, adjusted ones, and what was paid."""

import numpy as np
import pandas as pd

SPLIT_DAY, SPLIT = 80, 4.0
DIVIDENDS = {30: 1.6, 130: 0.5}
PRICES = ["open", "high", "low", "close"]


def raw_bars(days: int = 160, seed: int = 0) -> pd.DataFrame:
    """date, open, high, low, close, volume, split, dividend as they were on the day."""
    random = np.random.default_rng(seed)
    night, day = random.normal(0, 0.006, days), random.normal(0, 0.01, days)
    split, paid = np.ones(days), np.zeros(days)
    split[SPLIT_DAY : SPLIT_DAY + 1] = SPLIT
    for at, cash in DIVIDENDS.items():
        paid[at : at + 1] = cash
    opened, close, last = np.empty(days), np.empty(days), 400.0
    for t in range(days):
        opened[t] = (last / split[t] - paid[t]) * np.exp(night[t])
        close[t] = last = opened[t] * np.exp(day[t])
    spread = np.exp(random.uniform(0.001, 0.01, (2, days)))
    frame = pd.DataFrame({"date": np.busday_offset("2019-01-02", np.arange(days), roll="forward")})
    frame["open"], frame["close"] = opened.round(4), close.round(4)
    frame["high"] = (np.maximum(opened, close) * spread[0]).round(4)
    frame["low"] = (np.minimum(opened, close) / spread[1]).round(4)
    frame["volume"] = random.integers(1e6, 5e6, days)
    frame["split"], frame["dividend"] = split, paid
    return frame[["date", *PRICES, "volume", "split", "dividend"]]


def factors(raw: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """What raw prices are multiplied by to be adjusted for later splits, and for dividends, as
    Yahoo does it: a dividend takes 1 - dividend / last close, off all earlier prices."""
    last = raw["close"].shift() / raw["split"]
    kept = (1 - raw["dividend"] / last).fillna(1.0).to_numpy()
    for_split = np.append(np.cumprod(1 / raw["split"].to_numpy()[::-1])[::-1][1:], 1.0)
    for_dividend = np.append(np.cumprod(kept[::-1])[::-1][1:], 1.0)
    return for_split, for_dividend


def scaled(raw: pd.DataFrame, factor: np.ndarray) -> pd.DataFrame:
    return raw.assign(**{name: raw[name] * factor for name in PRICES})


def adjusted_close(raw: pd.DataFrame) -> pd.Series:
    for_split, for_dividend = factors(raw)
    return (raw["close"] * for_split * for_dividend).round(6)
