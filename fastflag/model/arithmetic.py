"""Which device computes, and in which arithmetic: the one that it is fast in by its own measure.

Lists of names would be wrong: of two CPUs, and of a GPU that emulates it, PyTorch says that bf16 is
supported, and one has units for it. fp16 is not tried: nobody has shown that it trains as well.
"""

import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from fastflag.config import PolicyConfig
from fastflag.files import InputError
from fastflag.model import ops
from fastflag.model.model_config import ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TRIED = ("bf16", "fp32")
# Rounds of each dtype, in turn; of several times the least is the machine's own.
_ROUNDS = 5
# With bf16 units bf16 is 1.5 to 4 times as fast on a CPU; without them oneDNN computes both alike.
_CLEARLY = 1.25
# Multiplications of a product below which chance decides: of widths 64 and 128 (2^21) 4 of 8
# processes took bf16; of SmolLM2-135M's (2^27) all did. Not by time: a GPU's large ones are quick.
_TELLING = 2**24
# From malloc.h of glibc, and a size that no activation has.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _NEVER = -3, -1, 2**31 - 1
# A product as large as an update's on a GPU, and on a CPU as large as a tenth of a second allows.
_LARGEST = {"cuda": (4096, 4096, 8192), "cpu": (256, 1024, 2048)}


@dataclass(frozen=True)
class Speeds:
    """What a product took in each dtype that is tried, its shape and its operations."""

    shape: tuple[int, int, int]  # rows, inputs, outputs
    seconds: dict[str, float]

    @property
    def best(self) -> Literal["bf16", "fp32"]:
        """fp32, which is the more exact, unless bf16 is clearly faster: where they are close, or
        over too soon to tell, the runs of a study must not be dealt different ones by chance."""
        if math.prod(self.shape) < _TELLING:
            return "fp32"
        return "bf16" if _CLEARLY * self.seconds["bf16"] < self.seconds["fp32"] else "fp32"

    def gigaflops(self, dtype: str) -> float:
        """Operations a second, in 10^9."""
        rows, inputs, outputs = self.shape
        return 2e-9 * rows * inputs * outputs / self.seconds[dtype]


def device_of(name: str) -> torch.device:
    """The device of a configuration's name. Raises InputError where there is no such device, and
    where there is a GPU that this PyTorch has no code for."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("no CUDA GPU is available, --device cuda")
    device = torch.device("cuda" if available and name != "cpu" else "cpu")
    if why := without_code(device):
        raise InputError(f"{why}; --device cpu does without it, --device {name}")
    return device


def without_code(device: torch.device) -> str:
    """Why this PyTorch computes nothing on a device, though it sees it; empty where it does. Wheels
    leave older GPUs out, and their first operation fails: "no kernel image"."""
    if device.type != "cuda":
        return ""
    capability, codes = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not codes or any(_runs(code, *capability) for code in codes):
        return ""
    architecture = "sm_{}{}".format(*capability)
    return (
        f"PyTorch {torch.__version__} has no code for this GPU, {architecture}, but for "
        f"{', '.join(codes)}: install a build that has"
    )


def _runs(code: str, major: int, minor: int) -> bool:
    """Whether code such as sm_86, sm_90a or compute_90 runs on a GPU of capability major.minor.
    Binary code does within its major version, from its minor version on, sm_90a on its own alone;
    compute_90 is compiled on the spot for whatever is newer (CUDA C++ Programming Guide)."""
    kind, _, version = code.partition("_")
    of_major, of_minor = divmod(int(version.rstrip("af")), 10)
    if version.endswith("a"):
        return (of_major, of_minor) == (major, minor)
    if kind == "compute":
        return (of_major, of_minor) <= (major, minor)
    return of_major == major and of_minor <= minor


def name_of(device: torch.device) -> Literal["cpu", "cuda"]:
    """A device's name in a configuration."""
    return "cuda" if device.type == "cuda" else "cpu"


def activations_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What lies between products: a CPU rounds inside of them alone (`products`)."""
    return torch.float32 if device.type == "cpu" else dtype


def keep_freed_memory() -> None:
    """Lets glibc's allocator keep what is freed for what comes next; nothing under another libc.

    It would give activations of some megabytes back to the system each time, whose pages are then
    faulted in and zeroed anew: a tenth of account texts' pass through the frozen layers (2 cores,
    AVX2). Before 2.35 blocks above 32 MB are always given back.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows
        return
    # The second call alone would fix the first threshold at 128 KB.
    if mallopt(_MMAP_THRESHOLD, _NEVER) or mallopt(_MMAP_THRESHOLD, 2**25):
        mallopt(_TRIM_THRESHOLD, _NEVER)


def measured(device: torch.device, width: int, mlp_width: int) -> Speeds:
    """Times of a product of rows of `width` with an MLP's matrix, in bf16 and in fp32."""
    rows, *largest = _LARGEST[device.type]
    inputs, outputs = map(min, (width, mlp_width), largest)
    made = {
        name: (
            torch.ones(rows, inputs, device=device, dtype=activations_dtype(device, dtype)),
            ops.frozen_linear(torch.ones(outputs, inputs, device=device, dtype=dtype), None, dtype),
        )
        for name in _TRIED
        for dtype in [DTYPES[name]]
    }
    times: dict[str, list[float]] = {name: [] for name in _TRIED}
    for _ in range(_ROUNDS):  # the first of each compiles, and is never the least
        for name, (x, multiply) in made.items():
            times[name].append(_seconds(device, partial(multiply, x)))
    return Speeds((rows, inputs, outputs), {name: min(taken) for name, taken in times.items()})


def resolved(config: PolicyConfig, model: ModelConfig) -> PolicyConfig:
    """The configuration with the dtype that is best on its device, where it leaves that open.

    Raises InputError for a device that is not there.
    """
    if config.dtype != "auto":
        return config
    speeds = measured(device_of(config.device), model.width, model.mlp_width)
    return replace(config, dtype=speeds.best)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
