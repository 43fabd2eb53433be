"""Performance of a series of prices or equity, by the named convention of who published it."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fastflag.config import Calendar, Convention
from fastflag.files import InputError
from fastflag.market.calendar import ANNUAL_DAYS


@dataclass(frozen=True)
class _Convention:
    simple: bool
    """Simple returns, compounded; otherwise log returns, added up."""
    annual: dict[Calendar, int]
    """Days a year in the annualised volatility."""
    years_of: Literal["returns", "prices"]
    """What is counted to get the years: count / 252. Unused with simple returns."""
    drops_last: tuple[Calendar, ...] = ()
    """Calendars on which the last price is left out."""


# `standard` is empyrical's. The others were found by reproducing published tables from the released
# data: FLAG-Trader's own rows, InvestorBench's code, FLAG-Trader's buy-and-hold rows.
_CONVENTIONS: dict[Convention, _Convention] = {
    "standard": _Convention(True, ANNUAL_DAYS, "returns"),
    "flag": _Convention(False, {"stock": 252, "crypto": 252}, "returns"),
    "investorbench": _Convention(False, {"stock": 365, "crypto": 365}, "prices"),
    "paper-bh": _Convention(False, {"stock": 252, "crypto": 365}, "prices", ("stock",)),
}
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

# Below this the deviation of daily returns is the rounding of float64 prices.
_ZERO_DEVIATION = 1e-12

_METRICS = ("cr", "sr", "av", "mdd", "sortino", "calmar", "win_rate_daily")


def metrics(
    values: np.ndarray, convention: Convention, calendar: Calendar
) -> dict[str, float | int]:
    """Metrics of `values` ([T] daily prices or equity), NaN where one is undefined.

    All are NaN for fewer than two values, for NaN among them, and for log returns of a total loss.

    The risk-free rate is 0 and deviations are sample deviations (ddof 1). With r the returns:

    cr        cumulative return, percent: compounded (`standard`), else the sum of log returns
    sr        Sharpe ratio: mean(r) sqrt(annual) / std(r) (`standard`), else cr / years / av;
              NaN where the deviation is 0
    av        annualised volatility, percent: std(r) sqrt(annual)
    mdd       maximum drawdown, percent, >= 0, of the product of (1 + r), whose first peak is 1 (the
              other conventions compound LOG returns here: the papers' formula, not a better one)
    sortino   as sr, but over sqrt(mean(min(r, 0)^2)), the mean over all days
    calmar    yearly return / mdd: compounded growth over len(r) / annual years (`standard`), else
              cr / years
    win_rate_daily   share of gains among the days that gained or lost
    days      number of returns

    Annual days and years by convention: `standard` 252 days (crypto 365); `flag` 252 and
    returns / 252 years; `investorbench` 365 and prices / 252; `paper-bh` stocks 252 without the
    last price, crypto 365, both prices / 252. Raises InputError for an unknown convention.
    """
    if convention not in _CONVENTIONS:
        raise InputError(f"unknown convention {convention!r}, one of {', '.join(CONVENTIONS)}")
    rule = _CONVENTIONS[convention]
    values = np.asarray(values, dtype=np.float64)
    if calendar in rule.drops_last:
        values = values[:-1]
    returns = _returns(values, rule.simple)
    if not len(returns) or not np.isfinite(returns).all():
        return {**dict.fromkeys(_METRICS, math.nan), "days": len(returns)}

    annual = rule.annual[calendar]
    growth = np.cumprod(np.append(1.0, 1.0 + returns))
    drawdown = float(np.max(1.0 - growth / np.maximum.accumulate(growth)))
    deviation = float(np.std(returns, ddof=1)) if len(returns) > 1 else math.nan
    downside = math.sqrt(np.mean(np.minimum(returns, 0.0) ** 2))
    if rule.simple:
        total = float(growth[-1]) - 1.0
        yearly = float(np.mean(returns)) * annual
        with np.errstate(over="ignore"):
            yearly_growth = float(np.maximum(growth[-1], 0.0) ** (annual / len(returns))) - 1.0
    else:
        total = float(np.sum(returns))
        years = (len(returns) if rule.years_of == "returns" else len(values)) / 252
        yearly = yearly_growth = total / years
    results = (
        100.0 * total,
        _ratio(yearly, deviation * math.sqrt(annual)),
        100.0 * deviation * math.sqrt(annual),
        100.0 * drawdown,
        _ratio(yearly, downside * math.sqrt(annual)),
        _ratio(yearly_growth, drawdown),
        _ratio(float(np.sum(returns > 0)), float(np.sum(returns != 0))),
    )
    finite = (value if math.isfinite(value) else math.nan for value in results)
    return {**dict(zip(_METRICS, finite, strict=True)), "days": len(returns)}


def _returns(values: np.ndarray, simple: bool) -> np.ndarray:
    """Daily returns [T-1]; after a total loss simple ones are 0, log ones not finite."""
    before, after = values[:-1], values[1:]
    if simple:
        return np.divide(after - before, before, out=np.zeros_like(before), where=before != 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(after / before)


def _ratio(value: float, spread: float) -> float:
    return value / spread if spread > _ZERO_DEVIATION else math.nan
