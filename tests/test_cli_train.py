"""`fastflag train` as a user meets it: what it leaves, what it refuses, what it goes on from."""

import dataclasses
import json
import os
import re
import shutil

import pandas as pd
import pytest
import tokenizers
import torch
from commands import FULL_DISK, NO_SPACE, command, the_refusal, unchanged
from safetensors.torch import load_file
from small import DATES, as_kept, small_market, write_csv
from tokenizers import models, pre_tokenizers

import fastflag
from fastflag import cli
from fastflag.config import PRESETS, TrainConfig, from_dict, to_dict
from fastflag.learn.run import OTHER_MARKET, claim, read_config

pytestmark = pytest.mark.usefixtures("one_thread")


def test_train_leaves_a_whole_run(trained, config):
    names = {path.name for path in trained.iterdir()}
    expected = {"config.json", "metrics.jsonl", "checkpoint", "tensorboard"}
    assert names == expected | {"backtest.json", "report.html"}
    document = json.loads((trained / "config.json").read_text())
    assert len(document.pop("market")) == 64
    assert document == to_dict(as_kept(config)) | {"fastflag": fastflag.__version__}
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").open()]
    assert steps == list(range(config.updates))
    state = json.loads((trained / "checkpoint" / "state.json").read_text())
    assert state["step"] == config.updates
    assert sorted(os.listdir(trained / "checkpoint")) == [state["tensors"], "state.json"]
    assert (trained / "report.html").stat().st_size > 1e6


