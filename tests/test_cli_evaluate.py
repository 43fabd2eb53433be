"""What a finished run is asked, and a market: backtest, decide, report, metrics."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from commands import command, the_refusal, unchanged
from small import DATES, DAYS, TRAIN_DAYS, small_market, write_csv
from tiny_model import write_tiny_model

from fastflag import cli

pytestmark = pytest.mark.usefixtures("one_thread")


def test_backtest(run, capsys):
    stored = json.loads((run / "backtest.json").read_text())
    (run / "backtest.json").unlink()
    (run / "report.html").unlink()
    capsys.readouterr()
    cli.main(["backtest", str(run), "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((run / "backtest.json").read_text()) == stored
    assert printed.err == ""
    assert (run / "report.html").exists()
    assert stored["dates"] == DATES[TRAIN_DAYS:]

    with unchanged(run):
        cli.main(["backtest", str(run), "--split", "train", "--json"])
        assert json.loads(capsys.readouterr().out)["dates"] == DATES[:TRAIN_DAYS]
        cli.main(["backtest", str(run), "--split", f"{DATES[3]}..{DATES[5]}"])
        shown = capsys.readouterr().out
    assert f"{DATES[3]} to {DATES[5]}" in shown and "random policies" in shown


@pytest.mark.parametrize(
    ("split", "told"),
    [
        ("tomorrow", "'tomorrow' is neither train, test nor START..END, --split"),
        ("", "is neither train, test nor START..END"),
        (f"{DATES[5]}..{DATES[5]}", "a backtest needs two days"),
        (f"{DATES[5]}..{DATES[4]}", f"start after end, --split {DATES[5]}..{DATES[4]}"),
        (f"{DATES[5]}..2030-01-01", f"--split {DATES[5]}..2030-01-01 is not inside the data"),
        ("..", "not a date"),
    ],
)
def test_backtest_refuses(split, told, run, refused):
    with unchanged(run):
        assert told in refused("backtest", run, "--split", split, "--json")


def moved(bars, folder, change=lambda frame: frame):
    """The run's bars and news under other names, the bars changed."""
    frame = change(pd.read_csv(bars))
    frame.to_parquet(folder / "elsewhere.parquet")
    shutil.copy(bars.with_suffix(".news.csv"), folder / "elsewhere.news.csv")
    return f"parquet:{folder / 'elsewhere.parquet'}"


def longer(frame):
    last = frame.iloc[[-1]].assign(date="2001-02-26")
    return pd.concat([frame, last], ignore_index=True)


def revised(day):
    def change(frame):
        frame.loc[day, "volume"] += 1
        return frame

    return change


@pytest.mark.parametrize("change", [pd.DataFrame.copy, longer, revised(TRAIN_DAYS)])
def test_a_run_whose_bars_have_moved(change, run, bars, tmp_path, capsys):
    """Other names, formats and later days make no other market."""
    cli.main(["backtest", str(run), "--json"])
    stored = json.loads(capsys.readouterr().out)
    data = moved(bars, tmp_path, change)
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["data"] = "csv:gone.csv"
    (run / "config.json").write_text(json.dumps(settings))
    cli.main(["backtest", str(run), "--json", "--data", data])
    shown = capsys.readouterr()
    assert shown.err == ""
    assert json.loads(shown.out)["policies"] == stored["policies"]
    assert json.loads((run / "backtest.json").read_text()) == json.loads(shown.out)
    cli.main(["decide", str(run), "--data", data, "--date", DATES[30]])
    assert capsys.readouterr().err == ""


OTHER_MARKET = "the training days' bars or news are not those that the run was trained on"


