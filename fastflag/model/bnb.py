"""bitsandbytes, imported when it is first used, and what it does for NF4."""

import logging
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

BLOCKSIZE = 64


def quantise_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Any floating point weight of n numbers -> [ceil(n / 2)] uint8 and the largest number of each
    block, [ceil(n / 64)] fp32."""
    packed, state = bitsandbytes().functional.quantize_4bit(
        weight.detach(), blocksize=BLOCKSIZE, compress_statistics=False, quant_type="nf4"
    )
    return packed.flatten(), state.absmax


def dequantise_nf4(
    packed: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The weight [out, in] in fp32, bf16 or fp16, on its device."""
    if shape[1] % BLOCKSIZE == 0:
        return _unpacked(packed, absmax, shape, dtype)
    # One flat row of whole bytes. On a CPU, for rows that end within a block bitsandbytes (0.50.2)
    # takes other blocks' scales, where 32 divides their length; for rows that end within a byte it
    # falls back to code that torch.compile takes 15 s to build for each shape.
    row = _unpacked(packed, absmax, (1, 2 * packed.numel()), dtype)
    return row[0, : math.prod(shape)].view(*shape)


def _unpacked(packed: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    bitsandbytes()
    return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, BLOCKSIZE, "nf4", shape, dtype)


def bitsandbytes() -> ModuleType:
    """The library. Its import takes two seconds; and on CPUs with AVX512-BF16 it warns that the
    `kernels` package is missing, which only its fused 4-bit product would need."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_about_kernels)
    import bitsandbytes

    return bitsandbytes


def _is_not_about_kernels(record: logging.LogRecord) -> bool:
    return not record.msg.startswith("Failed to load CPU gemm_4bit_forward from kernels-community")
