"""The report: its numbers are the backtest's, its text is inert, it is written whole or not."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fastflag import config as settings
from fastflag.evaluate.figures import backtest_figures
from fastflag.evaluate.report import write_report
from fastflag.files import InputError
from fastflag.market.tasks.single import ACTIONS

HOSTILE = (
    """<script>alert("1")</script> 'a' & </script><img src="https://evil.example/"> <!-- $name"""
)


def standard_metrics(equity):
    """Equity [T] or [episodes, T] -> metrics, by the plainest formulas."""
    returns = equity[..., 1:] / equity[..., :-1] - 1
    deviation = returns.std(axis=-1, ddof=1)
    downside = np.sqrt((np.minimum(returns, 0) ** 2).mean(axis=-1))
    cr = 100 * (equity[..., -1] / equity[..., 0] - 1)
    mdd = 100 * (1 - equity / np.maximum.accumulate(equity, axis=-1)).max(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "cr": cr,
            "sr": returns.mean(axis=-1) / deviation * math.sqrt(252),
            "av": 100 * deviation * math.sqrt(252),
            "mdd": mdd,
            "sortino": returns.mean(axis=-1) / downside * math.sqrt(252),
            "calmar": cr * 252 / returns.shape[-1] / mdd,
            "win_rate_daily": (returns > 0).mean(axis=-1),
        }


def plain(metrics):
    numbers = {key: float(value) for key, value in metrics.items()}
    standard = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
    return {"standard": standard, "flag": {**standard, "cr": 100 * math.log1p(numbers["cr"] / 100)}}


def spread(values):
    p05, p50, p95 = np.percentile(values, [5, 50, 95])
    return {"mean": float(values.mean()), "p05": float(p05), "p50": float(p50), "p95": float(p95)}


def band(equity):
    levels = np.percentile(equity, [5, 50, 95], axis=0)
    return dict(zip(("p05", "p50", "p95"), levels.tolist(), strict=True))


def long_flat_equity(close, position):
    """Equity of accounts that are in the market where `position` [..., T] is 1."""
    growth = 1 + position[..., 1:] * (close[1:] / close[:-1] - 1)
    first = np.full((*growth.shape[:-1], 1), 1e5)
    return np.concatenate([first, 1e5 * np.cumprod(growth, axis=-1)], axis=-1)


def make_backtest(days=150, seed=3, position=None):
    rng = np.random.default_rng(seed)
    dates = np.busday_offset("2020-10-01", np.arange(days), roll="forward").astype(str).tolist()
    close = 210 * np.exp(np.cumsum(rng.normal(0.0008, 0.016, days)))
    score = np.convolve(rng.normal(0, 1, days + 9), np.ones(10) / 3, "valid")
    if position is None:
        position = np.concatenate([[0], (score[:-1] > -0.4).astype(int)])
    position = np.asarray(position)
    logits = np.stack([-1.4 * score, 0.4 + 0 * score, 0.3 + 1.4 * score], axis=1)[:-1]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    change = np.diff(position)
    flips = rng.random((64, days)) < 0.15
    sampled = long_flat_equity(close, np.where(flips, 1 - position, position))
    chance = long_flat_equity(close, (rng.random((1000, days)) < 0.5).astype(float))
    greedy, hold = long_flat_equity(close, position), 1e5 * close / close[0]
    sharpes = standard_metrics(chance)["sr"]
    greedy_metrics = plain(standard_metrics(greedy))
    sampled_metrics = {key: spread(value) for key, value in standard_metrics(sampled).items()}
    ahead = [
        100 * float((sharpes < value).mean()) for value in (greedy_metrics["standard"]["sr"] or 0,)
    ]
    phrases = ("beats estimates on cloud growth", "faces antitrust question", "raises its dividend")
    return {
        "symbol": "AAPL",
        "action_names": ["Sell", "Hold", "Buy"],
        "split": "test",
        "start": dates[0],
        "end": dates[-1],
        "positions": "long_flat",
        "fill": "next_open",
        "dividends": "reinvest",
        "anonymised": True,
        "fee_bps": 1.0,
        "slippage_bps": 2.0,
        "dates": dates,
        "close": close.tolist(),
        "news": {
            day: [f"The company {phrases[i % 3]}"] * (1 + i % 2) for i, day in enumerate(dates)
        },
        "policies": {
            "greedy": {
                "equity": greedy.tolist(),
                "actions": [("Sell", "Hold", "Buy")[step + 1] for step in change],
                "probabilities": probabilities.tolist(),
                "position": position.tolist(),
                "metrics": greedy_metrics,
            },
            "buy_and_hold": {"equity": hold.tolist(), "metrics": plain(standard_metrics(hold))},
        },
        "sampled": {
            "episodes": 64,
            "equity": band(sampled),
            "metrics": {"standard": sampled_metrics, "flag": sampled_metrics},
        },
        "random": {
            "episodes": 1000,
            "equity": band(chance),
            "sharpe": {f"p{q:02}": float(np.percentile(sharpes, q)) for q in (5, 50, 95, 99)},
            "percentile": {"greedy": ahead[0], "sampled_median": 61.0},
            "sharpes": sharpes.tolist(),
        },
        "trades": [
            {
                "date": dates[day + 1],
                "action": "Buy" if step > 0 else "Sell",
                "price": float(close[day + 1] * 0.999),
                "shares": 476.19 * int(step),
            }
            for day, step in enumerate(change)
            if step
        ],
    }


def make_updates(count=62, seed=0):
    rng = np.random.default_rng(seed)
    updates = []
    for step in range(count):
        done = 1 - math.exp(-step / 15)
        noise = rng.normal(0, 0.03, 5)
        updates.append(
            {
                "step": step,
                "env_steps": (step + 1) * 256 * 63,
                "return": 0.05 + 0.3 * done + noise[0],
                "sharpe": 0.4 + 3 * done + 5 * noise[1],
                "entropy": 1.05 - 0.6 * done + noise[2],
                "kl": abs(0.01 + 0.2 * noise[3]),
                "clip_fraction": abs(0.04 + noise[4]),
                "policy_loss": -0.01,
                "value_loss": 0.2,
                "explained_variance": 0.5,
                "grad_norm": 0.4,
                "learning_rate": 5e-3 * (1 - step / count),
                "steps_per_second": 3e4,
                "seconds": {
                    "evaluate": (4.0 if step == 0 else 0.21) + abs(noise[0]),
                    "rollout": 0.004,
                    "advantage": 0.002,
                    "update": 0.32 + abs(noise[1]),
                },
            }
        )
    return updates


def make_run(folder, backtest=None, updates=None):
    folder.mkdir(parents=True, exist_ok=True)
    values = {**settings.to_dict(settings.PRESETS["default"]), "fastflag": "0.1.0"}
    (folder / "config.json").write_text(json.dumps(values))
    updates = make_updates() if updates is None else updates
    (folder / "metrics.jsonl").write_text("".join(json.dumps(update) + "\n" for update in updates))
    if backtest is not None:
        (folder / "backtest.json").write_text(json.dumps(backtest))
    return folder


class Page(HTMLParser):
    """The parts of a page that tests ask about. Scripts are opaque, as they are to a browser."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self.tables = [], "", [], {}
        self._stack, self._rows = [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "script":
            self.scripts.append("")
        if "data-convention" in attributes:
            self._rows = self.tables.setdefault(attributes["data-convention"], {})
        if tag == "tr":
            self._row, self._column = None, -1
        if tag == "td":
            self._column += 1
        if tag == "data" and self._row is not None:
            cells = self._rows[self._row].setdefault(self._column, [])
            cells.append([float(attributes["value"]), ""])
        self._stack.append(tag)

    def handle_endtag(self, tag):
        while self._stack and self._stack.pop() != tag:
            pass

    def handle_data(self, data):
        inside = self._stack[-1] if self._stack else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside != "style":
            self.text += data
        if inside == "th" and self._rows is not None and self._row is None:
            self._row = data
            self._rows.setdefault(data, {})
        if inside == "data" and self._row is not None:
            self._rows[self._row][self._column][-1][1] += data


def render(folder, **parts):
    return Page(write_report(make_run(folder, **parts)).read_text(encoding="utf-8"))


def figures(page):
    return json.loads(page.scripts[0])


COLUMNS = ("cr", "sr", "av", "mdd", "sortino", "calmar", "win_rate_daily")


@pytest.mark.parametrize("convention", ["standard", "flag"])
def test_table_shows_the_numbers_of_the_backtest(tmp_path, convention):
    backtest = make_backtest()
    table = render(tmp_path, backtest=backtest).tables[convention]
    for name, policy in (("Greedy", "greedy"), ("Buy-and-hold", "buy_and_hold")):
        for column, key in enumerate(COLUMNS):
            value = backtest["policies"][policy]["metrics"][convention][key]
            ((exact, shown),) = table[name][column]
            assert exact == value
            scale, digits = (100, 1) if key == "win_rate_daily" else (1, 2)
            assert float(shown.rstrip("%").replace("\N{MINUS SIGN}", "-")) == round(
                scale * value, digits
            )
    for column, key in enumerate(COLUMNS):
        summary = backtest["sampled"]["metrics"][convention][key]
        cells = table["Sampled, mean"][column]
        assert [exact for exact, _ in cells] == [summary["mean"], summary["p05"], summary["p95"]]


def test_random_policies_stand_in_the_standard_table(tmp_path):
    backtest = make_backtest()
    row = render(tmp_path, backtest=backtest).tables["standard"]["Random, median"]
    sharpe, equity = backtest["random"]["sharpe"], backtest["random"]["equity"]
    keys = ("p50", "p05", "p95")
    assert [exact for exact, _ in row[1]] == [sharpe[key] for key in keys]
    returns = [100 * (equity[key][-1] / equity[key][0] - 1) for key in keys]
    assert [exact for exact, _ in row[0]] == pytest.approx(returns)


def test_figures_show_the_backtest(tmp_path):
    backtest = make_backtest()
    drawn = figures(render(tmp_path, backtest=backtest))
    greedy = next(t for t in drawn["equity"]["data"] if t["name"] == "greedy")
    equity = np.array(backtest["policies"]["greedy"]["equity"])
    np.testing.assert_allclose(greedy["y"], equity / equity[0] - 1, rtol=1e-5)
    assert greedy["x"] == backtest["dates"]
    drawdown = next(t for t in drawn["drawdown"]["data"] if t["name"] == "greedy")
    deepest = backtest["policies"]["greedy"]["metrics"]["standard"]["mdd"]
    assert -100 * min(drawdown["y"]) == pytest.approx(deepest, rel=1e-5)
    bought = next(t for t in drawn["price"]["data"] if t["name"] == "Buy")
    buys = [trade for trade in backtest["trades"] if trade["action"] == "Buy"]
    assert bought["x"] == [trade["date"] for trade in buys]
    assert bought["y"] == [trade["price"] for trade in buys]
    assert [trace["name"] for trace in drawn["actions"]["data"]] == list(ACTIONS)
    assert drawn["actions"]["data"][2]["y"][0] == pytest.approx(
        backtest["policies"]["greedy"]["probabilities"][0][2], rel=1e-5
    )
    assert len(drawn["luck"]["data"][0]["x"]) == 1000


def test_actions_are_named_by_the_document():
    """A task of four actions; and a document of before, which names none."""
    backtest = make_backtest()
    greedy = backtest["policies"]["greedy"]
    greedy["probabilities"] = [[0.1, 0.2, 0.3, 0.4]] * 149
    backtest["action_names"] = ["Sell", "Hold", "Buy", "Double"]
    drawn = backtest_figures(backtest)["actions"].data
    assert [trace["name"] for trace in drawn] == backtest["action_names"]
    assert len({trace["fillcolor"] for trace in drawn}) == 4
    del backtest["action_names"]
    greedy["probabilities"] = [[0.1, 0.2, 0.7]] * 149
    drawn = backtest_figures(backtest)["actions"].data
    assert [trace["name"] for trace in drawn] == list(ACTIONS)


def test_hostile_text_stays_text(tmp_path):
    backtest = make_backtest()
    innocent = render(tmp_path / "innocent", backtest=backtest)
    backtest["symbol"] = backtest["split"] = HOSTILE
    backtest["news"][backtest["dates"][0]] = [HOSTILE]
    backtest["news"][HOSTILE] = [HOSTILE, HOSTILE]
    for part in (*backtest["policies"].values(), backtest["sampled"]):
        part["metrics"][HOSTILE] = part["metrics"]["flag"]
    updates = make_updates()
    updates[0]["seconds"][HOSTILE] = 1.0
    run = make_run(tmp_path / "hostile <b>", backtest, updates)
    values = settings.to_dict(settings.PRESETS["default"])
    values["data"]["data"] = values["policy"]["model"] = HOSTILE
    (run / "config.json").write_text(json.dumps({**values, "fastflag": HOSTILE}))
    page = Page(write_report(run).read_text(encoding="utf-8"))

    assert len(page.scripts) == len(innocent.scripts) == 3
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in innocent.tags}
    assert page.text.count(HOSTILE) >= 7
    assert not set("<>&") & set(page.scripts[0])
    names = [trace["name"] for trace in figures(page)["seconds"]["data"]]
    assert names[:4] == ["evaluate", "rollout", "advantage", "update"]
    assert not any("<" in name for name in names)  # plotly draws <a> and <b> in names as markup


