"""A run told in one self-contained page, RUN/report.html."""

import json
import math
from dataclasses import dataclass
from datetime import date
from html import escape
from itertools import cycle
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from fastflag import config as settings
from fastflag.config import TrainConfig
from fastflag.files import InputError, read_json, write_atomic

# Mid-tones, readable on the light and on the dark page alike. Actions stand in the order of their
# probabilities.
PALETTE = {
    "greedy": "#3b7ddd",
    "sampled": "#3b7ddd",
    "buy_and_hold": "#d18b1f",
    "random": "#808b99",
    "training": "#8b6fd6",
}
ACTION_COLOURS = {"Sell": "#d9583f", "Hold": "#98a2ae", "Buy": "#1f9d86"}
PHASE_COLOURS = ("#3b7ddd", "#1f9d86", "#d18b1f", "#8b6fd6", "#d9583f", "#808b99")

# Buy-and-hold is drawn last and dashed: a policy that equals it must not hide it.
POLICIES = {"greedy": "greedy", "buy_and_hold": "buy-and-hold"}
DASHES = {"greedy": "solid", "buy_and_hold": "5px,3px"}
COLUMNS = (
    ("cr", "Return", "%"),
    ("sr", "Sharpe", ""),
    ("av", "Volatility", "%"),
    ("mdd", "Max drawdown", "%"),
    ("sortino", "Sortino", ""),
    ("calmar", "Calmar", ""),
    ("win_rate_daily", "Winning days", "fraction"),
)
SHARE = {"tickformat": ".1%", "rangemode": "tozero"}
CURVES = {
    "return": ("Return", "Mean sum of an environment's rewards.", {}),
    "sharpe": ("Sharpe ratio", "Of the training episodes so far, annualised.", {}),
    "entropy": ("Entropy", "Of the action distribution, in nats.", {"rangemode": "tozero"}),
    "kl": (
        "KL divergence",
        "From the rollout's policy; 0 with one step an update.",
        {"rangemode": "tozero"},
    ),
    "clip_fraction": ("Clip fraction", "Of the samples; 0 with one step an update.", SHARE),
}
CONVENTIONS = {
    "standard": "Simple returns, compounded; annualised by 252 days (crypto: 365). In brackets: "
    "5th and 95th percentile. Random policies: the two metrics kept of them.",
    "flag": "As FLAG-Trader reports itself: return is the sum of log returns.",
    "investorbench": "As InvestorBench reports: sums of log returns, volatility over 365 days.",
    "paper-bh": "As FLAG-Trader's paper reports buy-and-hold.",
}
BACKTEST_FIGURES = {
    "equity": ("Equity", "Bands: 5th to 95th percentile of episodes, each day."),
    "drawdown": ("Drawdown", "Below the highest equity so far."),
    "price": ("Price and trades", "Fills, before slippage. Below: the position at each close."),
    "actions": ("Action probabilities", "Of the greedy run's prompts, one a decision."),
    "luck": ("Against luck", "Sharpe ratios of random policies under the same rules."),
}

MOST_POINTS = 2000
"""Updates drawn in a training curve; longer runs are thinned, so that the page opens fast."""

# A shape is a type (float: a number or null; date: an ISO date), a tuple of the values allowed, a
# list of one item's shape, or a dictionary of the keys required; the key `str` is for any other.


@dataclass(frozen=True)
class _OrNull:
    shape: Any


_BAND = {"p05": [float], "p95": [float], str: [float]}
_METRICS = {"standard": {"cr": float, "sr": float, "mdd": float, str: float}, str: {str: float}}
_SPREAD = {"mean": float, "p05": float, "p95": float, str: float}
_SPREADS = {str: _OrNull(_SPREAD)}
_BACKTEST = {
    **{"symbol": str, "split": str, "start": date, "end": date, "anonymised": bool},
    "positions": ("long_flat", "long_short"),
    "fill": ("next_open", "next_close", "same_close"),
    **{"fee_bps": float, "slippage_bps": float, "dates": [date], "close": [float]},
    "news": {str: [str]},
    "policies": {
        "greedy": {
            "equity": [float],
            "actions": [tuple(ACTION_COLOURS)],
            "probabilities": [[float]],
            "position": [(-1, 0, 1)],
            "metrics": _METRICS,
        },
        "buy_and_hold": {"equity": [float], "metrics": _METRICS},
    },
    "sampled": {"episodes": int, "equity": _BAND, "metrics": {"standard": _SPREADS, str: _SPREADS}},
    "random": {
        "episodes": int,
        "equity": {"p50": [float], **_BAND},
        "sharpe": {"p05": float, "p50": float, "p95": float, str: float},
        "percentile": {"greedy": float, str: float},
        "sharpes": [float],
    },
    "trades": [{"date": date, "action": tuple(ACTION_COLOURS), "price": float, "shares": float}],
}
_UPDATE = {"step": int, "seconds": {str: float}, str: float}


