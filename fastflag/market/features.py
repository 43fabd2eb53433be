"""Indicators, each known at the close of its own bar: no value depends on what follows it."""

import math

import numpy as np

from fastflag.market.machine_code import kernel

RETURN_BARS = (1, 5, 20)
VOLATILITY_BARS = 20
RSI_BARS = 14
DRAWDOWN_BARS = 60


def forward_adjusted(prices: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Prices [T] in shares of the first day: raw prices times all splits up to and including t.

    Unlike the usual back-adjusted price, it needs no split of the future and makes no jump on a
    split day.
    """
    return prices * np.cumprod(split)


def indicators(close: np.ndarray, high: np.ndarray) -> dict[str, np.ndarray]:
    """Indicators [T] of forward-adjusted closes and highs [T]; NaN where history is too short.

    return_1, return_5, return_20
        close[t] / close[t - k] - 1.
    volatility_20
        Standard deviation (ddof 1) of the last 20 daily log returns, not annualised.
    rsi_14
        Wilder's relative strength index, 0..100 (New Concepts in Technical Trading Systems, 1978):
        averages of gains and losses start as the mean of the first 14 changes, then move by 1/14.
        50 where nothing has moved.
    drawdown_60
        close[t] / (highest high of the last 60 bars) - 1, at most 0.

    Days whose close is NaN are not bars: windows step over them, they show the last bar's values.
    """
    is_bar = np.isfinite(close)
    closes = np.ascontiguousarray(close[is_bar], dtype=np.float64)
    # A bar without a usable high has at least traded at its close.
    highs = np.fmax(np.asarray(high, dtype=np.float64)[is_bar], closes)
    of_bars = {f"return_{bars}": _returns_nb(closes, bars) for bars in RETURN_BARS}
    of_bars["volatility_20"] = _volatility_nb(closes, VOLATILITY_BARS)
    of_bars["rsi_14"] = _rsi_nb(closes, RSI_BARS)
    of_bars["drawdown_60"] = _drawdown_nb(closes, highs, DRAWDOWN_BARS)
    last_bar = np.cumsum(is_bar)  # 1-based, so that 0 stands for "no bar yet"
    return {name: np.append(np.nan, values)[last_bar] for name, values in of_bars.items()}


# Plain loops in time order: a value's additions are the same ones whatever the array's length,
# which NumPy's blocked sums don't promise.


@kernel()
def _returns_nb(close, bars):
    result = np.full(close.size, np.nan)
    for t in range(bars, close.size):
        result[t] = close[t] / close[t - bars] - 1.0
    return result


@kernel()
def _volatility_nb(close, bars):
    result = np.full(close.size, np.nan)
    for t in range(bars, close.size):
        mean = math.log(close[t] / close[t - bars]) / bars
        squares = 0.0
        for i in range(t - bars + 1, t + 1):
            squares += (math.log(close[i] / close[i - 1]) - mean) ** 2
        result[t] = math.sqrt(squares / (bars - 1))
    return result


@kernel()
def _rsi_nb(close, bars):
    result = np.full(close.size, np.nan)
    weight = 1.0 / bars
    gain = 0.0
    loss = 0.0
    for t in range(1, close.size):
        change = close[t] - close[t - 1]
        keep = 1.0 if t <= bars else 1.0 - weight
        gain = gain * keep + weight * max(change, 0.0)
        loss = loss * keep + weight * max(-change, 0.0)
        if t >= bars:
            result[t] = 50.0 if gain + loss == 0.0 else 100.0 * gain / (gain + loss)
    return result


@kernel()
def _drawdown_nb(close, high, bars):
    result = np.full(close.size, np.nan)
    for t in range(bars - 1, close.size):
        result[t] = close[t] / high[t - bars + 1 : t + 1].max() - 1.0
    return result