def test_headline_cut_in_the_middle_of_a_character(tmp_path):
    backtest = make_backtest()
    backtest["news"] = {backtest["dates"][0]: ["Rocket \ud83d"]}
    assert "Rocket ?" in render(tmp_path, backtest=backtest).text


def test_page_fetches_nothing(tmp_path):
    page = render(tmp_path, backtest=make_backtest())
    fetching = ("src", "href", "srcset", "action", "data", "poster", "background")
    assert not [(tag, name) for tag, names in page.tags for name in names if name in fetching]
    assert "link" not in {tag for tag, _ in page.tags}
    styles = (
        write_report(tmp_path).read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    )
    assert "url(" not in styles and "@import" not in styles
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert sum("plotly.js v" in script for script in page.scripts) == 1


def test_run_without_backtest_shows_training_only(tmp_path):
    page = render(tmp_path)
    assert "Trained, not yet tested" in page.text
    assert list(figures(page)) == ["return", "sharpe", "entropy", "kl", "clip_fraction", "seconds"]
    drawn = {attributes.get("id") for _, attributes in page.tags}
    assert set(figures(page)) <= drawn
    assert page.tables == {}


def test_run_without_updates(tmp_path):
    page = render(tmp_path, updates=[], backtest=make_backtest())
    assert "No update has been recorded yet" in page.text
    assert list(figures(page)) == ["equity", "drawdown", "price", "actions", "luck"]
    assert "No update" in render(tmp_path / "bare", updates=[]).text