def write_report(run: Path) -> Path:
    """Writes RUN/report.html from config.json, metrics.jsonl and, where it exists, backtest.json.

    The page fetches nothing: plotly.js is inside, and a content security policy bars the network.
    Raises InputError for a missing, truncated or inconsistent file; an earlier page then stays.
    """
    run = Path(run)
    version, config = _read_config(run / "config.json")
    updates = _read_updates(run / "metrics.jsonl")
    path = run / "backtest.json"
    backtest = _read_backtest(path) if path.exists() else None
    title, sentences = _verdict(backtest)
    figures = _training_figures(updates) | (_backtest_figures(backtest) if backtest else {})
    page = Template(PAGE).substitute(
        name=escape(run.resolve().name),
        version=escape(version),
        title=escape(title),
        verdict="".join(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        facts=_facts(config, updates, backtest),
        backtest=_backtest_section(backtest) if backtest else "",
        training=_training_section(updates, figures),
        headlines=_headlines(backtest["news"]) if backtest else "",
        config=escape(json.dumps(settings.to_dict(config), indent=2)),
        figures=_script_json(figures),
        plotly=get_plotlyjs(),
    )
    # A headline cut in the middle of a surrogate pair has no UTF-8.
    write_atomic(run / "report.html", page.encode(errors="replace"))
    return run / "report.html"


# Reading


def _read_config(path: Path) -> tuple[str, TrainConfig]:
    values = read_json(path)
    version = values.pop("fastflag", "") if isinstance(values, dict) else ""
    return str(version), settings.from_dict(values, str(path))


def _read_updates(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{error.strerror or error}, {path}") from None
    except ValueError as error:
        raise InputError(f"not valid UTF-8 ({error}), {path}") from None
    return [_read_update(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _read_update(line: str, where: str) -> dict[str, Any]:
    try:
        update = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error}), {where}") from None
    _check(update, _UPDATE, "", where)
    return update


def _read_backtest(path: Path) -> dict[str, Any]:
    backtest = read_json(path)
    _check(backtest, _BACKTEST, "", str(path))
    dates, greedy = backtest["dates"], backtest["policies"]["greedy"]
    days = len(dates)
    _require(days >= 2 and dates == sorted(set(dates)), "dates", "two or more, rising", path)
    equities = {
        "greedy.equity": greedy["equity"],
        "buy_and_hold.equity": backtest["policies"]["buy_and_hold"]["equity"],
        **{f"sampled.equity.{key}": band for key, band in backtest["sampled"]["equity"].items()},
        **{f"random.equity.{key}": band for key, band in backtest["random"]["equity"].items()},
    }
    for name, series, length in [
        *((name, equity, days) for name, equity in equities.items()),
        ("close", backtest["close"], days),
        ("greedy.position", greedy["position"], days),
        ("greedy.actions", greedy["actions"], days - 1),
        ("greedy.probabilities", greedy["probabilities"], days - 1),
        *(("greedy.probabilities[]", row, 3) for row in greedy["probabilities"]),
    ]:
        _require(len(series) == length, name, f"of length {length}, not {len(series)}", path)
    for name, equity in equities.items():
        _require((equity[0] or 0) > 0, name, "positive on the first day", path)
    return backtest


def _check(value: Any, shape: Any, name: str, where: str) -> None:
    if isinstance(shape, dict):
        _require(isinstance(value, dict), name, "an object", where)
        for key in shape:
            _require(key is str or key in value, f"{name}.{key}", "present", where)
        for key, item in value.items():
            if key in shape or str in shape:
                _check(item, shape.get(key, shape.get(str)), f"{name}.{key}", where)
    elif isinstance(shape, _OrNull):
        if value is not None:
            _check(value, shape.shape, name, where)
    elif isinstance(shape, list):
        _require(isinstance(value, list), name, "a list", where)
        for item in value:
            _check(item, shape[0], f"{name}[]", where)
    elif isinstance(shape, tuple):
        _require(value in shape, name, f"one of {', '.join(map(str, shape))}", where)
    elif shape is date:
        _require(_is_date(value), name, "an ISO date", where)
    elif shape is float:
        whole = type(value) is int and abs(value) < 2**63
        _require(whole or value is None or type(value) is float, name, "a number or null", where)
    else:
        _require(type(value) is shape, name, f"of type {shape.__name__}", where)


def _require(condition: bool, name: str, expected: str, where: Any) -> None:
    if not condition:
        name = " ".join(name.lstrip(".").split()) or "the document"
        raise InputError(f"{name} must be {expected}, {where}")


def _is_date(value: Any) -> bool:
    try:
        return date.fromisoformat(value).isoformat() == value
    except (TypeError, ValueError):
        return False


# Words


def _verdict(backtest: dict[str, Any] | None) -> tuple[str, list[str]]:
    """A title, and sentences that say no more than the numbers do."""
    if backtest is None:
        return "Trained, not yet tested", ["There is no backtest yet: only the training curves."]
    chance = backtest["random"]
    greedy, hold = (backtest["policies"][name]["metrics"]["standard"] for name in POLICIES)
    sharpe, bar = greedy["sr"], hold["sr"]
    percentile = chance["percentile"]["greedy"]
    constant, exposure = _exposure(backtest)
    sentences = [
        f"The greedy policy returned {_shown(greedy['cr'], '%', 1)} at a Sharpe ratio of "
        f"{_number(sharpe)}; buy-and-hold {_shown(hold['cr'], '%', 1)} at {_number(bar)}."
    ]
    sampled = backtest["sampled"]["metrics"]["standard"].get("sr")
    if sampled:
        sentences.append(
            f"With actions sampled, the mean Sharpe ratio of {backtest['sampled']['episodes']:,} "
            f"episodes is {_number(sampled['mean'])}."
        )
    sentences.append(
        f"Of {chance['episodes']:,} random policies under the same rules, the greedy one is ahead "
        f"of {_number(percentile, 1)}%; their middle 90% reach from "
        f"{_number(chance['sharpe']['p05'])} to {_number(chance['sharpe']['p95'])}. {exposure}"
    )
    title = constant or _comparison(sharpe, bar, percentile)
    if backtest["split"] == "train":
        title = f"On its own training days: {_lower(title)}"
    return title, [" ".join(sentences), " ".join(_cautions(backtest, sharpe))]


def _comparison(sharpe: float | None, bar: float | None, percentile: float | None) -> str:
    if not (_finite(sharpe) and _finite(bar) and _finite(percentile)):
        return "No verdict: a Sharpe ratio is undefined"
    against = "Ahead of" if sharpe > bar else "Behind" if sharpe < bar else "Level with"
    if percentile >= 95:
        luck = f"ahead of {_number(percentile, 1)}% of random policies, on one window"
    elif percentile >= 50:
        luck = "within the reach of luck"
    else:
        luck = "below the median random policy"
    return f"{against} buy-and-hold; {luck}"


def _exposure(backtest: dict[str, Any]) -> tuple[str, str]:
    """A title for a policy that (all but) always holds one position, else ""; and a sentence."""
    # The first position is the account's before its first decision.
    position = np.array(backtest["policies"]["greedy"]["position"][1:])
    long, flat, short = ((position == side).mean() for side in (1, 0, -1))
    parts = [f"{long:.0%} of days long", f"{flat:.0%} flat"]
    if backtest["positions"] == "long_short":
        parts.append(f"{short:.0%} short")
    trades = len(backtest["trades"])
    sentence = f"It was {', '.join(parts)}, with {trades} trade{'' if trades == 1 else 's'}."
    for share, title, words in (
        (long, "Always long: buy-and-hold under another name", "chose when to be in the market"),
        (flat, "Always flat: it took no position", "took a position"),
        (short, "Always short: one bet against the market", "chose when to be in the market"),
    ):
        if share == 1:
            return title, f"{sentence} It never {words}."
        if share >= 0.97:
            return f"All but {_lower(title)}", f"{sentence} It hardly ever {words}."
    if long > 0 and trades == 1:
        return "Bought once and held: buy-and-hold, begun later", sentence
    return "", sentence


def _cautions(backtest: dict[str, Any], sharpe: float | None) -> list[str]:
    sentences = []
    if backtest["split"] == "train":
        sentences.append("These days were trained on: the result says nothing about other days.")
    days = len(backtest["dates"]) - 1
    caution = "One window and one seed prove little"
    if _finite(sharpe):
        error = _sharpe_error(sharpe, days, backtest["dates"][0], backtest["dates"][-1])
        caution += (
            f": over {days} days, the standard error of this Sharpe ratio is about {error:.1f}"
        )
    sentences.append(f"{caution}.")
    if not backtest["anonymised"]:
        sentences.append(
            "The prompts name the ticker or the dates, so the model may remember this period."
        )
    if backtest["fill"] == "same_close":
        sentences.append("Orders fill at the very close they were decided on, which flatters.")
    if not backtest["fee_bps"] and not backtest["slippage_bps"]:
        sentences.append("Trading is free of fees and slippage here, which flatters.")
    return sentences


def _sharpe_error(sharpe: float, days: int, start: str, end: str) -> float:
    """Standard error of an annualised Sharpe ratio of independent returns (Lo 2002, equation 9)."""
    years = (date.fromisoformat(end) - date.fromisoformat(start)).days / 365.25
    return math.sqrt(1 / years + sharpe**2 / (2 * days))


def _facts(config: TrainConfig, updates: list, backtest: dict[str, Any] | None) -> str:
    policy, data, algorithm = config.policy, config.data, config.algorithm
    plural = "s" * (policy.top_layers != 1)
    how = f"LoRA rank {policy.lora_rank}" if policy.adaptation == "lora" else "all weights"
    env_steps = updates[-1].get("env_steps") if updates else 0
    train_days = data.train.replace("..", " to ") or "the first 80% of days"
    facts = {
        "Model": f"{policy.model}; top {policy.top_layers} layer{plural} trained ({how}), "
        f"the rest frozen in {policy.trunk_weights}",
        "Training": f"{algorithm.algorithm.upper()}, {len(updates):,} of {config.steps:,} updates, "
        f"{_number(env_steps, 0)} steps in {config.rollout.num_envs:,} environments; "
        f"seed {config.seed}",
        "Trained on": f"{data.data}, {train_days}; "
        f"reward: {config.simulator.reward.replace('_', ' ')}",
    }
    if backtest:
        split = "held-out days" if backtest["split"] == "test" else f"split {backtest['split']}"
        names = "no ticker and no date" if backtest["anonymised"] else "the ticker or the dates"
        facts["Tested on"] = (
            f"{backtest['symbol']}, {backtest['start']} to {backtest['end']} ({split}, "
            f"{len(backtest['dates']):,} closes); prompts name {names}"
        )
        facts["Rules"] = (
            f"{backtest['positions'].replace('_', ' or ')}; filled at the "
            f"{backtest['fill'].replace('_', ' ')}; fee {_number(backtest['fee_bps'], None)} bp, "
            f"slippage {_number(backtest['slippage_bps'], None)} bp of the traded value"
        )
    return "".join(f"<dt>{key}</dt><dd>{escape(text)}</dd>" for key, text in facts.items())


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None, digits: int | None = 2) -> str:
    """With `digits` decimals (None: as many as it has) and a true minus sign; a dash for none."""
    if not _finite(value):
        return "–"
    text = f"{value:,g}" if digits is None else f"{value:,.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


# Tables


def _backtest_section(backtest: dict[str, Any]) -> str:
    names = list(backtest["policies"]["greedy"]["metrics"])
    inputs = "".join(
        f'<input type="radio" name="convention" id="convention-{index}"{" checked" * (index == 0)}>'
        f'<label for="convention-{index}">{escape(name)}</label>'
        for index, name in enumerate(names)
    )
    tables = "".join(_metrics_table(backtest, name) for name in names)
    figures = "".join(_figure(name, *words) for name, words in BACKTEST_FIGURES.items())
    return (
        f'<div class="tiles">{_tiles(backtest)}</div>'
        f'<section><h2>Metrics</h2><div class="conventions">{inputs}{tables}</div></section>'
        f"<section><h2>Backtest</h2>{figures}</section>"
    )


def _tiles(backtest: dict[str, Any]) -> str:
    greedy, hold = (backtest["policies"][name]["metrics"]["standard"] for name in POLICIES)
    tiles = [
        (
            heading,
            _shown(greedy[key], unit, digits),
            f"buy-and-hold {_shown(hold[key], unit, digits)}",
        )
        for key, heading, unit, digits in (
            ("sr", "Sharpe ratio", "", 2),
            ("cr", "Return", "%", 1),
            ("mdd", "Max drawdown", "%", 1),
        )
    ]
    percentile = _shown(backtest["random"]["percentile"]["greedy"], "%", 1)
    tiles.append(("Ahead of", percentile, "of random policies, by Sharpe"))
    return "".join(
        f"<div><h3>{heading}</h3><strong>{value}</strong><span>{note}</span></div>"
        for heading, value, note in tiles
    )


def _metrics_table(backtest: dict[str, Any], convention: str) -> str:
    policies = backtest["policies"]
    rows = {
        "Greedy": policies["greedy"]["metrics"][convention],
        "Sampled, mean": backtest["sampled"]["metrics"].get(convention, {}),
        "Buy-and-hold": policies["buy_and_hold"]["metrics"].get(convention, {}),
    }
    if convention == "standard":
        rows["Random, median"] = _random_metrics(backtest["random"])
    head = "".join(f'<th scope="col">{heading}</th>' for _, heading, _ in COLUMNS)
    body = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f"<td>{_cell(row.get(key), unit)}</td>" for key, _, unit in COLUMNS)
        + "</tr>"
        for name, row in rows.items()
    )
    return (
        f'<div class="table" data-convention="{escape(convention)}"><div class="scroll"><table>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<small>{CONVENTIONS.get(convention, '')}</small></div>"
    )


