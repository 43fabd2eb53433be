"""What every bench script prints and keeps: rows of one run, with the machine and the commit."""

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fastflag
from fastflag.files import write_atomic

_FOLDER = Path(__file__).with_name("results")


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
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastflag": fastflag.__version__,
    }


def document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a script says with --json."""
    return {"machine": machine(), "commit": _commit(), "rows": rows}


def publish(script: str, rows: list[Row], as_json: bool) -> None:
    """Writes bench/results/DEVICE/COMMIT-SCRIPT.json, beside what other parts of the script wrote
    there; prints a table, or the document in a line."""
    told = document([asdict(row) for row in rows])
    device = "".join(c if c.isalnum() else "-" for c in told["machine"]["device"]).strip("-")
    path = _FOLDER / device / f"{told['commit']}-{script}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {_key(row) for row in told["rows"]}
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in kept if _key(row) not in measured]
    write_atomic(path, json.dumps(told | {"rows": kept + told["rows"]}, indent=1))
    if as_json:
        print(json.dumps(told))
        return
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:12,.1f} x {row.against}"
        print(f"{row.what:28}{row.shape:18}{row.provider:22}{row.value:14,.4g} {row.unit:9}{ratio}")


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["what"], row["shape"], row["provider"], row["against"], row["note"]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The commit that was measured; with a + where the tree differs from it."""
    root = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if dirty else "")
