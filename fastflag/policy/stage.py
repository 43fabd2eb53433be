"""A prompt set as blocks on the device: all that an evaluation reads, in shapes that come back.

Sets of about one size have one shape, because prompts and prefix tokens are padded to multiples.
So a GPU's evaluation need not wait for the host, and a CUDA graph of it can be replayed.

Shapes: D prefixes of P tokens, U prompts, S suffix tokens, C width, A actions, R reference rows.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastflag.model.shared_prefix import TOKEN_MULTIPLE, SuffixLayout, padded_up, round_up
from fastflag.policy.heads import Reference
from fastflag.prompt.prompts import PromptSet

# Most windows of a market then share a shape: of 1,500 prompts 4% are padding at most.
_PROMPTS = 64
_TOKENS = 16


@dataclass(frozen=True)
class Stage:
    """A set of prompts as blocks. Padding: extra suffixes are zeros under the last prefix, extra
    rows of results repeat suffix 0; both are ignored."""

    prefixes: Tensor  # [D, P, C], frozen states
    suffixes: Tensor  # [U, S, C], frozen states; those of one prefix follow one another
    layout: SuffixLayout
    place: Tensor  # [U] int64, where each prompt's suffix is
    side: Tensor  # [U] int64
    allowed: Tensor  # [U, A] bool
    reference: Reference

    @staticmethod
    def of(prompts: PromptSet, prefixes: list[Tensor], suffixes: list[Tensor]) -> "Stage":
        """prefixes, D tensors [its tokens, C], and suffixes, U tensors in the prompts' order."""
        device, count = suffixes[0].device, len(suffixes)
        rows = round_up(count, _PROMPTS)
        order = np.argsort(prompts.pairs[:, 0], kind="stable")
        counts = np.bincount(prompts.pairs[:, 0], minlength=len(prefixes))
        counts[-1] += rows - count
        lengths = torch.ones(rows, dtype=torch.int64)
        lengths[:count] = torch.tensor([len(suffixes[row]) for row in order])
        blocks = tuple(_block(texts) for texts in (prefixes, [suffixes[row] for row in order]))

        def moved(numbers: np.ndarray) -> Tensor:
            return torch.from_numpy(numbers).to(device)

        def extended(numbers: np.ndarray, fill: int) -> Tensor:
            spare = np.full((rows - count, *numbers.shape[1:]), fill, numbers.dtype)
            return moved(np.concatenate([numbers, spare]))

        return Stage(
            prefixes=blocks[0],
            suffixes=padded_up(blocks[1], 0, _PROMPTS),
            layout=SuffixLayout.build(
                counts.tolist(),
                [len(prefix) for prefix in prefixes],
                lengths.to(device),
                blocks[1].shape[1],
            ),
            place=extended(np.argsort(order), 0),
            side=extended(side_index(prompts), 0),
            allowed=extended(prompts.allowed, True),
            reference=reference_of(prompts, device),
        )

    @staticmethod
    def shape_of(prompts: PromptSet) -> tuple[int, int, int, int]:
        """D, P, U and S of the blocks of `prompts`, padded."""
        prefix, suffix = (
            round_up(max(map(len, texts)), _TOKENS)
            for texts in (prompts.prefixes, prompts.suffixes)
        )
        return len(prompts.prefixes), prefix, round_up(len(prompts.pairs), _PROMPTS), suffix

    def tensors(self) -> tuple[Tensor, ...]:
        """All of it but what only the host reads."""
        layout, reference = self.layout, self.reference
        return (
            self.prefixes,
            self.suffixes,
            layout.starts,
            layout.prefix_lengths,
            layout.last,
            layout.positions,
            self.place,
            self.side,
            self.allowed,
            reference.rows,
            reference.side,
            reference.known,
            *reference.of_side,
        )

    @staticmethod
    def from_tensors(*tensors: Tensor) -> "Stage":
        """Without the counts of suffixes, which the host alone reads."""
        prefixes, suffixes, *layout = tensors[:6]
        starts, prefix_lengths, last, positions = layout
        place, side, allowed, rows, of_rows, known, *of_side = tensors[6:]
        reference = Reference(rows, of_rows, tuple(of_side), known)
        laid = SuffixLayout((), starts, prefix_lengths, last, positions)
        return Stage(prefixes, suffixes, laid, place, side, allowed, reference)


def _block(texts: list[Tensor]) -> Tensor:
    """N texts' states [T, C] -> [N, T, C], zeros after each, T a multiple.

    Joined and then gathered, by two operators: pad_sequence copies text by text, for 1,500 texts as
    many launches on a GPU.
    """
    lengths = np.array([len(text) for text in texts])
    places = np.arange(round_up(int(lengths.max()), _TOKENS))
    first = np.cumsum(lengths) - lengths
    # After the last text comes a row of zeros.
    index = np.where(places < lengths[:, None], first[:, None] + places, lengths.sum())
    joined = torch.cat([*texts, texts[0].new_zeros(1, texts[0].shape[1])])
    gathered = joined.index_select(0, torch.from_numpy(index.ravel()).to(joined.device))
    return gathered.view(*index.shape, -1)


def padded(states: list[Tensor]) -> Tensor:
    """N texts' states [T, C] -> [N, T, C], T the longest's up to a multiple of 8."""
    return padded_up(pad_sequence(states, batch_first=True), 1, TOKEN_MULTIPLE)


def side_index(prompts: PromptSet) -> np.ndarray:
    """Each prompt's side of the account as an index, [U] int64."""
    return prompts.side.astype(np.int64) + 1


def reference_of(prompts: PromptSet, device: torch.device) -> Reference:
    """Raises ValueError where the set has no reference rows."""
    if not len(prompts.reference):
        raise ValueError("a prompt set without a reference needs statistics")
    return Reference.of(prompts.reference, side_index(prompts)[prompts.reference], device)


def content_of(prompts: PromptSet) -> bytes:
    """Equal for prompt sets of equal content alone."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(prompts):
        digest.update(repr((part.shape, part.dtype)).encode())
        digest.update(part.tobytes())
    return digest.digest()


def _parts(prompts: PromptSet) -> Iterator[np.ndarray]:
    yield from prompts.prefixes
    yield from prompts.suffixes
    yield from (prompts.pairs, prompts.side, prompts.allowed, prompts.reference)