def test_missing_measures_and_undefined_numbers(tmp_path):
    updates = [{"step": 0, "return": math.nan, "sharpe": None, "seconds": {}}]
    updates.append({"step": 1, "return": 0.5, "seconds": {}})
    backtest = make_backtest(position=[0] * 150)
    backtest["policies"]["buy_and_hold"]["equity"][7] = None
    backtest["random"]["percentile"]["greedy"] = None
    backtest["sampled"]["metrics"]["standard"]["sr"] = None
    page = render(tmp_path, updates=updates, backtest=backtest)
    assert figures(page)["return"]["data"][0]["y"] == [None, 0.5]
    assert "sharpe" not in figures(page)
    assert 1 not in page.tables["standard"]["Greedy"]  # a dash, not a number
    assert "Always flat: it took no position" in page.text


def test_last_update_cut_off_by_a_kill_is_none(tmp_path):
    run = make_run(tmp_path, updates=make_updates(4))
    whole = write_report(run).read_bytes()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "env_st')
    assert write_report(run).read_bytes() == whole


def test_long_runs_are_thinned(tmp_path):
    page = render(tmp_path, updates=make_updates(4001))
    assert len(figures(page)["return"]["data"][0]["x"]) <= 2000
    assert "4,001 of 62 updates" in page.text


