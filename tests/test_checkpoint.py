"""What a run keeps on disk: whole at any moment, exact, and refused when it is not what it was."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import small_config, small_market, small_world
from tiny_model import write_tiny_model

from fastflag.files import InputError
from fastflag.learn.batch import start_accounts
from fastflag.learn.checkpoint import (
    _kept,
    _restored,
    read_checkpoint,
    restore_accounts,
    restore_optimizer,
    restore_policy,
    write_checkpoint,
)
from fastflag.learn.lesson import estimate
from fastflag.learn.progress import PhaseTimer
from fastflag.learn.rollout import rollout
from fastflag.learn.run import load_policy
from fastflag.learn.train import train
from fastflag.learn.update import make_optimizer, update
from fastflag.market.compiled.constants import CODES
from fastflag.model.weights import open_weights

FINGERPRINT = "of some model"


pytestmark = pytest.mark.usefixtures("one_thread")


class Trainer:
    """Everything that a checkpoint keeps, and the updates that change it."""

    def __init__(self, config):
        self.config = config
        self.world, self.policy, self.days = small_world(config, small_market())
        self.optimizer = make_optimizer(self.policy, config.algorithm)
        self.accounts = start_accounts(config.rollout, config.simulator.cash)

    def update(self, step):
        config, phase = self.config, PhaseTimer()
        table, batches = rollout(
            self.policy, self.world, [self.days], self.accounts, config, step, phase
        )
        lesson = estimate(table, batches, config.algorithm, phase)
        return update(self.policy, self.optimizer, table, lesson, config.algorithm, step)

    def write(self, run, step):
        write_checkpoint(run, step, FINGERPRINT, self.policy, self.optimizer, self.accounts)

    def restore(self, run):
        checkpoint = read_checkpoint(run)
        restore_policy(checkpoint, self.policy, FINGERPRINT, run)
        restore_optimizer(checkpoint, self.optimizer, Path())
        self.accounts = restore_accounts(checkpoint, self.config.rollout.start_groups, run)
        return checkpoint.updates

    def bits(self):
        """Every kept tensor's bytes by name."""
        tensors = {f"policy.{name}": t for name, t in self.policy.state_dict().items()}
        for number, state in enumerate(self.optimizer.state.values()):
            tensors |= {f"{number}.{name}": torch.as_tensor(t) for name, t in state.items()}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        for group, accounts in enumerate(self.accounts):
            arrays |= {f"{group}.{name}": array for name, array in accounts.arrays().items()}
        return {name: (array.dtype, array.tobytes()) for name, array in arrays.items()}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout__start_groups": 2},
        {"policy__adaptation": "full", "policy__head": "mlp", "policy__dtype": "bf16"},
        {"policy__head": "lm", "prompt__account": "exact"},
        {"policy__adaptation": "full", "algorithm__optimizer": "adamw8bit"},
    ],
    ids=["linear", "full mlp bf16", "lm exact", "8 bits"],
)
def test_a_checkpoint_brings_everything_back_bit_for_bit(tiny_model, tmp_path, changes):
    config = small_config(tiny_model, **changes)
    trained = Trainer(config)
    trained.update(0), trained.update(1)
    trained.write(tmp_path, 2)
    resumed = Trainer(config)
    assert resumed.bits() != trained.bits()
    assert resumed.restore(tmp_path) == 2
    assert resumed.bits() == trained.bits()
    assert trained.update(2) == resumed.update(2)
    assert resumed.bits() == trained.bits()


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
tensors_ = st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(torch.tensor)
nested = st.recursive(
    scalars | tensors_,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
)


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@given(nested)
def test_any_nested_state_comes_back_from_tensors_and_json(value):
    tensors = {}
    kept = json.loads(json.dumps(_kept(value, "0", tensors)))
    again = _restored(kept, tensors)
    assert type(again) is type(value) and same(value, again)


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept["dict"].pop("state1"),
        lambda kept: kept["dict"].pop("qmap1"),
        lambda kept: kept["dict"].update(state1={"tensor": "accounts.0.cash"}),
        lambda kept: kept["dict"].update(state1={"tensor": "none"}),
        lambda kept: kept["dict"].update(state1={"pickle": "gASVAA=="}),
        lambda kept: kept["dict"].update(state1=[1, 2]),
        lambda kept: kept.update(list=[]),
    ],
)
def test_a_malformed_optimiser_is_refused(tiny_model, tmp_path, change):
    config = small_config(tiny_model, policy__adaptation="full", algorithm__optimizer="adamw8bit")
    trained = Trainer(config)
    trained.update(0)
    trained.write(tmp_path, 1)
    path = tmp_path / "checkpoint/state.json"
    state = json.loads(path.read_text())
    kept = max(state["optimizer"].values(), key=lambda kept: len(json.dumps(kept)))
    inner = kept["dict"].get("__bnb_optimizer_quant_state__", kept)
    change(inner if "dict" in inner else kept)
    path.write_text(json.dumps(state))
    with pytest.raises(InputError, match="optimiser is malformed"):
        Trainer(config).restore(tmp_path)


