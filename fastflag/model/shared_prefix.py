"""Which suffixes follow which prefix, and the keys and values that those of one prefix share.

Shapes: D prefixes of up to P tokens, U suffixes of S tokens, G key/value heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# Texts' tokens come in eights: prefixes and account texts of one padded length go together.
TOKEN_MULTIPLE = 8
# Keys of a tile come in sixteens. A suffix's own lie in one of its four places, and with AVX-512 a
# softmax adds up vectors of 16 numbers: by eights, another place would be another order.
KEY_MULTIPLE = 16
IntegersT = TypeVar("IntegersT", int, np.ndarray)
# Suffixes of a tile. A tile has a copy of its prefix's keys and values and pays for all of its
# places; days of the demo have 8 or 9 account texts. Each query is given the own keys of all: of
# more tokens than this, copies of the prefix cost less.
_TILE, _TILED_TOKENS = 4, 16

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of some prefixes in one layer, each [n, G, P, E], padded on the right."""


class Prefixes:
    """What suffixes attend to of D prefixes, in one layer: blocks of some of them, in order.

    A CPU reads those of one padded length together, a GPU all; each is made when first asked for.
    """

    def __init__(self, blocks: Sequence[KeysValues], lengths: Sequence[int]):
        """`lengths` [D], tokens of each prefix."""
        self.blocks = blocks
        self.lengths = lengths
        self._of_size: dict[int, KeysValues] = {}

    @staticmethod
    def joined(parts: Sequence["Prefixes"]) -> "Prefixes":
        """The prefixes of several, one after another."""
        blocks = [block for part in parts for block in part.blocks]
        return Prefixes(blocks, [length for part in parts for length in part.lengths])

    def of_size(self, size: int) -> KeysValues:
        """Those of `size` tokens when padded to a multiple of 8, in their order: P is `size` up to
        a multiple of 16."""
        if size not in self._of_size:
            chosen, first = [], 0
            for block in self.blocks:
                lengths = self.lengths[first : first + len(block[0])]
                first += len(lengths)
                rows = [row for row, n in enumerate(lengths) if padded_length(n) == size]
                if rows:
                    chosen.append(_cut(block, rows, round_up(size, KEY_MULTIPLE)))
            self._of_size[size] = _one_after_another(chosen)
        return self._of_size[size]

    @cached_property
    def whole(self) -> KeysValues:
        """All of them: P is the longest's."""
        longest = max(key.shape[2] for key, _ in self.blocks)
        return _one_after_another(
            [_cut(block, list(range(len(block[0]))), longest) for block in self.blocks]
        )


def _cut(block: KeysValues, rows: list[int], size: int) -> KeysValues:
    """Some rows of a block, with P made `size`."""
    if len(rows) < len(block[0]):
        # Not side[rows]: its index is kept for the backward pass, and work that is done again in
        # that pass, where the rows lie ready, would keep one tensor less.
        block = tuple(torch.stack([side[row] for row in rows]) for side in block)
    missing = size - block[0].shape[2]
    if missing > 0:
        return tuple(functional.pad(side, (0, 0, 0, missing)) for side in block)
    return tuple(side[:, :, :size] for side in block)


def _one_after_another(blocks: Sequence[KeysValues]) -> KeysValues:
    return blocks[0] if len(blocks) == 1 else tuple(map(torch.cat, zip(*blocks, strict=True)))


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
        width = _TILE if self.positions.shape[1] <= _TILED_TOKENS else 1
        counts, lengths = np.array(self.counts), self.prefix_lengths.cpu().numpy()
        sizes = padded_length(lengths)
        first = np.cumsum(counts) - counts
        made = []
        for size in np.unique(sizes[counts > 0]):
            alike = np.flatnonzero(sizes == size)
            tiles = -(-counts[alike] // width)
            place = np.repeat(np.arange(len(alike)), tiles)
            start = width * (np.arange(len(place)) - np.repeat(np.cumsum(tiles) - tiles, tiles))
            rows = np.minimum(start[:, None] + np.arange(width), counts[alike][place, None] - 1)
            rows += first[alike][place, None]
            there = np.arange(round_up(int(size), KEY_MULTIPLE)) < lengths[alike][place, None]
            arrays = (torch.from_numpy(array) for array in (place, rows.ravel(), there))
            made.append(Tiles(int(size), *(array.to(self.last.device) for array in arrays)))
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
    """B tiles of suffixes, each of n of one prefix (4, or 1 where they are long): the last is
    repeated where there are fewer."""

    size: int  # tokens of the prefixes, up to a multiple of 8
    prefix: Tensor  # [B] int64, which of the prefixes of that size
    rows: Tensor  # [n B] int64, the suffixes
    there: Tensor  # [B, P] bool, where the prefix has tokens


@dataclass(frozen=True)
class Pieces:
    """N pieces of suffixes, of T tokens each, as a tree under each prefix; those of a prefix follow
    one another.

    A piece attends to the pieces in its slots: those before it in its suffix, then itself until
    the slots are full. All pieces have as many slots, so that one's bits don't depend on others.
    """

    path: Tensor  # [slots, N] int64, which pieces
    above: Tensor  # [N] int64, tokens of the suffix before the piece
    layout: SuffixLayout  # of the pieces, as if each followed its prefix


def padded_up(block: Tensor, axis: int, multiple: int) -> Tensor:
    """Zeros after the last place of `axis`, up to a multiple."""
    missing = round_up(block.shape[axis], multiple) - block.shape[axis]
    if not missing:  # `pad` would copy
        return block
    return functional.pad(block, [0, 0] * (block.dim() - 1 - axis) + [0, missing])


def padded_length(tokens: IntegersT) -> IntegersT:
    """Up to a multiple of 8, of a number or of an array."""
    return round_up(tokens, TOKEN_MULTIPLE)


def round_up(size: IntegersT, multiple: int) -> IntegersT:
    return -(-size // multiple) * multiple
