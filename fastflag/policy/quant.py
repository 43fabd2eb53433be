"""NF4 storage of frozen weights: one of 16 levels times the largest number of its block of 64."""

import logging
import math
from dataclasses import dataclass
from types import ModuleType

import torch

BLOCKSIZE = 64


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight [out, in] at 4.5 bits a number, by bitsandbytes.

    dequantised[i] = round_to_dtype(code[nibble[i]] * absmax[i // 64]), a product in fp32, over the
    flattened weight: blocks cross rows. The high nibble of a byte is the even element.
    """

    packed: torch.Tensor
    """[ceil(out * in / 2)] uint8."""
    absmax: torch.Tensor
    """[ceil(out * in / 64)] fp32."""
    shape: tuple[int, int]
    """(out, in)."""

    @staticmethod
    def quantise(weight: torch.Tensor) -> "NF4Weight":
        """weight [out, in], floating point, on the device where it is to stay."""
        packed, state = _bitsandbytes().functional.quantize_4bit(
            weight.detach(), blocksize=BLOCKSIZE, compress_statistics=False, quant_type="nf4"
        )
        return NF4Weight(packed.flatten(), state.absmax, tuple(weight.shape))

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in] in fp32, bf16 or fp16, on the weight's device."""
        if self.shape[1] % 2 == 0:
            return self._unpacked(self.shape, dtype)
        # One flat row of whole bytes: for rows that end within a byte bitsandbytes falls back, on a
        # CPU, to code that torch.compile takes 15 s to build for each shape.
        row = self._unpacked((1, 2 * self.packed.numel()), dtype)
        return row[0, : math.prod(self.shape)].view(self.shape)

    def _unpacked(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        _bitsandbytes()
        return torch.ops.bitsandbytes.dequantize_4bit(
            self.packed, self.absmax, BLOCKSIZE, "nf4", shape, dtype
        )

    def to(self, device: torch.device | str) -> "NF4Weight":
        return NF4Weight(self.packed.to(device), self.absmax.to(device), self.shape)


def _bitsandbytes() -> ModuleType:
    # Imported on use, for it is slow; and on CPUs with AVX512-BF16 it warns that the `kernels`
    # package is missing, which only its fused 4-bit product would need.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_about_kernels)
    import bitsandbytes

    return bitsandbytes


def _is_not_about_kernels(record: logging.LogRecord) -> bool:
    return not record.msg.startswith("Failed to load CPU gemm_4bit_forward from kernels-community")