def test_the_running_statistics_are_kept(tiny_model, tmp_path):
    trained = Trainer(small_config(tiny_model))
    trained.update(0)
    trained.write(tmp_path, 1)
    tensors = read_checkpoint(tmp_path).tensors
    assert tensors["policy.running.count"].tolist() == [0, 1, 1]
    assert (tensors["policy.running.deviation"] != 1).any()


def interrupt(monkeypatch, owner, name, at, after):
    """The call number `at` of owner.name ends in an exception, before or after its work."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) - 1 == at and not after:
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        if len(calls) - 1 == at:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name", "at", "step"),
    [
        (os, "fsync", 0, 1),
        (os, "replace", 0, 1),
        (os, "fsync", 1, 1),
        (os, "replace", 1, None),
        (Path, "unlink", 0, 2),
    ],
)
def test_stopped_at_any_operation_it_is_whole(
    tiny_model, tmp_path, monkeypatch, owner, name, at, step, after
):
    """`step` is the checkpoint left; until state.json is replaced the one before."""
    trainer = Trainer(small_config(tiny_model))
    trainer.write(tmp_path, 1)
    kept = {1: trainer.bits()}
    trainer.update(1)
    kept[2] = trainer.bits()
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, at, after)
        with pytest.raises(KeyboardInterrupt):
            trainer.write(tmp_path, 2)
    resumed = Trainer(trainer.config)
    left = resumed.restore(tmp_path)
    assert left == (step or 1 + after)
    assert resumed.bits() == kept[left]
    trainer.write(tmp_path, 2)
    names = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert names == ["00000002.safetensors", "state.json"]


def test_what_a_kill_in_mid_write_leaves_is_cleared(tiny_model, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / ".00000001.safetensors.a1b2c3").write_bytes(b"half")
    (folder / "00000007.safetensors").write_bytes(b"never named by state.json")
    Trainer(small_config(tiny_model)).write(tmp_path, 1)
    assert sorted(snapshot(folder)) == ["00000001.safetensors", "state.json"]


def test_a_full_disk_leaves_the_checkpoint_before(tiny_model, tmp_path, monkeypatch):
    trainer = Trainer(small_config(tiny_model))
    trainer.write(tmp_path, 1)
    before = snapshot(tmp_path)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.write(tmp_path, 2)
    assert snapshot(tmp_path) == before


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    config = small_config(tiny_model, total_timesteps=2 * 24)
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config, small_market(), open_weights(config.policy.model), folder, resume=False)
    return folder, config


@pytest.fixture
def run(finished, tmp_path):
    """(folder, configuration) of a finished run of 2 updates, to be spoilt."""
    folder, config = finished
    return Path(shutil.copytree(folder, tmp_path / "run")), config


def refused(run, config, match):
    """Neither resumed nor loaded, and nothing of the run is touched."""
    before = snapshot(run)
    for use in (
        lambda: train(config, small_market(), open_weights(config.policy.model), run, resume=True),
        lambda: load_policy(run, config, small_market()),
    ):
        with pytest.raises(InputError, match=match) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert snapshot(run) == before


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_truncated_tensors_are_refused(run, part):
    folder, config = run
    path = folder / "checkpoint/00000002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    refused(folder, config, "truncated, or not what was written, .*00000002.safetensors")


@pytest.mark.parametrize("place", [3, 40, -1])
def test_a_flipped_bit_is_refused(run, place):
    folder, config = run
    path = folder / "checkpoint/00000002.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    refused(folder, config, "not what was written")


def test_missing_tensors_are_refused(run):
    folder, config = run
    (folder / "checkpoint/00000002.safetensors").unlink()
    refused(folder, config, "No such file.*00000002.safetensors")


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_truncated_state_is_refused(run, part):
    folder, config = run
    path = folder / "checkpoint/state.json"
    text = path.read_text()
    path.write_text(text[: int(part * len(text))])
    refused(folder, config, "not valid JSON.*state.json")


def test_tensors_alone_as_an_earlier_version_wrote_them_are_refused(run):
    folder, config = run
    path = folder / "checkpoint/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"optimizer": {}}))
    with pytest.raises(InputError, match="optimiser is malformed"):
        train(config, small_market(), open_weights(config.policy.model), folder, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [],
        lambda state: {k: v for k, v in state.items() if k != "step"},
        lambda state: {k: v for k, v in state.items() if k != "digest"},
        lambda state: state | {"step": "two"},
        lambda state: state | {"optimizer": 5},
        lambda state: None,
    ],
)
def test_a_malformed_state_is_refused(run, change):
    folder, config = run
    path = folder / "checkpoint/state.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    refused(folder, config, "not a checkpoint, .*state.json")


def test_a_name_that_leads_out_of_the_folder_is_not_followed(run, tmp_path):
    folder, config = run
    path = folder / "checkpoint/state.json"
    secret = tmp_path / "elsewhere.safetensors"
    (folder / "checkpoint/00000002.safetensors").rename(secret)
    state = json.loads(path.read_text()) | {"tensors": str(secret)}
    path.write_text(json.dumps(state))
    refused(folder, config, "not a checkpoint")


def rewrite(folder, change):
    """The run's tensors changed, with a digest that fits."""
    from fastflag.learn.checkpoint import _digest

    tensors, path = folder / "checkpoint/00000002.safetensors", folder / "checkpoint/state.json"
    content = load_file(tensors)
    change(content)
    save_file(content, tensors)
    state = json.loads(path.read_text()) | {"digest": _digest(tensors.read_bytes())}
    path.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("policy.value_head.bias"), "does not fit this policy"),
        (lambda t: t.update({"policy.other": torch.zeros(1)}), "does not fit this policy"),
        (lambda t: t.update({"policy.value_head.bias": torch.zeros(2)}), "does not fit"),
    ],
)
def test_tensors_of_another_policy_are_refused(run, change, match):
    folder, config = run
    rewrite(folder, change)
    refused(folder, config, match)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("accounts.0.cash"),
        lambda t: t.update({"accounts.0.cash": torch.zeros(3)}),
        lambda t: t.update({"accounts.0.extra": torch.zeros(4)}),
        lambda t: [t.pop(name) for name in list(t) if name.startswith("accounts")],
    ],
)
def test_incomplete_accounts_are_refused(run, change):
    folder, config = run
    rewrite(folder, change)
    before = snapshot(folder)
    with pytest.raises(InputError, match="accounts are incomplete"):
        train(config, small_market(), open_weights(config.policy.model), folder, resume=True)
    assert snapshot(folder) == before