def with_sharpes(backtest, greedy, hold, percentile):
    backtest["policies"]["greedy"]["metrics"]["standard"]["sr"] = greedy
    backtest["policies"]["buy_and_hold"]["metrics"]["standard"]["sr"] = hold
    backtest["random"]["percentile"]["greedy"] = percentile
    return backtest


@pytest.mark.parametrize(
    ("sharpes", "title"),
    [
        ((1.3, 1.1, 80.0), "Ahead of buy-and-hold; within the reach of luck"),
        ((1.1, 1.3, 80.0), "Behind buy-and-hold; within the reach of luck"),
        (
            (2.1, 1.3, 97.5),
            "Ahead of buy-and-hold; ahead of 97.5% of random policies, on one window",
        ),
        ((-0.2, -0.1, 12.0), "Behind buy-and-hold; below the median random policy"),
        ((None, 1.0, 0.0), "No verdict: a Sharpe ratio is undefined"),
    ],
)
def test_verdict(tmp_path, sharpes, title):
    page = render(tmp_path, backtest=with_sharpes(make_backtest(), *sharpes), updates=[])
    assert title in page.text
    assert "One window and one seed prove little" in page.text


@pytest.mark.parametrize(
    ("position", "title"),
    [
        ([0] + [1] * 149, "Always long: buy-and-hold under another name"),
        ([0] + [1] * 146 + [0] * 3, "All but always long: buy-and-hold under another name"),
        ([0] * 30 + [1] * 120, "Bought once and held: buy-and-hold, begun later"),
    ],
)
def test_policy_that_is_buy_and_hold_is_called_that(tmp_path, position, title):
    page = render(tmp_path, backtest=make_backtest(position=position), updates=[])
    assert title in page.text


