"""Which device computes, and in which arithmetic: the one that it is fast in by its own measure.

Lists of names would be wrong: 2 cores of a CPU with AVX2 alone make 126 GFLOP/s in fp32 and 16 in
bf16, which AVX-512 with bf16 units turns round; PyTorch says of both, and of a GPU that emulates
it, that bf16 is supported. fp16 is not tried: its range needs a scaled loss.
"""

import ctypes
import time
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear

from fastflag.config import PolicyConfig
from fastflag.files import InputError
from fastflag.policy.model_config import ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Rounds of each dtype, in turn; of several times the least is the machine's own.
_ROUNDS = 5
# Without bf16 units fp32 is 1.5 to 8 times as fast, with them half as fast.
_CLEARLY = 1.25
# From malloc.h of glibc, and a size that no activation has.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _NEVER = -3, -1, 2**31 - 1
# A product as large as an update's on a GPU, and on a CPU as large as a tenth of a second allows.
_LARGEST = {"cuda": (4096, 4096, 8192), "cpu": (256, 1024, 2048)}


@dataclass(frozen=True)
class Speeds:
    """What a product took in each dtype, its shape and its operations."""

    shape: tuple[int, int, int]  # rows, inputs, outputs
    seconds: dict[str, float]

    @property
    def best(self) -> str:
        """bf16, which takes half the memory, unless fp32 is clearly faster: where they are close,
        the runs of a study must not be dealt different ones by chance."""
        return "fp32" if _CLEARLY * self.seconds["fp32"] < self.seconds["bf16"] else "bf16"

    def gigaflops(self, dtype: str) -> float:
        """Operations a second, in 10^9."""
        rows, inputs, outputs = self.shape
        return 2e-9 * rows * inputs * outputs / self.seconds[dtype]


def device_of(name: str) -> torch.device:
    """The device of a configuration's name. Raises InputError where there is no such device."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("no CUDA GPU is available, --device cuda")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


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
    """Times of a product of rows of `width` with an MLP's matrix, in every dtype."""
    rows, *largest = _LARGEST[device.type]
    inputs, outputs = map(min, (width, mlp_width), largest)
    factors = {
        name: (
            torch.ones(rows, inputs, device=device, dtype=dtype),
            torch.ones(outputs, inputs, device=device, dtype=dtype),
        )
        for name, dtype in DTYPES.items()
    }
    times: dict[str, list[float]] = {name: [] for name in DTYPES}
    for _ in range(_ROUNDS):  # the first of each compiles, and is never the least
        for name, pair in factors.items():
            times[name].append(_seconds(device, *pair))
    return Speeds((rows, inputs, outputs), {name: min(taken) for name, taken in times.items()})


def resolved(config: PolicyConfig, model: ModelConfig) -> PolicyConfig:
    """The configuration with the dtype that is best on its device, where it leaves that open.

    Raises InputError for a device that is not there.
    """
    if config.dtype != "auto":
        return config
    speeds = measured(device_of(config.device), model.width, model.mlp_width)
    return replace(config, dtype=speeds.best)


def _seconds(device: torch.device, x: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    linear(x, weight)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