def test_a_checkpoint_of_another_model_is_refused(run, tiny_model, tmp_path):
    folder, config = run
    tokenizer = (tiny_model / "tokenizer.json").read_text()
    other = write_tiny_model(tmp_path / "other", tokenizer, seed=1)
    # The same path with other weights behind it: the configuration is the same.
    document = json.loads((folder / "config.json").read_text())
    document["policy"]["model"] = str(other)
    (folder / "config.json").write_text(json.dumps(document))
    policy = dataclasses.replace(config.policy, model=str(other))
    refused(folder, dataclasses.replace(config, policy=policy), "other model weights")


def test_a_loaded_policy_answers_as_the_trained_one(tiny_model, tmp_path):
    config = small_config(tiny_model, total_timesteps=2 * 24)
    weights = open_weights(config.policy.model)
    world, trained = train(config, small_market(), weights, tmp_path / "run", resume=False)
    _, loaded = load_policy(tmp_path / "run", config, small_market())
    prompts, _ = world.stepped([5, 6], np.arange(CODES)[None] < [[1], [3]])
    with torch.no_grad():
        ours, theirs = (p.evaluate(prompts, p.running.current()) for p in (loaded, trained))
    assert torch.equal(ours.log_probabilities, theirs.log_probabilities)
    assert torch.equal(ours.value, theirs.value)
