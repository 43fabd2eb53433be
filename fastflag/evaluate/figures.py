"""The page's figures: plotly.js dictionaries. What all of them share is set in report.js."""

import math
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import Any

import numpy as np

from fastflag.evaluate.words import finite, number

# Mid-tones, readable on the light and on the dark page alike.
_RANDOM, _TRAINING = "#808b99", "#8b6fd6"
_GREEDY = _SAMPLED = "#3b7ddd"
# Buy-and-hold is drawn last and dashed: a policy that equals it must not hide it.
_POLICIES = {
    "greedy": ("greedy", _GREEDY, "solid"),
    "buy_and_hold": ("buy-and-hold", "#d18b1f", "5px,3px"),
}
_ACTION_COLOURS = {"Sell": "#d9583f", "Hold": "#98a2ae", "Buy": "#1f9d86"}
_MARKERS = {"Sell": "triangle-down", "Buy": "triangle-up"}
# Of phases, and of actions that have none of their own.
_COLOURS = ("#3b7ddd", "#1f9d86", "#d18b1f", "#8b6fd6", "#d9583f", "#808b99")
_PERCENT = {"tickformat": ".0%", "hoverformat": ".1%"}

# Updates drawn in a training curve: longer runs are thinned, so that the page opens fast.
_MOST_POINTS = 2000


@dataclass(frozen=True)
class Figure:
    title: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def backtest_figures(backtest: dict[str, Any]) -> dict[str, Figure]:
    """Raises ValueError for dates out of order and series that do not fit them."""
    if "groups" in backtest:
        return _figures_of_several(backtest)
    days = _rising(backtest)
    if "assets" in backtest:
        return {
            "equity": _equity(backtest, days),
            "drawdown": _drawdown(backtest, days),
            "weights": _weights(backtest, days),
            "luck": _luck(backtest),
        }
    return {
        "equity": _equity(backtest, days),
        "drawdown": _drawdown(backtest, days),
        "price": _price(backtest, days),
        "actions": _actions(backtest, days),
        "luck": _luck(backtest),
    }


def _figures_of_several(backtest: dict[str, Any]) -> dict[str, Figure]:
    """Of all symbols together, and each as a point."""
    whole = backtest["groups"]["all"]
    days = _rising(whole)
    return {
        "equity": _equity(whole, days),
        "drawdown": _drawdown(whole, days),
        "symbols": _symbols(backtest),
        "luck": _luck(whole),
    }


def _rising(backtest: dict[str, Any]) -> list[str]:
    dates = np.array(backtest["dates"], dtype="datetime64[D]")
    if len(dates) < 2 or not (np.diff(dates) > 0).all():
        raise ValueError("the dates do not rise")
    return dates.astype(str).tolist()


def _symbols(backtest: dict[str, Any]) -> Figure:
    """Sharpe ratios, a point a symbol, beside the line of those that are as good as holding."""
    points = {name: _both_sharpes(told) for name, told in backtest["symbols"].items()}
    points = {name: both for name, both in points.items() if finite(both[0]) and finite(both[1])}
    held_out = {*backtest["held_out"]}
    traces = []
    if points:
        ends = [min(map(min, points.values())), max(map(max, points.values()))]
        line = {"width": 1, "dash": "3px,3px"}
        diagonal = _line(ends, _array(ends), "as buy-and-hold", _RANDOM, line=line)
        traces.append(diagonal | {"mode": "lines", "hoverinfo": "skip"})
    for unseen, label, colour in ((False, "learnt from", _GREEDY), (True, "never seen", "#d9583f")):
        some = {name: both for name, both in points.items() if (name in held_out) is unseen}
        if some:
            traces.append(_scatter(some, label, colour))
    axes = {
        "xaxis": {"title": {"text": "buy-and-hold"}},
        "yaxis": {"title": {"text": "greedy"}},
    }
    caption = "Sharpe ratios, a point a symbol. Above the line the policy is ahead of holding it."
    return Figure("Symbols", caption, traces, {"hovermode": "closest", **axes})


def _scatter(points: dict[str, tuple[float, float]], label: str, colour: str) -> dict[str, Any]:
    held, greedy = (_points(_array(list(side))) for side in zip(*points.values(), strict=True))
    return {
        "x": held,
        "y": greedy,
        "name": label,
        "mode": "markers",
        "marker": {"color": colour, "size": 9},
        # plotly draws <a> and <b> in names as markup.
        "text": [escape(name) for name in points],
        "hovertemplate": "%{text}: greedy %{y}, buy-and-hold %{x}<extra></extra>",
    }


def _both_sharpes(told: dict[str, Any]) -> tuple[float, float]:
    policies = told["policies"]
    held, greedy = (
        policies[key]["metrics"]["standard"]["sr"] for key in ("buy_and_hold", "greedy")
    )
    return held, greedy