def test_always_short_and_training_days(tmp_path):
    backtest = {
        **make_backtest(position=[0] + [-1] * 149),
        "positions": "long_short",
        "split": "train",
    }
    page = render(tmp_path, backtest=backtest, updates=[])
    assert "On its own training days: always short: one bet against the market" in page.text
    assert "says nothing about other days" in page.text
    assert "100% short" in page.text


def test_cautions_name_what_flatters(tmp_path):
    backtest = {
        **make_backtest(),
        "anonymised": False,
        "fill": "same_close",
        "fee_bps": 0,
        "slippage_bps": 0,
    }
    text = render(tmp_path / "flattered", backtest=backtest, updates=[]).text
    sober = render(tmp_path / "sober", backtest=make_backtest(), updates=[]).text
    for words in (
        "may remember this period",
        "decided on, which flatters",
        "free of fees and slippage",
    ):
        assert words in text and words not in sober


@pytest.mark.parametrize(
    ("dividends", "told"),
    [
        (
            "reinvest",
            "reinvested at the close of their day, free of costs, for the policy, buy-and",
        ),
        ("cash", "idle until a position is next opened: where prices rise, buy-and-hold"),
        (None, "idle until a position is next opened: where prices rise, buy-and-hold"),
    ],
)
def test_what_became_of_dividends(tmp_path, dividends, told):
    """None: of a backtest from before there was a choice."""
    backtest = make_backtest() | {"dividends": dividends}
    if dividends is None:
        del backtest["dividends"]
    text = render(tmp_path, backtest=backtest, updates=[]).text
    assert "Dividends" in text and told in text


def test_a_report_of_an_old_run_names_its_rule(tmp_path):
    run = make_run(tmp_path, make_backtest())
    values = json.loads((run / "config.json").read_text())
    del values["simulator"]["dividends"]
    (run / "config.json").write_text(json.dumps(values))
    assert '"dividends": "cash"' in Page(write_report(run).read_text(encoding="utf-8")).text


def test_standard_error_of_the_sharpe_ratio(tmp_path):
    """Against the spread of Sharpe ratios of independent normal returns."""
    rng = np.random.default_rng(0)
    backtest = make_backtest()
    returns = rng.normal(0.001, 0.01, (4000, 149))
    sharpes = returns.mean(axis=1) / returns.std(axis=1, ddof=1) * math.sqrt(252)
    text = render(tmp_path, backtest=with_sharpes(backtest, sharpes.mean(), 1.0, 50.0)).text
    shown = float(text.split("standard error of this Sharpe ratio is about ")[1][:3])
    assert shown == pytest.approx(sharpes.std(), abs=0.07)


