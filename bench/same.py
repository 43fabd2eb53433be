"""Whether two checkouts train the same run, to the bit.

    python -m bench.same OTHER_CHECKOUT [train flags, such as --preset demo --total-timesteps 48384]

Both train with these flags (the demo by default) and a cache of their own, one after the other, and
what they leave is compared: every tensor of the checkpoint, metrics.jsonl but for times, and
backtest.json. Exit status 1, with the first difference of each file, where they are not the same.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

_TIMES = ("seconds", "steps_per_second")


def trained(checkout: Path, flags: list[str], place: Path) -> Path:
    """The folder of a run of `checkout`."""
    run = place / "run"
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "XDG_CACHE_HOME": str(place / "cache"),
    }
    command = [sys.executable, "-m", "fastflag", "train", "--out", str(run), *flags]
    subprocess.run(command, cwd=place, env=environment, check=True)
    return run


def differences(one: Path, other: Path) -> list[str]:
    """A line for each file in which two runs are not the same; before them the dtype, where --dtype
    auto dealt them two: nothing else is alike then."""
    told = []
    dtypes = [_documents(run / "config.json")[0]["policy"]["dtype"] for run in (one, other)]
    if dtypes[0] != dtypes[1]:
        told.append(f"config.json: dtype {dtypes[0]}, {dtypes[1]} in the other: name one, --dtype")
    for tensors in sorted((one / "checkpoint").glob("*.safetensors")):
        beside = other / "checkpoint" / tensors.name
        if not beside.exists():
            told.append(f"{tensors.name}: not in the other")
            continue
        mine, theirs = load_file(tensors), load_file(beside)
        if mine.keys() != theirs.keys():
            told.append(f"{tensors.name}: tensors {sorted(mine.keys() ^ theirs.keys())[:3]}")
        wrong = [
            name for name in mine.keys() & theirs.keys() if not _same(mine[name], theirs[name])
        ]
        if wrong:
            told.append(f"{tensors.name}: {len(wrong)} of {len(mine)} tensors, {wrong[0]} first")
    for name in ("metrics.jsonl", "backtest.json"):
        both = _documents(one / name), _documents(other / name)
        if len(both[0]) != len(both[1]):
            told.append(f"{name}: {len(both[0])} documents, {len(both[1])} in the other")
            continue
        for line, (mine, theirs) in enumerate(zip(*both, strict=True), 1):
            if mine != theirs:
                keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
                told.append(f"{name}, document {line}: {', '.join(keys)}")
                break
    return told


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def _documents(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    parts = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [
        {key: value for key, value in json.loads(part).items() if key not in _TIMES}
        for part in parts
    ]


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0].startswith("-"):
        print(__doc__)
        return 2
    flags = words[1:] or ["--preset", "demo"]
    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as place:
        runs = []
        for name, checkout in (("here", here), ("other", Path(words[0]).resolve())):
            folder = Path(place, name)
            folder.mkdir()
            runs.append(trained(checkout, flags, folder))
        told = differences(*runs)
    print("\n".join(told) or "the same run, to the bit")
    return int(bool(told))


if __name__ == "__main__":
    sys.exit(main())
