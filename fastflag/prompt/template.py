"""How the world is told: a day as a prefix, an account as the suffix that ends at the action.

A prompt is a prefix and a suffix, tokenised apart and joined. Both layouts cut after a line break
and before a letter or a quotation mark, where byte-level BPE splits anyway, so the joined text has
the same tokens. The text of day t is made of bars up to t and of news available by the close of t.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastflag.config import PromptConfig, SimulatorConfig
from fastflag.market.accounts import Accounts, Bars
from fastflag.market.bars import Market
from fastflag.market.features import forward_adjusted, indicators
from fastflag.market.simulator import (
    CODES,
    HISTORY,
    PROFIT_STEP,
    SELL,
    allowed,
    allowed_codes,
    decode,
    side_of,
)
from fastflag.prompt.markup import without_markup
from fastflag.prompt.tokens import PromptSet, Tokenizer

HEADLINE_TOKENS = 24
"""A headline is cut to this many tokens, so that several fit into the budget of news."""
SHORTEST_CUT = 8
"""A headline is left out rather than cut to fewer tokens than this."""

# All three are single tokens of SmolLM2, with and without the space; " Sell" would be two.
ACTION_WORDS = ("sell", "hold", "buy")
_SIDES = {-1: "short", 0: "flat", 1: "long"}


@dataclass(frozen=True)
class DayFacts:
    """What a prefix tells."""

    symbol: str
    date: str
    """Both empty: anonymous."""
    tradable: bool
    prices: tuple[float, ...]
    """Last closes, newest last, in shares of this day; anonymous: the newest is 100."""
    indicators: dict[str, float]
    news_today: tuple[str, ...]
    news_earlier: tuple[str, ...]


@dataclass(frozen=True)
class AccountFacts:
    """What a suffix of raw numbers tells."""

    side: int
    cash: float
    position: float
    """Shares; anonymous: in units that cost 100, so that position x price is still a value."""
    value: float
    profit: float
    """Of the open position, as a fraction of its entry price."""
    held: int
    """Bars since the fill."""
    rewards: tuple[float, ...]
    net_values: tuple[float, ...]
    actions: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    prefix: Callable[[DayFacts, str], str]
    """Of a day and the position mode."""
    stepped: Callable[[int, float, int], str]
    """Of side, profit and bars held."""
    exact: Callable[[AccountFacts], str]
    action_words: tuple[str, str, str]
    has_news: bool
    """The paper's template has none."""


_RULES = {
    "long_flat": "buy spends all cash, sell sells all, hold keeps",
    "long_short": "buy is long, sell is short, hold is flat",
}


_INDICATORS = (
    ("return_20", "20-day return {:+.1%}"),
    ("volatility_20", "volatility {:.1%}"),
    ("rsi_14", "RSI {:.0f}"),
    ("drawdown_60", "from high {:+.1%}"),
)


def _default_prefix(day: DayFacts, positions: str) -> str:
    asset = f"{day.symbol} on {day.date}" if day.symbol else "one asset"
    lines = [f"Trade {asset}: {_RULES[positions]}."]
    if not day.tradable:
        lines.append("The market is closed today.")
    if day.prices:
        write = _significant if day.symbol else "{:.1f}".format
        lines.append("Closes, newest last: " + " ".join(map(write, day.prices)))
    else:
        lines.append("No prices yet.")
    told = [(text, day.indicators[name]) for name, text in _INDICATORS]
    told = [text.format(value) for text, value in told if np.isfinite(value)]
    if told:
        lines.append(", ".join(told))
    if day.news_today:
        lines.append("News today: " + " | ".join(day.news_today))
    if day.news_earlier:
        lines.append("Earlier news: " + " | ".join(day.news_earlier))
    return "\n".join(lines) + "\n"


def _default_stepped(side: int, profit: float, held: int) -> str:
    """At most 16 tokens of SmolLM2: its layers see every one of them for every distinct prompt."""
    if side == 0:
        return "Account: flat. Action:"
    return f"Account: {_SIDES[side]} {_days(held)}, {profit:+.1%}. Action:"


