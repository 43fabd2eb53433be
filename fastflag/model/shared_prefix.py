"""Which suffixes follow which prefix, and the keys and values that those of one prefix share.

Shapes: D prefixes of up to P tokens, U suffixes of S tokens, G key/value heads, E head size.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

# Texts' tokens come in eights: prefixes and account texts of one padded length go together.
TOKEN_MULTIPLE = 8
# Keys of a tile come in sixteens. A suffix's own lie in one of its four places, and with AVX-512 a
# softmax adds up vectors of 16 numbers: by eights, another place would be another order.
KEY_MULTIPLE = 16
T = TypeVar("T")
IntegersT = TypeVar("IntegersT", int, np.ndarray)
# Suffixes of a tile. A tile has a copy of its prefix's keys and values and pays for all of its
# places; days of the demo have 8 or 9 account texts. Each query is given the own keys of all: where
# suffixes have more tokens than this, copies of the prefix cost less.
_TILE, _TILED_TOKENS = 4, 16

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of some prefixes in one layer, each [n, G, P, E], padded on the right."""


class Prefixes:
    """What suffixes attend to of D prefixes, in one layer: blocks of some of them, in order.

    A CPU reads those of one padded length together, a GPU all.
    """

    def __init__(self, blocks: Sequence[KeysValues], lengths: Sequence[int]):
        """`lengths` [D], tokens of each prefix."""
        self.blocks = blocks
        self.lengths = lengths
        self._made: dict[tuple[str, bool], Any] = {}

    @staticmethod
    def joined(parts: Sequence["Prefixes"]) -> "Prefixes":
        """The prefixes of several, one after another."""
        blocks = [block for part in parts for block in part.blocks]
        return Prefixes(blocks, [length for part in parts for length in part.lengths])

    def select(self, places: Sequence[int]) -> "Prefixes":
        """Those at `places`, which ascend.

        The backward pass of a block's index would fill zeros for every prefix that was not asked
        for: with an evaluation a day, for all days each time. Here it does it once.
        """
        if len(places) == len(self.lengths):
            return self
        rows = self._once("rows", lambda: [row for block in self.blocks for row in _rows(block)])
        return Prefixes([rows[at] for at in places], [self.lengths[at] for at in places])

    def of_size(self, size: int) -> KeysValues:
        """Those of `size` tokens when padded to a multiple of 8, in their order: P is `size` up to
        a multiple of 16. Raises ValueError where there are none.

        Made anew each time: gradients then add up in one order, whatever is selected.
        """
        sizes = [padded_length(length) for length in self.lengths]
        chosen, first = [], 0
        for block in self.blocks:
            alike = [n == size for n in sizes[first : first + len(block[0])]]
            first += len(alike)
            chosen += [block] if all(alike) else itertools.compress(_rows(block), alike)
        if not chosen:
            raise ValueError(f"no prefix has {size} tokens when padded, but {sorted(set(sizes))}")
        return _one_block(chosen, round_up(size, KEY_MULTIPLE))

    @property
    def whole(self) -> KeysValues:
        """All of them: P is the longest's."""
        longest = max(key.shape[2] for key, _ in self.blocks)
        return self._once("whole", lambda: _one_block(self.blocks, longest))

    def _once(self, what: str, make: Callable[[], T]) -> T:
        """What `make` returns, made when first asked for: once with gradients and once without, for
        what was made without would silently pass none."""
        key = what, torch.is_grad_enabled()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _rows(block: KeysValues) -> Iterator[KeysValues]:
    """A block of each row. Split, not indexed: an index is kept for the backward pass, and work
    that is done again in that pass, where the rows may lie ready, would keep one tensor less."""
    return zip(*(side.split(1) for side in block), strict=True)


def _one_block(blocks: Sequence[KeysValues], size: int) -> KeysValues:
    """Blocks one after another, with P made `size`: all at once, since of a block a day each would
    be two launches in every layer."""
    sides = [*zip(*blocks, strict=True)]
    keys, values = (_stacked(side, size) for side in sides)
    return keys, values


def _stacked(sides: Sequence[Tensor], size: int) -> Tensor:
    lengths = [side.shape[2] for side in sides]
    if len({*lengths}) == 1:
        return _sized(torch.cat([*sides]) if len(sides) > 1 else sides[0], size)
    if torch.is_grad_enabled() or any(len(side) > 1 for side in sides):
        # Backward a gather would add up in any order.
        return torch.cat([_sized(side, size) for side in sides])
    zeros = sides[0].new_zeros(sides[0].shape[1], 1, sides[0].shape[3])
    joined = torch.cat([*(side[0] for side in sides), zeros], 1)
    places = _places((*lengths,), size, joined.device)
    return joined.index_select(1, places).unflatten(1, (-1, size)).transpose(0, 1)


@lru_cache(maxsize=8)
def _places(lengths: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """Where each of `size` places of each length is, when all are one after another, and zeros are
    after the last: [D size] int64. Every layer asks for the same."""
    each, offset = np.array(lengths)[:, None], np.arange(size)
    first = np.cumsum(each)[:, None] - each
    places = np.where(offset < each, first + offset, each.sum())
    return torch.from_numpy(places.ravel()).to(device)


def _sized(side: Tensor, size: int) -> Tensor:
    missing = size - side.shape[2]
    return functional.pad(side, (0, 0, 0, missing)) if missing > 0 else side[:, :, :size]


@dataclass(frozen=True)
class SuffixLayout:
    """Where the tokens of padded suffixes [U, S] stand; those of one prefix follow one another."""

    counts: Sequence[int]  # suffixes of each prefix
    starts: Tensor  # [D + 1] int32, the first suffix of each prefix
    prefix_lengths: Tensor  # [D] int32
    last: Tensor  # [U] int64, place of the last token in the suffix
    positions: Tensor  # [U, S] int64
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

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

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made when first asked for: every layer reads the same."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @cached_property
    def tiles(self) -> list["Tiles"]:
        """Prefixes of one padded length together, each suffix in one tile."""
        width = tile_width(self.positions.shape[1])
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


def tile_width(tokens: int) -> int:
    """Suffixes of a tile, where they are padded to `tokens`."""
    return _TILE if tokens <= _TILED_TOKENS else 1


def alone(side: Tensor) -> Tensor:
    """The same numbers in memory that holds nothing else: not as a part of a larger product."""
    storage = side.untyped_storage().nbytes()
    return side if storage == side.numel() * side.element_size() else side.contiguous()


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


def padded(texts: list[Tensor]) -> Tensor:
    """N texts' states [T, C] -> [N, T, C], T the longest's up to a multiple of 8."""
    return padded_up(pad_sequence(texts, batch_first=True), 1, TOKEN_MULTIPLE)