def test_bars_that_are_not_those_trained_on(run, bars, tmp_path, refused, capsys):
    data = moved(bars, tmp_path, revised(TRAIN_DAYS - 1))
    for words in (["--data", data], ["--data", data, "--split", "train"]):
        with unchanged(run):
            message = refused("backtest", run, *words)
        assert message.startswith(OTHER_MARKET) and message.endswith(data)
        assert "--split START..END" in message
    news = pd.read_csv(bars.with_suffix(".news.csv")).iloc[1:]
    news.to_csv(tmp_path / "less.csv", index=False)
    with unchanged(run):
        assert refused("backtest", run, "--news", tmp_path / "less.csv").startswith(OTHER_MARKET)
        period = f"{DATES[26]}..{DATES[30]}"
        cli.main(["backtest", str(run), "--data", data, "--split", period, "--json"])
        assert json.loads(capsys.readouterr().out)["dates"] == DATES[26:31]
        cli.main(["decide", str(run), "--data", data, "--date", DATES[30], "--json"])
    shown = capsys.readouterr()
    assert json.loads(shown.out)["date"] == DATES[30]
    assert shown.err == f"fastflag: {OTHER_MARKET}, {data}\n"
    told = refused("decide", run, "--data", data, "--date", "soon")
    assert told == "not a date (YYYY-MM-DD), --date 'soon'"


def test_bars_of_the_last_days_alone_decide(run, bars, tmp_path, capsys, refused):
    data = moved(bars, tmp_path, lambda frame: frame.iloc[20:])
    cli.main(["decide", str(run), "--data", data, "--date", DATES[38]])
    assert capsys.readouterr().err == ""
    assert "is not inside the data" in refused("backtest", run, "--data", data)


def test_a_run_whose_model_has_moved(run, tiny_model, tmp_path, capsys, refused):
    cli.main(["decide", str(run), "--date", DATES[30], "--json"])
    own = capsys.readouterr().out
    settings = json.loads((run / "config.json").read_text())
    settings["policy"]["model"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(settings))
    told = refused("decide", run, "--date", DATES[30])
    assert told == f"no such folder or file, {tmp_path / 'gone'}"
    model = shutil.copytree(tiny_model, tmp_path / "here")
    words = ["--model", str(model)]
    cli.main(["decide", str(run), "--date", DATES[30], "--json", *words])
    assert capsys.readouterr().out == own
    cli.main(["backtest", str(run), *words])
    tokenizer = (model / "tokenizer.json").read_text()
    other = write_tiny_model(tmp_path / "other", tokenizer, seed=1)
    assert "other model weights" in refused("backtest", run, "--model", other)


# What a file's owner may do, root too.
NO_PRIVILEGE = (
    "import ctypes\n"
    "header = (ctypes.c_uint32 * 2)(0x20080522, 0)\n"
    "assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0"
)


def test_a_run_that_can_not_be_written(run, tmp_path):
    run.chmod(0o555)
    try:
        with unchanged(run):
            done = command("backtest", run, cwd=tmp_path, prepare=NO_PRIVILEGE)
            assert done.returncode == 0, done.stderr
            assert "random policies" in done.stdout
            told = f"fastflag: not written: Permission denied, {run}/backtest.json\n"
            assert done.stderr == told
            done = command("report", run, cwd=tmp_path, prepare=NO_PRIVILEGE)
            told = the_refusal(done.returncode, done.stdout, done.stderr)
            assert told == f"Permission denied, {run}/report.html"
    finally:
        run.chmod(0o755)


