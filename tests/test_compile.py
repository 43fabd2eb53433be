"""What Triton's compiler makes of every kernel for GPUs that are not there."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

from bench.compile import Compiled

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
