"""Which suffixes follow which prefix, and the keys and values that those of one prefix share.

Shapes: D prefixes of up to P tokens, U suffixes of S tokens, G key/value heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

# Texts' tokens come in eights: prefixes and account texts of one padded length go together.
TOKEN_MULTIPLE = 8
# Suffixes of a tile. A tile has a copy of its prefix's keys and values and pays for all of its
# places; days of the demo have 8 or 9 account texts.
_TILE = 4

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one prefix in one layer, each [G, its tokens, E]."""


class Prefixes:
    """What suffixes attend to of D prefixes, in one layer.

    A CPU reads the days of one padded length in a block, a GPU all days: made of one form, it makes
    the other only when asked.
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

    def of_size(self, days: Sequence[int], size: int) -> KeysValues:
        """Keys and values of some, [n, G, size, E]."""
        chosen = self.select(days)
        if chosen is self and "block" in self.__dict__:
            return tuple(padded_up(side[:, :, :size], 2, size) for side in self.block)
        return tuple(padded_up(side, 2, size) for side in chosen.block)

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

    @cached_property
    def tiles(self) -> list["Tiles"]:
        """Prefixes of one padded length together, each suffix in one tile."""
        counts, lengths = np.array(self.counts), self.prefix_lengths.cpu().numpy()
        sizes = -(-lengths // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
        first = np.cumsum(counts) - counts
        made = []
        for size in np.unique(sizes):
            days = np.flatnonzero(sizes == size)
            tiles = -(-counts[days] // _TILE)
            day = np.repeat(np.arange(len(days)), tiles)
            start = _TILE * (np.arange(len(day)) - np.repeat(np.cumsum(tiles) - tiles, tiles))
            rows = np.minimum(start[:, None] + np.arange(_TILE), counts[days][day, None] - 1)
            rows += first[days][day, None]
            beyond = np.arange(size) >= lengths[days][day, None]
            arrays = (torch.from_numpy(array) for array in (day, rows.ravel(), beyond))
            made.append(Tiles(int(size), days.tolist(), *(a.to(self.last.device) for a in arrays)))
        return made

    @cached_property
    def untiled(self) -> Tensor:
        """Where each suffix is among the rows of all tiles, [U] int64; of one that fills a tile up,
        any of its places, for all are alike."""
        rows = torch.cat([tiles.rows for tiles in self.tiles])
        place = torch.empty_like(self.last)
        place[rows] = torch.arange(len(rows), device=rows.device)
        return place


@dataclass(frozen=True)
class Tiles:
    """B tiles of suffixes, each of 4 of one prefix: the last is repeated where there are fewer."""

    size: int  # P, padded
    days: list[int]  # the prefixes
    day: Tensor  # [B] int64, the place of a tile's among them
    rows: Tensor  # [4 B] int64, the suffixes
    beyond: Tensor  # [B, P] bool, where the prefix has ended


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