def test_training_says_what_news_it_reads(bars, config, tiny_model, tmp_path, capsys):
    """Two headlines a day of every symbol; in a second file half of them are of another one."""
    path = tmp_path / "config.json"
    settings = dataclasses.replace(config, total_timesteps=24, backtest_episodes=1)
    news = pd.read_csv(bars.with_suffix(".news.csv"))
    news["symbol"] = ["BARS", "OTHER"] * (len(news) // 2)
    news.to_csv(tmp_path / "half.csv", index=False)
    told = []
    for name, file in enumerate(("", str(tmp_path / "half.csv"))):
        data = dataclasses.replace(settings.data, news=file, timezone="Asia/Tokyo")
        path.write_text(json.dumps(to_dict(dataclasses.replace(settings, data=data))))
        words = ["--config", str(path), "--close-time", "15:30"]
        cli.main(["train", "--out", str(tmp_path / str(name)), *words])
        told.append(capsys.readouterr().out.splitlines()[0])
        kept = json.loads((tmp_path / str(name) / "config.json").read_text())["data"]
        assert (kept["calendar"], kept["close_time"], kept["timezone"]) == (
            "auto",
            "15:30",
            "Asia/Tokyo",
        )
    assert told[0] == "news: 48 headlines on 24 of 24 training days, 48 in their day's prompt"
    assert told[1] == (
        "news: 24 headlines on 24 of 24 training days, 24 in their day's prompt; "
        "40 of other symbols than BARS"
    )


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
    assert seen[0].updates > 0


def test_an_interrupted_run_goes_on_to_the_same_weights(
    trained, config_file, tmp_path, monkeypatch, capsys
):
    from fastflag.learn.progress import Log

    real = Log.add
    words = ["train", "--out", str(tmp_path / "run"), "--config", str(config_file)]

    def interrupt_third(self, record):
        if record["step"] == 2:
            raise KeyboardInterrupt
        real(self, record)

    monkeypatch.setattr(Log, "add", interrupt_third)
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


def learning_rates(run):
    return [json.loads(line)["learning_rate"] for line in (run / "metrics.jsonl").open()]


def test_resume_alone_goes_on_with_the_runs_own_settings(run, capsys):
    (run / "report.html").unlink()
    cli.main(["train", "--out", str(run), "--resume"])
    assert "update" not in capsys.readouterr().out  # it was finished
    assert (run / "report.html").exists()


def test_resume_alone_where_there_is_no_run(tmp_path, monkeypatch, refused):
    seen = []
    monkeypatch.setattr(cli.Train, "run", lambda self: seen.append(self.settings))
    for content in (None, "{}", "[]"):
        if content:
            (tmp_path / "config.json").write_text(content)
        cli.main(["train", "--out", str(tmp_path), "--resume"])
    assert seen == [TrainConfig()] * 3
    (tmp_path / "config.json").write_text('{"fastflag": "0.1.0", "seeds": 1}')
    assert "unknown config key 'seeds'" in refused("train", f"--out={tmp_path}", "--resume")
    cli.main(["train", "--out", str(tmp_path), "--resume", "--preset", "paper"])
    assert seen[-1] == PRESETS["paper"]


def test_a_finished_run_goes_on_for_longer(run, config, refused):
    """Its learning rates fall to 0 anew, over the longer run as a whole."""
    longer = ["train", "--out", run, "--resume", "--total-timesteps", 6 * 24]
    before = learning_rates(run)
    with unchanged(run):
        told = refused(*longer[:-1], 3 * 24)
        assert (
            told
            == f"the run to resume was started with another total_timesteps (96, not 72), {run}"
        )
    cli.main(list(map(str, longer)))
    rate = config.algorithm.learning_rate
    expected = [rate * (1 - step / 4) for step in range(4)]
    assert before == pytest.approx(expected)
    expected += [rate * (1 - step / 6) for step in (4, 5)]
    assert learning_rates(run) == pytest.approx(expected)
    assert json.loads((run / "config.json").read_text())["total_timesteps"] == 6 * 24
    assert json.loads((run / "checkpoint/state.json").read_text())["step"] == 6
    cli.main(["train", "--out", str(run), "--resume"])  # 6 updates are its own now
    assert len(learning_rates(run)) == 6
    assert "another total_timesteps (144, not 96)" in refused(*longer[:-1], 4 * 24)


def test_a_run_made_longer_is_one_that_was_planned_so(config_file, tmp_path):
    """Where the learning rates don't hang on its length."""
    words = ["--config", str(config_file), "--no-anneal-lr", "--total-timesteps"]
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    cli.main(["train", "--out", str(whole), *words, "96"])
    cli.main(["train", "--out", str(grown), *words, "48"])
    cli.main(["train", "--out", str(grown), "--resume", "--total-timesteps", "96"])
    for name in ("config.json", "checkpoint/00000004.safetensors", "backtest.json"):
        assert (whole / name).read_bytes() == (grown / name).read_bytes(), name


def test_a_run_is_not_resumed_on_another_market(config, refused, tmp_path):
    bars = write_csv(small_market(), tmp_path / "bars.csv")
    file, run = tmp_path / "config.json", tmp_path / "run"
    data = dataclasses.replace(config.data, data=f"csv:{bars}")
    file.write_text(json.dumps(to_dict(dataclasses.replace(config, data=data))))
    cli.main(["train", "--out", str(run), "--config", str(file)])
    frame = pd.read_csv(bars)
    frame.loc[3, "volume"] += 1
    frame.to_csv(bars, index=False)
    with unchanged(run):
        told = refused("train", "--out", run, "--resume", "--total-timesteps", "960")
    assert told == f"{OTHER_MARKET}, csv:{bars}"


def test_a_config_with_a_byte_order_mark_under_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text('{"seed": 7}', encoding="utf-8-sig")
    seen = []
    monkeypatch.setattr(cli.Train, "run", lambda self: seen.append(self))
    cli.main(["train", "--out=~/run", "--config=~/config.json"])
    assert (seen[0].out, seen[0].settings.seed) == (tmp_path / "run", 7)


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


def test_a_metrics_file_with_a_bad_byte_is_read_past(run, config_file):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n" + b"[" * 200_000 + b"\n")
    cli.main(["train", "--out", str(run), "--config", str(config_file), "--resume"])
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


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
        (["--top-layers", "-1"], "top_layers must be at least 0"),
        (["--top-layers", "0", "--head", "lm"], "an lm head has nothing to learn, top_layers 0"),
        (["--top-layers", "3"], "top_layers must be 0 to 2, not 3"),
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
        (["--data", "bars.csv"], "unknown data source"),
        (["--data", "sample:TSLA"], "unknown sample 'TSLA'"),
        (["--data", "csv:none.csv"], "No such file or directory, none.csv"),
        (["--news", "none.csv"], "No such file or directory, none.csv"),
        (["--train", "2001-01-01"], "not START..END, --train '2001-01-01'"),
        (
            ["--train", f"{DATES[9]}..{DATES[2]}"],
            f"start after end, --train {DATES[9]}..{DATES[2]}",
        ),
        (["--test", f"{DATES[9]}..{DATES[2]}"], f"start after end, --test {DATES[9]}..{DATES[2]}"),
        (["--train", "1999-01-01..2001-01-10"], "is not inside the data, 2001-01-01..2001-02-23"),
        (["--test", "2001-02-01..2002-02-01"], "is not inside the data"),
        (["--test", "2001-02-03..2001-02-04"], "no day of the market"),
        (["--train", f"{DATES[0]}..{DATES[30]}"], "before training ends"),
        (["--train", f"{DATES[0]}..{DATES[0]}"], "fewer than 2 days, training period"),
        (["--train", "2001-02-30..2001-03-01"], "not a date (YYYY-MM-DD), --train '2001-02-30'"),
        (["--model", "none"], "no such folder or file, none"),
        (["--model", "package:none_such"], "no such Python package is installed"),
    ],
)
def test_train_refuses(flags, told, config_file, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with unchanged(tmp_path):
        assert told in refused("train", "--out", "run", "--config", config_file, *flags)


@pytest.mark.parametrize("variable", ["FASTFLAG_KERNELS", "FASTFLAG_GRAPHS"])
def test_train_refuses_an_environment_that_asks_for_what_there_is_not(
    variable, config_file, refused, tmp_path, monkeypatch
):
    monkeypatch.setenv(variable, "fast")
    out = tmp_path / "run"
    told = refused("train", "--config", config_file, "--out", out)
    assert re.search(rf"{variable}(=fast is not auto| is 'fast')", told)
    assert not out.exists()


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


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("below", ["", "/run"])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("file", "is not a folder"),
        ("link", "is a symbolic link to nothing"),
        ("loop", "is a symbolic link to nothing"),
    ],
)
def test_an_out_that_is_no_folder_is_named(
    name, told, below, resume, config_file, refused, tmp_path
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    out = f"{tmp_path / name}{below}"
    words = ["train", "--out", out, "--config", config_file]
    # Without --resume before data and model are read.
    words += ["--resume"] if resume else ["--data", "csv:none.csv", "--model", "none"]
    with unchanged(tmp_path):
        assert refused(*words) == f"{tmp_path / name} {told}, --out {out}"


def test_a_link_to_a_folder_is_one(config_file, refused, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    words = ["train", "--out", tmp_path / "link", "--config", config_file]
    assert refused(*words, "--data", "csv:none.csv") == "No such file or directory, none.csv"


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


def test_a_run_whose_time_steps_are_gone_has_the_default(run):
    path = run / "config.json"
    document = json.loads(path.read_text())
    del document["total_timesteps"]
    path.write_text(json.dumps(document))
    with claim(run, read_config(run), True, {"": document["market"]}) as resumes:
        assert resumes
    assert json.loads(path.read_text())["total_timesteps"] == TrainConfig.total_timesteps


def test_two_trainings_do_not_share_a_folder(config_file, refused, tmp_path):
    settings = from_dict(json.loads(config_file.read_text()), "config")
    with claim(tmp_path / "run", settings, resume=False):
        for flags in ([], ["--resume"]):
            words = ["train", "--out", tmp_path / "run", "--config", config_file, *flags]
            assert "another training is at work in it" in refused(*words)


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
    assert message.startswith(f"File too large, {tmp_path}/run/"), message
    documents = [*tmp_path.rglob("*.json")]
    assert all(json.loads(path.read_text()) for path in documents)
    assert not list(tmp_path.rglob(".*"))
    assert not (tmp_path / "run" / "report.html").exists()
    cli.main(["train", "--out", str(tmp_path / "run"), *map(str, words[3:]), "--resume"])
    assert (tmp_path / "run" / "report.html").exists()


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


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("rate", ["1e37", "1e308"])
@pytest.mark.parametrize("flag", ["--learning-rate", "--layer-learning-rate"])
def test_a_policy_that_overflows_is_told_in_one_line(
    flag, rate, optimizer, config_file, capsys, tmp_path
):
    words = ["train", "--out", str(tmp_path / "run"), "--config", str(config_file), flag, rate]
    words += ["--optimizer", optimizer]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--max-grad-norm", "0"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert "lower the learning rates" in message


def test_words_that_begin_alike_are_no_actions_of_an_lm_head(
    tiny_model, config_file, refused, tmp_path, monkeypatch
):
    """A token a byte: each of the words begins with the space before it."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.save(str(model / "tokenizer.json"))
    words = ["train", "--config", config_file, "--model", model, "--total-timesteps", 24]
    told = refused(*words, "--out", tmp_path / "lm", "--head", "lm")
    assert told == (
        "two of the words ' sell', ' hold', ' buy' begin with the same token, which an lm head "
        f"can't tell apart: choose another --head, {model}"
    )
    assert not (tmp_path / "lm").exists()
    cli.main(list(map(str, [*words, "--out", tmp_path / "linear", "--head", "linear"])))
