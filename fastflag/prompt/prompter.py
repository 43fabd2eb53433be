"""How the world is told: a day as a prefix, an account as the suffix that ends at the action.

A prompt is a prefix and a suffix, tokenised apart and joined. The text of day t is made of bars up
to t and of news available by the close of t.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fastflag.config import PromptConfig
from fastflag.market.accounts import Accounts
from fastflag.market.bars import Bars, Market
from fastflag.market.compiled.constants import CODES, HISTORY, PROFIT_STEP
from fastflag.market.features import forward_adjusted, indicators
from fastflag.market.tasks.account_codes import decode
from fastflag.prompt.headlines import anonymiser, headline
from fastflag.prompt.layouts import LAYOUTS, NO_MORE_DIGITS, AccountFacts, DayFacts
from fastflag.prompt.tokens import Tokenizer

HEADLINE_TOKENS = 24
"""A headline is cut to this many tokens, so that several fit into the budget of news."""
SHORTEST_CUT = 8
"""A headline is left out rather than cut to fewer tokens than this."""


class Prompter:
    """Texts and tokens of one symbol's days and accounts; texts are made once and kept.

    Raises InputError where the market has no such symbol.
    """

    def __init__(
        self,
        config: PromptConfig,
        market: Market,
        symbol: str,
        positions: str,
        actions: Sequence[str],
        tokenizer: Tokenizer,
    ):
        """`positions` is the position mode; `actions` are the task's, in its order."""
        self.config = config
        self.tokenizer = tokenizer
        column = market.column(symbol)
        self.symbol = market.symbols[column]
        self.bars = Bars.from_market(market, self.symbol)
        self.layout = LAYOUTS[config.layout]
        self._positions, self._actions = positions, tuple(actions)
        self._market = market
        self._bar_days = np.flatnonzero(self.bars.tradable)
        self._shares = np.cumprod(self.bars.split)  # of day t for each share of the first day
        closes = np.where(self.bars.tradable, self.bars.close, np.nan)
        adjusted = forward_adjusted(closes, self.bars.split)
        highs = forward_adjusted(market.high[:, column], self.bars.split)
        self._indicators = indicators(adjusted, highs)
        self._news = [item for item in market.news if item.symbol in ("", self.symbol)]
        self._available = np.array([item.available for item in self._news], dtype="datetime64[s]")
        self._anonymisers: dict[tuple[str, ...], Callable[[str], str]] = {}
        self._headlines: dict[tuple[int, tuple[str, ...]], str] = {}
        self._prefixes: dict[int, np.ndarray] = {}
        self._suffixes: dict[int, np.ndarray] = {}

    @property
    def action_words(self) -> tuple[str, ...]:
        """The task's actions, in its order, as they continue a prompt of this layout."""
        return tuple(self.layout.action_words[action] for action in self._actions)

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
            text = self.tokenizer.truncate(whole, limit).strip(" ,;:|")
            if text and text not in told:
                told[text] = index >= today
                budget -= len(self.tokenizer.encode(f" {text} |"))
        return (
            tuple(text for text, is_today in told.items() if is_today),
            tuple(text for text, is_today in told.items() if not is_today),
        )

    def training_news(self, days: range) -> str:
        """How much news the prompts of the training days read, as a line's text. A headline is of
        the day at whose close it is first available."""
        if not self.layout.has_news:
            return f"not read by --layout {self.config.layout}"
        if self.config.news_tokens <= SHORTEST_CUT:
            return f"not read with --news-tokens {self.config.news_tokens}"
        day_of = np.searchsorted(self._market.closes, self._available)
        came = day_of[(day_of >= days.start) & (day_of < days.stop)]
        told = sum(len(self.headlines(day)[0]) for day in days)
        line = (
            f"{len(came):,} headlines on {len(np.unique(came)):,} of {len(days):,} training days, "
            f"{told:,} in their day's prompt"
        )
        if not len(came):
            line = f"none on {len(days):,} training days"
        others = len(self._market.news) - len(self._news)
        return line + (f"; {others:,} of other symbols than {self.symbol}" if others else "")

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

    def _day_facts(self, day: int) -> DayFacts:
        end = int(np.searchsorted(self._bar_days, day, side="right"))
        shown = self._bar_days[max(0, end - self.config.window) : end]
        prices = self.bars.close[shown] * (self._shares[shown] / self._shares[day])
        if self.config.anonymise and len(prices):
            prices = prices * (100 / prices[-1])
        today, earlier = self.headlines(day)
        return DayFacts(
            symbol="" if self.config.anonymise else self.symbol,
            date="" if self.config.anonymise else str(self._market.dates[day]),
            tradable=bool(self.bars.tradable[day]),
            prices=tuple(prices.tolist()),
            indicators={name: float(values[day]) for name, values in self._indicators.items()},
            news_today=today,
            news_earlier=earlier,
        )

    def prefix_text(self, day: int) -> str:
        return self.layout.prefix(self._day_facts(day), self._positions)

    def prefix(self, day: int) -> np.ndarray:
        """Token ids [n] int32 of day's prefix."""
        if day not in self._prefixes:
            self._prefixes[day] = self.tokenizer.encode(self.prefix_text(day))
        return self._prefixes[day]

    def longest(self, days: Sequence[int]) -> int:
        """Tokens of the longest prompt of `days`. Exact accounts can't be listed: for them it is an
        upper bound, a token for each byte of the longest text."""
        if self.config.account == "exact":
            suffix = len(self._longest_exact_text().encode())
        else:
            suffix = max(len(self.suffix(code)) for code in range(CODES))
        return max(len(self.prefix(day)) for day in days) + suffix

    def stepped_text(self, code: int) -> str:
        """The suffix of an account code of the simulator."""
        side, step, held = decode(code)
        return self.layout.stepped(side, step * PROFIT_STEP, held)

    def suffix(self, code: int) -> np.ndarray:
        """Token ids [n] int32 of an account code's suffix."""
        if code not in self._suffixes:
            self._suffixes[code] = self.tokenizer.encode(self.stepped_text(code))
        return self._suffixes[code]

    def exact_text(self, accounts: Accounts, b: int, day: int) -> str:
        """The suffix of account b at day's close, in raw numbers."""
        shares, mark = float(accounts.shares[b]), float(self.bars.mark[day])
        side = int(np.sign(shares))
        rewards, net_values, actions = (
            accounts.rewards[b],
            accounts.equities[b],
            accounts.actions[b],
        )
        facts = AccountFacts(
            side=side,
            cash=float(accounts.cash[b]),
            position=shares * mark / 100 if self.config.anonymise and side else shares,
            value=float(accounts.equity[b]),
            profit=side * (mark / float(accounts.entry[b]) - 1) if side else 0.0,
            held=day - int(accounts.opened[b]) if side else 0,
            rewards=tuple(rewards[np.isfinite(rewards)].tolist()),
            net_values=tuple(net_values[np.isfinite(net_values)].tolist()),
            actions=tuple(self._actions[action] for action in actions if action >= 0),
        )
        return self.layout.exact(facts)

    def _longest_exact_text(self) -> str:
        """A short account's with all numbers as long as `_fixed` makes them."""
        longest = -0.9 * NO_MORE_DIGITS
        facts = AccountFacts(
            side=-1,
            cash=longest,
            position=longest,
            value=longest,
            profit=longest / 100,
            held=len(self.bars),
            rewards=(longest,) * HISTORY,
            net_values=(longest,) * HISTORY,
            actions=(max(self._actions, key=len),) * HISTORY,
        )
        return self.layout.exact(facts)
