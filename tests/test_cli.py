"""The commands as a user meets them: what they print, what they refuse, what they leave alone."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from planted import write_tiny_model
from safetensors.torch import load_file
from small import DAYS, TRAIN_DAYS, small_config, small_market, write_csv

import fastflag
from fastflag import cli
from fastflag.config import PRESETS, PlanConfig, PolicyConfig, TrainConfig, from_dict, to_dict
from fastflag.evaluate.doctor import plan
from fastflag.learn.run import claim
from fastflag.policy.ops import IMPLEMENTATIONS

ROOT = Path(__file__).resolve().parents[1]
DATES = [str(date) for date in small_market().dates]
TEST_DAYS = DAYS - TRAIN_DAYS


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bars(tmp_path_factory) -> Path:
    """A small market's CSV, with news beside it."""
    return write_csv(small_market(), tmp_path_factory.mktemp("market") / "bars.csv")


@pytest.fixture(scope="module")
def config(bars, tiny_model) -> TrainConfig:
    return small_config(tiny_model, data__data=f"csv:{bars}")


@pytest.fixture(scope="module")
def config_file(config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    return path


@pytest.fixture(scope="module")
def trained(config_file, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    cli.main(["train", "--out", str(out), "--config", str(config_file)])
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs a command line that must be refused, and returns what it says without its beginning."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return the_refusal(stop.value.code, printed.out, printed.err)

    return call


def the_refusal(code: int, out: str, error: str) -> str:
    assert (code, out) == (2, ""), error
    assert error.startswith("fastflag: error: ") and error.count("\n") == 1, error
    assert "Traceback" not in error
    return error.removeprefix("fastflag: error: ").rstrip("\n")


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Inside, no file of the folder is written, made or taken away."""

    def content() -> dict[str, bytes | None]:
        paths = sorted(folder.rglob("*"))
        return {str(path): path.read_bytes() if path.is_file() else None for path in paths}

    before = content()
    yield
    assert content().keys() == before.keys()
    assert content() == before


def command(*arguments: object, cwd: Path, prepare: str = "") -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, after the statements of `prepare`."""
    words = [str(argument) for argument in arguments]
    code = f"{prepare}\nfrom fastflag.cli import main\nmain({words})"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )


# What works


def test_train_leaves_a_whole_run(trained, config):
    names = {path.name for path in trained.iterdir()}
    expected = {"config.json", "metrics.jsonl", "checkpoint", "tensorboard"}
    assert names == expected | {"backtest.json", "report.html"}
    document = json.loads((trained / "config.json").read_text())
    assert document == to_dict(config) | {"fastflag": fastflag.__version__}
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").open()]
    assert steps == list(range(config.steps))
    state = json.loads((trained / "checkpoint" / "state.json").read_text())
    assert state["step"] == config.steps
    assert sorted(os.listdir(trained / "checkpoint")) == [state["tensors"], "state.json"]
    assert (trained / "report.html").stat().st_size > 1e6


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


def test_report(run, capsys):
    (run / "report.html").unlink()
    cli.main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").exists()


def test_doctor(capsys):
    cli.main(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["ops"].keys() == IMPLEMENTATIONS.keys()
    assert all(entry["implementation"] and entry["reason"] for entry in document["ops"].values())
    assert document["packages"]["torch"] == importlib.metadata.version("torch")
    assert document["machine"]["fastflag"] == fastflag.__version__
    cli.main(["doctor"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*document["ops"], document["packages"]["torch"]))


def test_doctor_plans(smollm, capsys):
    words = ["doctor", "--plan", "--model", smollm, "--top-layers", "3", "--days", "5"]
    cli.main([*words, "--json"])
    document = json.loads(capsys.readouterr().out)
    config = PolicyConfig(model=smollm, top_layers=3)
    assert document == plan(config, "adamw", PlanConfig(days=5))
    assert document["total"] == sum(document["parts"].values())
    cli.main(words)
    shown = dict(re.findall(r"^  ([a-z ]+?) +([\d,.]+)$", capsys.readouterr().out, re.MULTILINE))
    wanted = document["parts"] | {"total": document["total"]}
    for name, size in wanted.items():
        assert shown[name.replace("_", " ")] == f"{size / 1024**2:,.1f}"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--plan", "--model", "none"], "no such folder or file, none"),
        (["--plan", "--top-layers", "3"], "top_layers must be 1 to 2, not 3"),
        (["--plan", "--days", "0"], "days must be at least 1 and at most"),
        (
            ["--plan", "--prefix-tokens", "2033"],
            "a prompt has 2049 tokens, the model reads 2048: lower --prefix-tokens or",
        ),
    ],
)
def test_doctor_refuses_a_plan(flags, told, tiny_model, refused):
    assert told in refused("doctor", "--model", tiny_model, *flags)


