"""One symbol's days as text: prices and figures up to a day's close, and the news known by then."""

from collections.abc import Callable

import numpy as np

from fastflag.config import PromptConfig
from fastflag.market.bars import Bars, Market
from fastflag.market.features import forward_adjusted, indicators
from fastflag.prompt.headlines import anonymiser, headline
from fastflag.prompt.layouts import LAYOUTS, DayFacts
from fastflag.prompt.tokens import Tokenizer

HEADLINE_TOKENS = 24
"""A headline is cut to this many tokens, so that several fit into the budget of news."""
SHORTEST_CUT = 8
"""A headline is left out rather than cut to fewer tokens than this."""


class DayTexts:
    """Texts of the days of a market of one symbol; headlines are made once and kept."""

    def __init__(self, config: PromptConfig, market: Market, rules: str, tokenizer: Tokenizer):
        """`rules` are the task's, by their name in a layout."""
        (self.symbol,) = market.symbols
        self.config, self.layout = config, LAYOUTS[config.layout]
        self._market, self._rules, self._tokenizer = market, rules, tokenizer
        self._bars = Bars.from_market(market, self.symbol)
        self._bar_days = np.flatnonzero(self._bars.tradable)
        self._shares = np.cumprod(self._bars.split)  # of day t for each share of the first day
        closes = np.where(self._bars.tradable, self._bars.close, np.nan)
        adjusted = forward_adjusted(closes, self._bars.split)
        highs = forward_adjusted(market.high[:, 0], self._bars.split)
        self._indicators = indicators(adjusted, highs)
        self._news = [item for item in market.news if item.symbol in ("", self.symbol)]
        self._available = np.array([item.available for item in self._news], dtype="datetime64[s]")
        self._anonymisers: dict[tuple[str, ...], Callable[[str], str]] = {}
        self._headlines: dict[tuple[int, tuple[str, ...]], str] = {}

    def prefix(self, day: int) -> str:
        """The text of a day, which every account of it reads."""
        return self.layout.prefix(self._facts(day), self._rules)

    def headlines(self, day: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Headlines in day's prompt, newest first: (of today, of the window's earlier days).

        At most `news_tokens` tokens with their separators; each a first sentence, cut to
        HEADLINE_TOKENS; none twice.
        """
        if not self.layout.has_news:
            return (), ()
        closes, window = self._market.closes, self.config.window
        begin = self._news_until(closes[day - window]) if day >= window else 0
        today = self._news_until(closes[day - 1]) if day >= 1 else 0
        end = self._news_until(closes[day])
        # A stable sort: of equally new items the first of the file comes first.
        newest_first = begin + np.argsort(-self._available[begin:end].astype(int), kind="stable")
        # A symbol that comes to the market later is not yet a name to hide.
        date = self._market.dates[day]
        listed = tuple(name for name, first in self._market.first_bars.items() if first <= date)
        told: dict[str, bool] = {}
        budget = self.config.news_tokens
        for index in newest_first.tolist():
            limit = min(HEADLINE_TOKENS, budget - 1)
            if limit < SHORTEST_CUT:
                break
            whole = " " + self._headline(index, listed)
            text = self._tokenizer.truncate(whole, limit).strip(" ,;:|")
            if text and text not in told:
                told[text] = index >= today
                budget -= len(self._tokenizer.encode(f" {text} |"))
        return (
            tuple(text for text, is_today in told.items() if is_today),
            tuple(text for text, is_today in told.items() if not is_today),
        )

    def news_counts(self, days: range) -> tuple[int, int, int]:
        """Headlines of `days`, on how many of them there is one, and how many stand in their own
        day's prompt. A headline is of the day at whose close it is first available."""
        day_of = np.searchsorted(self._market.closes, self._available)
        came = day_of[(day_of >= days.start) & (day_of < days.stop)]
        return len(came), len(np.unique(came)), sum(len(self.headlines(day)[0]) for day in days)

    def _news_until(self, moment: np.datetime64) -> int:
        return int(np.searchsorted(self._available, moment, side="right"))

    def _headline(self, index: int, listed: tuple[str, ...]) -> str:
        key = index, listed
        if key not in self._headlines:
            self._headlines[key] = headline(self._news[index].text, self._anonymiser(listed))
        return self._headlines[key]

    def _anonymiser(self, listed: tuple[str, ...]) -> Callable[[str], str] | None:
        if not self.config.anonymise:
            return None
        if listed not in self._anonymisers:
            others = [symbol for symbol in listed if symbol != self.symbol]
            self._anonymisers[listed] = anonymiser(self.symbol, others)
        return self._anonymisers[listed]

    def _facts(self, day: int) -> DayFacts:
        end = int(np.searchsorted(self._bar_days, day, side="right"))
        shown = self._bar_days[max(0, end - self.config.window) : end]
        prices = self._bars.close[shown] * (self._shares[shown] / self._shares[day])
        if self.config.anonymise and len(prices):
            prices = prices * (100 / prices[-1])
        today, earlier = self.headlines(day)
        return DayFacts(
            symbol="" if self.config.anonymise else self.symbol,
            date="" if self.config.anonymise else str(self._market.dates[day]),
            tradable=bool(self._bars.tradable[day]),
            prices=tuple(prices.tolist()),
            indicators={name: float(values[day]) for name, values in self._indicators.items()},
            news_today=today,
            news_earlier=earlier,
        )
