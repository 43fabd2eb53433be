"""NF4 storage of frozen weights: one of 16 levels times the largest number of its block of 64."""

from dataclasses import dataclass

import torch

from fastflag.model import bnb, ops


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight [out, in] at 4.5 bits a number, as bitsandbytes stores it.

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
        rows, columns = weight.shape
        return NF4Weight(*bnb.quantise_nf4(weight), (rows, columns))

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in] in fp32, bf16 or fp16, on the weight's device."""
        return ops.nf4_dequantise(self.packed, self.absmax, self.shape, dtype)

    def to(self, device: torch.device | str) -> "NF4Weight":
        return NF4Weight(self.packed.to(device), self.absmax.to(device), self.shape)
