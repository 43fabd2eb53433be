"""Figures of equity: by every convention, beside chance, and paired.

Shapes: B episodes, R random policies, N symbols, n days.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastflag.market.metrics import CONVENTIONS, Calendar, metrics


@dataclass(frozen=True)
class Equities:
    """What a policy and others under the same rules had at the same n closes."""

    greedy: np.ndarray
    """[n]"""
    held: np.ndarray
    """[n], of buy-and-hold."""
    sampled: np.ndarray
    """[B, n]"""
    random: np.ndarray
    """[R, n]"""


def judged(equities: Equities, calendar: Calendar) -> dict[str, dict[str, Any]]:
    """The parts `policies`, `sampled` and `random` of a backtest's document."""
    greedy = all_metrics(equities.greedy, calendar)
    sampled = [all_metrics(equity, calendar) for equity in equities.sampled]
    sharpes = np.array([sharpe(metrics(each, "standard", calendar)) for each in equities.random])
    median = float(np.median([sharpe(entry["standard"]) for entry in sampled]))
    return {
        "policies": {
            "greedy": {"equity": equities.greedy.tolist(), "metrics": greedy},
            "buy_and_hold": {
                "equity": equities.held.tolist(),
                "metrics": all_metrics(equities.held, calendar),
            },
        },
        "sampled": {
            "episodes": len(equities.sampled),
            "equity": _bands(equities.sampled),
            "metrics": _spread(sampled),
        },
        "random": {
            "episodes": len(equities.random),
            "equity": _bands(equities.random),
            "sharpe": {f"p{q:02}": float(np.percentile(sharpes, q)) for q in (5, 50, 95, 99)},
            "sharpes": sharpes.tolist(),
            "percentile": {
                "greedy": _percentile(sharpe(greedy["standard"]), sharpes),
                "sampled_median": _percentile(median, sharpes),
            },
        },
    }


def all_metrics(equity: np.ndarray, calendar: Calendar) -> dict[str, dict[str, Any]]:
    """Of equity [n], by each convention."""
    return {name: _finite(metrics(equity, name, calendar)) for name in CONVENTIONS}


def sharpe(values: dict[str, Any]) -> float:
    """A policy that never traded has no Sharpe ratio; it ranks as one that earned nothing."""
    ratio = values["sr"]
    return 0.0 if ratio is None or math.isnan(ratio) else ratio


def paired(differences: Sequence[np.ndarray], days: Sequence[np.ndarray]) -> dict[str, Any]:
    """The mean of all `differences` ([n] each, one array a symbol), and its standard error where
    those of one of the `days` ([n] each) are a cluster: symbols rise and fall together.

    sqrt(G / (G - 1) sum over days of (sum of the day's differences from the mean)^2) / count, G the
    number of days (Liang and Zeger 1986, of a mean); None of fewer than two days.
    """
    all_differences = np.concatenate(differences)
    _, cluster = np.unique(np.concatenate(days), return_inverse=True)
    mean, count = float(all_differences.mean()), len(all_differences)
    sums = np.bincount(cluster, weights=all_differences - mean)
    error = None
    if len(sums) > 1:
        error = math.sqrt(len(sums) / (len(sums) - 1) * float(sums @ sums)) / count
    return {"mean": mean, "standard_error": error, "days": len(sums), "pairs": count}


def returns(equity: np.ndarray) -> np.ndarray:
    """Simple returns [n - 1] from close to close; 0 after ruin."""
    before = equity[:-1]
    return np.divide(np.diff(equity), before, out=np.zeros_like(before), where=before > 0)


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN: None where a figure is not defined."""
    return float(value) if math.isfinite(value) else None


def _percentile(value: float, others: np.ndarray) -> float:
    """Percent of `others` that `value` beats."""
    return float((others < value).mean() * 100)


def _bands(equity: np.ndarray) -> dict[str, list[float]]:
    """[B, n] -> the 5th, 50th and 95th percentile of each day."""
    return {f"p{q:02}": np.percentile(equity, q, axis=0).tolist() for q in (5, 50, 95)}


def _spread(entries: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Mean and percentiles of each metric over episodes; those without a value do not count."""
    spread: dict[str, dict[str, Any]] = {}
    for convention, names in entries[0].items():
        spread[convention] = {}
        for name in names:
            values = [e[convention][name] for e in entries if e[convention][name] is not None]
            spread[convention][name] = _summary(np.array(values, float)) if values else None
    return spread


def _summary(values: np.ndarray) -> dict[str, float]:
    percentiles = {f"p{q:02}": float(np.percentile(values, q)) for q in (5, 50, 95)}
    return {"mean": float(values.mean())} | percentiles


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: finite_or_none(value) for name, value in values.items()}
