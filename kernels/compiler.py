"""What compiles kernels for a device: whether anything can, and which assembler (ptxas) does."""

import ctypes
import os
import re
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflag.kernels.language import INSTALLED, jit, tl
from fastflag.kernels.tiles import architecture, interpreted

# The first architecture whose matrix instructions Triton uses. Below it, it makes scalar code of
# tl.dot: 13,496 instructions of LoRA's product on sm_75, of which 7,193 spill.
PRODUCTS_FROM = 80

_PTXAS = "TRITON_PTXAS_PATH"


@dataclass(frozen=True)
class Assembler:
    """A ptxas."""

    path: str
    version: str  # as 13.1.80


def launching(x: Tensor) -> torch.cuda.device:
    """For `with`: kernels that are launched inside run on x's device, which need not be the current
    one, and are assembled as `assembler` says."""
    _choose_assembler(x.device)
    return torch.cuda.device_of(x)


@cache
def unusable(device: torch.device) -> str:
    """Why no kernel runs on a device; empty where one does. The first call for a GPU compiles and
    launches one: that Triton can be imported says little, since its launcher is built on the
    machine, by a C compiler and with Python's headers, which slim images have not."""
    if not INSTALLED:
        return "Triton is not installed"
    if interpreted():
        return ""
    if device.type != "cuda":
        return "there is no GPU for Triton's kernels"
    try:
        number = torch.zeros(1, dtype=torch.int32, device=device)
        with launching(number):
            _probe_kernel[(1,)](number)
        stored = int(number)
    except Exception as error:  # of the compiler, of the driver, of a folder that can't be written
        return f"no Triton kernel runs here: {_cause(error)}"
    return "" if stored == 1 else f"no Triton kernel runs here: one stored {stored} in place of 1"


@jit
def _probe_kernel(number_ptr):
    tl.store(number_ptr, 1)


def _cause(error: Exception) -> str:
    if "C compiler" in str(error):
        return "its launcher is built by a C compiler, and there is no gcc or clang"
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if isinstance(error, subprocess.CalledProcessError) and not headers.exists():
        return f"its launcher needs Python's headers (python3-dev), and there is no {headers}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@cache
def assembler(device: torch.device) -> Assembler | None:
    """What kernels for a device are assembled by; None in the interpreter, and where there is none.
    The same kernel may be right by one version and wrong by another: a verdict on kernels holds for
    this one alone."""
    if not INSTALLED or interpreted():
        return None
    from triton.backends.nvidia.compiler import get_ptxas

    _choose_assembler(device)
    try:
        path = get_ptxas(architecture(device)).path
        told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        return None
    return Assembler(path, re.search(r"V(\d[\d.]*)", told.stdout)[1])


@cache
def _choose_assembler(device: torch.device) -> None:
    """Has Hopper's kernels assembled by the ptxas that Triton carries for Blackwell.

    Triton 3.7.1 assembles Hopper's by ptxas 12.8.93. From one and the same PTX that made wrong
    products and invalid writes of kernels with several wgmma, and 13.1.80 right ones (an H20,
    fla-org/flash-linear-attention#1262). To be called before the first compilation: Triton looks
    up what it has compiled by the version that it found first.
    """
    if not 90 <= architecture(device) < 100 or _PTXAS in os.environ:
        return
    import triton

    tools = triton.knobs.nvidia
    newer = _tool(tools, "ptxas_blackwell")
    if newer and is_better(newer.version, tools.ptxas.version, _driver_version()):
        tools.ptxas = newer.path


def _tool(tools: Any, name: str) -> Any:
    """One of Triton's, or None where it has none of this name."""
    try:
        return getattr(tools, name)
    except (AttributeError, RuntimeError):
        return None


def is_better(version: str, than: str, driver: int | None) -> bool:
    """Whether a ptxas of a `version` such as 13.1 is newer, and the driver loads what it makes. A
    driver (the major version of its CUDA; None where there is none) is only sure to load what
    tools of its own major version or before have made (NVIDIA's minor version compatibility):
    otherwise "device kernel image is invalid"."""
    new, old = (tuple(map(int, text.split("."))) for text in (version, than))
    return new > old and (driver is None or driver >= new[0])


def _driver_version() -> int | None:
    """The major version of CUDA that the driver is of."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return None if failed else number.value // 1000
