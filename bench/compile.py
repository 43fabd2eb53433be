"""Every kernel compiled for GPUs that are not there, and what the compiler made of it.

    python -m bench.compile [--json] [--record] [--op NAME ...] [--architecture 80 ...]

The public ops are called, forward and backward, on CPU tensors of real models' shapes, while
Triton believes in a GPU and compiles where it would launch: so what is examined is what runs, at
its recorded tiles, with the alignments that Triton finds in pointers and sizes. Exit status 1 where
a kernel spills registers, exceeds an architecture's shared memory, has a matrix product without
matrix instructions or in tf32, a pipelined loop of products without asynchronous copies, two
products chained on one accumulator where Triton miscompiles that, or is assembled by another ptxas
than is said; or where it is worse than in the table that is kept in bench/results/compile.json,
which --record writes. What ptxas warns of is printed, and a warning that is new is worse.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from bench.measure.results import document
from fastflag.files import write_atomic
from fastflag.kernels.compiler import Assembler, assembler

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TABLE = Path(__file__).with_name("results") / "compile.json"
# Bytes of shared memory that a block can have (CUDA C++ Programming Guide, compute capabilities).
_SHARED = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
_MATRIX = {90: "wgmma", 100: "tcgen05.mma"}  # and mma.sync elsewhere
_COPIES = ("cp.async.bulk", "cp.async")
# Overrides of PyTorch's operators, which hold while they are kept.
_KEPT: list[Any] = []


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture, by the first case that needed it."""

    kernel: str
    case: str
    architecture: int
    warps: int
    stages: int
    registers: int  # a thread
    spilled: int  # instructions that load from or store to local memory
    shared: int  # bytes a block
    instructions: int
    matrix: str  # the matrix instruction, if any
    copies: str  # the asynchronous copy, if any
    ptxas: str  # the assembler's version
    warned: str  # what the assembler warned of; empty if nothing
    wrong: str  # what an examination finds; empty if nothing

    @property
    def key(self) -> tuple[str, str, int]:
        return self.kernel, self.case, self.architecture

    def worse_than(self, kept: "Compiled") -> str:
        """What got worse; an instruction in fifty more or less is the scheduler's mood."""
        told = [
            f"{name} {getattr(kept, name)} -> {getattr(self, name)}"
            for name, slack in (("registers", 1.0), ("shared", 1.0), ("instructions", 1.02))
            if getattr(self, name) > slack * getattr(kept, name)
        ]
        told += [f"lost {was}" for was, now in self._lost(kept) if was and was != now]
        told += [f"warned: {self.warned}"] if self.warned and self.warned != kept.warned else []
        return ", ".join(told)

    def _lost(self, kept: "Compiled") -> Iterator[tuple[str, str]]:
        return zip((kept.matrix, kept.copies), (self.matrix, self.copies), strict=True)


def examine(architecture: int, ops: list[str]) -> list[Compiled]:
    """Compiles every case of `ops` (all, if none is named) in this process, where no kernel may
    have been defined for the interpreter."""
    from bench.measure.cases import CASES, Memory

    found: dict[str, Compiled] = {}
    kernels = compile_instead(architecture)
    _multiply_nothing()
    for case in CASES:
        if ops and case.name not in ops:
            continue
        case.run(Memory("cpu", random=False, rows=256))
        fresh = {kernel.hash: kernel for kernel in kernels if kernel.hash not in found}
        for number, kernel in enumerate(fresh.values(), 1):
            label = f"{case.name} {case.shape} {number}"
            found[kernel.hash] = _read(kernel, label, architecture)
        kernels.clear()
    return list(found.values())


def _multiply_nothing() -> None:
    """From now on, in this process, the library's products on a CPU are memory as it came: nobody
    reads them, and on a CPU without bf16 units they took two thirds of the time."""
    overrides = torch.library.Library("aten", "IMPL")
    overrides.impl("mm", lambda a, b: a.new_empty(len(a), b.shape[1]), "CPU")
    overrides.impl("addmm_", lambda total, *_, **__: total, "CPU")
    _KEPT.append(overrides)