def _default_exact(account: AccountFacts) -> str:
    parts = [f"Account: {_SIDES[account.side]}", f"cash {_fixed(account.cash, '.2f')}"]
    if account.side != 0:
        parts += [f"shares {_fixed(account.position, '.4f')}"]
        parts += [f"profit {_fixed(100 * account.profit, '+.2f')}%", f"held {_days(account.held)}"]
    return ", ".join([*parts, f"value {_fixed(account.value, '.2f')}"]) + ". Action:"


def _paper_prefix(day: DayFacts, positions: str) -> str:
    closed = "" if day.tradable else '"market_closed": true, '
    prices = ", ".join(_cut(price, 6) for price in day.prices)
    return (
        "You are a trader. Buy when the asset is undervalued on historical trends, sell when it is "
        "overvalued or risky, hold when uncertain. Maximise long-term return, manage risk, "
        "minimise costs, follow momentum.\n"
        f"Legal actions: {_RULES[positions]}.\n"
        f'State: {{{closed}"historical_prices": [{prices}],\n'
    )


_PAPER_ANSWER = '}\nAnswer in JSON with one key, Action: {"Action": "'


def _paper_stepped(side: int, profit: float, held: int) -> str:
    open_position = f', "profit": "{profit:+.1%}", "days_held": {held}' if side else ""
    return f'"account_status": {{"position": "{_SIDES[side]}"{open_position}}}' + _PAPER_ANSWER


def _paper_exact(account: AccountFacts) -> str:
    rewards = ", ".join(_cut(reward, 6) for reward in account.rewards)
    net_values = ", ".join(_cut(value, 10) for value in account.net_values)
    actions = ", ".join(f'"{ACTION_WORDS[action]}"' for action in account.actions)
    return (
        f'"account_status": {{"cash_balance": {_fixed(account.cash, ".2f")}, '
        f'"asset_position": {_fixed(account.position, ".4f")}, '
        f'"total_account_value": {_fixed(account.value, ".2f")}}},\n'
        f'"previous_decision_metrics": {{"recent_rewards": [{rewards}], '
        f'"net_values": [{net_values}], "actions": [{actions}]}}' + _PAPER_ANSWER
    )


LAYOUTS = {
    "default": Layout(
        _default_prefix,
        _default_stepped,
        _default_exact,
        tuple(f" {word}" for word in ACTION_WORDS),
        has_news=True,
    ),
    "paper": Layout(_paper_prefix, _paper_stepped, _paper_exact, ACTION_WORDS, has_news=False),
}


def _days(count: int) -> str:
    return f"{count} day" if count == 1 else f"{count} days"


def _significant(price: float) -> str:
    """Five significant digits, never an exponent."""
    return np.format_float_positional(price, 5, unique=False, fractional=False, trim="-")


_NO_MORE_DIGITS = 1e16


def _fixed(number: float, form: str) -> str:
    """`number` in a form of fixed digits. From 10^16 on, where float64 has none after the point,
    with an exponent: so there is a longest text."""
    return format(number, form if abs(number) < _NO_MORE_DIGITS else ".6e")


def _cut(number: float, characters: int) -> str:
    """The paper's way of rounding; still a JSON number, and all of its digits before the point."""
    whole = _fixed(number, ".0f")
    return whole if len(whole) >= characters else f"{number:.8f}"[:characters].rstrip(".")


