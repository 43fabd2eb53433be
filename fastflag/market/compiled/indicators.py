"""Indicators of one series of prices, a value a bar."""

import math

import numpy as np

from fastflag.market.compiled.kernel import kernel

# Plain loops in time order: a value's additions are the same ones whatever the array's length,
# which NumPy's blocked sums don't promise.


@kernel()
def returns_nb(close, bars):
    result = np.full(close.size, np.nan)
    for t in range(bars, close.size):
        result[t] = close[t] / close[t - bars] - 1.0
    return result


@kernel()
def volatility_nb(close, bars):
    result = np.full(close.size, np.nan)
    for t in range(bars, close.size):
        mean = math.log(close[t] / close[t - bars]) / bars
        squares = 0.0
        for i in range(t - bars + 1, t + 1):
            squares += (math.log(close[i] / close[i - 1]) - mean) ** 2
        result[t] = math.sqrt(squares / (bars - 1))
    return result


@kernel()
def rsi_nb(close, bars):
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
def drawdown_nb(close, high, bars):
    result = np.full(close.size, np.nan)
    for t in range(bars - 1, close.size):
        result[t] = close[t] / high[t - bars + 1 : t + 1].max() - 1.0
    return result
