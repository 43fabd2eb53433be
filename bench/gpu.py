"""All that needs a GPU, by a command of at most 8 minutes that is given again until all is done.

    python -m bench.gpu [--json] [--parts tests kernels ...] [--minutes 8]

Parts, in this order: doctor; the tests of each file of kernels, and of what launches them; their
times beside their baselines (bench/kernels.py); QLoRA beside bf16 LoRA over a layer's matrices; an
update of 64 days x 24 texts, and its memory beside the plan's; rollout and update; the paper's
whole budget; training curves with kernels and graphs on and off; training throughput beside
transformers + PEFT (bench/train.py); compute-sanitizer on small shapes. Each runs in a process of
its own, for one that breaks the device breaks it for its process. All goes into one file,
bench/results/DEVICE/COMMIT-gpu.json (bench/parts.py). Exit status 1 where something is red or
failed, 2 without a GPU.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench.cases import CASES, MODELS, SMALL_CASES, Memory, Model
from bench.clock import Clock, clock, interleaved
from bench.parts import Found, Part, Record, code_digest, run_parts
from bench.providers import adapted
from bench.results import Row, print_table, result_file
from bench.standin import stand_in

_ROOT = Path(__file__).resolve().parents[1]
_TAIL = 4000  # characters that are kept of what a failing program says

# The first is what the others are compared with.
VARIANTS = {
    "torch": {"FASTFLAG_KERNELS": "torch", "FASTFLAG_GRAPHS": "off"},
    "torch + graphs": {"FASTFLAG_KERNELS": "torch", "FASTFLAG_GRAPHS": "on"},
    "triton": {"FASTFLAG_KERNELS": "triton", "FASTFLAG_GRAPHS": "off"},
    "triton + graphs": {"FASTFLAG_KERNELS": "triton", "FASTFLAG_GRAPHS": "on"},
}
_FASTEST = VARIANTS["triton + graphs"]
# Tests beside those of kernels that take another path where there is a GPU.
_POLICY_TESTS = ("quant", "graphs", "table", "update", "plan")


class Failed(Exception):
    """A program that a part needs did not do its work."""


def run_program(
    words: Sequence[str], limit: float, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs a program for at most `limit` seconds, and then ends it with all that it has started.

    Raises Failed at the limit.
    """
    process = subprocess.Popen(
        words,
        cwd=_ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        told, wrong = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise Failed(f"not done within {limit:.0f} s: {' '.join(words)}") from None
    except BaseException:
        # Ctrl-C: a child in a session of its own would go on, beside the next run.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(words, process.returncode, told, wrong)


def run_json(words: Sequence[str], limit: float, environment: dict[str, str] | None = None) -> Any:
    """The last line that a program of ours prints; raises Failed with what it says instead."""
    done = run_program([sys.executable, *words], limit, environment)
    if done.returncode != 0:
        raise Failed((done.stderr or done.stdout)[-_TAIL:])
    return json.loads(done.stdout.splitlines()[-1])


def run_task(name: str, *words: str, limit: float, environment: dict[str, str]) -> Any:
    """What a function of TASKS gives, in a process of its own."""
    return run_json(["-m", "bench.gpu", "--task", name, *words], limit, environment)


# Parts, which run in the process that was started and leave the GPU's work to others.


def all_parts(given: dict[str, str]) -> list[Part]:
    """`given` are environment variables for all that trains."""
    files = Counter(case.file for case in CASES)
    tests = [
        Part(f"tests {name}", 45, partial(run_test_files, [f"kernels_{name}"])) for name in files
    ]
    # Most of it is torch.compile's.
    times = [
        Part(f"kernels {name}", 12 * count, partial(time_kernels, name))
        for name, count in files.items()
    ]
    return [
        Part("doctor", 15, lambda limit, _: doctor(limit)),
        *tests,
        Part("tests policy", 90, partial(run_test_files, _POLICY_TESTS)),
        *times,
        Part("layer", 40, lambda limit, _: run_task("layer", limit=limit, environment={})),
        Part("update", 90, partial(compared, "update", given)),
        Part("loop", 90, partial(compared, "loop", given)),
        Part("paper", 240, partial(compared, "paper", given)),
        Part("curves", 150, partial(curves, given)),
        Part("train", 120, partial(train, given)),
        Part("sanitizer memcheck", 90, partial(sanitize, "memcheck")),
        Part("sanitizer racecheck", 90, partial(sanitize, "racecheck")),
    ]


def doctor(limit: float) -> Found:
    return {"doctor": run_task("doctor", limit=limit, environment={}), "summary": "told"}


def run_test_files(names: Sequence[str], limit: float, found: dict[str, Found]) -> Found:
    files = [f"tests/test_{name}.py" for name in names]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    done = run_program([*words, *files], limit)
    told = done.stdout.strip() or done.stderr.strip()
    red = done.returncode != 0
    output = {"output": told[-_TAIL:]} if red else {}
    return {"summary": told.splitlines()[-1], "red": red, **output}


def time_kernels(name: str, limit: float, found: dict[str, Found]) -> Found:
    """The rows of one file of kernels, where its tests are green; those of this run, if any."""
    tests = found.get(f"tests {name}")
    if tests and tests["red"]:
        return {"summary": "refused, its tests are red", "red": True, "rows": []}
    green = ["green"] if tests else []
    return run_task("kernels", name, *green, limit=limit, environment={})


def compared(task: str, given: dict[str, str], limit: float, found: dict[str, Found]) -> Found:
    """Rows of a task under each variant; a variant's ratio is to the first one's time."""
    tried: dict[str, list[Row]] = {}
    for name, chosen in VARIANTS.items():
        made = run_task(task, name, limit=limit / len(VARIANTS), environment=given | chosen)
        tried[name] = [Row(**row) for row in made]
    first, base = next(iter(tried.items()))
    rows = [
        dataclasses.replace(row, ratio=before.value / row.value, against=first)
        if name != first and row.unit in ("s", "ms")
        else row
        for name, some in tried.items()
        for row, before in zip(some, base, strict=True)
    ]
    return {"rows": [dataclasses.asdict(row) for row in rows]}


# Of what a curve is made (the policy's loss and KL are 0 but for rounding where an update is one
# step), and how far it may be off in fp32, relative to the largest value.
_CURVE = ("value_loss", "entropy", "grad_norm")
_CURVE_BOUND = 1e-3  # as in tests/test_switches.py


def curves(given: dict[str, str], limit: float, found: dict[str, Found]) -> Found:
    """How far training curves are from that of PyTorch in fp32. In fp32 they must be the same; in
    bf16 PyTorch's own distance stands beside them."""
    cases = [(dtype, name) for dtype in ("fp32", "bf16") for name in VARIANTS]
    made = {
        (dtype, name): run_task(
            "curve", dtype, limit=limit / len(cases), environment=given | VARIANTS[name]
        )
        for dtype, name in cases
    }
    right = made[cases[0]]
    rows, red = [], False
    for dtype, name in cases[1:]:
        off = curve_distance(made[dtype, name], right)
        red |= dtype == "fp32" and not off <= _CURVE_BOUND
        note = "the largest of " + ", ".join(_CURVE)
        rows.append(Row(f"training curve, {dtype}", "tiny", name, off, "relative", note=note))
    return {"rows": [dataclasses.asdict(row) for row in rows], "red": red}


def curve_distance(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """Of two lists of updates' statistics: the largest difference, relative to the statistic's
    largest value."""
    distances = []
    for name in _CURVE:
        ours, theirs = (np.array([update[name] for update in curve]) for curve in (one, other))
        distances.append(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return float(np.max(distances))  # NaN where one is


def train(given: dict[str, str], limit: float, found: dict[str, Found]) -> Found:
    words = ["-m", "bench.train", "--json", "--parts", "speed", "--envs", "64", "1024", "65536"]
    with TemporaryDirectory() as folder:
        scratch = {"FASTFLAG_BENCH_RESULTS": folder}
        return {"rows": run_json(words, limit, given | _FASTEST | scratch)["rows"]}


def sanitize(tool: str, limit: float, found: dict[str, Found]) -> Found:
    """Every op at a small shape, forward and backward, under NVIDIA's compute-sanitizer."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    program = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ["PATH"], toolkit)))
    if program is None:
        return {"summary": "compute-sanitizer is not installed"}
    words = [program, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    task = [sys.executable, "-m", "bench.gpu", "--task", "small"]
    # PyTorch's cache hands out neighbours of what is freed: an access beyond an end would be legal.
    done = run_program([*words, *task], limit, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    told = f"{done.stdout}\n{done.stderr}".strip()
    summaries = [line for line in told.splitlines() if "SUMMARY" in line]
    summary = summaries[-1].strip("= ") if summaries else f"exit status {done.returncode}"
    red = done.returncode != 0
    return {"summary": summary, "red": red, **({"output": told[-_TAIL:]} if red else {})}


# Tasks, each in a process of its own, on the GPU. They return what goes into JSON.


def _doctor_task() -> dict[str, Any]:
    from fastflag.evaluate.doctor import examine

    return examine()


def _kernels_task(name: str, *green: str) -> Found:
    from bench import kernels, roofline

    timer = clock()
    roof = roofline.measured(timer)
    verdict = (lambda file: "") if green else kernels.tested
    bench = kernels.Bench(timer, roof, rounds=50, seconds=1.0, tested=verdict)
    made = list(bench.rows([case for case in CASES if case.file == name]))
    slower = [
        f"{row.what}, {row.shape}: {row.ratio:.2f} x {row.against}"
        for row in made
        if row.provider == "triton" and row.ratio is not None and row.ratio < 1
    ]
    return {
        "rows": [dataclasses.asdict(row) for row in [*kernels.roof_rows(roof), *made]],
        "refused": bench.refused,
        "absent": sorted(bench.absent),
        "slower": slower,
        "red": bool(bench.refused),
    }


def _small_task() -> int:
    for case in SMALL_CASES:
        case.run(Memory("cuda", rows=256))
    torch.cuda.synchronize()
    return len(SMALL_CASES)


def _layer_task() -> Found:
    """Forward and backward through a layer's seven adapted matrices, in NF4 and in bf16."""
    from fastflag.kernels.lora import lora_linear

    timer = clock()
    made = (
        layer_rows(model, tokens, lora_linear, timer)
        for model in MODELS
        for tokens in (2048, 4096, 8192)
    )
    return {"rows": [dataclasses.asdict(row) for row in chain.from_iterable(made)]}


def layer_rows(model: Model, tokens: int, linear: Callable, timer: Clock) -> list[Row]:
    """Ratios are to the fastest in bf16, the kernel's or PyTorch's by PEFT's formula."""
    rank, memory = 16, Memory(timer.device)

    def peft(x, weight, absmax, a, b, scale):
        return adapted(torch.nn.functional.linear(x, weight), x, a, b, scale)

    works = {
        name: partial(_layer_pass, layer_inputs(model, tokens, rank, memory, nf4), linear)
        for name, linear, nf4 in (
            ("nf4", linear, True),
            ("bf16", linear, False),
            ("bf16, torch + peft", peft, False),
        )
    }
    times = interleaved(works, timer, 30, 3.0)
    best = min(("bf16", "bf16, torch + peft"), key=lambda name: times[name].percentile(50))
    what, shape = "LoRA layer forward + backward", f"{model.name}, {tokens} tokens"
    return [
        Row(what, shape, name, 1e3 * took.percentile(50), "ms", took.faster_than(times[best]), best)
        for name, took in times.items()
    ]


def layer_inputs(model: Model, tokens: int, rank: int, memory: Memory, nf4: bool) -> list[dict]:
    """Arguments of lora_linear for q, k, v, o, gate, up and down; equal inputs are one tensor."""
    inner, groups = model.heads * model.head_size, model.kv_heads * model.head_size
    width = model.width
    shapes = [(inner, width), (groups, width), (groups, width), (width, inner)]
    shapes += [(model.inner, width), (model.inner, width), (width, model.inner)]
    sources = {
        "attention": memory.normal(tokens, width),
        "attended": memory.normal(tokens, inner),
        "mlp": memory.normal(tokens, width),
        "activated": memory.normal(tokens, model.inner),
    }
    order = ("attention", "attention", "attention", "attended", "mlp", "mlp", "activated")
    return [
        {
            "x": sources[source].requires_grad_(),
            **_stored_matrix(outputs, columns, memory, nf4),
            "a": memory.normal(rank, columns, dtype=torch.float32).requires_grad_(),
            "b": memory.normal(outputs, rank, dtype=torch.float32).requires_grad_(),
            "scale": 2.0,
        }
        for source, (outputs, columns) in zip(order, shapes, strict=True)
    ]


def _stored_matrix(outputs: int, columns: int, memory: Memory, nf4: bool) -> dict[str, Any]:
    if not nf4:
        return {"weight": memory.normal(outputs, columns, scale=columns**-0.5), "absmax": None}
    size = outputs * columns
    packed = torch.randint(256, ((size + 1) // 2,), dtype=torch.uint8, device=memory.device)
    absmax = memory.normal((size + 63) // 64, dtype=torch.float32, scale=columns**-0.5).abs_()
    return {"weight": packed, "absmax": absmax}


def _layer_pass(inputs: list[dict], linear: Callable) -> Callable[[], Any]:
    leaves = list({id(t): t for some in inputs for t in (some["x"], some["a"], some["b"])}.values())
    shapes = [(len(some["x"]), len(some["b"])) for some in inputs]
    x = inputs[0]["x"]
    gradients = [torch.randn(shape, device=x.device).to(x.dtype) for shape in shapes]

    def work() -> Any:
        outputs = [linear(**some) for some in inputs]
        return torch.autograd.grad(outputs, leaves, gradients)

    return work


_DAYS, _PREFIX, _TEXTS, _SUFFIX, _ACTIONS = 64, 150, 24, 16, 3


def _update_task(variant: str) -> list[dict]:
    """One evaluation and one gradient step, where every account text is met on every day; and
    memory, beside what `doctor --plan` says."""
    from bench.train import configuration, seconds
    from fastflag.config import PlanConfig
    from fastflag.learn.update import make_optimizer, update
    from fastflag.model.weights import open_weights
    from fastflag.policy.plan import parts
    from fastflag.policy.table import Policy

    config = configuration(64)
    weights = open_weights(config.policy.model)
    policy = Policy(weights, config.policy, range(_ACTIONS), config.seed)
    optimizer = make_optimizer(policy, config.algorithm)
    lesson = whole_lesson(weights.config.vocabulary, policy.device)

    def one_update() -> None:
        table = policy.evaluate(lesson.prompts)
        update(policy, optimizer, table, lesson, config.algorithm, 0)

    for _ in range(5):  # the trunk is read, kernels are compiled and graphs captured
        one_update()
    torch.cuda.reset_peak_memory_stats()
    took = float(np.median([seconds(one_update) for _ in range(30)]))
    batch = PlanConfig(_DAYS, _TEXTS, _PREFIX, _SUFFIX)
    plan = parts(weights.config, config.policy, config.algorithm.optimizer, batch, _ACTIONS)
    shape = f"{_DAYS} days x {_TEXTS} texts"
    peak = torch.cuda.max_memory_allocated() / 1e6
    rows = [
        Row("update", shape, variant, 1e3 * took, "ms"),
        Row("update: peak memory", shape, variant, peak, "MB"),
        Row("update: planned memory", shape, variant, sum(plan.values()) / 1e6, "MB"),
    ]
    return [dataclasses.asdict(row) for row in rows]


def whole_lesson(vocabulary: int, device: torch.device) -> Any:
    """Every text on every day, and every action of each, with advantages at random."""
    from fastflag.learn.lesson import Lesson
    from fastflag.learn.samples import Before, Samples
    from fastflag.prompt.prompts import PromptSet

    random = np.random.default_rng(0)
    prefixes, suffixes = (
        tuple(random.integers(1, vocabulary, (count, length)).astype(np.int32))
        for count, length in ((_DAYS, _PREFIX), (_TEXTS, _SUFFIX))
    )
    pairs = np.indices((_DAYS, _TEXTS), np.int32).reshape(2, -1).T.copy()
    count = len(pairs)
    prompts = PromptSet(
        prefixes,
        suffixes,
        pairs,
        np.zeros(count, np.int8),
        np.ones((count, _ACTIONS), bool),
        np.arange(0, count, _TEXTS, dtype=np.int32),
    )
    rows, one = np.arange(count).repeat(_ACTIONS), np.ones(count * _ACTIONS)
    value, uniform = torch.zeros(count), torch.full((count, _ACTIONS), -float(np.log(_ACTIONS)))
    samples = Samples(
        row=rows,
        action=np.tile(np.arange(_ACTIONS), count),
        weight=one,
        advantage=random.standard_normal(len(rows)),
        advantage_spread=0 * one,
        target=0 * one,
        target_spread=0 * one,
        old_log_probability=-one * np.log(_ACTIONS),
        before=Before(value.to(device), uniform.to(device)),
    )
    return Lesson(prompts, samples.placed(), len(rows), 0.0)


def _loop_task(variant: str) -> list[dict]:
    """Rollout and update of 64 environments, whose prompts are those that they meet."""
    from bench.train import Trainer, configuration, seconds

    trainer = Trainer(configuration(64))
    for _ in range(10):
        trainer.update()
    took = float(np.median([seconds(trainer.update) for _ in range(20)]))
    steps = trainer.config.rollout.num_steps
    row = Row("rollout + update", f"64 x {steps}", variant, 1e3 * took, "ms")
    return [dataclasses.asdict(row)]


def _paper_task(variant: str) -> list[dict]:
    """The paper's 13,860 steps in its own setting, on this machine's bars, with cold caches."""
    from bench.train import Trainer, given, seconds
    from fastflag.config import PRESETS

    paper, demo = PRESETS["paper"], PRESETS["demo"]
    config = given(dataclasses.replace(paper, data=demo.data))
    policy = dataclasses.replace(config.policy, trunk_disk_mb=0)
    trainer = Trainer(dataclasses.replace(config, policy=policy))

    def budget() -> None:
        for _ in range(config.steps):
            trainer.update()

    shape = f"{config.steps} updates of 1 x {config.rollout.num_steps}"
    row = Row("the paper's budget", shape, variant, seconds(budget), "s")
    return [dataclasses.asdict(row)]


def _curve_task(dtype: str) -> list[dict[str, float]]:
    """Statistics of the first updates of a random model of two layers."""
    from bench.standin import write_model
    from bench.train import Trainer, configuration

    tiny = Model("tiny", 64, 128, 4, 2, 16, 8192)
    with TemporaryDirectory() as folder:
        model = str(write_model(Path(folder), tiny, layers=3))
        config = configuration(64, dtype)
        policy = dataclasses.replace(
            config.policy, model=model, trunk_weights=dtype, trunk_disk_mb=0
        )
        # Large rates, so that a wrong gradient soon shows.
        algorithm = dataclasses.replace(
            config.algorithm, learning_rate=2e-2, layer_learning_rate=5e-3
        )
        trainer = Trainer(dataclasses.replace(config, policy=policy, algorithm=algorithm))
        return [trainer.update() for _ in range(8)]


TASKS: dict[str, Callable[..., Any]] = {
    "doctor": _doctor_task,
    "kernels": _kernels_task,
    "small": _small_task,
    "layer": _layer_task,
    "update": _update_task,
    "loop": _loop_task,
    "paper": _paper_task,
    "curve": _curve_task,
}


def main() -> None:
    # As Ctrl-C: what was started is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON document")
    parser.add_argument("--parts", nargs="+", help="those whose name begins so")
    parser.add_argument("--minutes", type=float, default=8.0, help="of this command, at most")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.task:
        name, *words = chosen.task
        print(json.dumps(TASKS[name](*words)))
        return
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA GPU is available", file=sys.stderr)
        sys.exit(2)
    record = Record(result_file("gpu"), code_digest())
    with TemporaryDirectory() as folder:
        parts = [
            part
            for part in all_parts(stand_in(Path(folder)))
            if not chosen.parts or part.name.startswith(tuple(chosen.parts))
        ]
        left = run_parts(parts, record, 60 * chosen.minutes)
    document = record.document() | {"left": left}
    if chosen.json:
        print(json.dumps(document))
    else:
        print_table([Row(**_of_row(row)) for row in document["rows"]])
    wrong = [name for name, part in record.parts.items() if part.get("red") or "error" in part]
    if wrong:
        print(f"red or failed: {', '.join(wrong)}", file=sys.stderr)
    sys.exit(bool(wrong))


def _of_row(row: dict[str, Any]) -> dict[str, Any]:
    return {field.name: row[field.name] for field in dataclasses.fields(Row)}


if __name__ == "__main__":
    main()