def broken(change):
    backtest = make_backtest()
    change(backtest)
    return json.dumps(backtest)


BROKEN = {
    "config truncated": ("config.json", lambda: '{"data": {'),
    "config not an object": ("config.json", lambda: "[]"),
    "config unknown key": ("config.json", lambda: '{"data": {"dta": 1}}'),
    "metrics truncated": (
        "metrics.jsonl",
        lambda: '{"step": 0, "sec\n{"step": 1, "seconds": {}}\n',
    ),
    "metrics not an object": ("metrics.jsonl", lambda: "3\n"),
    "metrics without step": ("metrics.jsonl", lambda: '{"seconds": {}}\n'),
    "metrics line break in a key": (
        "metrics.jsonl",
        lambda: '{"step": 0, "seconds": {"a\\nb": ""}}\n',
    ),
    "metrics text for number": (
        "metrics.jsonl",
        lambda: '{"step": 0, "seconds": {}, "kl": "low"}\n',
    ),
    "backtest truncated": ("backtest.json", lambda: broken(lambda b: None)[:5000]),
    "backtest empty": ("backtest.json", lambda: ""),
    "backtest without random": ("backtest.json", lambda: broken(lambda b: b.pop("random"))),
    "equity short": (
        "backtest.json",
        lambda: broken(lambda b: b["policies"]["greedy"]["equity"].pop()),
    ),
    "bad date": ("backtest.json", lambda: broken(lambda b: b["dates"].__setitem__(0, "soon"))),
    "bad action": ("backtest.json", lambda: broken(lambda b: b["trades"][0].update(action="<b>"))),
    "days out of order": ("backtest.json", lambda: broken(lambda b: b["dates"].reverse())),
    "no cash": (
        "backtest.json",
        lambda: broken(lambda b: b["random"]["equity"]["p05"].__setitem__(0, 0)),
    ),
    "huge number": ("backtest.json", lambda: broken(lambda b: b["close"].__setitem__(0, 10**400))),
    "metrics nested too deep": ("metrics.jsonl", lambda: "[" * 100_000 + "\n"),
    "bad number": ("backtest.json", lambda: broken(lambda b: b["close"].__setitem__(0, "high"))),
    "two probabilities": (
        "backtest.json",
        lambda: broken(lambda b: b["policies"]["greedy"]["probabilities"][4].pop()),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_one_line_and_leaves_the_report(tmp_path, case):
    name, content = BROKEN[case]
    run = make_run(tmp_path, make_backtest())
    report = run / "report.html"
    report.write_text("earlier")
    (run / name).write_text(content())
    with pytest.raises(InputError) as caught:
        write_report(run)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert report.read_text() == "earlier"
    assert sorted(path.name for path in run.iterdir()) == [
        "backtest.json",
        "config.json",
        "metrics.jsonl",
        "report.html",
    ]


PYTHON_S_OWN = re.compile(r"Error\(|object has no attribute|not subscriptable|indices must be")


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_told_in_words(case, tmp_path):
    name, content = BROKEN[case]
    run = make_run(tmp_path, make_backtest())
    (run / name).write_text(content())
    with pytest.raises(InputError) as caught:
        write_report(run)
    assert not PYTHON_S_OWN.search(str(caught.value))


def test_a_missing_key_is_named(tmp_path):
    run = make_run(tmp_path, make_backtest())
    (run / "backtest.json").write_text(broken(lambda b: b.pop("random")))
    with pytest.raises(InputError) as caught:
        write_report(run)
    told = "not as fastflag writes it ('random' is missing or not known)"
    assert str(caught.value) == f"{told}, {run / 'backtest.json'}"


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_missing_file(tmp_path, name):
    run = make_run(tmp_path)
    (run / name).unlink()
    with pytest.raises(InputError, match=name):
        write_report(run)


def test_report_is_replaced_whole(tmp_path, monkeypatch):
    run = make_run(tmp_path, make_backtest())
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_report(run)
    assert (run / "report.html").read_bytes() == first
    assert not list(Path(run).glob(".report*"))
