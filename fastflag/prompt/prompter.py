"""How the world is told: a moment as a prefix, an account as the suffix that ends at the action.

A prompt is a prefix and a suffix, tokenised apart and joined. The text of a moment is made of its
symbol's bars up to it and of news available by its close; a portfolio's moment has one for each
slot.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastflag.config import PromptConfig
from fastflag.market.accounts import Accounts
from fastflag.market.bars import Market
from fastflag.market.compiled.constants import HISTORY, PROFIT_STEP
from fastflag.market.compiled.portfolio_constants import PROFIT_STEPS, WEIGHT_STEPS
from fastflag.market.task import Task
from fastflag.market.tasks import account_codes, slot_codes
from fastflag.market.tasks.portfolio import Portfolio
from fastflag.market.tasks.single import Single
from fastflag.prompt.day_texts import SHORTEST_CUT, DayTexts
from fastflag.prompt.layouts import LAYOUTS, NO_MORE_DIGITS, AccountFacts
from fastflag.prompt.tokens import Tokenizer


class Prompter:
    """Texts and tokens of a task's moments and accounts; tokens are made once and kept."""

    def __init__(
        self, config: PromptConfig, task: Task[Any], markets: Sequence[Market], tokenizer: Tokenizer
    ):
        """`markets` are the task's symbols', in the order of its spans or of its slots."""
        self.config = config
        self.tokenizer = tokenizer
        self.layout = LAYOUTS[config.layout]
        self._of_slots = isinstance(task, Portfolio)
        rules = f"portfolio {task.rules.positions}" if self._of_slots else task.rules.positions
        self.days = [DayTexts(config, each, rules, tokenizer) for each in markets]
        self._task, self._news = task, markets[0].news
        self._prefixes: dict[tuple[int, int], np.ndarray] = {}
        self._suffixes: dict[int, np.ndarray] = {}

    @property
    def action_words(self) -> tuple[str, ...]:
        """The task's actions, in its order, as they continue a prompt of this layout."""
        return tuple(self.layout.action_words[action] for action in self._task.actions)

    def headlines(self, moment: int, slot: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Headlines in a moment's prompt, as `DayTexts.headlines` has them."""
        days, day = self._day(moment, slot)
        return days.headlines(day)

    def training_news(self, spans: Sequence[range]) -> str:
        """How much news the prompts of the training days read, as a line's text."""
        if not self.layout.has_news:
            return f"not read by --layout {self.config.layout}"
        if self.config.news_tokens <= SHORTEST_CUT:
            return f"not read with --news-tokens {self.config.news_tokens}"
        slots = range(self._task.slots)
        counts = [self._news_counts(span, slot) for span in spans for slot in slots]
        came, days_with, told = (sum(column) for column in zip(*counts, strict=True))
        days = sum(map(len, spans)) * len(slots)
        symbols = [each.symbol for each in self.days]
        line = (
            f"{came:,} headlines on {days_with:,} of {days:,} training days, "
            f"{told:,} in their day's prompt"
        )
        if not came:
            line = f"none on {days:,} training days"
        others = sum(item.symbol not in ("", *symbols) for item in self._news)
        return line + (f"; {others:,} of other symbols than {', '.join(symbols)}" if others else "")

    def prefix_text(self, moment: int, slot: int = 0) -> str:
        days, day = self._day(moment, slot)
        return days.prefix(day)

    def prefix(self, moment: int, slot: int = 0) -> np.ndarray:
        """Token ids [n] int32 of a moment's prefix."""
        if (moment, slot) not in self._prefixes:
            text = self.prefix_text(moment, slot)
            self._prefixes[moment, slot] = self.tokenizer.encode(text)
        return self._prefixes[moment, slot]

    def prefixes(self, moments: Sequence[int]) -> list[np.ndarray]:
        """Those of all slots at `moments`, slot by slot at each."""
        slots = range(self._task.slots)
        return [self.prefix(moment, slot) for moment in moments for slot in slots]

    def longest(self, moments: Sequence[int]) -> int:
        """Tokens of the longest prompt of `moments`. Exact accounts can't be listed: for them it is
        an upper bound, a token for each byte of the longest text."""
        if self.config.account == "exact":
            suffix = len(self._longest_exact_text().encode())
        else:
            suffix = max(len(self.suffix(code)) for code in range(self._task.codes))
        return max(map(len, self.prefixes(moments))) + suffix

    def stepped_text(self, code: int) -> str:
        """The suffix of an account code of the simulator."""
        if self._of_slots:
            side, weight, profit = slot_codes.decode(code)
            return self.layout.slot(side, weight / WEIGHT_STEPS, profit / PROFIT_STEPS)
        side, step, held = account_codes.decode(code)
        return self.layout.stepped(side, step * PROFIT_STEP, held)

    def suffix(self, code: int) -> np.ndarray:
        """Token ids [n] int32 of an account code's suffix."""
        if code not in self._suffixes:
            self._suffixes[code] = self.tokenizer.encode(self.stepped_text(code))
        return self._suffixes[code]

    def exact_text(self, accounts: Accounts, b: int, moment: int) -> str:
        """The suffix of account b at a moment, in raw numbers."""
        assert isinstance(self._task, Single)  # which alone has exact accounts
        shares, mark = float(accounts.shares[b]), float(self._task.bars.mark[moment])
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
            held=moment - int(accounts.opened[b]) if side else 0,
            rewards=tuple(rewards[np.isfinite(rewards)].tolist()),
            net_values=tuple(net_values[np.isfinite(net_values)].tolist()),
            actions=tuple(self._task.actions[action] for action in actions if action >= 0),
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
            held=len(self._task.timeline),
            rewards=(longest,) * HISTORY,
            net_values=(longest,) * HISTORY,
            actions=(max(self._task.actions, key=len),) * HISTORY,
        )
        return self.layout.exact(facts)

    def _day(self, moment: int, slot: int) -> tuple[DayTexts, int]:
        """The symbol's texts, and which of its days it is."""
        timeline = self._task.timeline
        return self.days[timeline.symbol[moment] + slot], moment - int(timeline.first[moment])

    def _news_counts(self, span: range, slot: int) -> tuple[int, int, int]:
        days, first = self._day(span.start, slot)
        return days.news_counts(range(first, first + len(span)))