_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
_NOT_TEXT = re.compile("[\\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_SENTIMENT = re.compile(r"\s*\(sentiment:\s*(\w+)\)$", re.IGNORECASE)
# A full stop sooner than this is an abbreviation's more often than a sentence's.
_SENTENCE = re.compile(r"(.{40,}?[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z])")
_HEADLINE_CHARACTERS = 400  # several times what HEADLINE_TOKENS hold

# Names by which a company is known in news, as beginnings of words.
NAMES = {
    "AAPL": ("apple",),
    "MSFT": ("microsoft",),
    "IBM": ("ibm", "international business machines"),
    "GOOG": ("googl", "alphabet"),
    "FB": ("facebook", "meta platforms"),
    "JNJ": ("johnson & johnson", "j&j"),
    "UVV": ("universal corp", "universal leaf"),
    "HON": ("honeywell",),
    "TSLA": ("tesla", "elon musk", "musk"),
    "BTC": ("bitcoin", "btc", "xbt"),
    "ETH": ("ethereum",),
}
OWN_NAME, OTHER_NAME = "the asset", "another asset"

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sep(?:t(?:ember)?)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_YEAR = r"(?:19|20)\d\d"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DATES = [
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (rf"(?<!\d){_YEAR}[-/.]\d{{1,2}}[-/.]\d{{1,2}}(?!\d)", "a date"),
        (r"(?<!\d)\d{1,2}[-/.]\d{1,2}[-/.](?:\d{4}|\d{2})(?!\d)", "a date"),
        (rf"(?<!\d){_YEAR}\d{{4}}(?!\d)", "a date"),
        (rf"\b{_MONTH}\s*{_DAY}\b(?:\s*,?\s*{_YEAR})?", "a date"),
        (rf"\b{_DAY}\s+(?:of\s+)?{_MONTH}(?!\w)(?:\s*,?\s*{_YEAR})?", "a date"),
        (rf"\b{_MONTH}\s*(?:,|of)?\s*['\u2019]?(?:{_YEAR}|\d\d\b)", "a month"),
        (rf"\b(?:FY|[QH][1-4]|[1-4][QH])\s?(?:of\s)?['\u2019]?(?:{_YEAR}|\d\d)\b", "a period"),
        (rf"(?<!\d){_YEAR}(?:\s?[-\u2013/]\s?\d{{2,4}})?(?!\d)", "a year"),
    )
]


def anonymiser(symbol: str, others: Sequence[str]) -> Callable[[str], str]:
    """A function of a text that takes out `symbol`, its names, `others` and theirs, and all dates.

    Names are those in `NAMES`; products and people that point to a company are not known.
    """
    own = _name_pattern([symbol])
    other = _name_pattern([*others, *NAMES])

    def replace(text: str) -> str:
        text = other.sub(OTHER_NAME, own.sub(OWN_NAME, text))
        for pattern, replacement in _DATES:
            text = pattern.sub(replacement, text)
        return text

    return replace


def _name_pattern(symbols: Sequence[str]) -> re.Pattern:
    alternatives = []
    for symbol in symbols:
        base = re.split(r"[-/.]", symbol)[0]
        for ticker in filter(None, (symbol, base)):
            # Short tickers are words in small letters (ALL, NOW).
            flag = "i" if len(ticker) >= 4 else "-i"
            alternatives.append(rf"(?{flag}:\$?{re.escape(ticker)})(?![^\W_])")
        alternatives += [re.escape(name) + r"\w*" for name in NAMES.get(base.upper(), ())]
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(alternatives)})", re.IGNORECASE)


def headline(text: str, anonymise: Callable[[str], str] | None = None) -> str:
    """The first sentence of an untrusted text as one line without markup or control characters.

    A sentiment that InvestorBench's files put at the end is moved to the front.
    """
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", without_markup(text)))
    text = _NOT_TEXT.sub(" ", text).strip()
    sentiment = _SENTIMENT.search(text)
    if sentiment:
        text = f"{sentiment[1]}: {text[: sentiment.start()]}"
    text = text[:_HEADLINE_CHARACTERS]
    if anonymise is not None:
        text = anonymise(text)
    sentence = _SENTENCE.match(text)
    return (sentence[1] if sentence else text).rstrip(" .,;:|")