def compile_instead(architecture: int) -> list[Any]:
    """From now on, in this process, launching a kernel compiles it for sm_`architecture` and adds
    it to the list that is returned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.backends.nvidia.driver import ty_to_cpp
    from triton.runtime.jit import JITFunction

    class NoGPU(DriverBase):
        """What Triton asks of a GPU's driver before it launches."""

        is_active = classmethod(lambda cls: True)
        map_python_to_cpp_type = staticmethod(ty_to_cpp)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", architecture, 32))
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
        # A device's number is the key of Triton's kernels in memory.
        get_current_device = staticmethod(lambda: architecture)
        get_current_stream = staticmethod(lambda device: 0)
        get_benchmarker = None

    kernels, launch = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernels.append(launch(self, *arguments, grid=grid, warmup=True, **options))

    triton.runtime.driver.set_active(NoGPU())
    JITFunction.run = compile_only
    return kernels


def _read(kernel: Any, case: str, architecture: int) -> Compiled:
    """What the compiler says of `kernel`, and what is wrong with it."""
    assembly, intermediate = kernel.asm["ptx"], kernel.asm["ttir"]
    cubin, metadata = kernel.asm["cubin"], kernel.metadata
    registers, sass = _disassembled(cubin)
    ptxas = assembler(torch.device("cpu"))
    spilled = sum(name.startswith(("LDL", "STL")) for name in sass)
    matrix = next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in assembly), "")
    copies = next((name for name in _COPIES if name in assembly), "")
    narrow_product = re.search(r"tt\.dot .*xb?f16", intermediate)
    pipelined = narrow_product and metadata.num_stages > 1 and "scf.for" in intermediate
    wrong = []
    if spilled:
        wrong.append(f"{spilled} instructions spill")
    if metadata.shared > _SHARED[architecture]:
        wrong.append(f"{metadata.shared} bytes of shared memory")
    if narrow_product and matrix != _MATRIX.get(architecture, "mma.sync"):
        wrong.append(f"a matrix product by {matrix or 'scalar instructions'}")
    if "tf32" in assembly:
        # Triton 3.7.1 on sm_100 takes some fp32 products so that were asked to be exact.
        wrong.append("fp32 products in tf32")
    if pipelined and not copies:
        wrong.append("no asynchronous copies in a pipelined loop")
    if matrix == "tcgen05.mma" and _chained(intermediate):
        wrong.append("two products chained on one accumulator (triton-lang/triton#10821)")
    if (by := _assembled_by(cubin)) not in ("", ptxas.version):
        wrong.append(f"assembled by ptxas {by}, not {ptxas.version}")
    return Compiled(
        kernel=metadata.name,
        case=case,
        architecture=architecture,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        registers=registers,
        spilled=spilled,
        shared=metadata.shared,
        instructions=len(sass),
        matrix=matrix,
        copies=copies,
        ptxas=ptxas.version,
        warned=_warnings(ptxas, kernel) if matrix == "wgmma" else "",
        wrong=", ".join(wrong),
    )


def _chained(intermediate: str) -> bool:
    """Whether a product's accumulator is what another product has just made."""
    dots = re.findall(r"(%\S+) = tt\.dot %\S+, %\S+, (%[^\s,]+)", intermediate)
    return bool({made for made, _ in dots} & {accumulator for _, accumulator in dots})


def _assembled_by(cubin: bytes) -> str:
    """The version of ptxas by a kernel's own note; empty where it has none, as before 13."""
    note = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", cubin)
    return note[1].decode() if note else ""


