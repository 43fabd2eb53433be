"""All that needs a GPU, by a command of at most 8 minutes that is given again until all is done.

    python -m bench.gpu [--json] [--parts tests kernels ...] [--minutes 8]

Parts, in this order: doctor; the tests of each file of kernels, and of what launches them; their
times beside their baselines (bench/kernels.py); QLoRA beside bf16 LoRA over a layer's matrices; an
update of 64 days x 24 texts, and its memory beside the plan's; rollout and update; the paper's
whole budget; training curves with kernels and graphs on and off; training throughput beside
transformers + PEFT (bench/train.py); compute-sanitizer on small shapes. Each runs in a process of
its own (gpu_tasks.py), for one that breaks the device breaks it for its process. All goes into one
file, bench/results/DEVICE/COMMIT-gpu.json (measure/parts.py). Exit status 1 where something is red
or failed, 2 without a GPU.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench.measure.cases import CASES
from bench.measure.parts import Found, Part, Record, code_digest, run_parts
from bench.measure.programs import TAIL, run_json, run_program
from bench.measure.results import Row, print_table, result_file
from bench.measure.standin import stand_in

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


def run_task(name: str, *words: str, limit: float, environment: dict[str, str]) -> Any:
    """What a task of gpu_tasks.py gives, in a process of its own."""
    return run_json(["-m", "bench.gpu_tasks", name, *words], limit, environment)


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
    output = {"output": told[-TAIL:]} if red else {}
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
    task = [sys.executable, "-m", "bench.gpu_tasks", "small"]
    # PyTorch's cache hands out neighbours of what is freed: an access beyond an end would be legal.
    done = run_program([*words, *task], limit, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    told = f"{done.stdout}\n{done.stderr}".strip()
    summaries = [line for line in told.splitlines() if "SUMMARY" in line]
    summary = summaries[-1].strip("= ") if summaries else f"exit status {done.returncode}"
    red = done.returncode != 0
    return {"summary": summary, "red": red, **({"output": told[-TAIL:]} if red else {})}


def main() -> None:
    # As Ctrl-C: what was started is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON document")
    parser.add_argument("--parts", nargs="+", help="those whose name begins so")
    parser.add_argument("--minutes", type=float, default=8.0, help="of this command, at most")
    chosen = parser.parse_args()
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