def test_a_tilde_is_the_home_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    cli.main(["report", "~/run"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "run/report.html")


def test_decide(run, capsys):
    with unchanged(run):
        cli.main(["decide", str(run), "--date", DATES[30], "--json"])
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert (printed.out.count("\n"), printed.err) == (1, "")
    assert list(document) == ["date", "action", "probabilities", "value"]
    probabilities = document["probabilities"]
    assert document["date"] == DATES[30]
    assert list(probabilities) == ["Sell", "Hold", "Buy"]
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert probabilities["Sell"] == 0  # nothing is held
    assert document["action"] == max(probabilities, key=probabilities.get)

    held = ["--position", "long", "--entry", "100", "--since", DATES[28]]
    cli.main(["decide", str(run), "--date", DATES[30], "--json", *held])
    long = json.loads(capsys.readouterr().out)
    assert long["probabilities"]["Buy"] == 0 < long["probabilities"]["Sell"]
    cli.main(["decide", str(run), "--date", DATES[30]])
    assert capsys.readouterr().out.startswith(f"{DATES[30]}  {document['action']}  (Sell 0.000")


def test_decide_on_other_bars(run, bars, tmp_path, capsys):
    """--data takes other bars with the news beside them, --news other news of the run's bars."""

    def decide(*arguments: object) -> dict:
        words = ["decide", run, "--date", DATES[30], "--json", *arguments]
        cli.main([str(word) for word in words])
        return json.loads(capsys.readouterr().out)

    own = decide()
    copy = shutil.copy(bars, tmp_path / "copy.csv")
    without_news = decide("--data", f"csv:{copy}")
    assert without_news != own
    news = bars.with_suffix(".news.csv")
    assert decide("--data", f"csv:{copy}", "--news", news) == own
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["news"] = str(news)  # of the run's bars, not of others
    (run / "config.json").write_text(json.dumps(settings))
    assert decide("--data", f"csv:{copy}") == without_news
    news = pd.read_csv(news).assign(text="Factory fire halts output")
    news.to_csv(tmp_path / "fires.csv", index=False)
    assert decide("--news", tmp_path / "fires.csv") not in (own, without_news)
    several = pd.concat([pd.read_csv(bars).assign(symbol=name) for name in ("BARS", "OTHER")])
    several.to_csv(tmp_path / "several.csv", index=False)
    several = ["--data", f"csv:{tmp_path / 'several.csv'}", "--symbol", "OTHER"]
    assert decide(*several) == without_news


def test_a_later_symbol_or_weekend_changes_no_earlier_decision(trained, tmp_path, capsys):
    whole = small_market()
    day = pd.Timestamp(DATES[30])
    frame = pd.DataFrame(
        {"date": pd.to_datetime(whole.dates), "symbol": "BARS"}
        | {name: getattr(whole, name)[:, 0] for name in ("open", "high", "low", "close")}
    )
    saturday = frame.iloc[[-1]].assign(date=pd.Timestamp("2001-02-24"))
    later = frame.iloc[35:].assign(symbol="FORECAST")
    files = {
        "cut": frame[frame["date"] <= day],
        "whole": frame,
        "saturday": pd.concat([frame, saturday]),
        "another": pd.concat([frame, later]),
    }
    told = []
    for name, bars in files.items():
        (tmp_path / name).mkdir()
        path = tmp_path / name / "bars.csv"
        bars.to_csv(path, index=False)
        news = pd.DataFrame(
            [
                (f"{DATES[n]} 18:30", f"{DATES[n]} 18:30", "BARS", f"FORECAST {n}")
                for n in range(30)
            ],
            columns=["published", "available", "symbol", "text"],
        )
        news.to_csv(path.with_suffix(".news.csv"), index=False)
        words = ["--data", f"csv:{path}", "--symbol", "BARS", "--date", DATES[30], "--json"]
        cli.main(["decide", str(trained), *words])
        told.append(json.loads(capsys.readouterr().out))
    assert told[1:] == told[:-1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--date", "2001-02-03"], "2001-02-03 is not a day of the data (2001-01-01 to"),
        (["--date", "1999-01-04"], "1999-01-04 is not a day of the data"),
        (["--date", "soon"], "not a date (YYYY-MM-DD), --date 'soon'"),
        (["--date", "today"], "not a date"),
        (["--date", "2001-02"], "not a date"),
        (["--date", "2001-02-30"], "not a date"),
        (["--date", ""], "not a date"),
        (["--date", DATES[9], "--position", "long"], "needs the price it was entered at, --entry"),
        (["--date", DATES[9], "--position", "long", "--entry", "5"], "needs the day it was"),
        (["--date", DATES[9], "--entry", "5"], "a flat position has no entry"),
        (["--date", DATES[9], "--entry", "nan"], "not a price (1e-15 to 1e+15), --entry nan"),
        (["--date", DATES[9], "--entry", "inf"], "not a price (1e-15 to 1e+15), --entry inf"),
        (["--date", DATES[9], "--position", "long", "--entry=-3"], "1e+15), --entry -3.0"),
        (["--date", DATES[9], "--since", DATES[8]], "a flat position has no entry"),
        (["--date", DATES[9], "--data", "csv:none.csv"], "No such file or directory, none.csv"),
        (["--date", DATES[9], "--news", "none.csv"], "No such file or directory, none.csv"),
        (["--date", DATES[9], "--data", "sample:IBM", "--symbol", "TWO"], "unknown symbol 'TWO'"),
        (["--date", DATES[9], "--position", "sideways"], "invalid choice 'sideways'"),
    ],
)
def test_decide_refuses(flags, told, trained, refused):
    assert told in refused("decide", trained, "--json", *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_of_a_gpu_is_read_without_one(run, refused, capsys):
    document = json.loads((run / "config.json").read_text())
    document["policy"]["device"] = "cuda"
    (run / "config.json").write_text(json.dumps(document))
    told = []
    for words in (["decide", "--date", DATES[30], "--json"], ["backtest", "--json"]):
        cli.main([words[0], str(run), *words[1:]])
        told.append(json.loads(capsys.readouterr().out))
        no_gpu = refused(words[0], run, *words[1:], "--device", "cuda")
        assert no_gpu == "no CUDA GPU is available, --device cuda"
    assert told[0]["date"] == DATES[30] and told[1]["split"] == "test"


def test_report(run, capsys):
    (run / "report.html").unlink()
    cli.main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "backtest.json"])
