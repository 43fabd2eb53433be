"""The door: what `import fastflag` offers, held against the command line and the files."""

import dataclasses
import html
import inspect
import json
import logging
import pickle
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from commands import ROOT, unchanged
from small import DATES, TRAIN_DAYS, small_market

import fastflag as ff
from fastflag import api, cli
from fastflag.cli.commands import Places
from fastflag.config import (
    DataConfig,
    PlanConfig,
    PolicyConfig,
    TrainConfig,
    to_dict,
    with_settings,
)
from fastflag.evaluate.chart import svg
from fastflag.evaluate.episodes import greedy, run_episodes
from fastflag.evaluate.figures import Figure
from fastflag.market.task import Steps

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_it_offers():
    """The stub, which type checkers and editors read, names what there is."""
    named = re.findall(r"import (\w+) as \1", (ROOT / "fastflag" / "__init__.pyi").read_text())
    assert set(named) <= {*dir(ff)}
    assert all(getattr(ff, name) is getattr(api, name) for name in named)
    assert set(named) == set(ff._OF_API)
    with pytest.raises(AttributeError, match="module 'fastflag' has no attribute 'trian'"):
        _ = ff.trian


@pytest.mark.parametrize(
    ("command", "function"),
    [
        (Places, api.open),
        (cli.COMMANDS["backtest"], api.Run.backtest),
        (cli.COMMANDS["decide"], api.Run.decide),
        (cli.COMMANDS["metrics"], api.load),
        (cli.COMMANDS["metrics"], api.metrics),
        (cli.COMMANDS["doctor"], api.plan),
    ],
)
def test_a_flag_and_its_argument_have_one_default(command, function):
    flags = {each.name: each.default for each in dataclasses.fields(command)}
    arguments = inspect.signature(function).parameters
    shared = {name: arguments[name].default for name in arguments if flags.get(name) is not None}
    told = {name: flags[name] for name in shared if flags[name] is not dataclasses.MISSING}
    assert told == {name: shared[name] for name in told} and told


def test_a_command_names_places_as_open_does():
    _, *arguments = inspect.signature(api.open).parameters
    assert [each.name for each in dataclasses.fields(Places)] == arguments


def test_settings_are_the_flags(config, tmp_path, monkeypatch):
    """The same settings, by name from Python and as flags, make the same run."""
    flat = {
        name: value
        for part, values in to_dict(config).items()
        for name, value in (values.items() if isinstance(values, dict) else [(part, values)])
    }
    seen = []
    monkeypatch.setattr("fastflag.learn.train.train", lambda *given: seen.append(given[0]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ff.train(tmp_path / "run", **flat)
    with pytest.raises(ZeroDivisionError):
        ff.train(tmp_path / "run", config)
    with pytest.raises(ZeroDivisionError):
        ff.train(tmp_path / "run", config, num_envs=8)
    assert seen[0] == seen[1] == config
    assert seen[2].rollout == dataclasses.replace(config.rollout, num_envs=8)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_env": 3}, "unknown config key 'num_env', settings"),
        ({"num_envs": "many"}, "config key 'rollout.num_envs' must be a whole number, not 'many'"),
        ({"num_envs": 0}, "num_envs must be at least 1 and at most 1,000,000,000,000, not 0"),
        ({"fill": "now"}, "config key 'simulator.fill' must be one of next_open, next_close"),
        ({"preset": "best"}, "unknown preset 'best', one of default, demo, paper"),
        ({"data": "csv:none.csv"}, "No such file or directory, none.csv"),
    ],
)
def test_train_refuses(settings, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ff.InputError) as error:
        ff.train("run", **settings)
    assert str(error.value).startswith(told) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_load_refuses_what_is_no_setting_of_a_market(bars):
    with pytest.raises(ff.InputError, match=r"unknown config key 'data\.num_envs', load\(\)"):
        ff.load(f"csv:{bars}", num_envs=3)
    assert ff.load(f"csv:{bars}", symbol="ANY").symbols == ("ANY",)
    assert ff.load(DataConfig(data=f"csv:{bars}")).symbols == ("BARS",)


