"""The frozen layers: what they make of a text is computed once, kept, and read from then on.

Account texts of a day begin alike ("Account: long 20 days, ..."), and attention is causal. So a
text of up to 16 tokens goes through in pieces of 8, and texts that are equal up to a piece's end
have that piece in common: a tree under each prefix, of an eighth fewer pieces in the demo's
backtest. A longer text, of an exact account, is one piece.

Shapes: P prefix tokens, S suffix tokens, N pieces of T tokens, C width, U prompts.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastflag import caches
from fastflag.config import PolicyConfig
from fastflag.model.linear import matrix_numbers, unpacked
from fastflag.model.llama import Block, piece_pass, prefix_pass
from fastflag.model.shared_prefix import (
    TOKEN_MULTIPLE,
    KeysValues,
    Pieces,
    Prefixes,
    SuffixLayout,
    alone,
    padded_length,
    round_up,
)
from fastflag.model.weights import Weights
from fastflag.policy.trunk_cache import TrunkCache, TrunkFiles, bits_of_a_cpu, bits_of_a_gpu
from fastflag.prompt.prompts import PromptSet

T = TypeVar("T")

# Counted up when the arithmetic changes in any bit: activations kept on disk are then new.
_ARITHMETIC = 9
# Prefixes that go through together. Keys and values of 64 prefixes of 150 tokens take 205 MB on
# SmolLM2-135M, and unpacking the matrices is a sixtieth of the work.
_TOGETHER = 64
# Tokens of one pass, over prefixes or texts. On a CPU 256 prompts of 14 tokens over prefixes of 150
# keep the attention's keys and values near 100 MB a layer on SmolLM2-135M. A GPU takes as many as
# have an MLP's numbers in so many bytes, and prefixes of up to a multiple of so many tokens: each
# pass is 60 to a hundred launches a layer.
_TOKENS = 4096
_GPU_BYTES = 2**28
_GPU_TOKENS = 64
_PIECE = TOKEN_MULTIPLE
# Pieces that a text in pieces has at most. Stepped texts have 1 or 2, and attend in one go.
_PIECES = 2


@dataclass
class _Prefix:
    """A prefix that goes through the layers, or has gone."""

    tokens: np.ndarray
    # Keys and values [G, P, E], P its padded length, of each layer passed; None where it is yet to
    # go through.
    layers: list[KeysValues] | None
    hidden: Tensor | None = None  # [P, C] after the last, where it has gone through now


@dataclass
class _PrefixWork:
    """Prefixes of one padded length on their way through."""

    prefixes: list[_Prefix]
    hidden: Tensor  # [D, P, C]


@dataclass
class _TextWork:
    """Texts on their way through, as the pieces of a tree; those of a prefix together."""

    rows: list[int]  # of the prompts
    paths: list[list[int]]  # the pieces of each of them
    prefixes: list[_Prefix]
    pieces: Pieces
    hidden: Tensor  # [N, T, C]

    def whole(self) -> Tensor:
        """The texts, each of as many pieces as the longest: [rows, tokens, C]."""
        most = max(map(len, self.paths))
        paths = torch.tensor([path + path[-1:] * (most - len(path)) for path in self.paths])
        return self.hidden[paths.to(self.hidden.device)].flatten(1, 2)


class _Piece(NamedTuple):
    tokens: np.ndarray
    walk: list[int]  # its place among the pieces, after those that lead to it


class Trunk:
    """The frozen layers of a model and the activations that they have made."""

    def __init__(
        self, weights: Weights, config: PolicyConfig, embedding: Tensor, blocks: Sequence[Block]
    ):
        self.blocks = blocks
        self._last_only = not config.top_layers  # no layer above reads the other tokens
        self._embedding = embedding
        self._device = embedding.device
        files = _files(weights, config, len(blocks), self._device)
        self.cache = TrunkCache(config.trunk_cache_mb * 2**20, files)
        self._resident: ExitStack | None = None
        self._on_gpu = self._device.type == "cuda"
        self._tokens = max(self._on_gpu * _GPU_BYTES // (2 * weights.config.mlp_width), _TOKENS)

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Inside, a layer once unpacked stays so, where all fit into the cache's budget: a pass
        over a few prompts takes less time than unpacking the matrices for it."""
        size = sum(matrix_numbers(block) * block.dtype.itemsize for block in self.blocks)
        if size > self.cache.budget_bytes:
            yield
            return
        try:
            with ExitStack() as self._resident:
                yield
        finally:
            self._resident = None

    @torch.no_grad()
    def prefix_states(self, tokens: dict[bytes, np.ndarray]) -> list[Tensor]:
        """What the layers make of each prefix, [P, C]. The keys are `digest_of` their tokens."""
        states = {digest: self.cache.get(b"hidden" + digest) for digest in tokens}
        missing = [digest for digest, kept in states.items() if kept is None]
        for some in _chunks(missing, _TOGETHER):
            prefixes = [_Prefix(tokens[digest], None) for digest in some]
            self._run(prefixes, [])
            for digest, prefix in zip(some, prefixes, strict=True):
                states[digest] = self._keep(prefix)
        return [state for (state,) in states.values()]

    @torch.no_grad()
    def suffix_states(self, prompts: PromptSet) -> list[Tensor]:
        """What the layers make of each prompt's suffix, [S, C]; with none above, of its last token.

        A piece's activations have the same bits whatever it is batched with, so a resumed run,
        whose cache is cold, repeats the uninterrupted one exactly.
        """
        keys = _keys(prompts)
        states = [self.cache.get(key) for key in keys]
        missing: dict[int, list[int]] = {}
        for row, prefix in enumerate(prompts.pairs[:, 0].tolist()):
            if states[row] is None:
                missing.setdefault(prefix, []).append(row)
        for some in _chunks(list(missing), _TOGETHER):
            prefixes = {prefix: self._prefix(prompts.prefixes[prefix]) for prefix in some}
            rows = [row for prefix in some for row in missing[prefix]]
            texts = [self._texts(prompts, *part, prefixes) for part in self._parts(prompts, rows)]
            self._run(list(prefixes.values()), texts)
            for prefix in prefixes.values():
                if prefix.hidden is not None:
                    self._keep(prefix)
            for done in texts:
                for row, whole in zip(done.rows, done.whole(), strict=True):
                    end = len(prompts.suffixes[prompts.pairs[row, 1]])
                    states[row] = (whole[end - 1 if self._last_only else 0 : end].clone(),)
                    self.cache.put(keys[row], *states[row])
        return [state for (state,) in states]

    def _prefix(self, tokens: np.ndarray) -> _Prefix:
        """A prefix with its keys and values, where they are kept."""
        kept = self.cache.get(b"keys_values" + digest_of(tokens))
        return _Prefix(tokens, kept and [*zip(kept[0::2], kept[1::2], strict=True)])

    def _keep(self, prefix: _Prefix) -> tuple[Tensor]:
        """Puts what became of a prefix into the cache; returns its states, ([P, C],)."""
        digest, states = digest_of(prefix.tokens), (prefix.hidden,)
        self.cache.put(b"hidden" + digest, *states)
        self.cache.put(b"keys_values" + digest, *itertools.chain(*prefix.layers))
        return states

    def _unread(self, prefixes: list[_Prefix]) -> list[_PrefixWork]:
        """Those of `prefixes` that are yet to go through, in parts of one padded length: each by
        itself, products of 110 tokens took half as long again (2 cores, AVX2). On a GPU, where
        launches cost more than padding, of about one length."""
        by_size: dict[int, list[_Prefix]] = {}
        for prefix in prefixes:
            if prefix.layers is None:
                prefix.layers = []
                size = round_up(len(prefix.tokens), _GPU_TOKENS if self._on_gpu else _PIECE)
                by_size.setdefault(size, []).append(prefix)
        return [
            _PrefixWork(some, self._embed([prefix.tokens for prefix in some]))
            for size, alike in by_size.items()
            for some in _chunks(alike, max(self._tokens // size, 1))
        ]

    def _parts(self, prompts: PromptSet, rows: list[int]) -> Iterator[tuple[list[int], int]]:
        """Rows that go through together, and the tokens of their pieces: a long text is one."""
        by_size: dict[int, list[int]] = {}
        for row in rows:
            length = padded_length(len(prompts.suffixes[prompts.pairs[row, 1]]))
            size = length if length > _PIECES * _PIECE else _PIECE
            by_size.setdefault(size, []).append(row)
        for size, alike in by_size.items():
            tokens = _PIECES * _PIECE if size == _PIECE else size
            yield from ((some, size) for some in _chunks(alike, max(self._tokens // tokens, 1)))

    def _texts(
        self, prompts: PromptSet, rows: list[int], size: int, prefixes: dict[int, _Prefix]
    ) -> _TextWork:
        """The suffixes of `rows`, by prefix, ready to go through in pieces of `size` tokens."""
        pieces, walks = _tree(prompts, rows, size)
        mine = [*dict.fromkeys(prompts.pairs[rows, 0].tolist())]
        counts = Counter(prefix for prefix, _ in pieces)
        layout = SuffixLayout.build(
            [counts[prefix] for prefix in mine],
            [len(prefixes[prefix].tokens) for prefix in mine],
            torch.full((len(pieces),), size, device=self._device),
            size,
        )
        walked = [piece.walk for piece in pieces.values()]
        above = torch.tensor([size * (len(walk) - 1) for walk in walked], device=self._device)
        slots = _PIECES if size == _PIECE else 1
        path = torch.tensor([walk + walk[-1:] * (slots - len(walk)) for walk in walked])
        laid = Pieces(path.T.to(self._device), above, layout)
        hidden = self._embed([piece.tokens for piece in pieces.values()])
        return _TextWork(rows, walks, [prefixes[prefix] for prefix in mine], laid, hidden)

    def _run(self, prefixes: list[_Prefix], texts: list[_TextWork]) -> None:
        """Layer by layer over all prefixes, so that each matrix is unpacked from NF4 once: for one
        prefix, unpacking takes as long as the arithmetic."""
        unread = self._unread(prefixes)
        for number, block in enumerate(self.blocks):
            with self._ready(block):
                for some in unread:
                    lengths = [len(prefix.tokens) for prefix in some.prefixes]
                    some.hidden, [layer] = prefix_pass([block], some.hidden, lengths)
                    both = map(alone, layer.blocks[0]) if self._on_gpu else layer.blocks[0]
                    for prefix, *sides in zip(some.prefixes, *both, strict=True):
                        prefix.layers.append(self._held(prefix, *sides))
                for some in texts:
                    attended = _read(some.prefixes, number)
                    some.hidden = piece_pass(block, some.hidden, attended, some.pieces)
        for some in unread:
            for prefix, hidden in zip(some.prefixes, some.hidden, strict=True):
                prefix.hidden = hidden[: len(prefix.tokens)].clone()

    def _held(self, prefix: _Prefix, keys: Tensor, values: Tensor) -> KeysValues:
        """A prefix's row of what a layer made of several. On a GPU views, whose memory goes with
        the last one's."""
        size = padded_length(len(prefix.tokens))
        keys, values = keys[:, :size], values[:, :size]
        return (keys, values) if self._on_gpu else (keys.clone(), values.clone())

    def _ready(self, block: Block) -> AbstractContextManager:
        """Inside, the layer's matrices lie unpacked; after it too, within `unpacked`."""
        if self._resident is None:
            return unpacked(block)
        self._resident.enter_context(unpacked(block))
        return nullcontext()

    def _embed(self, texts: list[np.ndarray]) -> Tensor:
        """Token ids, padded on the right to a multiple of 8, -> [N, T, C] fp32."""
        size = padded_length(max(map(len, texts)))
        ids = torch.zeros(len(texts), size, dtype=torch.int64)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = torch.from_numpy(tokens)
        return self._embedding[ids.to(self._device)].float()


def digest_of(tokens: np.ndarray) -> bytes:
    """A text by content."""
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def _read(prefixes: list[_Prefix], layer: int) -> Prefixes:
    """What texts attend to of `prefixes`."""
    blocks = [tuple(side[None] for side in prefix.layers[layer]) for prefix in prefixes]
    return Prefixes(blocks, [len(prefix.tokens) for prefix in prefixes])


def _tree(
    prompts: PromptSet, rows: list[int], size: int
) -> tuple[dict[tuple[int, bytes], _Piece], list[list[int]]]:
    """The distinct pieces, of `size` tokens, of the suffixes of `rows`, and each suffix's walk. The
    keys are the prefix and the tokens up to the piece's end."""
    pieces: dict[tuple[int, bytes], _Piece] = {}
    walks = []
    for row in rows:
        prefix, text = prompts.pairs[row].tolist()
        tokens, walk = prompts.suffixes[text], []
        for start in range(0, len(tokens), size):
            end = start + size
            piece = _Piece(tokens[start:end], [*walk, len(pieces)])
            walk = pieces.setdefault((prefix, tokens[:end].tobytes()), piece).walk
        walks.append(walk)
    return pieces, walks


def _keys(prompts: PromptSet) -> list[bytes]:
    """Each prompt by content: the digests of its prefix and of its suffix."""
    prefixes = [digest_of(tokens) for tokens in prompts.prefixes]
    suffixes = [digest_of(tokens) for tokens in prompts.suffixes]
    return [b"suffix" + prefixes[at] + suffixes[text] for at, text in prompts.pairs.tolist()]


def _files(
    weights: Weights, config: PolicyConfig, layers: int, device: torch.device
) -> TrunkFiles | None:
    """Where activations outlive the process, under a name that says what made them: to the bit, for
    a resumed run repeats the uninterrupted one."""
    if not config.trunk_disk_mb:
        return None
    made_by = (
        _ARITHMETIC,
        weights.fingerprint,
        layers,
        config.trunk_weights,
        config.dtype,
        torch.__version__,
        bits_of_a_gpu() if device.type == "cuda" else bits_of_a_cpu(config.dtype),
    )
    name = hashlib.blake2b(repr(made_by).encode(), digest_size=8).hexdigest()
    return TrunkFiles(caches.own("trunk").folder, name, config.trunk_disk_mb * 2**20, device)


def _chunks(rows: list[T], size: int) -> Iterator[list[T]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
