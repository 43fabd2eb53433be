"""What the GPU is, asked of the driver's libraries.

PyTorch would make a context to answer, which takes memory; and on a GPU that serves one process at
a time (compute mode EXCLUSIVE_PROCESS) the child that proves could then make none.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# From cuda.h: CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT and _COMPUTE_CAPABILITY_MAJOR, _MINOR.
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76
_TEXT = 256  # characters of a name or a version, at most


@dataclass(frozen=True)
class Gpu:
    name: str
    uuid: str
    """Of this device, or of the part of it that is ours (MIG)."""
    capability: str
    """Such as 9.0."""
    multiprocessors: int
    memory: int
    """Bytes."""
    driver: str
    """Its version; the newest CUDA version that it serves where NVML is not there."""

    @property
    def bf16(self) -> bool:
        """Whether it has units for bf16 (from Ampere on)."""
        return int(self.capability.partition(".")[0]) >= 8


class _Refused(Exception):
    """A library is not there, or answers with an error."""


def first(load: Callable[[str], Any] = ctypes.CDLL) -> Gpu | None:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, PyTorch's cuda:0; None where there is none.
    `load` opens a library by its file's name."""
    try:
        cuda = _Library(load, "libcuda.so.1")
        cuda.call("cuInit", 0)
        device = cuda.answer(ctypes.c_int, "cuDeviceGet", 0)
        major, minor = (cuda.attribute(number, device) for number in (_MAJOR, _MINOR))
        return Gpu(
            name=cuda.text("cuDeviceGetName", device),
            uuid=bytes(cuda.answer(ctypes.c_ubyte * 16, "cuDeviceGetUuid_v2", device)).hex(),
            capability=f"{major}.{minor}",
            multiprocessors=cuda.attribute(_MULTIPROCESSORS, device),
            memory=cuda.answer(ctypes.c_size_t, "cuDeviceTotalMem_v2", device),
            driver=_driver(load, cuda),
        )
    except _Refused:
        return None


def _driver(load: Callable[[str], Any], cuda: "_Library") -> str:
    try:
        nvml = _Library(load, "libnvidia-ml.so.1")
        nvml.call("nvmlInit_v2")
    except _Refused:
        return f"for CUDA {cuda.answer(ctypes.c_int, 'cuDriverGetVersion')}"
    try:
        text = ctypes.create_string_buffer(_TEXT)
        nvml.call("nvmlSystemGetDriverVersion", text, _TEXT)
        return text.value.decode(errors="replace")
    finally:
        nvml.call("nvmlShutdown")


class _Library:
    """A library of C functions that return 0 where all is well. Raises _Refused elsewhere."""

    def __init__(self, load: Callable[[str], Any], file: str):
        try:
            self._library = load(file)
        except OSError:
            raise _Refused from None

    def call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        if function is None or function(*arguments) != 0:
            raise _Refused

    def answer(self, kind: Any, name: str, *arguments: Any) -> Any:
        """What a function writes to where its first argument points: a number, or an array."""
        made = kind()
        self.call(name, ctypes.byref(made), *arguments)
        return getattr(made, "value", made)

    def attribute(self, number: int, device: int) -> int:
        return self.answer(ctypes.c_int, "cuDeviceGetAttribute", number, device)

    def text(self, name: str, *arguments: Any) -> str:
        """As `answer`, of a function that is told the text's size as well."""
        made = ctypes.create_string_buffer(_TEXT)
        self.call(name, made, _TEXT, *arguments)
        return made.value.decode(errors="replace")
