"""The set of distinct prompts that a policy evaluates."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PromptSet:
    """Distinct prompts: a prompt is a prefix (one a day) and a suffix, tokenised apart and joined.

    Raises ValueError where the parts do not fit together.
    """

    prefixes: tuple[np.ndarray, ...]
    """D arrays of token ids [n] int32, one a day."""
    suffixes: tuple[np.ndarray, ...]
    """S arrays of token ids [n] int32, one for each distinct account text."""
    pairs: np.ndarray
    """[U, 2] int32: (prefix, suffix) of each prompt."""
    side: np.ndarray
    """[U] int8: the account's position, -1 short, 0 flat, 1 long."""
    allowed: np.ndarray
    """[U, A] bool: actions with a probability above 0."""
    centring: np.ndarray
    """[R] int32: rows whose prompts centre the features; none where statistics are at hand."""

    def __post_init__(self) -> None:
        days, rows = len(self.prefixes), len(self.pairs)
        _check(days > 0 and rows > 0, "no prompts")
        for part in (*self.prefixes, *self.suffixes):
            _check(
                part.dtype == np.int32 and part.ndim == 1 and part.size > 0,
                "empty or malformed text",
            )
        _check(
            self.pairs.dtype == np.int32 and self.pairs.shape == (rows, 2),
            "pairs are not [U, 2] int32",
        )
        limits = (days, len(self.suffixes))
        _check(bool(((self.pairs >= 0) & (self.pairs < limits)).all()), "a pair names no text")
        _check(
            self.side.dtype == np.int8
            and self.side.shape == (rows,)
            and bool((abs(self.side) <= 1).all()),
            "side is not [U] int8 of -1, 0 and 1",
        )
        _check(self.allowed.dtype == bool and self.allowed.ndim == 2, "allowed is not [U, A] bool")
        _check(
            len(self.allowed) == rows and bool(self.allowed.any(1).all()),
            "a prompt without actions",
        )
        _check(
            self.centring.dtype == np.int32 and self.centring.ndim == 1,
            "centring is not [R] int32",
        )
        _check(bool(((self.centring >= 0) & (self.centring < rows)).all()), "centring names no row")

    def __repr__(self) -> str:
        parts = f"{len(self.prefixes)} prefixes, {len(self.suffixes)} suffixes"
        return f"PromptSet({len(self.pairs)} prompts of {parts})"

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        prefix, suffix = (np.array([*map(len, texts)]) for texts in (self.prefixes, self.suffixes))
        return int((prefix[self.pairs[:, 0]] + suffix[self.pairs[:, 1]]).max())

    def subset(self, rows: np.ndarray) -> tuple["PromptSet", np.ndarray]:
        """The prompts in `rows` [n] and those that centre; where each of `rows` went, [n] int64."""
        kept = np.union1d(rows, self.centring)
        read, prefix = np.unique(self.pairs[kept, 0], return_inverse=True)
        texts, suffix = np.unique(self.pairs[kept, 1], return_inverse=True)
        prompts = PromptSet(
            prefixes=tuple(self.prefixes[at] for at in read),
            suffixes=tuple(self.suffixes[text] for text in texts),
            pairs=np.stack([prefix, suffix], axis=1).astype(np.int32),
            side=self.side[kept],
            allowed=self.allowed[kept],
            centring=np.searchsorted(kept, self.centring).astype(np.int32),
        )
        return prompts, np.searchsorted(kept, rows)

    def keys(self) -> list[Hashable]:
        """What each prompt [U] is, whatever set it is in."""
        prefixes, suffixes = (
            [ids.tobytes() for ids in texts] for texts in (self.prefixes, self.suffixes)
        )
        each = zip(self.pairs.tolist(), self.side.tolist(), self.allowed, strict=True)
        return [
            (prefixes[day], suffixes[text], side, mask.tobytes())
            for (day, text), side, mask in each
        ]

    def tokens(self, row: int) -> np.ndarray:
        """Token ids [n] int32 of the whole prompt in `row`."""
        prefix, suffix = self.pairs[row]
        return np.concatenate([self.prefixes[prefix], self.suffixes[suffix]])


def _check(fits: bool, problem: str) -> None:
    if not fits:
        raise ValueError(f"{problem}, prompt set")


def merge(sets: Sequence[PromptSet]) -> tuple[PromptSet, list[np.ndarray]]:
    """One set with the distinct prompts of all, and for each set the new rows [U] of its prompts.

    Prefixes with the same tokens are one. Those of each set centre.
    """
    prefixes, suffixes = _Distinct(), _Distinct()
    place: dict[tuple[int, int, int, bytes], int] = {}
    allowed: list[np.ndarray] = []
    rows = []
    for prompts in sets:
        heads = [prefixes.place(ids) for ids in prompts.prefixes]
        texts = [suffixes.place(ids) for ids in prompts.suffixes]
        new_rows = np.empty(len(prompts.pairs), dtype=np.int32)
        each = zip(prompts.pairs.tolist(), prompts.side.tolist(), prompts.allowed, strict=True)
        for row, ((prefix, text), side, mask) in enumerate(each):
            key = (heads[prefix], texts[text], side, mask.tobytes())
            if key not in place:
                place[key] = len(place)
                allowed.append(mask)
            new_rows[row] = place[key]
        rows.append(new_rows)
    centring = [new[prompts.centring] for new, prompts in zip(rows, sets, strict=True)]
    merged = PromptSet(
        prefixes=tuple(prefixes.texts),
        suffixes=tuple(suffixes.texts),
        pairs=np.array([key[:2] for key in place], dtype=np.int32),
        side=np.array([key[2] for key in place], dtype=np.int8),
        allowed=np.stack(allowed),
        centring=np.unique(np.concatenate(centring)),
    )
    return merged, rows


class _Distinct:
    """Texts in order of first appearance, each once."""

    def __init__(self) -> None:
        self.texts: list[np.ndarray] = []
        self._place: dict[bytes, int] = {}

    def place(self, ids: np.ndarray) -> int:
        place = self._place.setdefault(ids.tobytes(), len(self.texts))
        if place == len(self.texts):
            self.texts.append(ids)
        return place
