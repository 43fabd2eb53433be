"""The loop: one seed is one run, and a run killed and resumed is the run uninterrupted."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small import as_kept, small_config, small_market, write_csv

from fastflag.config import to_dict
from fastflag.files import InputError
from fastflag.learn.checkpoint import read_checkpoint
from fastflag.learn.progress import Log, PhaseTimer
from fastflag.learn.run import read_config
from fastflag.learn.train import train
from fastflag.model.weights import open_weights

TIMINGS = ("seconds", "steps_per_second")


pytestmark = pytest.mark.usefixtures("one_thread")


def trained(config, run, resume=False):
    """Trains in this process -> (final tensors' bytes, lines of metrics.jsonl without timings)."""
    train(config, small_market(), open_weights(config.policy.model), run, resume)
    return outcome(run)


def outcome(run):
    state = json.loads((run / "checkpoint/state.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
    return (run / "checkpoint" / state["tensors"]).read_bytes(), metrics


VARIANTS = [
    (algorithm, adaptation, head)
    for algorithm in ("ppo", "reinforce")
    for adaptation in ("lora", "full")
    for head in ("linear", "mlp", "lm")
]


def variant(model, algorithm, adaptation, head):
    return small_config(
        model,
        algorithm__algorithm=algorithm,
        algorithm__minibatch_size=9,
        algorithm__kl_coef=0.05,
        policy__adaptation=adaptation,
        policy__head=head,
        total_timesteps=2 * 24,
    )


def test_every_algorithm_adaptation_and_head_trains_and_differs(tiny_model, tmp_path):
    outcomes = [
        trained(variant(tiny_model, *names), tmp_path / "-".join(names)) for names in VARIANTS
    ]
    assert len({tensors for tensors, _ in outcomes}) == len(VARIANTS)
    assert len({json.dumps(metrics) for _, metrics in outcomes}) == len(VARIANTS)
    for _, metrics in outcomes:
        assert [line["first_ratio_error"] for line in metrics] == [0.0, 0.0]
        assert metrics[0]["kl"] != 0.0  # the later minibatches see a policy that has moved


@pytest.mark.parametrize("names", VARIANTS[::5], ids="-".join)
def test_the_same_seed_gives_the_same_run_and_another_another(tiny_model, tmp_path, names):
    config = variant(tiny_model, *names)
    first = trained(config, tmp_path / "first")
    assert trained(config, tmp_path / "second") == first
    other = trained(dataclasses.replace(config, seed=1), tmp_path / "other")
    assert other[0] != first[0]
    assert other[1][0]["return"] != first[1][0]["return"]


def test_the_loop_that_benchmarks_measure_is_this_one(tiny_model, tmp_path):
    """Update by update, shuffles and accounts too."""
    from bench.measure.loop import Trainer

    config = small_config(
        tiny_model,
        algorithm__minibatch_size=9,
        algorithm__anneal_lr=False,
        policy__device="cpu",
        total_timesteps=3 * 24,
    )
    _, lines = trained(config, tmp_path / "run")
    trainer = Trainer(config, small_market())
    measured = [trainer.update() for _ in range(3)]
    assert [
        {name: line[name] for name in one} for one, line in zip(measured, lines, strict=True)
    ] == measured


class Killed(BaseException):
    pass


def killed_at(monkeypatch, step):
    """The run stops dead when update `step` is logged, before its checkpoint."""
    log = Log.add

    def stopping(self, record):
        log(self, record)
        if record["step"] == step:
            raise Killed

    monkeypatch.setattr(Log, "add", stopping)


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout__start_groups": 2, "policy__dtype": "bf16", "checkpoint_every": 2},
        {"policy__head": "lm", "algorithm__kl_coef": 0.1, "algorithm__minibatch_size": 7},
        {"prompt__account": "exact", "policy__head": "lm", "algorithm__kl_coef": 0.1},
        {"prompt__account": "exact", "rollout__num_envs": 1, "policy__dtype": "bf16"},
        {"policy__adaptation": "full", "policy__trunk_cache_mb": 0, "algorithm__update_epochs": 2},
        {"policy__adaptation": "full", "algorithm__optimizer": "adamw8bit"},
    ],
    ids=["groups", "lm", "exact lm", "exact alone", "full uncached", "8 bits"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tiny_model, tmp_path, monkeypatch, changes):
    """Its caches are cold, its optimiser and accounts come from the file: no bit may differ."""
    envs = changes.get("rollout__num_envs", 4)
    # Late in a run every prompt has been met: what is kept of it must be what is made of it anew.
    updates = 20 if changes.get("policy__head") == "lm" else 5
    config = small_config(tiny_model, total_timesteps=updates * envs * 6, **changes)
    whole = trained(config, tmp_path / "whole")
    assert len(whole[1]) == updates
    for step in (0, updates - 2):
        run = tmp_path / f"killed at {step}"
        with monkeypatch.context() as patch:
            killed_at(patch, step)
            with pytest.raises(Killed):
                trained(config, run)
        assert trained(config, run, resume=True) == whole


def test_checkpoints_come_when_due_and_at_the_end(tiny_model, tmp_path, monkeypatch):
    config = small_config(tiny_model, total_timesteps=5 * 24, checkpoint_every=2)
    for step, kept in ((1, None), (2, 2), (4, 4)):
        run = tmp_path / str(step)
        with monkeypatch.context() as patch:
            killed_at(patch, step)
            with pytest.raises(Killed):
                trained(config, run)
        assert (run / "checkpoint").exists() == (kept is not None)
        assert kept is None or read_checkpoint(run).updates == kept
    trained(config, tmp_path / "whole")
    assert read_checkpoint(tmp_path / "whole").updates == 5


def test_a_finished_run_resumed_stays_as_it_is(tiny_model, tmp_path):
    config = small_config(tiny_model)
    first = trained(config, tmp_path)
    assert trained(config, tmp_path, resume=True) == first


def test_a_run_that_is_there_is_not_trained_over(tiny_model, tmp_path):
    config = small_config(tiny_model)
    before = trained(config, tmp_path)
    with pytest.raises(InputError, match=r"holds a run already.*--resume"):
        trained(config, tmp_path)
    assert outcome(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, r"seed \(0, not 1\)"),
        ({"algorithm__gamma": 0.9}, r"gamma \(0.95, not 0.9\)"),
        ({"total_timesteps": 48}, r"total_timesteps \(96, not 48\)"),
        ({"policy__head": "mlp"}, r"head \('linear', not 'mlp'\)"),
    ],
)
def test_a_run_is_not_resumed_with_another_configuration(tiny_model, tmp_path, changes, told):
    config = small_config(tiny_model)
    before = trained(config, tmp_path)
    with pytest.raises(InputError, match=f"another {told}"):
        trained(small_config(tiny_model, **changes), tmp_path, resume=True)
    assert outcome(tmp_path) == before
    assert read_config(tmp_path) == as_kept(config)


