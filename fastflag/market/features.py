"""Indicators, each known at the close of its own bar: no value depends on what follows it."""

import numpy as np

from fastflag.market.compiled.indicators import drawdown_nb, returns_nb, rsi_nb, volatility_nb

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
    of_bars = {f"return_{bars}": returns_nb(closes, bars) for bars in RETURN_BARS}
    of_bars["volatility_20"] = volatility_nb(closes, VOLATILITY_BARS)
    of_bars["rsi_14"] = rsi_nb(closes, RSI_BARS)
    of_bars["drawdown_60"] = drawdown_nb(closes, highs, DRAWDOWN_BARS)
    last_bar = np.cumsum(is_bar)  # 1-based, so that 0 stands for "no bar yet"
    return {name: np.append(np.nan, values)[last_bar] for name, values in of_bars.items()}