def _equity(backtest: dict[str, Any], days: list[str]) -> Figure:
    traces = []
    for key, colour in (("random", _RANDOM), ("sampled", _SAMPLED)):
        low, high = (_growth(backtest[key]["equity"][edge]) for edge in ("p05", "p95"))
        traces += _band(days, low, high, f"{key}, 5–95%", colour)
    for key, (name, colour, dash) in _POLICIES.items():
        growth = _growth(backtest["policies"][key]["equity"])
        traces.append(_line(days, growth, name, colour, line={"dash": dash}))
    caption = "Bands: 5th to 95th percentile of episodes, each day."
    return Figure("Equity", caption, traces, {"yaxis": _PERCENT})


def _drawdown(backtest: dict[str, Any], days: list[str]) -> Figure:
    traces = []
    for key, (name, colour, dash) in _POLICIES.items():
        equity = _array(backtest["policies"][key]["equity"])
        drawdown = equity / np.fmax.accumulate(equity) - 1
        more = {"line": {"dash": dash}, "fill": "tozeroy", "fillcolor": colour + "24"}
        traces.append(_line(days, drawdown, name, colour, **more))
    return Figure("Drawdown", "Below the highest equity so far.", traces, {"yaxis": _PERCENT})


def _price(backtest: dict[str, Any], days: list[str]) -> Figure:
    position = _array(backtest["policies"]["greedy"]["position"])
    held = {"yaxis": "y2", "fill": "tozeroy", "fillcolor": _GREEDY + "50", "showlegend": False}
    traces = [
        _line(days, _array(backtest["close"]), "close", _RANDOM, line={"width": 1.3}),
        _line(days, position, "position", _GREEDY, line={"shape": "hv", "width": 1}, **held),
    ]
    for action in sorted({trade["action"] for trade in backtest["trades"]}):
        trades = [trade for trade in backtest["trades"] if trade["action"] == action]
        traces.append(_trade_markers(trades, action))
    sides = {-1: "short", 0: "flat", 1: "long"}
    if backtest["positions"] == "long_flat":
        del sides[-1]
    below = {"domain": [0, 0.15], "range": [min(sides) - 0.15, 1.15], "showgrid": False}
    ticks = {"tickvals": list(sides), "ticktext": list(sides.values())}
    axes = {"xaxis": {"anchor": "y2"}, "yaxis": {"domain": [0.22, 1]}, "yaxis2": below | ticks}
    caption = "Fills, before slippage. Below: the position at each close."
    return Figure("Price and trades", caption, traces, {"hovermode": "closest", **axes})


def _trade_markers(trades: list[dict[str, Any]], action: str) -> dict[str, Any]:
    return {
        "x": [trade["date"] for trade in trades],
        "y": [trade["price"] for trade in trades],
        "name": action,
        "mode": "markers",
        "marker": {"symbol": _MARKERS[action], "color": _ACTION_COLOURS[action], "size": 10},
        "text": [number(trade["shares"]) for trade in trades],
        "hovertemplate": f"%{{x|%Y-%m-%d}}: {action} at %{{y:,.2f}}<br>"
        "%{text} shares held after it<extra></extra>",
    }


def _actions(backtest: dict[str, Any], days: list[str]) -> Figure:
    columns = _array(backtest["policies"]["greedy"]["probabilities"]).T
    # Earlier documents don't name the actions: theirs are these three.
    names = backtest.get("action_names", list(_ACTION_COLOURS))
    others = zip(names, cycle(_COLOURS), strict=False)
    colours = [_ACTION_COLOURS.get(name, other) for name, other in others]
    traces = [
        _area(days[:-1], column, name, colour)
        for column, name, colour in zip(columns, names, colours, strict=True)
    ]
    caption = "Of the greedy run's prompts, one a decision."
    axis = {**_PERCENT, "range": [0, 1]}
    return Figure("Action probabilities", caption, traces, {"yaxis": axis})


def _weights(backtest: dict[str, Any], days: list[str]) -> Figure:
    """What a portfolio held of each asset: areas where none is short, else lines."""
    columns = _array(backtest["policies"]["greedy"]["weights"]).T
    draw = _area if backtest["positions"] == "long_only" else _line
    traces = [
        # plotly draws <a> and <b> in names as markup.
        draw(days, column, escape(name), colour)
        for column, name, colour in zip(columns, backtest["assets"], cycle(_COLOURS), strict=False)
    ]
    caption = "Of the greedy run's equity, at each close; the rest is cash."
    return Figure("Weights", caption, traces, {"yaxis": _PERCENT})