def _random_metrics(chance: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """`sr`, and `cr`: a percentile of final equity is that percentile of the return."""
    keys = ("p05", "p50", "p95")
    growth = {key: _growth(chance["equity"][key])[-1] for key in keys}
    return {
        "cr": {key: 100 * float(value) for key, value in growth.items()},
        "sr": {key: chance["sharpe"][key] for key in keys},
    }


def _cell(value: float | dict | None, unit: str) -> str:
    if isinstance(value, dict):
        low, high = (_cell(value[key], unit) for key in ("p05", "p95"))
        middle = value["mean"] if "mean" in value else value["p50"]
        return f"{_cell(middle, unit)}<small>[{low}, {high}]</small>"
    shown = _shown(value, unit)
    return f'<data value="{value!r}">{shown}</data>' if _finite(value) else shown


def _shown(value: float | None, unit: str, digits: int = 2) -> str:
    """`unit` is "%" for percentages, "fraction" for what is shown as one, or empty."""
    if not _finite(value):
        return _number(None)
    if unit == "fraction":
        return _number(100 * value, 1) + "%"
    return _number(value, digits) + unit


def _headlines(news: dict[str, list[str]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(day)}</th><td>'
        + "".join(f"<p>{escape(text)}</p>" for text in texts)
        + "</td></tr>"
        for day, texts in sorted(news.items())
    )
    count = sum(map(len, news.values()))
    if not count:
        return ""
    return (
        f"<details><summary>Headlines shown to the model ({count:,})</summary>"
        f'<div class="scroll tall"><table class="news"><tbody>{rows}</tbody></table></div>'
        "</details>"
    )


# Figures: plain plotly.js dictionaries; what all of them share is set in the page's script.


def _figure(name: str, title: str, caption: str) -> str:
    return (
        f'<figure class="{name}"><figcaption><h3>{title}</h3><span>{caption}</span></figcaption>'
        f'<div id="{name}" role="img" aria-label="{title}"></div></figure>'
    )


def _script_json(value: Any) -> str:
    """JSON in which nothing can end a <script> element or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _array(values: list) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def _growth(equity: list[float | None]) -> np.ndarray:
    return _array(equity) / equity[0] - 1


def _points(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def _line(x: list, y: np.ndarray, name: str, colour: str, **more: Any) -> dict[str, Any]:
    line = {"color": colour, "width": 1.8, **more.pop("line", {})}
    mode = "lines" if len(x) > 2 else "lines+markers"
    return {"x": x, "y": _points(y), "name": name, "mode": mode, "line": line, **more}


def _area(x: list, y: np.ndarray, name: str, colour: str) -> dict[str, Any]:
    return _line(x, y, name, colour, stackgroup="all", line={"width": 0.5}, fillcolor=colour + "b0")


def _band(x: list, low: np.ndarray, high: np.ndarray, name: str, colour: str) -> list[dict]:
    shared = {"legendgroup": name, "line": {"width": 0}}
    text = [f"{a:.1%} to {b:.1%}" for a, b in zip(low, high, strict=True)]
    return [
        _line(x, low, name, colour, **shared, hoverinfo="skip", showlegend=False),
        _line(x, high, name, colour, **shared, fill="tonexty", fillcolor=colour + "38")
        | {"text": text, "hovertemplate": "%{text}"},
    ]


def _backtest_figures(backtest: dict[str, Any]) -> dict[str, dict]:
    percent = {"tickformat": ".0%", "hoverformat": ".1%"}
    return {
        "equity": {"data": _equity_traces(backtest), "layout": {"yaxis": percent}},
        "drawdown": {"data": _drawdown_traces(backtest), "layout": {"yaxis": percent}},
        "price": _price_figure(backtest),
        "actions": {
            "data": _action_traces(backtest),
            "layout": {"yaxis": {**percent, "range": [0, 1]}},
        },
        "luck": _luck_figure(backtest),
    }


def _equity_traces(backtest: dict[str, Any]) -> list[dict]:
    dates, traces = backtest["dates"], []
    for key, name in (("random", "random, 5–95%"), ("sampled", "sampled, 5–95%")):
        low, high = (_growth(backtest[key]["equity"][edge]) for edge in ("p05", "p95"))
        traces += _band(dates, low, high, name, PALETTE[key])
    for key, name in POLICIES.items():
        growth = _growth(backtest["policies"][key]["equity"])
        traces.append(_line(dates, growth, name, PALETTE[key], line={"dash": DASHES[key]}))
    return traces


def _drawdown_traces(backtest: dict[str, Any]) -> list[dict]:
    traces = []
    for key, name in POLICIES.items():
        equity = _array(backtest["policies"][key]["equity"])
        drawdown = equity / np.fmax.accumulate(equity) - 1
        more = {"line": {"dash": DASHES[key]}, "fill": "tozeroy", "fillcolor": PALETTE[key] + "24"}
        traces.append(_line(backtest["dates"], drawdown, name, PALETTE[key], **more))
    return traces


def _action_traces(backtest: dict[str, Any]) -> list[dict]:
    columns = _array(backtest["policies"]["greedy"]["probabilities"]).T
    return [
        _area(backtest["dates"][:-1], column, action, colour)
        for column, (action, colour) in zip(columns, ACTION_COLOURS.items(), strict=True)
    ]


def _price_figure(backtest: dict[str, Any]) -> dict:
    dates, blue = backtest["dates"], PALETTE["greedy"]
    position = _array(backtest["policies"]["greedy"]["position"])
    held = {"yaxis": "y2", "fill": "tozeroy", "fillcolor": blue + "50", "showlegend": False}
    traces = [
        _line(dates, _array(backtest["close"]), "close", PALETTE["random"], line={"width": 1.3}),
        _line(dates, position, "position", blue, line={"shape": "hv", "width": 1}, **held),
    ]
    for action in ACTION_COLOURS:
        trades = [trade for trade in backtest["trades"] if trade["action"] == action]
        if trades:
            traces.append(_trade_markers(trades, action))
    sides = {-1: "short", 0: "flat", 1: "long"}
    if backtest["positions"] == "long_flat":
        del sides[-1]
    below = {"domain": [0, 0.15], "range": [min(sides) - 0.15, 1.15], "showgrid": False}
    ticks = {"tickvals": list(sides), "ticktext": list(sides.values())}
    axes = {"xaxis": {"anchor": "y2"}, "yaxis": {"domain": [0.22, 1]}, "yaxis2": below | ticks}
    return {"data": traces, "layout": {"hovermode": "closest", **axes}}


def _trade_markers(trades: list[dict[str, Any]], action: str) -> dict[str, Any]:
    symbol = {"Sell": "triangle-down", "Hold": "diamond", "Buy": "triangle-up"}[action]
    return {
        "x": [trade["date"] for trade in trades],
        "y": [trade["price"] for trade in trades],
        "name": action,
        "mode": "markers",
        "marker": {"symbol": symbol, "color": ACTION_COLOURS[action], "size": 10},
        "text": [_number(trade["shares"]) for trade in trades],
        "hovertemplate": f"%{{x|%Y-%m-%d}}: {action} at %{{y:,.2f}}<br>"
        "%{text} shares held after it<extra></extra>",
    }


def _luck_figure(backtest: dict[str, Any]) -> dict:
    bars = {
        "x": _points(_array(backtest["random"]["sharpes"])),
        "type": "histogram",
        "nbinsx": 50,
        "name": "random policies",
        "marker": {"color": PALETTE["random"] + "90"},
        "hovertemplate": "Sharpe %{x}: %{y} policies<extra></extra>",
    }
    traces = [bars]
    for key, name in POLICIES.items():
        sharpe = backtest["policies"][key]["metrics"]["standard"]["sr"]
        if _finite(sharpe):
            label, line = (f"{name} {_number(sharpe)}", {"width": 2.5, "dash": DASHES[key]})
            upright = _line([sharpe] * 2, np.array([0.0, 1.0]), label, PALETTE[key], line=line)
            traces.append(upright | {"yaxis": "y2", "mode": "lines", "hoverinfo": "name"})
    axes = {
        "xaxis": {"title": {"text": "Sharpe ratio"}},
        "yaxis": {"title": {"text": "policies"}},
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False},
    }
    return {"data": traces, "layout": {"hovermode": "closest", **axes}}


def _training_figures(updates: list[dict[str, Any]]) -> dict[str, dict]:
    updates = updates[:: math.ceil(len(updates) / MOST_POINTS) or 1]
    steps = [update["step"] for update in updates]
    whole = {"dtick": 1} if len(steps) <= 10 else {}
    figures = {}
    for key, (title, _, axis) in CURVES.items():
        values = _array([update.get(key) for update in updates])
        if np.isfinite(values).any():
            colour = PALETTE["greedy" if key in ("return", "sharpe") else "training"]
            traces = [_line(steps, values, title, colour)]
            figures[key] = {"data": traces, "layout": {"xaxis": whole, "yaxis": axis}}
    phases = list(dict.fromkeys(name for update in updates for name in update["seconds"]))
    if phases:
        figures["seconds"] = _seconds_figure(updates, steps, phases)
    return figures


def _seconds_figure(updates: list[dict[str, Any]], steps: list[int], phases: list[str]) -> dict:
    seconds = _array([[update["seconds"].get(name) or 0 for name in phases] for update in updates])
    # The first update compiles; on a scale that shows it, the others would be invisible.
    top = 1.3 * float(np.percentile(seconds.sum(axis=1), 90)) or 1.0
    traces = [
        _area(steps, column, escape(name), colour)
        for column, name, colour in zip(seconds.T, phases, cycle(PHASE_COLOURS), strict=False)
    ]
    return {"data": traces, "layout": {"yaxis": {"range": [0, top], "ticksuffix": " s"}}}


def _training_section(updates: list[dict[str, Any]], figures: dict[str, dict]) -> str:
    if not updates:
        return "<section><h2>Training</h2><p>No update has been recorded yet.</p></section>"
    parts = [_figure(key, *CURVES[key][:2]) for key in CURVES if key in figures]
    if "seconds" in figures:
        total = sum(value or 0 for update in updates for value in update["seconds"].values())
        caption = f"{_number(total, 1)} s in all; the first update compiles."
        parts.append(_figure("seconds", "Seconds per phase", caption))
    return f'<section><h2>Training</h2><div class="grid">{"".join(parts)}</div></section>'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<title>$name - FastFLAG</title>
<style>
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --ink: #1b212a; --soft: #5a6573;
  --rule: #e2e6eb; --accent: #3b7ddd; }
@media (prefers-color-scheme: dark) { :root { --page: #101318; --card: #181d24; --ink: #e6eaf0;
  --soft: #9aa5b4; --rule: #2b323c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font-variant-numeric: tabular-nums;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { margin: 4px 0 16px; font-size: 30px; line-height: 1.2; text-wrap: balance; }
h2 { margin: 44px 0 14px; font-size: 20px; }
h3 { margin: 0; font-size: 15px; font-weight: 600; }
header p { margin: 0 0 10px; max-width: 78ch; }
header p + p, small, figcaption span, .tiles span { color: var(--soft); }
.run { color: var(--soft); font-size: 14px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 20px; margin: 22px 0 0;
  font-size: 14.5px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin-top: 28px; }
.tiles div, figure, .conventions, details { background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; }
.tiles div { padding: 14px 18px; }
.tiles h3 { color: var(--soft); font-size: 13.5px; font-weight: 500; }
.tiles strong { display: block; font-size: 27px; line-height: 1.3; font-weight: 650; }
.tiles span { font-size: 13.5px; }
figure { margin: 0 0 14px; padding: 16px 18px 10px; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 12px; align-items: baseline; }
figcaption span { font-size: 13.5px; }
figure > div { height: 300px; }
.equity > div { height: 380px; }
.price > div { height: 400px; }
.drawdown > div, .grid figure > div { height: 220px; }
.grid { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
.grid figure { margin: 0; }
.conventions { padding: 14px 18px; }
.conventions input { position: absolute; opacity: 0; }
.conventions label { display: inline-block; padding: 2px 12px; margin: 0 6px 8px 0;
  font-size: 13.5px; border: 1px solid var(--rule); border-radius: 99px; color: var(--soft);
  cursor: pointer; }
.conventions input:checked + label { border-color: var(--accent); color: var(--ink); }
.conventions input:focus-visible + label { outline: 2px solid var(--accent); }
.table { display: none; }
.conventions:has(input:nth-of-type(1):checked) .table:nth-of-type(1),
.conventions:has(input:nth-of-type(2):checked) .table:nth-of-type(2),
.conventions:has(input:nth-of-type(3):checked) .table:nth-of-type(3),
.conventions:has(input:nth-of-type(4):checked) .table:nth-of-type(4) { display: block; }
.scroll { overflow-x: auto; }
.tall { max-height: 480px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
th, td { padding: 9px 10px; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th:first-child { padding-left: 0; text-align: left; position: sticky; left: 0;
  background: var(--card); }
thead th { color: var(--soft); font-size: 13px; font-weight: 500; }
tbody th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
td small { display: block; font-size: 12.5px; }
.table > small { display: block; padding-top: 8px; border-top: 1px solid var(--rule); }
small { font-size: 13px; }
details { margin-top: 14px; padding: 12px 18px; }
summary { cursor: pointer; font-weight: 600; font-size: 15px; }
.news td { width: 100%; text-align: left; white-space: normal; overflow-wrap: anywhere; }
.news th { font-weight: 500; color: var(--soft); }
.news p { margin: 0 0 4px; }
pre { margin: 10px 0 0; overflow-x: auto; font-size: 13px; }
@media (max-width: 720px) {
  main { padding: 24px 14px 40px; }
  h1 { font-size: 24px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tiles div { padding: 12px 14px; }
  .tiles strong { font-size: 23px; }
  .grid { grid-template-columns: 1fr; }
  figure { padding: 14px 10px 6px; }
}
</style>
</head>
<body>
<main>
<header>
<div class="run">FastFLAG $version &middot; $name</div>
<h1>$title</h1>
$verdict
<dl>$facts</dl>
</header>
$backtest
$training
<section><h2>Details</h2>
$headlines
<details><summary>Configuration</summary><pre>$config</pre></details>
</section>
</main>
<script type="application/json" id="figures">$figures</script>
<script>$plotly</script>
<script>
const figures = JSON.parse(document.getElementById("figures").textContent);
const narrow = matchMedia("(max-width: 720px)"), dark = matchMedia("(prefers-color-scheme: dark)");

function look() {
  const css = getComputedStyle(document.documentElement);
  const [ink, soft, rule, card] = ["--ink", "--soft", "--rule", "--card"]
    .map(name => css.getPropertyValue(name).trim());
  const axis = { gridcolor: rule, zerolinecolor: rule, linecolor: rule, automargin: true,
    ticks: "outside", ticklen: 5, tickcolor: "rgba(0,0,0,0)",
    tickfont: { color: soft }, title: { font: { size: 12, color: soft }, standoff: 8 } };
  return { layout: {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    margin: { l: 44, r: 10, t: 8, b: 30 }, hovermode: "x unified",
    hoverlabel: { bgcolor: card, bordercolor: rule, font: { color: ink, size: 12 } },
    legend: { orientation: "h", x: 0, y: 1.03, yanchor: "bottom" },
    dragmode: narrow.matches ? false : "zoom",
    xaxis: { ...axis, showgrid: false, nticks: narrow.matches ? 5 : 0 },
    yaxis: { ...axis, nticks: 6 } } };
}

function draw() {
  const template = look();
  for (const [name, figure] of Object.entries(figures))
    Plotly.react(name, figure.data, { ...figure.layout, template },
      { responsive: true, displayModeBar: false });
}

draw();
narrow.addEventListener("change", draw);
dark.addEventListener("change", draw);
</script>
</body>
</html>
"""
