"""A policy on several symbols: each, and all of them together.

Together means the capital in equal parts, one a symbol, each traded by itself from its first day to
its last: the equity is the mean of the symbols' equities, on the days of any. Buy-and-hold and each
random policy are put together in the same way.

Shapes: N symbols, n days of one, T days of any.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from fastflag.evaluate.statistics import Equities, judged, paired, returns
from fastflag.market.metrics import Calendar

# The same for all symbols.
_RULES = (
    "action_names",
    "split",
    "positions",
    "fill",
    "dividends",
    "anonymised",
    "fee_bps",
    "slippage_bps",
)
# Symbols that beat this share of random policies, in percent, are counted.
_FEW = 95.0

Tested = tuple[dict[str, Any], Equities]
"""The document of one symbol, and the equities that it tells of."""


def pooled(
    tested: Sequence[Tested], learnt: Sequence[str], left_out: Sequence[str], calendar: Calendar
) -> dict[str, Any]:
    """The document of several symbols: under `symbols` that of each, under `groups` what is told of
    `all` together and, where some of them were held out, of those that were `learnt` from and of
    those `held_out`. `left_out` are symbols with too few bars to be tested."""
    names = [document["symbol"] for document, _ in tested]
    held_out = [name for name in names if name not in learnt]
    groups = {"all": list(tested)}
    if 0 < len(held_out) < len(names):
        for group, is_in in (("learnt", False), ("held_out", True)):
            groups[group] = [each for each in tested if (each[0]["symbol"] in held_out) is is_in]
    return {
        **{key: tested[0][0][key] for key in _RULES},
        "start": min(document["start"] for document, _ in tested),
        "end": max(document["end"] for document, _ in tested),
        "held_out": held_out,
        "left_out": list(left_out),
        "groups": {name: _together(some, calendar) for name, some in groups.items()},
        "symbols": {
            name: each[0] | {"paired": _against_holding([each])}
            for name, each in zip(names, tested, strict=True)
        },
    }


def _together(tested: Sequence[Tested], calendar: Calendar) -> dict[str, Any]:
    dates = np.unique(np.concatenate([_days(document) for document, _ in tested]))

    def mean(name: str) -> np.ndarray:
        parts = (_on_days(getattr(each, name), _days(told), dates) for told, each in tested)
        return reduce(np.add, parts) / len(tested)

    whole = Equities(mean("greedy"), mean("held"), mean("sampled"), mean("random"))
    documents = [document for document, _ in tested]
    ahead = [equities.greedy[-1] > equities.held[-1] for _, equities in tested]
    ranks = [document["random"]["percentile"]["greedy"] for document in documents]
    return {
        "symbols": [document["symbol"] for document in documents],
        "dates": dates.astype(str).tolist(),
        "ahead_of_buy_and_hold": int(sum(ahead)),
        "ahead_of_95_percent": sum(rank > _FEW for rank in ranks),
        "paired": _against_holding(tested),
        **judged(whole, calendar),
    }


def _against_holding(tested: Sequence[Tested]) -> dict[str, Any]:
    """Daily returns less those of holding the same symbol, clustered by day."""
    differences = [returns(each.greedy) - returns(each.held) for _, each in tested]
    return paired(differences, [_days(document)[1:] for document, _ in tested])


def _days(document: dict[str, Any]) -> np.ndarray:
    return np.array(document["dates"], "datetime64[D]")


def _on_days(equity: np.ndarray, own: np.ndarray, dates: np.ndarray) -> np.ndarray:
    """[..., n] at the days `own` -> [..., T] at `dates`: as it was last, and before as it began."""
    place = np.searchsorted(own, dates, side="right") - 1
    return equity[..., np.maximum(place, 0)]