def _warnings(ptxas: Assembler, kernel: Any) -> str:
    """What ptxas says of a kernel's PTX but for its resources. Triton throws it away: so a kernel
    is assembled again, by the same options. That wgmma can't overlap (C7515) is its one warning."""
    metadata = kernel.metadata
    options = ["--regAllocOptLevel=2", *([] if metadata.enable_fp_fusion else ["--fmad=false"])]
    with NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        words = [ptxas.path, "-v", "-lineinfo", *options, "--gpu-name=sm_90a", file.name]
        told = subprocess.run(
            [*words, "-o", os.devnull], capture_output=True, text=True, check=True
        )
    codes = re.findall(r"\(C\d+\)[^\n]*|warning[^\n]*", told.stdout + told.stderr)
    return "; ".join(dict.fromkeys(" ".join(code.split())[:120] for code in codes))


def _disassembled(cubin: bytes) -> tuple[int, list[str]]:
    """Registers a thread, and the names of all instructions."""
    import triton

    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", told)
    return max(int(number) for number in re.findall(r"REG:(\d+)", told)), names


def recorded() -> tuple[str, dict[tuple[str, str, int], Compiled]]:
    """Triton's version and its kernels, from the table that is kept."""
    kept = json.loads(TABLE.read_text())
    rows = [Compiled(**row) for row in kept["rows"]]
    return kept["triton"], {row.key: row for row in rows}


def regressions(rows: list[Compiled], whole: bool) -> list[str]:
    """A line for each kernel that is worse than recorded, or not recorded; of the `whole` table
    also for those that are compiled no more. Only the same Triton's code compares."""
    by, kept = recorded()
    if by != version("triton"):
        return []
    told = []
    for row in rows:
        what = row.worse_than(kept[row.key]) if row.key in kept else "not recorded, use --record"
        if what:
            told.append(f"{row.kernel} ({row.case}, sm_{row.architecture}): {what}")
    gone = kept.keys() - {row.key for row in rows} if whole else ()
    return told + [f"{name} ({case}, sm_{at}): not compiled" for name, case, at in sorted(gone)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compile")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON document")
    parser.add_argument("--record", action="store_true", help="keep the table")
    parser.add_argument("--op", nargs="+", default=[], help="these ops alone")
    parser.add_argument(
        "--architecture", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES
    )
    chosen = parser.parse_args()
    whole = not chosen.op and set(chosen.architecture) == set(ARCHITECTURES)
    if chosen.record and not whole:
        parser.error("--record keeps the whole table: neither --op nor --architecture")
    # Read when a kernel is defined, which is in the processes that are started from here.
    os.environ["TRITON_INTERPRET"] = "0"
    with get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        work = pool.map(partial(examine, ops=chosen.op), chosen.architecture, chunksize=1)
    rows = sorted(chain.from_iterable(work), key=lambda row: row.key)
    if not rows:
        parser.error(f"no case of {' '.join(chosen.op)}: see bench/measure/cases.py")
    wrong = [f"{r.kernel} ({r.case}, sm_{r.architecture}): {r.wrong}" for r in rows if r.wrong]
    if chosen.record:
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        write_atomic(TABLE, f'{{"triton": "{version("triton")}", "rows": [\n{lines}\n]}}\n')
    else:
        wrong += regressions(rows, whole)
    if chosen.json:
        print(json.dumps(document([_as_row(row) for row in rows]) | {"wrong": wrong}))
    else:
        _print(rows)
    for row in rows:
        if row.warned:
            print(
                f"{row.kernel} ({row.case}, sm_{row.architecture}): {row.warned}", file=sys.stderr
            )
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(bool(wrong))


def _as_row(row: Compiled) -> dict[str, Any]:
    shown = {"what": row.kernel, "shape": row.case, "provider": f"sm_{row.architecture}"}
    return shown | {"value": row.registers, "unit": "registers", **asdict(row)}


def _print(rows: list[Compiled]) -> None:
    columns = ("registers", "spilled", "shared", "instructions", "matrix", "copies", "ptxas")
    print(f"{'kernel':34}{'case':48}sm_ " + "".join(f"{name:>13}" for name in columns))
    for row in rows:
        values = "".join(f"{getattr(row, name):>13}" for name in columns)
        print(f"{row.kernel:34}{row.case:48}{row.architecture:3} {values}")


if __name__ == "__main__":
    main()
