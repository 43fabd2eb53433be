"""What accounts are shown: a task, and how it is told.

Shapes: B accounts, M moments, K slots, U prompts, A actions. A task of one symbol at a time leaves
the axis K out: rows and codes are [B], the row of each moment and code [M, CODES].
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastflag.config import PortfolioConfig, PromptConfig, SimulatorConfig
from fastflag.files import InputError
from fastflag.market.accounts import Accounts, Columns
from fastflag.market.bars import Bars, Market
from fastflag.market.periods import days_within
from fastflag.market.task import Task
from fastflag.market.tasks.centring import accounts_that_centre
from fastflag.market.tasks.portfolio import Portfolio
from fastflag.market.tasks.single import Single
from fastflag.prompt.prompter import Prompter
from fastflag.prompt.prompts import PromptSet, merge
from fastflag.prompt.tokens import Tokenizer


@dataclass(frozen=True)
class World:
    task: Task[Any]
    prompter: Prompter
    market: Market
    """Of all its symbols; those of the timeline's spans are `markets`."""
    seed: int

    @staticmethod
    def of(
        config: PromptConfig,
        market: Market,
        symbol: str,
        rules: SimulatorConfig,
        tokenizer: Tokenizer,
        seed: int,
    ) -> "World":
        """One symbol of a market; with none named, all it has. Raises InputError where the market
        has no such symbol."""
        if symbol and len(market.symbols) > 1:
            market = market.of(symbol)
        market.column(symbol or market.symbols[0])
        markets = market.each
        task = Single.of(rules, *(Bars.from_market(each, each.symbols[0]) for each in markets))
        return World(task, Prompter(config, task, markets, tokenizer), market, seed)

    @staticmethod
    def of_portfolio(
        config: PromptConfig,
        market: Market,
        rules: PortfolioConfig,
        tokenizer: Tokenizer,
        seed: int,
    ) -> "World":
        """All symbols of a market as the slots of each account. Raises InputError for exact
        accounts."""
        if config.account == "exact":
            raise InputError("portfolios are told in steps, --account exact")
        task, symbols = Portfolio.of(rules, market), market.symbols
        prompter = Prompter(config, task, [*map(market.on_all_days, symbols)], tokenizer)
        return World(task, prompter, market, seed)

    @property
    def markets(self) -> tuple[Market, ...]:
        """Those of the timeline's spans: each symbol's, or the one of all of them together."""
        return (self.market,) if len(self.task.timeline.spans) == 1 else self.market.each

    @property
    def single(self) -> Single:
        """The task where it is that. Raises InputError where it is another."""
        if not isinstance(self.task, Single):
            raise InputError("not yet there for portfolios, --task portfolio")
        return self.task

    def within(self, period: str) -> list[range]:
        """Each span's moments in a period "A..B"; none where it has no day there."""
        spans = self.task.timeline.spans
        days = [days_within(each, period) for each in self.markets]
        return [span[day.start : day.stop] for span, day in zip(spans, days, strict=True)]

    def dates(self, span: range) -> np.ndarray:
        """[len(span)] datetime64[D], of moments of one span."""
        timeline = self.task.timeline
        dates = self.markets[timeline.symbol[span.start]].dates
        return dates[np.array(span) - timeline.first[span.start]]

    def shown(self, accounts: Columns, moment: int) -> tuple[PromptSet, np.ndarray]:
        """The distinct prompts of these accounts at `moment`, and each account's rows [B, K] int32.
        None of them centres."""
        if self.prompter.config.account == "exact":
            assert isinstance(accounts, Accounts)
            return self._exact(accounts, moment)
        codes = self.task.code(accounts, moment)
        present = self.nowhere([moment])
        present[0][of_codes(codes)] = True
        prompts, row_of = self.stepped([moment], present)
        return prompts, row_of[0][of_codes(codes)]

    def nowhere(self, moments: Sequence[int] | np.ndarray) -> np.ndarray:
        """No code at any of `moments` [n]: [n, K, CODES] bool, all False."""
        return np.zeros((len(moments), *self._slots, self.task.codes), bool)

    @property
    def _slots(self) -> tuple[int, ...]:
        return () if isinstance(self.task, Single) else (self.task.slots,)

    def possible(self, episodes: Iterable[tuple[range, Columns]]) -> tuple[PromptSet, np.ndarray]:
        """Every prompt that accounts could be shown in `episodes`, whatever they do: moments and
        who is there at the first of them. -> (prompts, the row of each moment and code, [M, K,
        CODES] int32, -1 where there is none)"""
        reached: dict[int, np.ndarray] = {}
        for lived, accounts in episodes:
            for moment, codes in zip(lived, self.task.reachable(lived, accounts), strict=True):
                reached[moment] = reached.get(moment, False) | codes
        moments = sorted(reached)
        present = np.stack([reached[moment] for moment in moments])
        prompts, row_of = self.stepped(moments, present, self.centring_codes(moments))
        return prompts, self.over_timeline(moments, row_of)

    def over_timeline(self, moments: Sequence[int], row_of: np.ndarray) -> np.ndarray:
        """Rows of `moments` [n] and codes, [n, K, CODES], in a table of all moments: [M, K, CODES]
        int32, -1 elsewhere."""
        whole = np.full((len(self.task.timeline), *row_of.shape[1:]), -1, np.int32)
        whole[moments] = row_of
        return whole

    def stepped(
        self,
        moments: Sequence[int] | np.ndarray,
        present: np.ndarray,
        centring: np.ndarray | None = None,
    ) -> tuple[PromptSet, np.ndarray]:
        """The distinct prompts of account codes at `moments` [n], which are distinct.

        `present` is [n, K, CODES] bool, and so is `centring`: the codes whose prompts centre the
        features; they are added. -> (prompts, the row of each moment and code, [n, K, CODES] int32,
        -1 where absent). Moments that read alike, as two without a bar may, share their prompts.
        Raises ValueError for a moment that is named twice.
        """
        moments = np.asarray(moments, dtype=np.int64)
        if len(np.unique(moments)) < len(moments):
            raise ValueError("a moment is named twice")
        if centring is None:
            centring = np.zeros_like(present)
        # A place is a slot at a moment, and has a prefix of its own.
        where, codes = np.nonzero((present | centring).reshape(-1, self.task.codes))
        text_of_code, suffixes = self._suffixes(np.unique(codes))
        pairs = np.stack([where, text_of_code[codes]], axis=1).astype(np.int32)
        pairs, first, rows = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        row_of = np.full(present.shape, -1, dtype=np.int32)
        row_of.reshape(-1, self.task.codes)[where, codes] = rows.reshape(-1)
        side, (at, slot) = self.task.side_of(codes), np.divmod(where, self.task.slots)
        prompts = PromptSet(
            prefixes=tuple(self.prompter.prefixes(moments.tolist())),
            suffixes=suffixes,
            pairs=pairs,
            side=side[first],
            allowed=self.task.allowed(moments[at], side, slot)[first],
            centring=np.unique(row_of[centring]),
        )
        prompts, (place,) = merge([prompts])
        return prompts, np.where(row_of >= 0, place[row_of], -1)

    def centring_codes(self, moments: Sequence[int]) -> np.ndarray:
        """The account codes whose prompts centre the features at `moments` [n], which are sorted:
        [n, K, CODES] bool."""
        accounts, moment_of = accounts_that_centre(self.task, moments)
        places, codes = np.searchsorted(moments, moment_of), self.task.code(accounts, moment_of)
        present = self.nowhere(moments)
        places = places.reshape(-1, *(1,) * len(self._slots))
        present[(places, *of_codes(codes))] = True
        return present

    def centring_prompts(self, moments: Sequence[int]) -> PromptSet:
        """The prompts of the accounts that centre the features at `moments`, all of them centring;
        of each moment one at least."""
        accounts, moment_of = accounts_that_centre(self.task, moments)
        at_each = [accounts.take(np.flatnonzero(moment_of == moment)) for moment in moments]
        sets = [self.shown(some, moment)[0] for some, moment in zip(at_each, moments, strict=True)]
        prompts, _ = merge(sets)
        return replace(prompts, centring=np.arange(len(prompts.pairs), dtype=np.int32))

    def _suffixes(self, codes: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """(index of each code's text [CODES], the distinct texts' tokens) for sorted `codes`."""
        index_of_text: dict[str, int] = {}
        suffixes = []
        text_of_code = np.full(self.task.codes, -1)
        for code in codes.tolist():
            text = self.prompter.stepped_text(code)
            if text not in index_of_text:
                index_of_text[text] = len(suffixes)
                suffixes.append(self.prompter.suffix(code))
            text_of_code[code] = index_of_text[text]
        return text_of_code, tuple(suffixes)

    def _exact(self, accounts: Accounts, moment: int) -> tuple[PromptSet, np.ndarray]:
        # Positions too small for the text's digits look flat and are not: the side is in the key.
        sides = np.sign(accounts.shares).astype(int).tolist()
        texts = [self.prompter.exact_text(accounts, b, moment) for b in range(len(accounts))]
        keys = list(zip(texts, sides, strict=True))
        row_of_key = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        text_index = {
            text: i for i, text in enumerate(dict.fromkeys(text for text, _ in row_of_key))
        }
        side = np.array([side for _, side in row_of_key], dtype=np.int8)
        prompts = PromptSet(
            prefixes=(self.prompter.prefix(moment),),
            suffixes=tuple(self.prompter.tokenizer.encode(text) for text in text_index),
            pairs=np.array([(0, text_index[text]) for text, _ in row_of_key], dtype=np.int32),
            side=side,
            allowed=self.task.allowed(moment, side),
            centring=np.zeros(0, dtype=np.int32),
        )
        return prompts, np.array([row_of_key[key] for key in keys], dtype=np.int32)


def of_codes(codes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where accounts' codes [B] or [B, K] are among those of a moment, [CODES] or [K, CODES]."""
    return (codes,) if codes.ndim == 1 else (np.arange(codes.shape[1]), codes)
