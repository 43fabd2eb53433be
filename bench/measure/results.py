"""What every bench script prints and keeps: rows of one run, with the machine and the commit."""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastflag
from fastflag.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Row:
    what: str
    shape: str
    provider: str
    value: float
    unit: str
    ratio: float | None = None  # above 1: the provider is better than `against`
    against: str = ""
    note: str = ""


def machine() -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    of_gpu = {"cuda": torch.version.cuda, "triton": _triton()} if on_gpu else {}
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastflag": fastflag.__version__,
        **of_gpu,
    }


def document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a script says with --json."""
    return {"machine": machine(), "commit": commit(), "rows": rows}


Key = Callable[[dict[str, Any]], tuple[str, ...]]


def full_key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["what"], row["shape"], row["provider"], row["against"], row["note"]


def publish(script: str, rows: list[Row], as_json: bool, key: Key = full_key) -> None:
    """Prints a table, or the document in a line; then writes
    bench/results/DEVICE/COMMIT-SCRIPT.json, beside what other parts of the script wrote there. A
    row takes the place of one of its key."""
    told = document([asdict(row) for row in rows])
    if as_json:
        print(json.dumps(told))
    else:
        print_table(rows)
    path = result_file(script)
    measured = {key(row) for row in told["rows"]}
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in kept if key(row) not in measured]
    write_document(path, told | {"rows": kept + told["rows"]})


def print_table(rows: list[Row]) -> None:
    columns = [(row.what, row.shape, row.provider) for row in rows]
    widths = [2 + max(map(len, column)) for column in zip(*columns, strict=True)]
    for row, texts in zip(rows, columns, strict=True):
        names = "".join(f"{text:{width}}" for text, width in zip(texts, widths, strict=True))
        ratio = "" if row.ratio is None else f"{row.ratio:12,.2f} x {row.against}"
        print(f"{names}{row.value:14,.4g} {row.unit:9}{ratio}")


def result_file(script: str) -> Path:
    """Where a script keeps what it measured on this device; FASTFLAG_BENCH_RESULTS names another
    folder than bench/results."""
    folder = Path(os.environ.get("FASTFLAG_BENCH_RESULTS") or FOLDER)
    device = "".join(c if c.isalnum() else "-" for c in machine()["device"]).strip("-")
    return folder / device / f"{commit()}-{script}.json"


def write_document(path: Path, told: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(told, indent=1))


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit that was measured; with a + where the tree differs from it. FASTFLAG_COMMIT names
    it for a copy of the tree that has no history."""
    if given := os.environ.get("FASTFLAG_COMMIT"):
        return given
    root = Path(__file__).parent

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if dirty else "")
