"""Which recorded tile a kernel takes: by the GPU's architecture alone, never by batch or length.

A kernel's file records its choices as {architecture: {constant: number}}, constants being the
kernel's constexprs, `num_warps` and `num_stages`; `recorded` takes the newest that the GPU has
reached.
"""

from collections.abc import Mapping

Tile = Mapping[str, int]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which needs no GPU."""
    import triton

    return triton.knobs.runtime.interpret


def architecture() -> int:
    """The current GPU's compute capability, such as 90 for sm_90; 0 in Triton's interpreter."""
    import triton

    return 0 if interpreted() else triton.runtime.driver.active.get_current_target().arch


def recorded(tiles: Mapping[int, Tile]) -> Tile:
    """The tile of the newest architecture that the GPU has reached. Older GPUs and the interpreter
    take the oldest one's."""
    reached = [known for known in tiles if known <= architecture()]
    return tiles[max(reached, default=min(tiles))]
