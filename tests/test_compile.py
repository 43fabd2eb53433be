"""What Triton's compiler makes of every kernel for GPUs that are not there."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

from bench.compile import Compiled, regressions

ROOT = Path(__file__).resolve().parents[1]


def test_every_kernel_compiles_as_well_as_recorded():
    done = subprocess.run(
        [sys.executable, "-m", "bench.compile", "--json"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["wrong"], done.returncode) == ([], 0)
    assert {row["architecture"] for row in told["rows"]} == {80, 89, 90, 100}


KEPT = Compiled("k", "op shape 1", 90, 4, 3, 128, 0, 65536, 1000, "wgmma", "cp.async", "")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"registers": 120, "instructions": 900}, ""),
        ({"instructions": 1015}, ""),
        ({"instructions": 1030}, "instructions 1000 -> 1030"),
        ({"registers": 129}, "registers 128 -> 129"),
        ({"shared": 70000}, "shared 65536 -> 70000"),
        ({"matrix": "mma.sync"}, "lost wgmma"),
        ({"copies": ""}, "lost cp.async"),
    ],
)
def test_a_change_for_the_worse_is_told(change, told):
    assert replace(KEPT, **change).worse_than(KEPT) == told


def test_kernels_that_come_or_go_are_told(monkeypatch):
    new, other = replace(KEPT, kernel="new"), replace(KEPT, kernel="gone")
    kept = {row.key: row for row in (KEPT, other)}
    monkeypatch.setattr("bench.compile.recorded", lambda: (version("triton"), kept))
    assert regressions([KEPT, other], whole=True) == []
    assert regressions([KEPT], whole=True) == ["gone (op shape 1, sm_90): not compiled"]
    assert regressions([KEPT], whole=False) == []
    assert regressions([new], whole=False) == [
        "new (op shape 1, sm_90): not recorded, use --record"
    ]
    monkeypatch.setattr("bench.compile.recorded", lambda: ("another", kept))
    assert regressions([new], whole=True) == []


def test_a_part_of_the_table_is_not_recorded():
    command = [sys.executable, "-m", "bench.compile", "--record", "--op", "swiglu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "keeps the whole table" in done.stderr
