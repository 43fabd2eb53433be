"""What all commands have in common: help, flags, output that nobody reads, refusals, Ctrl-C."""

import importlib.metadata
import json
import logging
import os
import re
import signal
import subprocess
import sys

import pandas as pd
import pytest
from commands import FULL_DISK, NO_SPACE, ROOT, command, the_refusal, unchanged

import fastflag
from fastflag import cli
from fastflag.config import PlanConfig, PolicyConfig
from fastflag.evaluate.doctor import plan
from fastflag.model.ops import OPS

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_doctor(capsys):
    cli.main(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert list(document["ops"]) == [*(op.name for op in OPS), "graphs"]
    assert all(all(entry.values()) for entry in document["ops"].values())
    assert document["packages"]["torch"] == importlib.metadata.version("torch")
    assert document["machine"]["fastflag"] == fastflag.__version__
    caches = document["caches"]
    assert list(caches) == [
        "frozen activations",
        "proofs of kernels",
        "numba",
        "triton",
        "torch",
        "hugging face hub",
    ]
    trunk = f"{os.environ['XDG_CACHE_HOME']}/fastflag/trunk (temporary)"
    assert caches["frozen activations"] == trunk
    assert all(place.endswith((" (kept)", " (temporary)")) for place in caches.values())
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
        (["--plan", "--top-layers", "3"], "top_layers must be 0 to 2, not 3"),
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
    assert refused("doctor", *flags.split()) == (
        "settings of a policy need --plan or --prove, doctor"
    )


def test_nobody_reads_the_output(bars, tmp_path):
    """As in `fastflag metrics | true`."""
    prepare = "import os\nreading, writing = os.pipe()\nos.dup2(writing, 1)\nos.close(reading)"
    done = command("metrics", "--data", f"csv:{bars}", cwd=tmp_path, prepare=prepare)
    assert (done.returncode, done.stderr) == (141, "")


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


ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_the_terminal_can_not_show_is_escaped(encoding, bars, tmp_path, monkeypatch):
    frame = pd.read_csv(bars).assign(symbol="株Ü")
    path = tmp_path / "bars.csv"
    frame.to_csv(path, index=False, encoding="utf-8")
    for name, value in (ASCII | {"PYTHONIOENCODING": encoding}).items():
        monkeypatch.setenv(name, value)
    shown = "株Ü".encode(encoding, "backslashreplace").decode(encoding)
    code = (
        "import sys\nfrom fastflag import cli\n"
        f"cli.main(['metrics', '--data', 'csv:{path}', '--symbol', 'B'])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    error = done.stderr.decode(encoding)
    assert (done.returncode, done.stdout) == (2, b"")
    assert error == f"fastflag: error: unknown symbol 'B' of {shown}, market csv:{path}\n"
    code = f"from fastflag import cli\ncli.arguments._usage = lambda: {'株Ü'!a}\ncli.main([])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding) == f"{shown}\n"


@pytest.mark.parametrize("variables", [{}, ASCII], ids=["utf-8", "ascii"])
def test_names_that_are_not_utf_8(variables, tmp_path):
    """Of a run, of bars, of a symbol: as bytes on the command line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    for words in (
        [b"report", b"\xff"],
        [b"metrics", b"--data", b"csv:\xff.csv"],
        [b"metrics", b"--data", b"csv:\xc3\xbc.csv"],
        [b"metrics", b"--symbol", b"\xff"],
        [b"train", b"--out", b"run", b"--model", b"\xff/"],
        [b"train", b"--out", b"run", b"--config", b"\xff"],
        [b"\xff"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "fastflag", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
        )
        the_refusal(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert not [*tmp_path.iterdir()]


def test_ctrl_c_while_the_command_line_is_imported(tmp_path):
    (tmp_path / "tyro.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)")
    done = subprocess.run(
        [sys.executable, "-m", "fastflag", "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        # A job in the background ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


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


def test_a_refusal_on_the_command_line(tmp_path):
    done = command("decide", "none", "--date", "2001-01-01", "--json", cwd=tmp_path)
    told = the_refusal(done.returncode, done.stdout, done.stderr)
    assert told == f"No such file or directory, {tmp_path}/none/config.json"


def test_warnings_are_told_unless_the_command_is_refused(bars, refused, tmp_path, capsys):
    path = tmp_path / "bars.csv"
    pd.read_csv(bars).assign(note="x").to_csv(path, index=False)
    words, warning = (
        ["metrics", "--data", f"csv:{path}"],
        f"columns that are not used: note, {path}\n",
    )
    assert refused(*words, "--start", "1999-01-01").startswith("--start..--end 1999-01-01..")
    cli.main([*words, "--json"])
    shown = capsys.readouterr()
    assert shown.err == warning and json.loads(shown.out)
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflag.market.metrics.metrics", lambda *_: 1 / 0)
        cli.main(words)
    assert capsys.readouterr().err == warning


def test_warnings_come_before_the_first_line_and_then_at_once(capsys, monkeypatch):
    """A training prints its first line once nothing can refuse it, and goes on for hours."""

    def run(_: cli.Report) -> None:
        log = logging.getLogger("fastflag.market.columns")
        log.warning("first")
        print("begins", file=sys.stdout)
        assert capsys.readouterr() == ("begins\n", "first\n")
        log.warning("second")
        assert capsys.readouterr() == ("", "second\n")

    monkeypatch.setattr(cli.Report, "run", run)
    cli.main(["report", "run"])


def test_the_settings_of_a_run_from_before_there_was_a_choice_keep_dividends_in_cash(tmp_path):
    """As --config of another training; settings that a user wrote are as they are now."""
    path = tmp_path / "config.json"
    for document, dividends in (({"fastflag": "0.1.0"}, "cash"), ({}, "reinvest")):
        path.write_text(json.dumps({**document, "simulator": {"fill": "next_close"}}))
        simulator = cli.arguments._train_default(["--config", str(path)]).settings.simulator
        assert (simulator.fill, simulator.dividends) == ("next_close", dividends)
