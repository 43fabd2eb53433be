"""Files that are broken, of markets, models and runs: one line says which, and none is changed."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from commands import unchanged
from small import DATES, DAYS
from tiny_model import write_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_tokenizer_larger_than_the_model_is_refused(config_file, refused, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 49999, "content": "<x>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ["--out", tmp_path / "run", "--config", config_file, "--model", model]
    message = refused("train", *words)
    assert "the model 49152 tokens" in message


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
    "change",
    [{"step": -1}, {"step": 2.7}, {"step": True}, {"step": 3}, {"tensors": "x\0"}]
    + [{"optimizer": value} for value in ({"a": {}}, {"0": 5}, {"0": None})],
)
def test_a_checkpoint_changed_by_hand_is_refused(change, run, config_file, refused):
    state = run / "checkpoint" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | change))
    with unchanged(run):
        refused("train", "--out", run, "--config", config_file, "--resume")