def _luck(backtest: dict[str, Any]) -> Figure:
    bars = {
        "x": _points(_array(backtest["random"]["sharpes"])),
        "type": "histogram",
        "nbinsx": 50,
        "name": "random policies",
        "marker": {"color": _RANDOM + "90"},
        "hovertemplate": "Sharpe %{x}: %{y} policies<extra></extra>",
    }
    traces = [bars]
    for key, (name, colour, dash) in _POLICIES.items():
        sharpe = backtest["policies"][key]["metrics"]["standard"]["sr"]
        if finite(sharpe):
            label, line = f"{name} {number(sharpe)}", {"width": 2.5, "dash": dash}
            upright = _line([sharpe] * 2, np.array([0.0, 1.0]), label, colour, line=line)
            traces.append(upright | {"yaxis": "y2", "mode": "lines", "hoverinfo": "name"})
    axes = {
        "xaxis": {"title": {"text": "Sharpe ratio"}},
        "yaxis": {"title": {"text": "policies"}},
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False},
    }
    caption = "Sharpe ratios of random policies under the same rules."
    return Figure("Against luck", caption, traces, {"hovermode": "closest", **axes})


_FROM_ZERO = {"rangemode": "tozero"}
_CURVES = {
    "return": ("Return", "Mean sum of an environment's rewards.", {}),
    "sharpe": ("Sharpe ratio", "Of the training episodes so far, annualised.", {}),
    "entropy": ("Entropy", "Of the action distribution, in nats.", _FROM_ZERO),
    "kl": ("KL divergence", "From the rollout's policy; 0 with one step an update.", _FROM_ZERO),
    "clip_fraction": (
        "Clip fraction",
        "Of the samples; 0 with one step an update.",
        {"tickformat": ".1%", **_FROM_ZERO},
    ),
}


def training_figures(updates: list[dict[str, Any]]) -> dict[str, Figure]:
    """A curve for each measure that has a value, and the seconds of each phase."""
    kept = updates[:: math.ceil(len(updates) / _MOST_POINTS) or 1]
    steps = [int(update["step"]) for update in kept]
    whole = {"dtick": 1} if len(steps) <= 10 else {}
    figures = {}
    for key, (title, caption, axis) in _CURVES.items():
        values = _array([update.get(key) for update in kept])
        if np.isfinite(values).any():
            colour = _GREEDY if key in ("return", "sharpe") else _TRAINING
            traces = [_line(steps, values, title, colour)]
            figures[key] = Figure(title, caption, traces, {"xaxis": whole, "yaxis": axis})
    phases = list(dict.fromkeys(name for update in kept for name in update["seconds"]))
    if phases:
        total = sum(sum(update["seconds"].values()) for update in updates)
        seconds = _array([[update["seconds"].get(name, 0) for name in phases] for update in kept])
        figures["seconds"] = _seconds(steps, seconds, phases, total)
    return figures


def _seconds(steps: list[int], seconds: np.ndarray, phases: list[str], total: float) -> Figure:
    # The first update compiles; on a scale that shows it, the others would be invisible.
    top = 1.3 * float(np.percentile(seconds.sum(axis=1), 90)) or 1.0
    traces = [
        # plotly draws <a> and <b> in names as markup.
        _area(steps, column, escape(name), _COLOURS[index % len(_COLOURS)])
        for index, (column, name) in enumerate(zip(seconds.T, phases, strict=True))
    ]
    caption = f"{number(total, 1)} s in all; the first update compiles."
    axis = {"range": [0, top], "ticksuffix": " s"}
    return Figure("Seconds per phase", caption, traces, {"yaxis": axis})


def _array(values: list) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def _growth(equity: list[float | None]) -> np.ndarray:
    if equity[0] is None or not equity[0] > 0:
        raise ValueError(f"an equity begins with {equity[0]}")
    return _array(equity) / equity[0] - 1


def _points(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def _line(x: list, y: np.ndarray, name: str, colour: str, **more: Any) -> dict[str, Any]:
    if len(x) != len(y):
        raise ValueError(f"{name} has {len(y)} values, not {len(x)}")
    line = {"color": colour, "width": 1.8, **more.pop("line", {})}
    mode = "lines" if len(x) > 2 else "lines+markers"
    return {"x": x, "y": _points(y), "name": name, "mode": mode, "line": line, **more}


def _area(x: list, y: np.ndarray, name: str, colour: str) -> dict[str, Any]:
    return _line(x, y, name, colour, stackgroup="all", line={"width": 0.5}, fillcolor=colour + "b0")


def _band(
    x: list, low: np.ndarray, high: np.ndarray, name: str, colour: str
) -> list[dict[str, Any]]:
    shared = {"legendgroup": name, "line": {"width": 0}}
    text = [f"{a:.1%} to {b:.1%}" for a, b in zip(low, high, strict=True)]
    return [
        _line(x, low, name, colour, **shared, hoverinfo="skip", showlegend=False),
        _line(x, high, name, colour, **shared, fill="tonexty", fillcolor=colour + "38")
        | {"text": text, "hovertemplate": "%{text}"},
    ]