def test_it_tells_what_the_commands_print(run, capsys):
    opened = ff.open(run)
    cli.main(["backtest", str(run), "--json"])
    assert opened.backtest().document == json.loads(capsys.readouterr().out)
    assert opened.tested == ff.open(run).backtest()
    held = {"position": "long", "entry": 100.0, "since": DATES[28]}
    cli.main(["decide", str(run), "--date", DATES[30], "--json", *flags(held)])
    decision = opened.decide(DATES[30], **held)
    assert dataclasses.asdict(decision) == json.loads(capsys.readouterr().out)
    data = opened.config.data.data
    cli.main(["metrics", "--data", data, "--convention", "flag", "--json"])
    told = ff.metrics(ff.load(data), convention="flag")
    assert told.values == json.loads(capsys.readouterr().out)
    assert list(told.values) == list(opened.backtest().metrics("flag"))
    assert told.to_frame().loc[(DATES[0], DATES[-1]), "cr"] == told.values["cr"]
    policy = opened.config.policy
    layers = {"model": policy.model, "top_layers": 1}
    cli.main(["doctor", "--plan", "--json", *flags(layers)])
    plan = ff.plan(PolicyConfig(**layers))
    assert dataclasses.asdict(plan) == json.loads(capsys.readouterr().out)
    frame = plan.to_frame()["bytes"]
    assert frame["total"] == frame[list(plan.parts)].sum()


def test_what_a_machine_has_is_a_table():
    told = ff.doctor()
    frame = told.to_frame()["told"]
    assert frame["machine", "fastflag"] == ff.__version__
    assert frame["packages", "torch"] == str(torch.__version__)
    assert frame["ops", "rms_norm"].startswith(told.ops["rms_norm"]["implementation"])
    longest = max(told.caches.values(), key=len)
    assert longest in told._repr_html_()  # pandas cuts what is longer than 50 characters


def flags(arguments):
    return [
        word
        for name, value in arguments.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def test_a_run_is_its_folder(config, trained, tmp_path):
    """Trained here, opened here, or copied: the weights, decisions and documents are the same."""
    run = ff.train(tmp_path / "run", config)
    copy = ff.open(shutil.copytree(run.folder, tmp_path / "copy"))
    assert ff.open(run.folder) == ff.open(str(run.folder)) != copy
    for other in (ff.open(run.folder), copy, ff.open(trained)):
        ours, theirs = run.policy.state_dict(), other.policy.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k].nan_to_num(), theirs[k].nan_to_num()) for k in ours)
        assert other.decide(DATES[30]) == run.decide(DATES[30])
        assert other.tested == run.tested == run.backtest()
    assert run.world.seed == copy.world.seed


def test_what_has_moved_is_named(run, bars, tmp_path, caplog):
    copy = shutil.copy(bars, tmp_path / "copy.csv")
    news = bars.with_suffix(".news.csv")
    own = ff.open(run).decide(DATES[30])
    moved = ff.open(run, data=f"csv:{copy}", news=str(news), symbol="ANY")
    assert moved.decide(DATES[30]) == own and moved.market.symbols == ("ANY",)
    assert caplog.records == []
    without = ff.open(run, data=f"csv:{copy}")  # no news beside it
    assert without.decide(DATES[30]) != own
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    with pytest.raises(ff.InputError, match="are not those that the run was trained on"):
        without.backtest()


