"""Which recorded tile a kernel takes: by the GPU's architecture alone, never by batch or length.

A kernel's file records its choices as {architecture: {constant: number}}, constants being the
kernel's constexprs, `num_warps` and `num_stages`; `recorded` takes the newest that the GPU has
reached.
"""

from collections.abc import Mapping
from functools import cache
from typing import TypeVar

import torch

Choice = TypeVar("Choice")
Tile = Mapping[str, int]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which needs no GPU."""
    import triton

    return triton.knobs.runtime.interpret


@cache
def architecture(device: torch.device) -> int:
    """A device's compute capability, such as 90 for sm_90; 0 in Triton's interpreter. A device is
    asked once, not at every launch."""
    if interpreted():
        return 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    import triton  # which is told of a GPU where there is none (bench.compile)

    return triton.runtime.driver.active.get_current_target().arch


def recorded(tiles: Mapping[int, Choice], device: torch.device) -> Choice:
    """The choice for the newest architecture that the device has reached. Older ones and the
    interpreter take the oldest one's."""
    reached = [known for known in tiles if known <= architecture(device)]
    return tiles[max(reached, default=min(tiles))]
