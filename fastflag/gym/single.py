"""The task `single` in numbers. B accounts, M moments, F columns."""

from dataclasses import dataclass

import numpy as np
from gymnasium.spaces import Discrete

from fastflag.config import DataConfig, PromptConfig, SimulatorConfig
from fastflag.gym.observe import observe_single_nb
from fastflag.gym.spaces import (
    NEWS_BUCKETS,
    Column,
    bounds,
    days_in,
    market_columns,
    market_numbers,
    market_of,
)
from fastflag.market.accounts import Accounts
from fastflag.market.bars import Bars, Market
from fastflag.market.tasks.single import Single
from fastflag.prompt.prompter import Prompter
from fastflag.prompt.tokens import Tokenizer

_ACCOUNT = (
    Column("side", -1.0, 1.0),
    Column("profit", -1.0, 1.0),
    Column("held", 0.0, 1.0),
    Column("waiting", 0.0, 1.0),
    Column("order", -1.0, 1.0),
    Column("growth", -2.0, 2.0),
    Column("sharpe", -1.0, 1.0),
    Column("left", 0.0, 1.0),
)
_RULES, _PROMPT = SimulatorConfig(), PromptConfig()


@dataclass(frozen=True, eq=False)
class SingleView:
    """What an account of `Single` is shown, may do and is told, and where its episodes lie.

    After the columns of `market_numbers` come those of the account:

    side
        -1, 0, 1.
    profit
        Of the open position, as a part of its entry price.
    held
        Bars since the fill, in forties.
    waiting, order
        1 where an order waits for a bar; -1, 0, 1: Sell, Hold, Buy.
    growth
        log(equity / starting cash).
    sharpe
        Of the profits so far, from which the reward `sharpe` goes on.
    left
        Part of the episode that is left.
    """

    task: Single
    markets: tuple[Market, ...]
    """Each symbol's."""
    spans: tuple[range, ...]
    horizon: int
    columns: tuple[Column, ...]
    market: np.ndarray
    """[M, columns of the market] float32"""
    prompter: Prompter | None

    @staticmethod
    def of(
        market: Market | str = DataConfig.data,
        *,
        rules: SimulatorConfig = _RULES,
        symbol: str = "",
        period: str = "",
        news_buckets: int = NEWS_BUCKETS,
        tokenizer: Tokenizer | str | None = None,
        prompt: PromptConfig = _PROMPT,
    ) -> "SingleView":
        """Of a market, or of a data source as `--data` names it.

        symbol: the one that is traded; empty: each episode one of all.
        period: where the episodes lie, START..END; empty: everywhere.
        tokenizer: or the file of one, by which news in prompts is measured: where it is given,
            info["prompt"] is the text that a language model would read, laid out by `prompt`.

        Raises InputError for what a file, a period or a symbol has wrong.
        """
        found = market_of(market)
        markets = (found.of(symbol),) if symbol else found.each
        task = Single.of(rules, *(Bars.from_market(each, each.symbols[0]) for each in markets))
        spans = zip(task.timeline.spans, (days_in(each, period) for each in markets), strict=True)
        prompter = None
        if tokenizer is not None:
            if isinstance(tokenizer, str):
                tokenizer = Tokenizer.load(tokenizer)
            prompter = Prompter(prompt, task, markets, tokenizer)
        return SingleView(
            task,
            markets,
            tuple(span[days.start : days.stop] for span, days in spans),
            rules.horizon,
            (*market_columns(news_buckets), *_ACCOUNT),
            np.concatenate([market_numbers(each, news_buckets) for each in markets]),
            prompter,
        )

    @property
    def actions(self) -> Discrete:
        return Discrete(len(self.task.actions))

    def observe(self, accounts: Accounts, moment: np.ndarray, left: np.ndarray) -> np.ndarray:
        """[B, F] float32, of accounts at `moment` [B] with `left` [B] of their episode."""
        numbers = np.empty((len(accounts), len(self.columns)), np.float32)
        mark, views = self.task.bars.mark, accounts.views()
        observe_single_nb(self.market, mark, views, moment, left, *bounds(_ACCOUNT), numbers)
        return numbers

    def masks(self, accounts: Accounts, moment: np.ndarray) -> np.ndarray:
        """Actions that would be executed, [B, A] bool."""
        return self.task.allowed(moment, np.sign(accounts.shares).astype(np.int64))

    def texts(self, accounts: Accounts, moment: np.ndarray) -> list[str]:
        """B prompts; none without a prompter."""
        if self.prompter is None:
            return []
        if self.prompter.config.account == "exact":
            own = [self.prompter.exact_text(accounts, b, int(t)) for b, t in enumerate(moment)]
        else:
            own = map(self.prompter.stepped_text, self.task.code(accounts, moment).tolist())
        before = map(self.prompter.prefix_text, moment.tolist())
        return [prefix + suffix for prefix, suffix in zip(before, own, strict=True)]

    def label(self, moment: int) -> str:
        """Date, symbol and price."""
        timeline = self.task.timeline
        market = self.markets[timeline.symbol[moment]]
        date = market.dates[moment - timeline.first[moment]]
        return f"{date} {market.symbols[0]} {self.task.bars.mark[moment]:.2f}"

    def prices(self, moments: range) -> np.ndarray:
        """[len(moments), 1], in shares of the first moment."""
        at = slice(moments.start, moments.stop)
        shares = np.cumprod(self.task.bars.split[at])
        return (self.task.bars.mark[at] * shares / shares[0])[:, None]
