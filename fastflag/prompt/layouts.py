"""How a day and an account are written: the texts of a prompt's prefix and of its suffix.

Every layout cuts after a line break and before a letter or a quotation mark, where byte-level BPE
splits anyway: so a prefix and a suffix that are tokenised apart have the joined text's tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# How an action is written, by its name. All are single tokens of SmolLM2, with and without the
# space; " Sell" would be two.
ACTION_WORDS = {
    "Sell": "sell",
    "Hold": "hold",
    "Buy": "buy",
    "Out": "out",
    "Keep": "keep",
    "Neutral": "neutral",
    "Over": "over",
    "Short": "short",
}
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
    actions: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    prefix: Callable[[DayFacts, str], str]
    """Of a day and the rules, by their name."""
    stepped: Callable[[int, float, int], str]
    """Of side, profit and bars held."""
    slot: Callable[[int, float, float], str]
    """Of a portfolio's asset: side, its size in equal parts of the equity, and profit."""
    exact: Callable[[AccountFacts], str]
    action_words: dict[str, str]
    """What continues a prompt, by the action's name."""
    has_news: bool
    """The paper's template has none."""


_PARTS = (
    "its part of the portfolio is neutral, over (double) or out (none); keep leaves it as it is"
)
_RULES = {
    "long_flat": "buy spends all cash, sell sells all, hold keeps",
    "long_short": "buy is long, sell is short, hold is flat",
    "portfolio long_only": _PARTS,
    "portfolio long_short": f"{_PARTS}; short sells it short",
}


_INDICATORS = (
    ("return_20", "20-day return {:+.1%}"),
    ("volatility_20", "volatility {:.1%}"),
    ("rsi_14", "RSI {:.0f}"),
    ("drawdown_60", "from high {:+.1%}"),
)


def _default_prefix(day: DayFacts, rules: str) -> str:
    asset = f"{day.symbol} on {day.date}" if day.symbol else "one asset"
    lines = [f"Trade {asset}: {_RULES[rules]}."]
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


def _default_slot(side: int, size: float, profit: float) -> str:
    if side == 0:
        return "Holding: none. Action:"
    return f"Holding: {_SIDES[side]} {size:g} parts, {profit:+.0%}. Action:"


def _default_exact(account: AccountFacts) -> str:
    parts = [f"Account: {_SIDES[account.side]}", f"cash {_fixed(account.cash, '.2f')}"]
    if account.side != 0:
        parts += [f"shares {_fixed(account.position, '.4f')}"]
        parts += [f"profit {_fixed(100 * account.profit, '+.2f')}%", f"held {_days(account.held)}"]
    return ", ".join([*parts, f"value {_fixed(account.value, '.2f')}"]) + ". Action:"


def _paper_prefix(day: DayFacts, rules: str) -> str:
    closed = "" if day.tradable else '"market_closed": true, '
    prices = ", ".join(_cut(price, 6) for price in day.prices)
    return (
        "You are a trader. Buy when the asset is undervalued on historical trends, sell when it is "
        "overvalued or risky, hold when uncertain. Maximise long-term return, manage risk, "
        "minimise costs, follow momentum.\n"
        f"Legal actions: {_RULES[rules]}.\n"
        f'State: {{{closed}"historical_prices": [{prices}],\n'
    )


_PAPER_ANSWER = '}\nAnswer in JSON with one key, Action: {"Action": "'


def _paper_stepped(side: int, profit: float, held: int) -> str:
    open_position = f', "profit": "{profit:+.1%}", "days_held": {held}' if side else ""
    return f'"account_status": {{"position": "{_SIDES[side]}"{open_position}}}' + _PAPER_ANSWER


def _paper_slot(side: int, size: float, profit: float) -> str:
    held = f', "size": {size:g}, "profit": "{profit:+.0%}"' if side else ""
    return f'"account_status": {{"position": "{_SIDES[side]}"{held}}}' + _PAPER_ANSWER


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
        _default_slot,
        _default_exact,
        {action: f" {word}" for action, word in ACTION_WORDS.items()},
        has_news=True,
    ),
    "paper": Layout(
        _paper_prefix, _paper_stepped, _paper_slot, _paper_exact, ACTION_WORDS, has_news=False
    ),
}


def _days(count: int) -> str:
    return f"{count} day" if count == 1 else f"{count} days"


def _significant(price: float) -> str:
    """Five significant digits, never an exponent."""
    return np.format_float_positional(price, 5, unique=False, fractional=False, trim="-")


NO_MORE_DIGITS = 1e16


def _fixed(number: float, form: str) -> str:
    """`number` in a form of fixed digits. From 10^16 on, where float64 has none after the point,
    with an exponent: so there is a longest text."""
    return format(number, form if abs(number) < NO_MORE_DIGITS else ".6e")


def _cut(number: float, characters: int) -> str:
    """The paper's way of rounding; still a JSON number, and all of its digits before the point."""
    whole = _fixed(number, ".0f")
    return whole if len(whole) >= characters else f"{number:.8f}"[:characters].rstrip(".")