@pytest.mark.parametrize("flags", ["--top-layers 1", "--texts 3 --json", "--optimizer adamw8bit"])
def test_doctor_refuses_what_only_a_plan_needs(flags, refused):
    assert refused("doctor", *flags.split()) == "settings of a policy need --plan, doctor"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_usage_names_every_command(arguments, capsys):
    cli.main(arguments)
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)


def test_help_of_every_command(capsys):
    for name in cli.COMMANDS:
        cli.main([name, "--help"])
        assert f"usage: fastflag {name}" in capsys.readouterr().out
    cli.main(["--version"])
    assert capsys.readouterr().out.strip() == fastflag.__version__


def test_flags_go_over_the_config_over_the_preset(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"algorithm": {"gamma": 0.5, "gae_lambda": 0.6}, "seed": 4}))
    seen = []
    monkeypatch.setattr(cli.Train, "run", lambda self: seen.append(self.settings))
    flags = ["--preset", "paper", "--config", str(path), "--gamma", "0.7"]
    cli.main(["train", "--out", "x", *flags])
    cli.main(["train", f"--config={path}", "--preset=paper", "--gamma=0.7", "--out=x"])
    cli.main(["train", "--out", "x", "--preset", "demo", "--config", "none", *flags])
    for settings in seen:
        algorithm = settings.algorithm
        assert (algorithm.gamma, algorithm.gae_lambda, settings.seed) == (0.7, 0.6, 4)
        assert algorithm.ent_coef == PRESETS["paper"].algorithm.ent_coef != 0.01
    cli.main(["train", "--out", "x"])
    assert seen[-1] == TrainConfig()
    cli.main(["train", "--out", "x", "--no-anonymise", "--num_envs", "8", "--symbol", ""])
    assert (seen[-1].prompt.anonymise, seen[-1].rollout.num_envs) == (False, 8)
    # A run's own config.json can be given as it is.
    path.write_text(json.dumps(to_dict(PRESETS["paper"]) | {"fastflag": "0.1.0"}))
    cli.main(["train", "--out", "x", "--config", str(path)])
    assert seen[-1] == PRESETS["paper"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_at_least_once(preset, monkeypatch):
    seen = []
    monkeypatch.setattr(cli.Train, "run", lambda self: seen.append(self.settings))
    cli.main(["train", "--out", "x", "--preset", preset])
    assert seen == [PRESETS[preset]]
    assert seen[0].steps > 0


def test_an_interrupted_run_goes_on_to_the_same_weights(
    trained, config_file, tmp_path, monkeypatch, capsys
):
    from fastflag.learn.progress import Log

    real = Log.step
    words = ["train", "--out", str(tmp_path / "run"), "--config", str(config_file)]

    def interrupt_third(self, record):
        if record["step"] == 2:
            raise KeyboardInterrupt
        real(self, record)

    monkeypatch.setattr(Log, "step", interrupt_third)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    cli.main([*words, "--resume"])
    tensors = [
        load_file(next((folder / "checkpoint").glob("*.safetensors")))
        for folder in (trained, tmp_path / "run")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(
        torch.equal(torch.nan_to_num(tensors[0][k]), torch.nan_to_num(tensors[1][k]))
        for k in tensors[0]
    )
    capsys.readouterr()
    cli.main([*words, "--resume"])  # a finished run is only looked at again
    assert "update" not in capsys.readouterr().out


def test_nobody_reads_the_output(bars, tmp_path):
    """As in `fastflag metrics | true`."""
    prepare = "import os\nreading, writing = os.pipe()\nos.dup2(writing, 1)\nos.close(reading)"
    done = command("metrics", "--data", f"csv:{bars}", cwd=tmp_path, prepare=prepare)
    assert (done.returncode, done.stderr) == (141, "")


def test_ctrl_c_while_the_command_line_is_imported(tmp_path):
    (tmp_path / "tyro.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)")
    done = subprocess.run(
        [sys.executable, "-m", "fastflag", "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


FULL_DISK = "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), {})"
NO_SPACE = "No space left on device, standard output"


@pytest.mark.parametrize(("descriptor", "terminal"), [(1, False), (1, True), (2, True)])
def test_a_training_does_not_end_for_its_output(
    descriptor, terminal, trained, config_file, tmp_path, monkeypatch
):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    words = ["train", "--out", "run", "--config", config_file]
    done = command(*words, cwd=tmp_path, prepare=FULL_DISK.format(descriptor))
    told = f"fastflag: {NO_SPACE}\n" if descriptor == 1 else ""
    assert done.returncode == 0 and done.stderr.endswith(told), done.stderr
    assert "Traceback" not in done.stderr
    written = [sorted(path.name for path in run.iterdir()) for run in (trained, tmp_path / "run")]
    assert written[0] == written[1]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["metrics", "--data", "BARS", "--json"], ["train", "--help"]])
def test_a_result_that_can_not_be_written(words, unbuffered, bars, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    words = [word.replace("BARS", f"csv:{bars}") for word in words]
    done = command(*words, cwd=tmp_path, prepare=FULL_DISK.format(1))
    assert the_refusal(done.returncode, done.stdout, done.stderr) == NO_SPACE
    assert command("--version", cwd=tmp_path, prepare=FULL_DISK.format(2)).returncode == 0
    assert command("metrics", "-x", cwd=tmp_path, prepare=FULL_DISK.format(2)).returncode == 2


def test_a_closed_stdout(tmp_path):
    """As in `fastflag --version >&-`."""
    done = command("--version", cwd=tmp_path, prepare="import sys\nsys.stdout = None")
    assert the_refusal(done.returncode, "", done.stderr) == "not writable, standard output"


# What is refused


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "unknown command 'trian', one of train, backtest"),
        (["--jsn"], "unknown command '--jsn'"),
        (["train"], "Missing from fastflag train: --out PATH, see fastflag train --help"),
        (["train", "--out"], "Missing value for argument '--out'"),
        (["train", "--out", "x", "--nope", "3"], "Unrecognized options: --nope, 3, see"),
        (["train", "--out", "x", "y"], "Unrecognized options: y"),
        (["train", "--ou", "x"], "Missing from fastflag train: --out PATH; Unrecognized options"),
        (["train", "--out", "x", "--resum"], "Perhaps you meant: --resume"),
        (["train", "--out", "x", "--horizon", "1e3"], "--horizon: invalid literal for int()"),
        (["train", "--out", "x", "--horizon", "2.5"], "--horizon: invalid literal for int()"),
        (["train", "--out", "x", "--cash", "much"], "--cash: could not convert string to float"),
        (["train", "--out", "x", "--fill", "now"], "'--fill'. Expected one of ('next_open',"),
        (["train", "--out", "x", "--preset", "best"], "unknown preset 'best', one of default,"),
        (["train", "--out", "x", "--preset"], "Missing value for argument '--preset'"),
        (["train", "--out", "x", "--config"], "Missing value for argument '--config'"),
        (["train", "--out", "x", "--window"], "Missing value for argument '--window'"),
        (["backtest"], "Missing from fastflag backtest: PATH"),
        (["decide", "run"], "Missing from fastflag decide: --date STR"),
        (["metrics", "--convention", "best"], "Expected one of ('standard', 'flag',"),
        (["metrics", "--jsn"], "Perhaps you meant: --json"),
        (["report", "a", "b"], "Unrecognized options: b"),
        (["doctor", "--fix"], "Unrecognized options: --fix"),
    ],
)
def test_refused_flags(arguments, told, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with unchanged(tmp_path):
        assert told in refused(*arguments)


def test_refusals_do_not_depend_on_the_terminal(tmp_path):
    words = ["train", "--out", "x", "--positions", "sideways"]
    told = []
    for variables in ("COLUMNS='40'", "COLUMNS='200'", "PYTHONIOENCODING='ascii'"):
        done = command(*words, cwd=tmp_path, prepare=f"import os; os.environ.update({variables})")
        told.append(the_refusal(done.returncode, done.stdout, done.stderr))
    assert set(told) == {
        "invalid choice 'sideways' for argument '--positions'. "
        "Expected one of ('long_flat', 'long_short'), see fastflag train --help"
    }


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--window", "0"], "window must be at least 1 and at most 1,000, not 0, --window"),
        (["--window", "100000"], "not 100000, --window"),
        (["--news-tokens=-1"], "news_tokens must be at least 0"),
        (["--fee-bps=-1"], "fee_bps must be at least 0 and below 10,000, not -1.0, --fee-bps"),
        (["--slippage-bps", "10000"], "slippage_bps must be"),
        (["--lot", "inf"], "lot must be"),
        (["--cash", "0"], "cash must be above 0, not 0.0, --cash"),
        (["--ruin", "1"], "ruin must be above 0 and below 1"),
        (
            ["--horizon", "0"],
            "horizon must be at least 1 and at most 1,000,000,000,000, not 0, --horizon",
        ),
        (["--top-layers", "0"], "top_layers must be at least 1"),
        (["--top-layers", "3"], "top_layers must be 1 to 2, not 3"),
        (["--lora-rank", "0"], "lora_rank must be at least 1"),
        (["--num-envs", "0"], "num_envs must be at least 1"),
        (
            ["--num-envs", "5", "--start-groups", "2"],
            "num_envs 5 must be a multiple of",
        ),
        (["--num-steps", "0"], "num_steps must be at least 1"),
        (["--seed=-1"], "seed must be at least 0"),
        (["--total-timesteps", "23"], "total_timesteps 23 is less than one update of 4 x 6"),
        (["--total-timesteps", "0"], "total_timesteps must be at least 1"),
        (["--learning-rate=-0.1"], "learning_rate must be at least 0, not -0.1"),
        (["--learning-rate", "nan"], "learning_rate must be at least 0, not nan"),
        (["--layer-learning-rate", "inf"], "layer_learning_rate must be at least 0, not inf"),
        (["--gamma", "1.1"], "gamma must be at least 0 and at most 1, not 1.1, --gamma"),
        (["--minibatch-size=-4"], "minibatch_size must be at least 0"),
        (["--checkpoint-every", "0"], "checkpoint_every must be at least 1"),
        (["--backtest-episodes", "0"], "backtest_episodes must be at least 1"),
        (["--optimizer", "adamw8bit", "--device", "cpu"], "8-bit AdamW needs a CUDA GPU"),
        (["--data", "bars.csv"], "unknown data source"),
        (["--data", "sample:TSLA"], "unknown sample 'TSLA'"),
        (["--data", "csv:none.csv"], "No such file or directory, none.csv"),
        (["--news", "none.csv"], "No such file or directory, none.csv"),
        (["--train", "2001-01-01"], "not START..END"),
        (["--train", f"{DATES[9]}..{DATES[2]}"], "start after end"),
        (["--train", "1999-01-01..2001-01-10"], "is not inside the data, 2001-01-01..2001-02-23"),
        (["--test", "2001-02-01..2002-02-01"], "is not inside the data"),
        (["--test", "2001-02-03..2001-02-04"], "no day of the market"),
        (["--train", f"{DATES[0]}..{DATES[30]}"], "before training ends"),
        (["--train", f"{DATES[0]}..{DATES[0]}"], "fewer than 2 days, training period"),
        (["--train", "2001-02-30..2001-03-01"], "not a date"),
        (["--model", "none"], "no such folder or file, none"),
        (["--model", "package:none_such"], "no such Python package is installed"),
    ],
)
def test_train_refuses(flags, told, config_file, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with unchanged(tmp_path):
        assert told in refused("train", "--out", "run", "--config", config_file, *flags)


def test_train_refuses_a_symbol_that_is_not_there(config_file, refused, bars, tmp_path):
    pd.read_csv(bars).assign(symbol="ONE").to_csv(tmp_path / "one.csv", index=False)
    words = ["--config", config_file, "--data", f"csv:{tmp_path / 'one.csv'}", "--symbol", "TWO"]
    with unchanged(tmp_path):
        assert "unknown symbol 'TWO' of ONE" in refused("train", "--out", tmp_path / "run", *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_train_refuses_a_gpu_that_is_not_there(config_file, refused, tmp_path):
    words = ["--out", tmp_path / "run", "--config", config_file, "--device", "cuda"]
    assert refused("train", *words) == "no CUDA GPU is available, --device cuda"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "not valid JSON"),
        ('{"seed": 1', "not valid JSON"),
        ("[]", "config must be a JSON object"),
        ('{"seeds": 1}', "unknown config key 'seeds'"),
        ('{"algorithm": {"gamma": "high"}}', "'algorithm.gamma' must be a number, not 'high'"),
        ('{"algorithm": {"gamma": NaN}}', "gamma must be at least 0 and at most 1, not nan"),
        (
            '{"rollout": {"num_envs": 0}}',
            "num_envs must be at least 1 and at most 1,000,000,000,000, not 0, --num-envs in",
        ),
    ],
)
def test_train_refuses_a_config(content, told, refused, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with unchanged(tmp_path):
        message = refused("train", "--out", tmp_path / "run", "--config", path)
    assert told in message and str(path) in message


def broken_markets(bars: Path, folder: Path) -> dict[str, tuple[str, str]]:
    """Data sources by name of what is wrong, each with a part of what must be told."""
    frame, text = pd.read_csv(bars), bars.read_text()
    made = {}

    def add(name: str, content: str | bytes, told: str, kind: str = "csv") -> None:
        path = folder / f"{name}.{kind}"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        made[name] = (f"{kind}:{path}".replace("json:", "investorbench:"), told)

    def changed(row: int, **cells: object) -> str:
        copy = frame.astype(object)
        for name, value in cells.items():
            copy.loc[row, name] = value
        return copy.to_csv(index=False)

    add("empty", "", "empty file")
    add("truncated", text[:-30], "cells under")
    add("binary", os.urandom(100) + b"\xff", "not CSV")
    add("unsorted", frame.iloc[[1, 0, *range(2, DAYS)]].to_csv(index=False), "is not after")
    add("duplicate", frame.iloc[[0, 0, *range(1, DAYS)]].to_csv(index=False), "is not after")
    add("words", changed(5, close="a lot"), "close 'a lot' is not a number")
    add("negative", changed(5, low=-3.0), "is not above 0")
    add("zero", changed(5, open=0.0), "is not above 0")
    add("crossed", changed(5, high=1.0), "high is below open or close")
    add("no_close", frame.drop(columns="close").to_csv(index=False), "no column close")
    add("no_date", changed(5, date="yesterday"), "is not a date")
    frame.to_parquet(folder / "whole.parquet")
    parquet = (folder / "whole.parquet").read_bytes()
    add("empty", b"", "empty file", "parquet")
    made["empty_parquet"] = made.pop("empty")
    add("empty", "", "empty file")
    add("cut", parquet[:-40], "not Parquet", "parquet")
    add("half", '{"2001-01-01": {"prices": 1.5', "not", "json")
    add("void", "", "empty file", "json")
    add("list", "[1, 2]", "not a JSON object of dates", "json")
    add("wordy", '{"2001-01-01": {"prices": "dear"}}', "no number 'prices'", "json")
    return made


BROKEN = (
    "empty truncated binary unsorted duplicate words negative zero crossed no_close no_date "
    "empty_parquet cut half void list wordy"
)


@pytest.mark.parametrize("name", BROKEN.split())
def test_broken_market_files_are_refused(name, bars, config_file, refused, tmp_path):
    markets = broken_markets(bars, tmp_path)
    assert set(markets) == set(BROKEN.split())
    source, told = markets[name]
    with unchanged(tmp_path):
        message = refused("metrics", "--data", source, "--json")
        assert told in message and source.partition(":")[2] in message
        words = ["--config", config_file, "--data", source, "--out", tmp_path / "run"]
        assert refused("train", *words) == message


@pytest.mark.parametrize("content", ["", "published,text\n2001-01-01,Up\n", "no news at all"])
def test_broken_news_is_refused(content, bars, refused, tmp_path):
    shutil.copy(bars, tmp_path / "bars.csv")
    (tmp_path / "bars.news.csv").write_text(content)
    message = refused("metrics", "--data", f"csv:{tmp_path / 'bars.csv'}")
    assert str(tmp_path / "bars.news.csv") in message


def damage_model(how: str, model: Path) -> Path:
    weights = model / "model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "truncated weights":
        os.truncate(weights, weights.stat().st_size - 1)
    elif how == "no config":
        (model / "config.json").unlink()
    elif how == "empty config":
        (model / "config.json").write_text("")
    elif how == "truncated tokenizer":
        os.truncate(model / "tokenizer.json", 1000)
    elif how == "empty tokenizer":
        (model / "tokenizer.json").write_text("")
    elif how == "NaN in weights":
        size = weights.stat().st_size
        with weights.open("r+b") as file:
            file.seek(size - 8)
            file.write(b"\xff" * 8)
    else:
        path = model / "model.gguf"
        path.write_bytes({"empty GGUF": b"", "GGUF header only": b"GGUF\x03\0\0\0"}[how])
        return path
    return model


@pytest.mark.parametrize(
    "how",
    [
        "no weights",
        "empty weights",
        "truncated weights",
        "NaN in weights",
        "no config",
        "empty config",
        "truncated tokenizer",
        "empty tokenizer",
        "empty GGUF",
        "GGUF header only",
    ],
)
def test_broken_models_are_refused(how, tiny_model, config_file, refused, tmp_path):
    model = damage_model(how, Path(shutil.copytree(tiny_model, tmp_path / "model")))
    words = ["--config", config_file, "--model", model, "--out", tmp_path / "run"]
    assert str(tmp_path / "model") in refused("train", *words)
    assert not (tmp_path / "run").exists()


def test_a_run_in_the_way(run, config_file, refused):
    words = ["train", "--out", run, "--config", config_file]
    with unchanged(run):
        in_the_way = f"holds a run already: go on with --resume or name another, {run}"
        assert refused(*words) == in_the_way
        # Told at once, before data and model are read.
        assert refused(*words, "--data", "csv:none.csv", "--model", "none") == in_the_way
        message = refused(*words, "--resume", "--gamma", "0.9")
        assert message == f"the run to resume was started with another gamma (0.95, not 0.9), {run}"


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/run", "/dev/null"])
def test_a_folder_that_can_not_be(out, config_file, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    with unchanged(tmp_path):
        message = refused("train", "--out", tmp_path / out, "--config", config_file)
    assert str(tmp_path / out) in message


@pytest.mark.parametrize("limit", [1_500, 20_000, 1_000_000])
def test_a_full_disk(limit, config_file, tmp_path):
    """No file may grow beyond `limit`: the configuration, a checkpoint or the report fails. What is
    there is whole, and with room again the run goes on."""
    prepare = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    )
    words = ["train", "--out", "run", "--config", config_file]
    done = command(*words, cwd=tmp_path, prepare=prepare)
    message = the_refusal(done.returncode, "", done.stderr)
    assert message.startswith("File too large, run/"), message
    documents = [*tmp_path.rglob("*.json")]
    assert all(json.loads(path.read_text()) for path in documents)
    assert not list(tmp_path.rglob(".*"))
    assert not (tmp_path / "run" / "report.html").exists()
    cli.main(["train", "--out", str(tmp_path / "run"), *map(str, words[3:]), "--resume"])
    assert (tmp_path / "run" / "report.html").exists()


def damage_run(how: str, run: Path, folder: Path) -> None:
    checkpoint = run / "checkpoint"
    tensors = next(checkpoint.glob("*.safetensors"))
    state = checkpoint / "state.json"
    settings = json.loads((run / "config.json").read_text())
    if how == "another model":
        tokenizer = (Path(settings["policy"]["model"]) / "tokenizer.json").read_text()
        settings["policy"]["model"] = str(write_tiny_model(folder / "other", tokenizer, seed=1))
        (run / "config.json").write_text(json.dumps(settings))
    elif how == "another policy":
        settings["policy"]["lora_rank"] += 1
        (run / "config.json").write_text(json.dumps(settings))
    elif how == "no run":
        shutil.rmtree(run)
        run.mkdir()
    elif how == "config cut":
        os.truncate(run / "config.json", 300)
    elif how == "config of a list":
        (run / "config.json").write_text("[]")
    elif how == "config of another kind":
        (run / "config.json").write_text('{"hidden_size": 64}')
    elif how == "config out of range":
        settings["simulator"]["fee_bps"] = -1
        (run / "config.json").write_text(json.dumps(settings))
    elif how == "no checkpoint":
        shutil.rmtree(checkpoint)
    elif how == "state cut":
        os.truncate(state, 20)
    elif how == "state empty":
        state.write_text("")
    elif how == "state of another kind":
        state.write_text('{"step": 4}')
    elif how == "no tensors":
        tensors.unlink()
    elif how == "tensors cut":
        os.truncate(tensors, tensors.stat().st_size - 1)
    elif how == "tensors empty":
        tensors.write_bytes(b"")


DAMAGE = {
    "another model": "trained on other model weights",
    "another policy": "does not fit this policy",
    "no run": "No such file",
    "config cut": "not valid JSON",
    "config of a list": "not a run's configuration",
    "config of another kind": "unknown config key 'hidden_size'",
    "config out of range": "fee_bps must be",
    "no checkpoint": "No such file",
    "state cut": "not valid JSON",
    "state empty": "not valid JSON",
    "state of another kind": "not a checkpoint",
    "no tensors": "No such file",
    "tensors cut": "truncated, or not what was written",
    "tensors empty": "truncated, or not what was written",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_runs_are_refused(how, run, refused, tmp_path):
    damage_run(how, run, tmp_path)
    with unchanged(run):
        message = refused("decide", run, "--date", DATES[30], "--json")
        assert DAMAGE[how] in message and str(run) in message
        assert refused("backtest", run, "--json") == message


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--date", "2001-02-03"], "2001-02-03 is not a day of the data (2001-01-01 to"),
        (["--date", "1999-01-04"], "1999-01-04 is not a day of the data"),
        (["--date", "soon"], "not a date (YYYY-MM-DD): 'soon', --date"),
        (["--date", "today"], "not a date"),
        (["--date", "2001-02"], "not a date"),
        (["--date", "2001-02-30"], "not a date"),
        (["--date", ""], "not a date"),
        (["--date", DATES[9], "--position", "long"], "needs the price it was entered at, --entry"),
        (["--date", DATES[9], "--position", "long", "--entry", "5"], "needs the day it was"),
        (["--date", DATES[9], "--entry", "5"], "a flat position has no entry"),
        (["--date", DATES[9], "--since", DATES[8]], "a flat position has no entry"),
        (["--date", DATES[9], "--data", "csv:none.csv"], "No such file or directory, none.csv"),
        (["--date", DATES[9], "--news", "none.csv"], "No such file or directory, none.csv"),
        (["--date", DATES[9], "--data", "sample:IBM", "--symbol", "TWO"], "unknown symbol 'TWO'"),
        (["--date", DATES[9], "--position", "sideways"], "invalid choice 'sideways'"),
    ],
)
def test_decide_refuses(flags, told, trained, refused):
    assert told in refused("decide", trained, "--json", *flags)


@pytest.mark.parametrize(
    ("split", "told"),
    [
        ("tomorrow", "'tomorrow' is neither train, test nor START..END, --split"),
        ("", "is neither train, test nor START..END"),
        (f"{DATES[5]}..{DATES[5]}", "a backtest needs two days"),
        (f"{DATES[5]}..{DATES[4]}", "start after end"),
        (f"{DATES[5]}..2030-01-01", "is not inside the data"),
        ("..", "not a date"),
    ],
)
def test_backtest_refuses(split, told, run, refused):
    with unchanged(run):
        assert told in refused("backtest", run, "--split", split, "--json")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--start", "soon"], "not a date (YYYY-MM-DD), 'soon'"),
        (["--start", "1999-01-01"], "is not inside the data"),
        (["--start", DATES[5], "--end", DATES[4]], "no day of the market"),
        (["--symbol", "TWO", "--data", "sample:AAPL"], "unknown symbol 'TWO' of AAPL"),
    ],
)
def test_metrics_refuses(flags, told, bars, refused):
    assert told in refused("metrics", "--data", f"csv:{bars}", "--json", *flags)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "backtest.json"])