def test_the_home_folder_is_meant_by_a_tilde(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ff.open("~/run").folder == run


def test_frames(run):
    tested, document = ff.open(run).tested, json.loads((run / "backtest.json").read_text())
    frame = tested.to_frame()
    market = small_market()
    assert frame.index.strftime("%Y-%m-%d").tolist() == DATES[TRAIN_DAYS:]
    np.testing.assert_allclose(frame["close"], market.close[TRAIN_DAYS:, 0])
    # What is held from one close to the next earns what the price does; nothing earns nothing.
    growth, side = frame["equity"] / frame["equity"].shift(), frame["position"]
    kept = side.eq(side.shift())
    price = (frame["close"] / frame["close"].shift()).where(side.eq(1), 1.0)
    assert kept.sum() > 3 and growth[kept].to_numpy() == pytest.approx(price[kept].to_numpy())
    assert frame[["Sell", "Hold", "Buy"]].iloc[:-1].sum(axis=1).to_numpy() == pytest.approx(1)
    metrics = tested.metrics()
    growth = frame.iloc[-1][["equity", "buy_and_hold"]] / 100_000 - 1
    assert metrics["cr"][["greedy", "buy_and_hold"]].tolist() == pytest.approx(
        [100 * x for x in growth]
    )
    spread = document["sampled"]["metrics"]["standard"]["cr"]
    assert metrics.loc["sampled", "cr"] == spread["mean"]
    decision = ff.open(run).decide(DATES[30])
    row = decision.to_frame().iloc[0]
    assert (row["action"], row["Buy"]) == (decision.action, decision.probabilities["Buy"])


def test_metrics_of_the_updates(run):
    updates = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    frame = ff.open(run).metrics
    assert frame["return"].tolist() == [update["return"] for update in updates]
    assert frame["seconds/update"].tolist() == [u["seconds"]["update"] for u in updates]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"return": 1')  # cut off by a kill
    assert len(ff.open(run).metrics) == len(updates)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ff.InputError, match=r"No such file or directory, .*metrics\.jsonl"):
        _ = ff.open(run).metrics


def test_what_a_notebook_shows(run):
    opened = ff.open(run)
    with unchanged(run):
        page, tested = opened._repr_html_(), opened.tested._repr_html_()
    inside = re.fullmatch(r'<iframe sandbox="allow-scripts" [^>]*srcdoc="([^"]*)"></iframe>', page)
    assert inside and html.unescape(inside[1]) == (run / "report.html").read_text()
    assert f"<td>{opened.tested.metrics().loc['greedy', 'cr']:.3f}</td>" in tested
    assert "random policies" in tested and tested.count("<polyline") == 2
    assert opened.decide(DATES[30])._repr_html_().count(DATES[30]) == 1
    (run / "report.html").unlink()
    missing = f"No such file or directory, {run}/report.html"
    assert opened._repr_html_() == f"<p>No report: {missing}</p>"
    (run / "report.html").write_bytes(b"\xff")
    assert opened._repr_html_().startswith("<p>No report: not UTF-8 text (")


def test_a_chart_is_to_scale():
    """Growth of 0, 1 and 0.5 on three days: the points' heights have those proportions."""
    line = {"x": ["2001-01-01", "2001-01-02", "2001-01-03"], "y": [0.0, 1.0, 0.5], "name": "<b>"}
    band = {**line, "fill": "tonexty", "fillcolor": "#12345638", "line": {"width": 0}}
    edge = {**line, "y": [0.0, None, 0.0], "showlegend": False, "line": {"width": 0}}
    drawn = line | {"line": {"color": "#123456", "width": 2, "dash": "5px,3px"}}
    text = svg(Figure("Equity", "", [edge, band, drawn], {}))
    (points,) = re.findall(r'<polyline points="([^"]*)" stroke-dasharray="5,3"', text)
    x, y = np.array([point.split(",") for point in points.split()], float).T
    assert x[1] - x[0] == pytest.approx(x[2] - x[1])
    assert (y[0] - y[2]) / (y[0] - y[1]) == pytest.approx(0.5)
    (polygon,) = re.findall(r'<polygon points="([^"]*)"', text)
    assert len(polygon.split()) == 2 + 3 and polygon.split()[2:] == points.split()[::-1]
    assert "100.0%" in text and "<b>" not in text and "2001-01-03" in text


