"""Splits and dividends that adjusted closes tell, and how finely they are rounded."""

from fractions import Fraction

import numpy as np


def recover_splits_and_dividends(
    close: np.ndarray, adjusted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Splits [T] and dividends [T] that turn raw closes [T] into adjusted closes [T] (NaN: no bar).

    With gain = (adjusted / close)[t] / (adjusted / close)[last event], a day's event is

        gain = split * (1 + dividend / close[t])

    which is how Quandl's WIKI prices were adjusted: a dividend buys shares at the close of its day.
    Reinvested so, the stream gives the adjusted total return whoever made the prices; with another
    maker's formula (1 - dividend / close[t-1]) the dividend differs from the declared one by the
    day's price move. Only rows up to t are used for row t.

    One number can't tell a split from a dividend. A gain of 1 to 1.2 is a dividend. Any other is
    the nearest p:q with q <= 5 and a dividend of at most 2%, or else a split of just that gain
    (spin-offs).

    Gains smaller than the rounding of `adjusted` are no events; its decimals are counted as they
    are seen. Gains are taken from the last event, so rounding never adds up. Measured on the 95
    events of the sample data: splits exact, dividends within 1e-11 dollars of whole cents, adjusted
    total returns within 1e-13; with `adjusted` rounded to cents the same 95 events, dividends
    within a cent.
    """
    split, dividend = np.ones(len(close)), np.zeros(len(close))
    event_factor = event_adjusted = None
    decimals = 2
    for t in np.flatnonzero(np.isfinite(close) & np.isfinite(adjusted)):
        factor = adjusted[t] / close[t]
        decimals = max(decimals, decimals_of(adjusted[t]))
        if event_factor is None or event_adjusted is None:
            event_factor, event_adjusted = factor, adjusted[t]
            continue
        rounding = 0.5 * 10.0**-decimals * (1 / adjusted[t] + 1 / event_adjusted)
        # Files made from float32 prices carry some 1e-7 of noise in every digit they print.
        noise = max(1.01 * rounding, 1e-6)
        gain = factor / event_factor
        if abs(gain - 1) > noise:
            split[t], dividend_yield = _split_and_yield(gain, noise)
            dividend[t] = close[t] * dividend_yield
            event_factor, event_adjusted = factor, adjusted[t]
    return split, dividend


def _split_and_yield(gain: float, noise: float) -> tuple[float, float]:
    if 1 < gain < 1.2:
        return 1.0, gain - 1
    if not 1e-3 <= gain <= 1e3:
        return gain, 0.0
    if gain > 1:
        ratio = float(Fraction(gain).limit_denominator(5))
    else:
        ratio = float(1 / Fraction(1 / gain).limit_denominator(5))
    remainder = gain / ratio - 1
    if not -noise <= remainder <= 0.02:
        return gain, 0.0
    return ratio, remainder if remainder > noise else 0.0


def decimals_of(value: float) -> int:
    """Digits after the point, of the shortest text that is this number."""
    return len(np.format_float_positional(value, trim="-").partition(".")[2])
