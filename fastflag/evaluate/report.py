"""A run in one self-contained page, RUN/report.html."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from fastflag import config as settings
from fastflag.evaluate.figures import Figure, backtest_figures, training_figures
from fastflag.evaluate.tables import facts_list, headlines, metrics_tables, symbols_table, tiles
from fastflag.evaluate.words import backtest_facts, training_facts, verdict
from fastflag.files import InputError, read_json, read_text, write_atomic
from fastflag.learn.checkpoint import read_state

_LOG = logging.getLogger(__name__)


def write_report(run: Path) -> Path:
    """Writes RUN/report.html from config.json, metrics.jsonl and, where it exists, backtest.json.

    The page fetches nothing: plotly.js is inside, and a content security policy bars the network.
    Raises InputError for a missing, truncated or inconsistent file; an earlier page then stays.
    """
    path = run / "config.json"
    with _refusing(path):
        values = read_json(path)
        version = str(values.get("fastflag", ""))
        config = settings.from_run(values, str(path))
    updates = read_updates(run)
    with _refusing(run / "metrics.jsonl"):
        facts, figures = training_facts(config, updates), training_figures(updates)
        parts = {"training": _training_section(figures)}
    path = run / "backtest.json"
    with _refusing(path):
        if path.exists():
            backtest = read_json(path)
            facts |= backtest_facts(backtest)
            drawn = backtest_figures(backtest)
            figures |= drawn
            parts |= _backtest_parts(backtest, drawn, outdated(run))
        else:
            parts |= _untested_parts()
    page = Template(_asset("report.html")).substitute(
        parts,
        name=escape(run.resolve().name),
        version=escape(version),
        facts=facts_list(facts),
        config=escape(json.dumps(settings.to_dict(config), indent=2)),
        figures=_script_json(figures),
        style=_asset("report.css"),
        plotly=get_plotlyjs(),
        script=_asset("report.js"),
    )
    # A headline cut in the middle of a surrogate pair has no UTF-8.
    write_atomic(run / "report.html", page.encode(errors="replace"))
    return run / "report.html"


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Raises InputError, with the file's name, for what a file of another shape leads to."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"not as fastflag writes it ({_told(error)}), {path}") from error


def _told(error: Exception) -> str:
    """In words, at most 200 characters: Python's own text of a missing key is the key alone."""
    if isinstance(error, KeyError):
        return f"{error!s:.150} is missing or not known"
    if isinstance(error, ArithmeticError):
        return "a number is 0 or too large"
    if isinstance(error, AttributeError | TypeError | IndexError):
        return "an entry is of another kind or length"
    return str(error)[:200]


def read_updates(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl but for a last one that a kill cut off: training drops it.

    Raises InputError for a missing or malformed file.
    """
    path, updates = run / "metrics.jsonl", []
    text = read_text(path)
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            updates.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"not valid JSON ({error}), {path}, line {number}") from None
    return updates


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def outdated(run: Path) -> str:
    """Where RUN/backtest.json is of another checkpoint than the run's last, that in words; else
    empty, as in a copy for reading, which has no checkpoint."""
    with suppress(InputError):
        backtest, (now, _) = read_json(run / "backtest.json"), read_state(run)
        if isinstance(backtest, dict) and (of := backtest.get("updates")) not in (None, now):
            return f"tested after {of} updates, now there are {now}: backtest it again"
    return ""


def warn_of_age(run: Path) -> None:
    if age := outdated(run):
        _LOG.warning("fastflag: %s, %s", age, run / "backtest.json")


def _backtest_parts(
    backtest: dict[str, Any], figures: dict[str, Figure], caution: str
) -> dict[str, str]:
    title, paragraphs = verdict(backtest)
    if caution:
        paragraphs = [f"{caution[0].upper()}{caution[1:]}.", *paragraphs]
    whole, news, symbols = backtest, backtest.get("news", {}), ""
    if "groups" in backtest:
        whole, symbols = backtest["groups"]["all"], symbols_table(backtest)
        symbols = f"<section><h2>Symbols</h2>{symbols}</section>"
        news = {
            f"{name} {day}": texts
            for name, told in backtest["symbols"].items()
            for day, texts in told["news"].items()
        }
    metrics = f"<section><h2>Metrics</h2>{metrics_tables(whole)}</section>"
    return {
        "title": escape(title),
        "verdict": "".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs),
        "backtest": f"{tiles(whole)}{symbols}{metrics}"
        f"<section><h2>Backtest</h2>{_frames(figures)}</section>",
        "headlines": headlines(news),
    }


def _untested_parts() -> dict[str, str]:
    return {
        "title": "Trained, not yet tested",
        "verdict": "<p>There is no backtest yet: only the training curves.</p>",
        "backtest": "",
        "headlines": "",
    }


def _training_section(figures: dict[str, Figure]) -> str:
    if not figures:
        return "<section><h2>Training</h2><p>No update has been recorded yet.</p></section>"
    return f'<section><h2>Training</h2><div class="grid">{_frames(figures)}</div></section>'


def _frames(figures: dict[str, Figure]) -> str:
    """Where report.js draws the figures."""
    return "".join(
        f'<figure class="{name}"><figcaption><h3>{figure.title}</h3><span>{figure.caption}</span>'
        f'</figcaption><div id="{name}" role="img" aria-label="{figure.title}"></div></figure>'
        for name, figure in figures.items()
    )


def _script_json(figures: dict[str, Figure]) -> str:
    """JSON in which nothing can end a <script> element or open a comment."""
    drawn = {name: {"data": f.data, "layout": f.layout} for name, f in figures.items()}
    text = json.dumps(drawn, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")