def test_a_config_of_a_run_is_what_was_trained(run, config):
    stored = ff.open(run).config
    assert isinstance(stored, TrainConfig) and stored.rollout == config.rollout
    assert ff.open(run, device="cpu", model="elsewhere").config.policy.model == "elsewhere"


@pytest.mark.parametrize("position", ["LONG", "banana", "", None, 1])
def test_a_position_is_flat_long_or_short(run, position):
    with pytest.raises(ff.InputError, match="a position is flat, long or short, not"):
        ff.open(run).decide(DATES[30], position, entry=100.0, since=DATES[28])


def test_dates_are_what_pandas_numpy_and_python_have(run):
    opened = ff.open(run)
    told = opened.decide(DATES[30])
    day = np.datetime64(DATES[30])
    for same in (day, pd.Timestamp(day), day.item()):
        assert opened.decide(same) == told
    assert ff.metrics(opened.market, day) == ff.metrics(opened.market, DATES[30])


def test_a_run_that_went_on_is_read_anew(config, tmp_path, caplog):
    """Its policy is that of the folder's last checkpoint, and an older backtest says that it is."""
    run = ff.train(tmp_path / "run", config)
    before, tested = run.decide(DATES[30]), run.tested
    longer = ff.train(run.folder, resume=True, total_timesteps=2 * config.total_timesteps)
    assert run.decide(DATES[30]) == longer.decide(DATES[30]) != before
    updates = tested.document["updates"]
    assert longer.tested.document["updates"] == 2 * updates == 2 * config.updates
    assert caplog.records == []
    longer_told = longer.decide(DATES[30])
    # Another training of as many updates is another policy.
    shutil.rmtree(run.folder)
    steps = 2 * config.total_timesteps
    other = ff.train(run.folder, config, seed=config.seed + 1, total_timesteps=steps)
    assert longer.decide(DATES[30]) == other.decide(DATES[30]) != longer_told
    (run.folder / "backtest.json").write_text(json.dumps(tested.document))
    assert run.tested == tested
    (record,) = caplog.records
    assert f"after {updates} updates, now there are {2 * updates}" in record.getMessage()
    shutil.rmtree(run.folder / "checkpoint")
    assert run.tested == tested  # what is there to be read needs no checkpoint
    for wrong in ("{}", "[]", '{"step": "x", "digest": ""}'):
        (run.folder / "checkpoint").mkdir(exist_ok=True)
        (run.folder / "checkpoint" / "state.json").write_text(wrong)
        with pytest.raises(ff.InputError, match="not a checkpoint"):
            run.decide(DATES[30])
    (run.folder / "backtest.json").write_text("[]")
    with pytest.raises(ff.InputError, match="not a backtest"):
        _ = run.tested


