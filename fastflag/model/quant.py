"""NF4 storage of frozen weights: one of 16 levels times the largest number of its block of 64."""

from collections.abc import Sequence
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

    @staticmethod
    def stacked(weights: Sequence["NF4Weight"]) -> "NF4Weight":
        """One under another, weights whose rows are whole blocks."""
        rows = sum(weight.shape[0] for weight in weights)
        packed = torch.cat([weight.packed for weight in weights])
        absmax = torch.cat([weight.absmax for weight in weights])
        return NF4Weight(packed, absmax, (rows, weights[0].shape[1]))

    def __getitem__(self, rows: slice) -> "NF4Weight":
        """A view of some rows, which are whole blocks."""
        first, last, _ = rows.indices(self.shape[0])
        columns = self.shape[1]
        packed = self.packed[first * columns // 2 : last * columns // 2]
        absmax = self.absmax[first * columns // bnb.BLOCKSIZE : last * columns // bnb.BLOCKSIZE]
        return NF4Weight(packed, absmax, (last - first, columns))

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in] in fp32, bf16 or fp16, on the weight's device."""
        return ops.nf4_dequantise(self.packed, self.absmax, self.shape, dtype)

    def to(self, device: torch.device | str) -> "NF4Weight":
        return NF4Weight(self.packed.to(device), self.absmax.to(device), self.shape)
