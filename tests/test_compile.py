"""What Triton's compiler makes of every kernel for GPUs that are not there."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

from triton.backends import nvidia

from bench.compile import Compiled, _assembled_by, _chained, _warnings, regressions
from fastflag.kernels.compiler import Assembler
from fastflag.model.ops import OPS

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(nvidia.__path__[0], "bin")


@pytest.mark.parametrize(
    "architectures", [(80, 90), pytest.param((80, 86, 89, 90, 100, 120), marks=pytest.mark.slow)]
)
def test_every_kernel_compiles_as_well_as_recorded(architectures):
    """Six architectures take minutes where nothing is cached."""
    asked = map(str, architectures)
    done = subprocess.run(
        [sys.executable, "-m", "bench.compile", "--json", "--architecture", *asked],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["wrong"], done.returncode) == ([], 0)
    rows = told["rows"]
    assert {row["architecture"] for row in rows} == {*architectures}
    assert not any(row["spilled"] or row["warned"] for row in rows)
    # Hopper's kernels have the assembler that Triton carries for Blackwell.
    of_hopper, of_others = (
        subprocess.run([TOOLS / name, "--version"], capture_output=True, text=True).stdout
        for name in ("ptxas-blackwell", "ptxas")
    )
    for row in rows:
        told = of_hopper if row["architecture"] >= 90 else of_others
        assert f"V{row['ptxas']}\n" in told
    # Which ops' kernels older GPUs have no instructions for.
    products = {row["case"].split()[0] for row in rows if row["matrix"]}
    assert products - {op.name for op in OPS if op.products} == {"token_log_probability"}
    assert products >= {op.name for op in OPS if op.products}


KEPT = Compiled(
    kernel="k",
    case="op shape 1",
    architecture=90,
    warps=4,
    stages=3,
    registers=128,
    spilled=0,
    shared=65536,
    instructions=1000,
    matrix="wgmma",
    copies="cp.async",
    ptxas="13.1.80",
    warned="",
    wrong="",
)


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
        ({"warned": "(C7515) serialized"}, "warned: (C7515) serialized"),
        ({"ptxas": "13.4.59"}, ""),
    ],
)
def test_a_change_for_the_worse_is_told(change, told):
    assert replace(KEPT, **change).worse_than(KEPT) == told


def test_chained_products_are_seen():
    """Of Triton's intermediate code: %y_178 adds to what %y_82 is, in the first."""
    types = "tensor<128x16xbf16> * tensor<16x64xbf16> -> tensor<128x64xf32> loc(#loc167)"
    one = f"    %y_82 = tt.dot %low_66, %y, %cst_36 : {types}"
    other = f"      %y_178 = tt.dot %x_101, %tile_177, {{}} : {types}"
    assert _chained("\n".join((one, other.format("%y_82"))))
    assert not _chained("\n".join((one, other.format("%cst_36"))))
    assert not _chained("\n".join((one, "    %y_86 = arith.mulf %y_82, %s", other.format("%y_86"))))


def test_the_assembler_is_read_from_a_kernel():
    note = b"\0Cuda compilation tools, release 13.1, V13.1.80\0Build cuda_13.1\0"
    assert _assembled_by(b"\x7fELF" + note) == "13.1.80"
    assert _assembled_by(b"\x7fELF") == ""


# An assembler that tells what ptxas told of a pipelined product of registers on Hopper.
WARNING = """\
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : 11 bytes gmem
ptxas info    : Used 164 registers
"""


def test_what_the_assembler_warns_of_is_kept(tmp_path):
    script = tmp_path / "ptxas"
    script.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{WARNING}END\n")
    script.chmod(0o755)
    kernel = SimpleNamespace(asm={"ptx": ""}, metadata=SimpleNamespace(enable_fp_fusion=True))
    told = _warnings(Assembler(str(script), "13.1.80"), kernel)
    assert told.startswith("(C7515) Potential Performance Loss: wgmma") and "gmem" not in told


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