@pytest.mark.parametrize("content", ["{", '{"step": 1}'])
def test_report_refuses(name, content, run, refused):
    """What was cut off or is something else; of the log, another line than its last."""
    rest = (run / name).read_text() if name == "metrics.jsonl" else ""
    (run / name).write_text(f"{content}\n{rest}")
    with unchanged(run):
        assert name in refused("report", run)


def test_a_refusal_on_the_command_line(tmp_path):
    done = command("decide", "none", "--date", "2001-01-01", "--json", cwd=tmp_path)
    told = the_refusal(done.returncode, done.stdout, done.stderr)
    assert told == "No such file or directory, none/config.json"


# Found by trying to break it


def test_a_folder_of_somebody_elses_is_not_written_into(config_file, refused, tmp_path, tiny_model):
    for name in ("config.json", "metrics.jsonl", "report.html"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        with unchanged(folder):
            message = refused("train", "--out", folder, "--config", config_file)
            assert message == f"{name} is there and of no run: name another folder, {folder}"
    model = shutil.copytree(tiny_model, tmp_path / "model")
    with unchanged(model):
        words = ["--config", config_file, "--model", model]
        assert "config.json is there and of no run" in refused("train", "--out", model, *words)
    assert "a folder of its own" in refused("train", "--out", "", "--config", config_file)


def test_two_trainings_do_not_share_a_folder(config_file, refused, tmp_path):
    settings = from_dict(json.loads(config_file.read_text()), "config")
    with claim(tmp_path / "run", settings, resume=False):
        for flags in ([], ["--resume"]):
            words = ["train", "--out", tmp_path / "run", "--config", config_file, *flags]
            assert "another training is at work in it" in refused(*words)


def test_a_run_keeps_its_days_when_the_file_grows_shorter(config, refused, tmp_path):
    """Else days that were trained on would pass for held-out ones."""
    bars = write_csv(small_market(), tmp_path / "bars.csv")
    open_ended = dataclasses.replace(config.data, data=f"csv:{bars}", train="", test="")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(dataclasses.replace(config, data=open_ended))))
    cli.main(["train", "--out", str(tmp_path / "run"), "--config", str(file)])
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert kept["train"] == f"{DATES[0]}..{DATES[31]}" and kept["test"].startswith(DATES[32])
    cli.main(["train", "--out", str(tmp_path / "run"), "--config", str(file), "--resume"])
    lines = bars.read_text().splitlines(keepends=True)
    bars.write_text("".join(lines[:30]))
    with unchanged(tmp_path / "run"):
        assert "is not inside the data" in refused("backtest", tmp_path / "run")


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