def test_a_run_from_before_there_was_a_choice_goes_on_with_cash(tiny_model, tmp_path):
    config = small_config(tiny_model, simulator__dividends="cash")
    before = trained(config, tmp_path)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    del document["simulator"]["dividends"]
    path.write_text(json.dumps(document))
    assert read_config(tmp_path) == as_kept(config)
    with pytest.raises(InputError, match=r"another dividends \('cash', not 'reinvest'\)"):
        trained(small_config(tiny_model), tmp_path, resume=True)
    assert trained(config, tmp_path, resume=True) == before
    assert json.loads(path.read_text()) == document


def test_resume_starts_a_run_where_there_is_none(tiny_model, tmp_path):
    config = small_config(tiny_model)
    assert trained(config, tmp_path / "a", resume=True) == trained(config, tmp_path / "b")


def test_too_few_steps_for_one_update_leave_no_folder(tiny_model, tmp_path):
    with pytest.raises(InputError, match="less than one update of 4 x 6"):
        trained(small_config(tiny_model, total_timesteps=23), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_tell_each_update(tiny_model, tmp_path):
    config = small_config(tiny_model, total_timesteps=100, rollout__start_groups=2)
    trained(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["env_steps"] for line in lines] == [24, 48, 72, 96]
    rates = [config.algorithm.learning_rate * factor for factor in (1, 0.75, 0.5, 0.25)]
    assert [line["learning_rate"] for line in lines] == rates
    for line in lines:
        assert set(line["seconds"]) == {"evaluate", "rollout", "advantage", "update"}
        assert line["steps_per_second"] == pytest.approx(
            24 / sum(line["seconds"].values()), rel=0.3
        )
        numbers = [value for value in line.values() if not isinstance(value, dict)]
        assert np.isfinite(numbers).all()
    # A uniform policy over two allowed actions, and the ends of whole episodes of 9 steps.
    assert lines[0]["entropy"] == pytest.approx(np.log(2), rel=1e-6)
    accounts = read_checkpoint(tmp_path).tensors
    sharpe = np.concatenate([accounts[f"accounts.{group}.sharpe"] for group in range(2)])
    assert lines[-1]["sharpe"] == pytest.approx(sharpe.mean() * np.sqrt(252))


def test_the_return_is_the_mean_of_the_environments_reward_sums(tiny_model, tmp_path):
    """One update over a whole episode of Sharpe rewards, which telescope to the Sharpe ratio."""
    config = small_config(tiny_model, rollout__num_steps=9, total_timesteps=4 * 9)
    _, (line,) = trained(config, tmp_path)
    assert line["return"] * np.sqrt(252) == pytest.approx(line["sharpe"], rel=1e-9)


def test_lines_of_updates_to_be_done_again_are_dropped(tmp_path):
    lines = [json.dumps({"step": step}) for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "ret')
    with Log(tmp_path, start=3, updates=9):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(lines[:3]) + "\n"


def test_tensorboard_reads_what_metrics_tell(tiny_model, tmp_path, monkeypatch):
    """Also of a run resumed from before its last lines: those are void."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small_config(tiny_model, total_timesteps=5 * 24, checkpoint_every=2)
    with monkeypatch.context() as patch:
        killed_at(patch, 2)
        with pytest.raises(Killed):
            trained(config, tmp_path)
    trained(config, tmp_path, resume=True)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("entropy", "sharpe", "grad_norm", "steps_per_second", "learning_rate"):
        events = board.Scalars(name)
        assert [event.step for event in events] == [0, 1, 2, 3, 4]
        np.testing.assert_allclose([e.value for e in events], [line[name] for line in lines], 1e-6)
    seconds = [event.value for event in board.Scalars("seconds/update")]
    np.testing.assert_allclose(seconds, [line["seconds"]["update"] for line in lines], 1e-6)


def test_phases_add_up(monkeypatch):
    now = iter([0.0, 1.0, 10.0, 12.5, 20.0, 20.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    phase = PhaseTimer()
    with phase("rollout"):
        pass
    with phase("rollout"):
        pass
    assert phase.take() == {"rollout": 3.5}
    with phase("update"):
        pass
    assert phase.take() == {"update": 0.5}


# As a user runs it ------------------------------------------------------------------------------


COMMAND = [sys.executable, "-m", "fastflag", "train"]


class Program:
    """`python -m fastflag train` on a CSV of the planted market, in a process of its own."""

    updates = 12

    def __init__(self, folder, model, optimizer):
        self.folder = folder
        bars = write_csv(small_market(), folder / "bars.csv")
        config = small_config(
            model,
            data__data=f"csv:{bars}",
            policy__dtype="bf16",
            policy__adaptation="full",
            algorithm__optimizer=optimizer,
            total_timesteps=self.updates * 24,
        )
        (folder / "settings.json").write_text(json.dumps(to_dict(config)))
        self.config = config

    def start(self, name, *flags, limit=None):
        def prepare():
            # What the shell starts in the background ignores it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        settings = str(self.folder / "settings.json")
        return subprocess.Popen(
            [*COMMAND, "--config", settings, "--out", str(self.folder / name), *flags],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
        )

    def run(self, name, *flags, limit=None):
        """-> (exit status, stderr)"""
        process = self.start(name, *flags, limit=limit)
        _, errors = process.communicate(timeout=120)
        return process.returncode, errors.strip()

    def signal_after(self, name, updates, delay, number, *flags):
        """Sends signal `number` some time after a line of metrics; -> as `run`"""
        process, metrics = self.start(name, *flags), self.folder / name / "metrics.jsonl"
        while process.poll() is None and lines(metrics) < updates:
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        return process.returncode, errors.strip()


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def program(request, tiny_model, tmp_path_factory):
    made = Program(tmp_path_factory.mktemp("program"), tiny_model, request.param)
    assert made.run("whole") == (0, "")
    return made


@pytest.mark.parametrize("program", ["adamw", "adamw8bit"], indirect=True)
def test_killed_at_random_moments_it_ends_as_if_it_were_not(program):
    random = np.random.default_rng(0)
    steps = []
    for updates, number in ((2, "SIGKILL"), (4, "SIGTERM"), (7, "SIGKILL"), (9, "SIGKILL")):
        number = signal.Signals[number]
        delay = random.uniform(0, 0.04)
        ended = program.signal_after("killed", updates, delay, number, "--resume")
        assert ended == (-number, "")
        steps.append(read_checkpoint(program.folder / "killed").updates)
    assert steps == sorted(steps) and 0 < steps[-1] < program.updates
    assert program.run("killed", "--resume") == (0, "")
    assert outcome(program.folder / "killed") == outcome(program.folder / "whole")


@pytest.mark.parametrize("program", ["adamw"], indirect=True)
def test_ctrl_c_and_a_full_disk_each_say_one_line_and_lose_nothing(program):
    run = program.folder / "stopped"
    status, errors = program.signal_after("stopped", 3, 0.0, signal.SIGINT)
    assert status == 130
    assert "interrupted" in errors and "--resume" in errors and "\n" not in errors
    kept = read_checkpoint(run)
    assert 2 <= kept.updates < program.updates
    state = json.loads((run / "checkpoint/state.json").read_text())

    status, errors = program.run("stopped", "--resume", limit=50_000)
    assert status == 2
    assert errors.startswith("fastflag: error: File too large, ") and "\n" not in errors
    assert json.loads((run / "checkpoint/state.json").read_text()) == state
    assert os.path.getsize(run / "checkpoint" / state["tensors"]) > 50_000
    assert read_checkpoint(run).updates == kept.updates
    assert len(list((run / "checkpoint").glob("*.safetensors"))) == 1

    assert program.run("stopped", "--resume") == (0, "")
    assert outcome(run) == outcome(program.folder / "whole")
    assert len(os.listdir(run / "checkpoint")) == 2  # nor anything half-written, hidden or not