@pytest.mark.parametrize("content", ["{", '{"step": 1}'])
def test_report_refuses(name, content, run, refused):
    """What was cut off or is something else; of the log, another line than its last."""
    rest = (run / name).read_text() if name == "metrics.jsonl" else ""
    (run / name).write_text(f"{content}\n{rest}")
    with unchanged(run):
        assert name in refused("report", run)


PAPER = {  # paper.md: CR, SR, AV, MDD of buy-and-hold over the test period
    ("msft", "flag"): (16.654, 1.129, 24.946, 9.428),
    ("jnj", "paper-bh"): (13.895, 1.343, 17.500, 9.847),
    ("btc", "paper-bh"): (21.822, 0.683, 37.426, 20.796),
}


@pytest.mark.parametrize(("symbol", "convention"), PAPER)
def test_metrics_are_the_papers(symbol, convention, investorbench, capsys):
    days = ("2023-04-05", "2023-11-05") if symbol == "btc" else ("2020-10-01", "2021-05-06")
    words = ["--data", f"investorbench:{investorbench / symbol}.json", "--convention", convention]
    cli.main(["metrics", *words, "--start", days[0], "--end", days[1], "--json"])
    values = json.loads(capsys.readouterr().out)
    cells = tuple(round(values[name], 3) for name in ("cr", "sr", "av", "mdd"))
    assert cells == PAPER[symbol, convention]


def test_metrics_of_a_price_that_stands_still(tmp_path, capsys):
    """A Sharpe ratio that is not defined is null: NaN is no JSON."""
    market = small_market()
    flat = {name: np.full_like(market.close, 50.0) for name in ("open", "high", "low", "close")}
    path = write_csv(dataclasses.replace(market, **flat), tmp_path / "flat.csv")
    cli.main(["metrics", "--data", f"csv:{path}", "--json"])
    values = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (values["cr"], values["sr"], values["days"]) == (0, None, DAYS - 1)
    cli.main(["metrics", "--data", f"csv:{path}", "--start", DATES[0], "--end", DATES[0], "--json"])
    assert set(json.loads(capsys.readouterr().out).values()) == {None, 0}
    cli.main(["metrics", "--data", f"csv:{path}"])
    assert "sr  -" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--start", "soon"], "not a date (YYYY-MM-DD), --start..--end 'soon'"),
        (["--start", "1999-01-01"], f"--start..--end 1999-01-01..{DATES[-1]} is not inside the"),
        (["--start", "2030-01-01"], f"--start..--end 2030-01-01..{DATES[-1]} is not inside the"),
        (
            ["--start", DATES[5], "--end", DATES[4]],
            f"start after end, --start..--end {DATES[5]}..{DATES[4]}",
        ),
        (["--symbol", "TWO", "--data", "sample:AAPL"], "unknown symbol 'TWO' of AAPL"),
    ],
)
def test_metrics_refuses(flags, told, bars, refused):
    assert told in refused("metrics", "--data", f"csv:{bars}", "--json", *flags)