@pytest.mark.parametrize("flag", ["--learning-rate", "--layer-learning-rate"])
def test_a_policy_that_overflows_is_told_in_one_line(flag, config_file, capsys, tmp_path):
    words = ["train", "--out", str(tmp_path / "run"), "--config", str(config_file), flag, "1e37"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--max-grad-norm", "0"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert "lower the learning rates" in message


def test_a_tokenizer_larger_than_the_model_is_refused(config_file, refused, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 49999, "content": "<x>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ["--out", tmp_path / "run", "--config", config_file, "--model", model]
    message = refused("train", *words)
    assert "the model 49152 tokens" in message


@pytest.mark.parametrize(
    "change",
    [{"step": -1}, {"step": 2.7}, {"step": True}, {"step": 3}, {"tensors": "x\0"}]
    + [{"optimizer": value} for value in ({"a": {}}, {"0": 5}, {"0": None})],
)
def test_a_checkpoint_changed_by_hand_is_refused(change, run, config_file, refused):
    state = run / "checkpoint" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | change))
    with unchanged(run):
        refused("train", "--out", run, "--config", config_file, "--resume")


def test_a_metrics_file_with_a_bad_byte_is_read_past(run, config_file):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n" + b"[" * 200_000 + b"\n")
    cli.main(["train", "--out", str(run), "--config", str(config_file), "--resume"])
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
