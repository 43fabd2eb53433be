"""The page's tables, as HTML. Text that comes from a file is escaped here."""

from html import escape
from typing import Any

from fastflag.evaluate.words import finite, number, percent

# Metric, heading, how it is shown.
_COLUMNS = (
    ("cr", "Return", percent),
    ("sr", "Sharpe", number),
    ("av", "Volatility", percent),
    ("mdd", "Max drawdown", percent),
    ("sortino", "Sortino", number),
    ("calmar", "Calmar", number),
    ("win_rate_daily", "Winning days", lambda value: percent(100 * value, 1)),
)
_NOTES = {
    "standard": "Simple returns, compounded; annualised by 252 days (crypto: 365). In brackets: "
    "5th and 95th percentile. Random policies: the two metrics kept of them.",
    "flag": "As FLAG-Trader reports itself: return is the sum of log returns.",
    "investorbench": "As InvestorBench reports: sums of log returns, volatility over 365 days.",
    "paper-bh": "As FLAG-Trader's paper reports buy-and-hold.",
}


def facts_list(facts: dict[str, str]) -> str:
    items = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{items}</dl>"


def tiles(backtest: dict[str, Any]) -> str:
    """The four numbers to see first."""
    policies = backtest["policies"]
    greedy, hold = (policies[key]["metrics"]["standard"] for key in ("greedy", "buy_and_hold"))
    shown = [
        ("Sharpe ratio", number(greedy["sr"]), f"buy-and-hold {number(hold['sr'])}"),
        ("Return", percent(greedy["cr"], 1), f"buy-and-hold {percent(hold['cr'], 1)}"),
        ("Max drawdown", percent(greedy["mdd"], 1), f"buy-and-hold {percent(hold['mdd'], 1)}"),
        (
            "Ahead of",
            percent(backtest["random"]["percentile"]["greedy"], 1),
            "of random policies, by Sharpe",
        ),
    ]
    items = "".join(
        f"<div><h3>{heading}</h3><strong>{value}</strong><span>{note}</span></div>"
        for heading, value, note in shown
    )
    return f'<div class="tiles">{items}</div>'


def metrics_tables(backtest: dict[str, Any]) -> str:
    """A table for each convention, and the buttons that choose between them."""
    names = list(backtest["policies"]["greedy"]["metrics"])
    buttons = "".join(
        f'<input type="radio" name="convention" id="convention-{index}"{" checked" * (index == 0)}>'
        f'<label for="convention-{index}">{escape(name)}</label>'
        for index, name in enumerate(names)
    )
    tables = "".join(_metrics_table(backtest, name) for name in names)
    return f'<div class="conventions">{buttons}{tables}</div>'


def _metrics_table(backtest: dict[str, Any], convention: str) -> str:
    policies = backtest["policies"]
    rows = {
        "Greedy": policies["greedy"]["metrics"][convention],
        "Sampled, mean": backtest["sampled"]["metrics"][convention],
        "Buy-and-hold": policies["buy_and_hold"]["metrics"][convention],
    }
    if convention == "standard":
        rows["Random, median"] = _random_metrics(backtest["random"])
    head = "".join(f'<th scope="col">{heading}</th>' for _, heading, _ in _COLUMNS)
    body = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f"<td>{_cell(row.get(key), shown)}</td>" for key, _, shown in _COLUMNS)
        + "</tr>"
        for name, row in rows.items()
    )
    return (
        f'<div class="table" data-convention="{escape(convention)}"><div class="scroll"><table>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<small>{_NOTES.get(convention, '')}</small></div>"
    )


_GROUPS = {"all": "All, in equal parts", "learnt": "Learnt from", "held_out": "Never seen"}
_OF_SYMBOLS = (
    "Return",
    "Buy-and-hold",
    "Sharpe",
    "Buy-and-hold",
    "Max drawdown",
    "Ahead of random",
    "Above holding, bp a day",
)


def symbols_table(backtest: dict[str, Any]) -> str:
    """A row a symbol, after those of the groups."""
    groups, symbols = backtest["groups"], backtest["symbols"]
    held_out = {*backtest["held_out"]}
    rows = [_symbol_row(f"<i>{_GROUPS[name]}</i>", told) for name, told in groups.items()]
    for name, told in symbols.items():
        note = "<small>never seen</small>" if name in held_out else ""
        rows.append(_symbol_row(escape(name) + note, told))
    head = "".join(f'<th scope="col">{heading}</th>' for heading in _OF_SYMBOLS)
    return (
        f'<div class="conventions"><div class="scroll tall"><table class="symbols"><thead><tr>'
        f"<th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<small>Of the greedy policy. The last column pairs each day with holding the same symbol; "
        "in brackets its standard error, of several symbols with days as clusters.</small></div>"
    )


def _symbol_row(name: str, told: dict[str, Any]) -> str:
    greedy, hold = (
        told["policies"][key]["metrics"]["standard"] for key in ("greedy", "buy_and_hold")
    )
    rank, paired = told["random"]["percentile"]["greedy"], told["paired"]
    error = paired["standard_error"]
    cells = (
        _cell(greedy["cr"], percent),
        _cell(hold["cr"], percent),
        _cell(greedy["sr"], number),
        _cell(hold["sr"], number),
        _cell(greedy["mdd"], percent),
        _cell(rank, lambda value: percent(value, 1)),
        _cell(1e4 * paired["mean"], lambda value: number(value, 1))
        + f"<small>({number(None if error is None else 1e4 * error, 1)})</small>",
    )
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{name}</th>{row}</tr>'


def _random_metrics(chance: dict[str, Any]) -> dict[str, dict[str, float]]:
    """`sr`, and `cr`: a percentile of the final equity is that percentile of the return."""
    keys, equity = ("p05", "p50", "p95"), chance["equity"]
    return {
        "cr": {key: 100 * (equity[key][-1] / equity[key][0] - 1) for key in keys},
        "sr": {key: chance["sharpe"][key] for key in keys},
    }


def _cell(value: Any, shown: Any) -> str:
    """A number, or the mean (where none is kept, the median) and the reach of several."""
    if isinstance(value, dict):
        low, high = (_cell(value[key], shown) for key in ("p05", "p95"))
        middle = value["mean"] if "mean" in value else value["p50"]
        return f"{_cell(middle, shown)}<small>[{low}, {high}]</small>"
    if not finite(value):
        return number(None)
    return f'<data value="{value!r}">{shown(value)}</data>'


def headlines(news: dict[str, list[str]]) -> str:
    """What the model was shown, day by day; empty where it was shown nothing."""
    count = sum(map(len, news.values()))
    if not count:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(day)}</th><td>'
        + "".join(f"<p>{escape(text)}</p>" for text in texts)
        + "</td></tr>"
        for day, texts in sorted(news.items())
    )
    return (
        f"<details><summary>Headlines shown to the model ({count:,})</summary>"
        f'<div class="scroll tall"><table class="news"><tbody>{rows}</tbody></table></div>'
        "</details>"
    )