class Prompter:
    """Texts and tokens of one symbol's days and accounts; texts are made once and kept.

    Raises InputError where the market has no such symbol.
    """

    def __init__(
        self,
        config: PromptConfig,
        market: Market,
        symbol: str,
        simulator: SimulatorConfig,
        tokenizer: Tokenizer,
    ):
        self.config = config
        self.simulator = simulator
        self.tokenizer = tokenizer
        column = market.column(symbol)
        self.symbol = market.symbols[column]
        self.bars = Bars.from_market(market, self.symbol)
        self.layout = LAYOUTS[config.layout]
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
    def action_words(self) -> tuple[str, str, str]:
        """Sell, Hold and Buy as they continue a prompt of this layout."""
        return self.layout.action_words

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
        return self.layout.prefix(self._day_facts(day), self.simulator.positions)

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
            actions=tuple(actions[actions >= 0].tolist()),
        )
        return self.layout.exact(facts)

    def _longest_exact_text(self) -> str:
        """A short account's with all numbers as long as `_fixed` makes them."""
        longest = -0.9 * _NO_MORE_DIGITS
        facts = AccountFacts(
            side=-1,
            cash=longest,
            position=longest,
            value=longest,
            profit=longest / 100,
            held=len(self.bars),
            rewards=(longest,) * HISTORY,
            net_values=(longest,) * HISTORY,
            actions=(SELL,) * HISTORY,
        )
        return self.layout.exact(facts)

    def stepped_prompts(
        self, days: Sequence[int], present: np.ndarray, reference: np.ndarray | None = None
    ) -> tuple[PromptSet, np.ndarray]:
        """The distinct prompts of account codes at `days` (distinct day indices).

        `present` is [len(days), CODES] bool, and so is `reference`: the codes whose prompts centre
        the features; they are added. Returns the prompts, in the order of `days`, and row_of
        [len(days), CODES] int32: the row of each day and code, -1 where absent. Raises ValueError
        for a day that is named twice.
        """
        days = np.asarray(days, dtype=np.int64)
        if len(np.unique(days)) < len(days):
            raise ValueError("a day is named twice")
        if reference is None:
            reference = np.zeros_like(present)
        where, codes = np.nonzero(present | reference)
        text_of_code, suffixes = self._distinct_suffixes(np.unique(codes))
        pairs = np.stack([where, text_of_code[codes]], axis=1).astype(np.int32)
        pairs, first, rows = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        row_of = np.full(present.shape, -1, dtype=np.int32)
        row_of[where, codes] = rows.reshape(-1)
        prompts = PromptSet(
            prefixes=tuple(self.prefix(int(day)) for day in days),
            suffixes=suffixes,
            pairs=pairs,
            side=side_of(codes)[first],
            allowed=allowed_codes(self.bars, self.simulator, days[where], codes)[first],
            reference=np.unique(row_of[reference]),
        )
        return prompts, row_of

    def _distinct_suffixes(self, codes: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """(index of each code's text [CODES], the distinct texts' tokens) for sorted `codes`."""
        index_of_text: dict[str, int] = {}
        suffixes = []
        text_of_code = np.full(CODES, -1)
        for code in codes.tolist():
            text = self.stepped_text(code)
            if text not in index_of_text:
                index_of_text[text] = len(suffixes)
                suffixes.append(self.suffix(code))
            text_of_code[code] = index_of_text[text]
        return text_of_code, tuple(suffixes)

    def exact_prompts(self, day: int, accounts: Accounts) -> tuple[PromptSet, np.ndarray]:
        """The distinct prompts of `accounts` at day's close, and the row of each account [B] int32.

        There is no reference.
        """
        # Positions too small for the text's digits look flat and are not: the side is in the key.
        sides = np.sign(accounts.shares).astype(int).tolist()
        keys = [(self.exact_text(accounts, b, day), side) for b, side in enumerate(sides)]
        row_of_key = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        text_index = {
            text: i for i, text in enumerate(dict.fromkeys(text for text, _ in row_of_key))
        }
        side = np.array([side for _, side in row_of_key], dtype=np.int8)
        prompts = PromptSet(
            prefixes=(self.prefix(day),),
            suffixes=tuple(self.tokenizer.encode(text) for text in text_index),
            pairs=np.array([(0, text_index[text]) for text, _ in row_of_key], dtype=np.int32),
            side=side,
            allowed=allowed(self.bars, self.simulator, side, day),
            reference=np.zeros(0, dtype=np.int32),
        )
        return prompts, np.array([row_of_key[key] for key in keys], dtype=np.int32)
