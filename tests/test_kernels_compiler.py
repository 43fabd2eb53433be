"""Whether kernels compile here, by which assembler, and for which device they are launched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from triton.backends import nvidia
from triton.runtime import build

from fastflag.kernels import compiler, tiles
from fastflag.kernels.compiler import is_better, launching, unusable

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda")
TOOLS = Path(nvidia.__path__[0], "bin")


@pytest.mark.parametrize(
    ("version", "than", "driver", "taken"),
    [
        ("13.1", "12.8", 13, True),
        ("13.1", "12.8", 14, True),
        ("13.1", "12.8", None, True),  # bench.compile, where nothing is loaded
        ("13.1", "12.8", 12, False),
        ("12.9", "12.8", 12, True),
        ("13.10", "13.9", 13, True),
        ("12.8", "12.8", 13, False),
        ("12.8", "13.1", 13, False),
    ],
)
def test_a_newer_assembler_is_taken_where_the_driver_loads_its_code(version, than, driver, taken):
    assert is_better(version, than, driver) == taken


FOUND = """
import sys, torch
from bench.compile import compile_instead
from fastflag.kernels import compiler
architecture, driver = map(int, sys.argv[1:])
compile_instead(architecture)
compiler._driver_version = lambda: driver
print(compiler.assembler(torch.device("cpu")).path)
"""


@pytest.mark.parametrize(
    ("architecture", "driver", "own", "name"),
    [
        (80, 13, False, "ptxas"),
        (89, 13, False, "ptxas"),
        (90, 13, False, "ptxas-blackwell"),
        (90, 12, False, "ptxas"),
        (90, 13, True, "mine"),
        (100, 13, False, "ptxas-blackwell"),
        (120, 13, True, "ptxas-blackwell"),  # for which Triton reads another variable
    ],
)
def test_hoppers_kernels_have_blackwells_assembler(architecture, driver, own, name, tmp_path):
    if not (TOOLS / "ptxas-blackwell").exists():
        pytest.skip("this Triton carries one assembler")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_PTXAS_PATH", None)
    (tmp_path / "mine").symlink_to(TOOLS / "ptxas")
    if own:
        environment["TRITON_PTXAS_PATH"] = str(tmp_path / "mine")
    words = [sys.executable, "-c", FOUND, str(architecture), str(driver)]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).name == name


@pytest.fixture
def a_gpu(monkeypatch):
    """As if there were a GPU, on which a kernel's launch is the function that is given."""
    cached = (unusable, compiler._choose_assembler)

    def make(launch) -> None:
        made = torch.zeros
        monkeypatch.setattr(compiler, "interpreted", lambda: False)
        monkeypatch.setattr(compiler, "architecture", lambda device: 80)
        monkeypatch.setattr(torch, "zeros", lambda *sizes, dtype, device: made(1, dtype=dtype))
        monkeypatch.setattr(compiler, "_probe_kernel", {(1,): launch})
        for function in cached:
            function.cache_clear()

    yield make
    for function in cached:
        function.cache_clear()


def built(folder: Path):
    """A launch as Triton's first one, which builds what it launches by, from C."""
    source = folder / "launcher.c"
    source.write_text("#include <Python.h>\n")
    return lambda number: build._build("launcher", str(source), str(folder), [], [], [], [])


def test_a_gpu_that_runs_a_kernel_is_asked_once(a_gpu):
    launched = []
    a_gpu(lambda number: launched.append(number.fill_(1)))
    assert unusable(GPU) == unusable(GPU) == ""
    assert len(launched) == 1


def test_a_machine_without_a_compiler_is_told(a_gpu, tmp_path, monkeypatch):
    a_gpu(built(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "there is no gcc or clang" in unusable(GPU)


def test_a_machine_without_pythons_headers_is_told(a_gpu, tmp_path, monkeypatch, capfd):
    a_gpu(built(tmp_path))
    headers = {"include": str(tmp_path)}
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme=None: headers)
    assert f"there is no {tmp_path / 'Python.h'}" in unusable(GPU)


def test_another_error_is_told_in_one_line(a_gpu):
    def denied(number):
        raise PermissionError("cannot write\nto the cache")

    a_gpu(denied)
    assert unusable(GPU).endswith("PermissionError: cannot write to the cache")


def test_a_kernel_that_stores_nothing_is_told(a_gpu):
    a_gpu(lambda number: None)
    assert "stored 0 in place of 1" in unusable(GPU)


def test_the_interpreter_runs_kernels_and_a_cpu_alone_does_not(monkeypatch):
    cpu = torch.device("cpu")
    unusable.cache_clear()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert unusable(cpu) == ""
    unusable.cache_clear()
    monkeypatch.setattr(compiler, "interpreted", lambda: False)
    assert "there is no GPU" in unusable(cpu)
    unusable.cache_clear()


def test_the_probes_kernel_stores_one():
    number = torch.zeros(1, dtype=torch.int32, device="cuda" if torch.cuda.is_available() else None)
    with launching(number):
        compiler._probe_kernel[(1,)](number)
    assert int(number) == 1


def test_kernels_are_launched_on_their_tensors_device(monkeypatch):
    """The second GPU's, while the first one is the current."""

    class OnTheSecond:
        device, is_cuda = torch.device("cuda", 1), True

        def get_device(self):
            return 1

    current = [0]
    monkeypatch.setattr(compiler, "_choose_assembler", lambda device: None)
    exchange = lambda index: (current.append(index), current[-2])[1]  # noqa: E731
    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    with launching(OnTheSecond()):
        assert current[-1] == 1
    assert current[-1] == 0


def test_a_device_is_asked_once_for_its_architecture(monkeypatch):
    asked = []
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or (12, 1)
    )
    tiles.architecture.cache_clear()
    table = {80: "Ampere's", 90: "Hopper's", 120: "the small Blackwell's"}
    found = [tiles.recorded(table, torch.device("cuda", 1)) for _ in range(3)]
    tiles.architecture.cache_clear()
    assert found == ["the small Blackwell's"] * 3 and len(asked) == 1
