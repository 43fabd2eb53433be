"""Which suffixes follow which prefix, and the keys and values that those of one prefix share.

Shapes: D prefixes of up to P tokens, U suffixes of S tokens, G key/value heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

# Tokens and rows come in eights: a row of a product of 8, 16, 24.. rows has the same bits in every
# batch (measured, CPU fp32 and bf16); of fewer, or of other numbers on two threads, it does not.
ROW_MULTIPLE = 8

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one prefix in one layer, each [G, its tokens, E]."""


class Prefixes:
    """What suffixes attend to of D prefixes, in one layer.

    A CPU reads each day's keys and values where they lie, a GPU all days' in one block: made of one
    form, it makes the other only when asked.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = lengths

    @staticmethod
    def of_block(key: Tensor, value: Tensor, lengths: Sequence[int]) -> "Prefixes":
        """key and value [D, G, P, E], padded on the right."""
        made = Prefixes(lengths)
        made.block = key, value
        return made

    @staticmethod
    def of_days(days: Sequence[KeysValues]) -> "Prefixes":
        made = Prefixes([key.shape[1] for key, _ in days])
        made.days = days
        return made

    @staticmethod
    def joined(parts: Sequence["Prefixes"]) -> "Prefixes":
        """The prefixes of several, one after another."""
        if len(parts) == 1:
            return parts[0]
        return Prefixes.of_days([day for part in parts for day in part.days])

    def select(self, places: Sequence[int]) -> "Prefixes":
        """Those at `places`, in their order."""
        if list(places) == list(range(len(self.lengths))):
            return self
        return Prefixes.of_days([self.days[place] for place in places])

    @cached_property
    def days(self) -> Sequence[KeysValues]:
        each = zip(*(side.unbind() for side in self.block), self.lengths, strict=True)
        return [(key[:, :length], value[:, :length]) for key, value, length in each]

    @cached_property
    def block(self) -> KeysValues:
        """Keys and values [D, G, P, E]."""
        sides = ([side.transpose(0, 1) for side in sides] for sides in zip(*self.days, strict=True))
        return tuple(pad_sequence(side, batch_first=True).transpose(1, 2) for side in sides)


@dataclass(frozen=True)
class SuffixLayout:
    """Where the tokens of padded suffixes [U, S] stand; those of one prefix follow one another."""

    counts: Sequence[int]  # suffixes of each prefix
    starts: Tensor  # [D + 1] int32, the first suffix of each prefix
    prefix_lengths: Tensor  # [D] int32
    last: Tensor  # [U] int64, place of the last token in the suffix
    positions: Tensor  # [U, S] int64

    @staticmethod
    def build(
        counts: Sequence[int], prefix_lengths: Sequence[int], suffix_lengths: Tensor, size: int
    ) -> "SuffixLayout":
        """counts and prefix_lengths, one a prefix; suffix_lengths [U] int64; size is S."""
        device = suffix_lengths.device
        each = torch.tensor([counts, prefix_lengths], dtype=torch.int32)
        starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
        starts[1:] = each[0].cumsum(0)
        first_positions = each[1].long().repeat_interleave(each[0]).to(device)
        return SuffixLayout(
            counts=counts,
            starts=starts.to(device),
            prefix_lengths=each[1].to(device),
            last=suffix_lengths - 1,
            positions=first_positions[:, None] + torch.arange(size, device=device),
        )


@dataclass(frozen=True)
class Level:
    """The pieces of suffixes that lie at one depth of a tree; those of a prefix follow one another.

    n pieces of T tokens at this depth, of N in the tree; the first level's depth is 0.
    """

    path: Tensor  # [depth + 1, n] int64: each piece's way down from depth 0, itself at the end
    layout: SuffixLayout  # of the pieces, as if each followed its prefix


def padded_up(block: Tensor, axis: int, multiple: int) -> Tensor:
    """Zeros after the last place of `axis`, up to a multiple."""
    missing = round_up(block.shape[axis], multiple) - block.shape[axis]
    return functional.pad(block, [0, 0] * (block.dim() - 1 - axis) + [0, missing])


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