def test_a_run_is_the_same_from_any_folder_and_in_another_process(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    opened = ff.open(run.name)
    told = opened.decide(DATES[30])
    monkeypatch.chdir(tmp_path)
    assert opened.folder == run and pickle.loads(pickle.dumps(opened)) == opened
    assert pickle.loads(pickle.dumps(opened)).decide(DATES[30]) == told


def test_what_python_hands_over_is_checked_before_anything_is_written(config, run, tmp_path):
    wrong = dataclasses.replace(config.algorithm, algorithm="a2c")
    unknown = dataclasses.replace(config, algorithm=wrong)
    refusals = {
        "'algorithm.algorithm' must be one of": {"config": unknown},
        "a configuration is a TrainConfig": {"config": {"num_envs": 4}},
        "the preset 'paper' beside a config": {"config": config, "preset": "paper"},
    }
    for told, arguments in refusals.items():
        with pytest.raises(ff.InputError, match=told):
            ff.train(tmp_path / "new", **arguments)
    for path in (None, 5, "a\0b"):
        with pytest.raises(ff.InputError, match="a run's folder is a path"):
            ff.open(path)
    for where in ({"device": "tpu"}, {"symbol": 5}, {"data": None}):
        with pytest.raises(ff.InputError, match="config key"):
            ff.open(run, **where)
    with pytest.raises(ff.InputError, match="a folder of its own"):
        ff.train("/", config)
    with pytest.raises(ff.InputError, match="unknown convention 'Standard'"):
        ff.open(run).tested.metrics("Standard")
    assert not (tmp_path / "new").exists()
    values = {"num_envs": np.int64(4), "learning_rate": np.float32(0.5), "model": ROOT}
    told = with_settings(config, values)
    assert (told.rollout.num_envs, told.algorithm.learning_rate) == (4, 0.5)
    assert told.policy.model == str(ROOT)


@pytest.mark.parametrize(
    ("name", "act", "raised"),
    [
        ("config.json", lambda run: ff.open(run), ff.InputError),
        ("metrics.jsonl", lambda run: ff.open(run).metrics, ff.InputError),
        ("metrics.jsonl", lambda run: longer(run), ff.InputError),
        ("backtest.json", lambda run: ff.open(run).tested, ff.InputError),
        ("report.html", lambda run: ff.open(run).report(), OSError),
        ("backtest.json", lambda run: ff.open(run).backtest(), OSError),
        ("checkpoint/state.json", lambda run: ff.open(run).policy, ff.InputError),
        ("checkpoint", lambda run: ff.open(run).policy, ff.InputError),
    ],
)
def test_what_cant_be_read_is_refused_and_what_cant_be_written_is_the_systems_error(
    name, act, raised, run
):
    """A folder where a file should be, and a file where a folder should be, as root can't pass."""
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("")
        path = path / "state.json"
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(raised) as error:
        act(run)
    if raised is OSError:
        assert error.value.filename == str(path) and error.value.strerror
    else:
        assert str(error.value).endswith(f"a directory, {path}")


def longer(run):
    steps = json.loads((run / "config.json").read_text())["total_timesteps"]
    return ff.train(run, resume=True, total_timesteps=2 * steps)


def test_a_name_that_no_file_can_have_is_refused(bars, tmp_path, monkeypatch):
    name = "x" * 300
    for act in (
        lambda: ff.train(tmp_path / name),
        lambda: ff.open(tmp_path / name),
        lambda: ff.load(f"csv:{tmp_path}/{name}"),
        lambda: ff.load(f"csv:{bars}", news=name),
        lambda: ff.plan(PolicyConfig(model=f"{tmp_path}/{name}")),
    ):
        with pytest.raises(ff.InputError, match="File name too long, "):
            act()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for act in (ff.open, ff.train):
        with pytest.raises(ff.InputError, match="No such file or directory, the current folder"):
            act("run")


def test_what_it_gives_is_shown_in_one_line(run):
    """What, how much, from when to when: numbers that were counted elsewhere."""
    opened = ff.open(run)
    world, held_out = opened.world, f"{DATES[TRAIN_DAYS]}..{DATES[-1]}"
    prompts, _ = world.shown(world.task.start(4), 30)
    shown = {
        repr(opened): f"Run(folder={run!r})",
        repr(opened.market): f"Market(BARS: 40 days {DATES[0]}..{DATES[-1]}, 80 news)",
        repr(opened.tested): f"Backtest(BARS: 16 days {held_out})",
        repr(world.task.bars): "Bars(40 days, 40 with a bar)",
        repr(world.task.start(1000)): "Accounts(1000)",
        repr(prompts): "PromptSet(1 prompts of 1 prefixes, 1 suffixes)",
        repr(Steps.empty(7, 9)): "Steps(7 accounts, 9 steps)",
        repr(
            run_episodes(opened.policy, world, range(3), 5, greedy)
        ): "Episodes(5 accounts, 3 days)",
    }
    assert [*shown] == [*shown.values()]
    assert len(repr(world)) < 600 and "array" not in repr(world) and "\n" not in repr(world)


def edit(run, section, **changes):
    document = json.loads((run / "config.json").read_text())
    document[section] |= changes
    (run / "config.json").write_text(json.dumps(document))


def test_a_config_that_was_changed_by_hand_is_told(run, caplog, capsys):
    """Opened or resumed; a run that went on for longer was changed by nobody."""
    longer(run)
    ff.open(run)
    assert caplog.records == []
    places = ff.open(run).config
    edit(run, "data", data=places.data.data, news="elsewhere.csv")  # files may be moved
    edit(run, "policy", device="cpu", model=str(places.policy.model))
    ff.open(run)
    assert caplog.records == []
    edit(run, "data", news="")
    edit(run, "simulator", fee_bps=5.0)
    told = "changed since the run was trained: fee_bps (5.0, not 1.0), "
    ff.open(run)
    assert [record.getMessage() for record in caplog.records] == [
        f"fastflag: {told}{run}/config.json"
    ]
    caplog.clear()
    longer(run)  # its checkpoints still know what came first
    ff.open(run)
    assert [told in record.getMessage() for record in caplog.records] == [True, True]
    capsys.readouterr()
    cli.main(["decide", str(run), "--date", DATES[30]])
    assert capsys.readouterr().err.count(told) == 1
    caplog.clear()
    (run / "checkpoint" / "state.json").write_text("{")
    assert ff.open(run).tested.document["updates"] == 16
    state = {"step": 4, "digest": "", "config": None}  # as an earlier version wrote it
    (run / "checkpoint" / "state.json").write_text(json.dumps(state))
    ff.open(run)
    assert caplog.records == []


def test_a_dtype_left_open_by_hand_is_refused(run):
    edit(run, "policy", dtype="auto")
    for act in (ff.open, longer):
        with pytest.raises(
            ff.InputError, match=r"'policy\.dtype' of a run is bf16, fp16 or fp32, not"
        ):
            act(run)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"policy": PolicyConfig(dtype="fp8")},
            "'dtype' must be one of auto, bf16, fp16, fp32, not",
        ),
        ({"policy": PolicyConfig(adaptation="half")}, "'adaptation' must be one of lora, qlora"),
        ({"policy": PolicyConfig(model=None)}, "'model' must be text, not None, plan()"),
        ({"policy": {"top_layers": 2}}, "a configuration is a PolicyConfig, not {'top_layers': 2}"),
        ({"optimizer": "sgd"}, "'optimizer' must be one of adamw, adamw8bit, not 'sgd', plan()"),
        ({"batch": PlanConfig(days=1.5)}, "'days' must be a whole number, not 1.5, plan()"),
        ({"batch": 64}, "a configuration is a PlanConfig, not 64, plan()"),
    ],
)
def test_what_a_plan_is_asked_of_is_checked_as_in_train(arguments, told):
    with pytest.raises(ff.InputError, match=re.escape(told)):
        ff.plan(**arguments)


def test_a_market_is_named_by_settings_that_are_checked():
    with pytest.raises(ff.InputError, match="'calendar' must be one of auto, stock, crypto, not"):
        ff.load(DataConfig(calendar="moon"))


def test_a_backtest_of_before_the_run_went_on_is_called_that(run, monkeypatch, caplog, capsys):
    """By the report, a notebook and the command, where a lengthened run stopped before its test."""
    monkeypatch.setattr(api.Run, "backtest", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        longer(run)
    told = "ested after 4 updates, now there are 8: backtest it again"
    opened = ff.open(run)
    assert opened._repr_html_().startswith(f"<p>Its backtest: t{told}.</p>")
    assert caplog.records == [] and told not in (run / "report.html").read_text()
    assert opened.tested.document["updates"] == 4
    assert f"<p>T{told}.</p>" in opened.report().read_text()
    assert [f"t{told}, {run}" in record.getMessage() for record in caplog.records] == [True, True]
    capsys.readouterr()
    cli.main(["report", str(run)])
    assert capsys.readouterr().err == f"fastflag: t{told}, {run}/backtest.json\n"
    monkeypatch.undo()
    opened.backtest()
    assert told not in (run / "report.html").read_text() + opened._repr_html_()
