"""bench.gpu without a GPU: parts resumed within a time, and what they measure by hand."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from models import EXACT, Given, tiny
from torch.nn import functional

pytest.importorskip("triton", reason="Triton exists for Linux only")

from bench import gpu
from bench.gpu import (
    VARIANTS,
    compared,
    curve_distance,
    run_test_files,
    sanitize,
    time_kernels,
)
from bench.measure.cases import SMALL, Memory, Model
from bench.measure.parts import Part, Record, code_digest, run_parts
from bench.measure.programs import Failed, run_program
from bench.measure.standin import write_market, write_model
from bench.rivals.layer import layer_inputs, layer_rows
from bench.rivals.ops import adapted
from fastflag.config import PRESETS, PlanConfig
from fastflag.learn.update import make_optimizer, update
from fastflag.learn.whole_lesson import whole_lesson
from fastflag.model.model_config import Settings, json_config
from fastflag.model.proof.clock import WallClock
from fastflag.policy.table import Policy

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


class Work:
    """Parts that take seconds of a clock of their own, and say in which order they ran."""

    def __init__(self):
        self.clock, self.ran, self.failing = 0.0, [], set()

    def part(self, name: str, estimate: float, takes: float) -> Part:
        def run(left, found):
            self.ran.append((name, left, sorted(found)))
            self.clock += takes
            if name in self.failing:
                raise RuntimeError(f"{name} broke")
            return {"rows": [{"what": name}], "summary": "1 row"}

        return Part(name, estimate, run)

    def now(self) -> float:
        return self.clock


def test_parts_go_on_where_they_stopped(tmp_path):
    work, file = Work(), tmp_path / "device" / "abc-gpu.json"
    parts = [work.part("a", 10, 20), work.part("b", 30, 25), work.part("c", 50, 10)]
    parts += [work.part("d", 5, 1)]
    # After a and b 15 s are left: c, which wants 50, is not begun, and d, which wants 5, is.
    assert run_parts(parts, Record(file, "code"), 60, work.now) == ["c"]
    assert work.ran == [("a", 60, []), ("b", 40, ["a"]), ("d", 15, ["a", "b"])]
    kept = json.loads(file.read_text())
    assert [row["what"] for row in kept["rows"]] == ["a", "b", "d"]
    assert [kept["parts"][name]["seconds"] for name in "abd"] == [20, 25, 1]
    work.ran.clear()
    assert run_parts(parts, Record(file, "code"), 60, work.now) == []
    assert work.ran == [("c", 60, ["a", "b", "d"])]
    work.ran.clear()
    assert run_parts(parts, Record(file, "code"), 60, work.now) == [] and work.ran == []
    # Other code: nothing of it counts, and nothing of it stays.
    assert run_parts(parts[3:], Record(file, "other"), 60, work.now) == []
    assert [*json.loads(file.read_text())["parts"]] == ["d"]


def test_a_part_that_fails_is_told_and_tried_again_last(tmp_path, capsys):
    work, file = Work(), tmp_path / "gpu.json"
    work.failing = {"a"}
    parts = [work.part("a", 1, 1), work.part("b", 1, 1)]
    assert run_parts(parts, Record(file, "code"), 9, work.now) == ["a"]
    kept = json.loads(file.read_text())["parts"]
    assert kept["a"] == {"error": "RuntimeError: a broke", "seconds": 1.0}
    assert "a: failed, RuntimeError: a broke" in capsys.readouterr().err
    work.failing, work.ran = set(), []
    parts.append(work.part("c", 1, 1))
    assert run_parts(parts, Record(file, "code"), 9, work.now) == []
    assert [name for name, _, _ in work.ran] == ["c", "a"]
    assert [row["what"] for row in json.loads(file.read_text())["rows"]] == ["a", "b", "c"]


def test_each_part_is_written_when_it_ends(tmp_path):
    work, file = Work(), tmp_path / "gpu.json"

    def interrupted(left, found):
        raise KeyboardInterrupt

    parts = [work.part("a", 1, 1), Part("b", 1, interrupted)]
    with pytest.raises(KeyboardInterrupt):
        run_parts(parts, Record(file, "code"), 9, work.now)
    assert [*json.loads(file.read_text())["parts"]] == ["a"]


def test_every_source_is_part_of_the_code(tmp_path):
    for folder in ("bench", "kernels", "fastflag/policy", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    seen = {code_digest(tmp_path)}
    for place in ("bench/a.py", "kernels/a.py", "fastflag/policy/a.py", "tests/a.py"):
        (tmp_path / place).write_text("1")
        seen.add(code_digest(tmp_path))
    (tmp_path / "kernels/a.py").write_text("2")
    seen.add(code_digest(tmp_path))
    (tmp_path / "README.md").write_text("not this")
    seen.add(code_digest(tmp_path))
    assert len(seen) == 6


def test_a_program_is_ended_with_what_it_started(tmp_path):
    child = tmp_path / "child"
    code = f"import subprocess\nsubprocess.run(['sh', '-c', 'echo $$ > {child}; exec sleep 60'])"
    began = time.monotonic()
    with pytest.raises(Failed, match="not done within 3 s"):
        run_program([sys.executable, "-c", code], 3)
    assert time.monotonic() - began < 20
    number = int(child.read_text())
    for _ in range(100):
        if _is_gone(number):
            return
        time.sleep(0.05)
    raise AssertionError("the child lives on")


def test_a_program_ends_with_who_waits_for_it(tmp_path, monkeypatch):
    """Ctrl-C reaches the one that waits; the other has a session of its own."""
    started, wait = [], subprocess.Popen.communicate

    def interrupted(self, *arguments, **options):
        if not started:
            started.append(self)
            raise KeyboardInterrupt
        return wait(self, *arguments, **options)

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_program([sys.executable, "-c", "import time; time.sleep(60)"], 30)
    assert started[0].returncode == -signal.SIGKILL


def _is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_red_tests_are_kept_with_what_they_say(monkeypatch):
    def planted(words, limit):
        assert words[-1] == "tests/test_kernels_rope.py" and limit == 45
        return subprocess.CompletedProcess(words, 1, "E  assert 1 == 2\n1 failed in 3.00s\n", "")

    monkeypatch.setattr(gpu, "run_program", planted)
    made = run_test_files(["kernels_rope"], 45, {})
    assert made["red"] and made["summary"] == "1 failed in 3.00s"
    assert "assert 1 == 2" in made["output"]


def test_kernels_are_timed_only_after_their_tests(monkeypatch):
    asked = []

    def task(*words, limit, environment):
        asked.append(words)
        return {"rows": []}

    monkeypatch.setattr(gpu, "run_task", task)
    made = time_kernels("rope", 60, {"tests rope": {"red": True}})
    assert made["red"] and made["rows"] == [] and asked == []
    time_kernels("rope", 60, {"tests rope": {"red": False}})
    time_kernels("rope", 60, {"tests swiglu": {"red": False}})  # its own tests are yet to run
    assert asked == [("kernels", "rope", "green"), ("kernels", "rope")]


def test_every_file_of_kernels_is_tested_before_any_is_timed():
    names = [part.name for part in gpu.all_parts({})]
    files = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"language", "tiles"}
    timed = [name for name in names if name.startswith("kernels ")]
    assert {name.split()[1] for name in timed} <= files
    for name in timed:
        tests = names.index(name.replace("kernels ", "tests "))
        assert tests < names.index(timed[0])
        assert (ROOT / "tests" / f"test_kernels_{name.split()[1]}.py").exists()
    assert len(names) == len(set(names)) and max(part.seconds for part in gpu.all_parts({})) < 480


def test_variants_are_compared_with_the_first(monkeypatch):
    took = dict(zip(VARIANTS, (12.0, 6.0, 8.0, 3.0), strict=True))

    def task(name, variant, limit, environment):
        assert environment == {"MODEL": "m", **VARIANTS[variant]} and limit == 25
        told = {"what": "update", "shape": "s", "provider": variant, "ratio": None, "against": ""}
        return [
            told | {"value": took[variant], "unit": "ms"},
            told | {"what": "memory", "value": 7.0, "unit": "MB"},
        ]

    monkeypatch.setattr(gpu, "run_task", task)
    rows = compared("update", {"MODEL": "m"}, 100, {})["rows"]
    told = [(row["provider"], row["ratio"], row["against"]) for row in rows if row["unit"] == "ms"]
    assert told[0] == ("torch", None, "")
    assert [ratio for _, ratio, _ in told[1:]] == [2.0, 1.5, 4.0]
    assert {against for _, _, against in told[1:]} == {"torch"}
    assert all(row["ratio"] is None for row in rows if row["unit"] == "MB")


def test_the_distance_of_curves_by_hand():
    one = [{"value_loss": 1.0, "entropy": 2.0, "grad_norm": 0.5}] * 2
    other = [
        {"value_loss": 1.0, "entropy": 2.0, "grad_norm": 0.5},
        {"value_loss": 1.0, "entropy": 2.5, "grad_norm": 0.4},
    ]
    assert curve_distance(one, one) == 0
    assert curve_distance(one, other) == pytest.approx(0.2)  # both 0.5 of 2.5 and 0.1 of 0.5
    gone = [one[0], one[1] | {"entropy": float("nan")}]
    assert not curve_distance(gone, one) <= 1e9


LEVELS = torch.linspace(-1, 1, 16)


def linear(x, weight, absmax, a, b, scale):
    """Any 4-bit code will do."""
    if absmax is not None:
        nibbles = torch.stack((weight >> 4, weight & 15), dim=1).flatten().long()
        flat = LEVELS[nibbles] * absmax.repeat_interleave(64)[: len(nibbles)]
        weight = flat.view(len(b), x.shape[-1]).to(x.dtype)
    return adapted(functional.linear(x, weight), x, a, b, scale)


def test_a_layer_has_its_seven_matrices():
    model = Model("grouped", 48, 80, 6, 2, 16, 100)
    for nf4 in (False, True):
        inputs = layer_inputs(model, 5, 4, Memory("cpu"), nf4)
        shapes = [tuple(linear(**some).shape) for some in inputs]
        # q, k, v, o, gate, up, down of 6 heads of 16 with 2 groups
        assert shapes == [(5, 96), (5, 32), (5, 32), (5, 48), (5, 80), (5, 80), (5, 48)]
        assert [some["x"].shape[1] for some in inputs] == [48, 48, 48, 96, 48, 48, 80]
        assert len({id(some["x"]) for some in inputs}) == 4
    rows = layer_rows(SMALL, 8, linear, WallClock())
    assert [row.provider for row in rows] == ["nf4", "bf16", "bf16, torch + peft"]
    best = min(rows[1:], key=lambda row: row.value).provider
    assert {row.against for row in rows} == {best}
    assert next(row.ratio for row in rows if row.provider == best) == 1.0


def test_the_lesson_of_an_update_is_whole():
    model = tiny("llama", max_position_embeddings=256)
    config = json_config(Settings(model.config.to_dict(), "memory"))
    weights = Given(config, {name: t.detach() for name, t in model.state_dict().items()})
    policy = Policy(weights, EXACT, range(3), 0)
    lesson = whole_lesson(PlanConfig(64, 24, 150, 16), config.vocabulary, policy.device)
    assert len(lesson.prompts.pairs) == 64 * 24 and len(lesson.samples) == 3 * 64 * 24
    assert len(set(map(tuple, lesson.prompts.pairs.tolist()))) == 64 * 24
    assert {*map(len, lesson.prompts.prefixes)} == {150}
    assert {*map(len, lesson.prompts.suffixes)} == {16}
    algorithm = PRESETS["demo"].algorithm
    table = policy.evaluate(lesson.prompts)
    told = update(policy, make_optimizer(policy, algorithm), table, lesson, algorithm, 0)
    # The untrained policy is uniform, and its ratio to what was sampled is 1.
    assert told["ratio_min"] == pytest.approx(1) and told["ratio_max"] == pytest.approx(1)
    assert told["entropy"] == pytest.approx(np.log(3)) and told["grad_norm"] > 0


def test_the_stand_in_is_read_as_the_demo_is(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model", Model("tiny", 64, 128, 4, 2, 16, 8192), layers=3)
    monkeypatch.setenv("FASTFLAG_BENCH_MODEL", str(model))
    monkeypatch.setenv("FASTFLAG_BENCH_DATA", f"csv:{write_market(tmp_path / 'walk.csv')}")
    from bench.measure.loop import Trainer, configuration

    trainer = Trainer(configuration(8, "fp32"))
    _, lesson = trainer.every_step()
    prompts = lesson.prompts
    assert len(trainer.days) == 64 and len(prompts.prefixes) == 64
    # bench.train says of the demo's that they have about 150 + 14 tokens.
    assert np.mean([*map(len, prompts.prefixes)]) == pytest.approx(150, abs=15)
    assert np.mean([*map(len, prompts.suffixes)]) == pytest.approx(14, abs=3)


def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--json"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "FASTFLAG_BENCH_RESULTS": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "bench.gpu: no CUDA GPU is available\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("errors", [0, 2])
def test_the_sanitizers_summary_is_kept(errors, tmp_path, monkeypatch):
    summary = f"ERROR SUMMARY: {errors} errors"
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '========= {summary}'\nexit {9 if errors else 0}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitize("memcheck", 30, {})["summary"] == "compute-sanitizer is not installed"
    tool.chmod(0o755)
    made = sanitize("memcheck", 30, {})
    assert (made["summary"], made["red"]) == (summary, bool(errors))
