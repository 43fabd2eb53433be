"""Splits and dividends of a bars file: from its adjusted closes, or from columns of their own.

Prices are raw, or adjusted already for the events that stand beside them: names do not tell, the
prices do. At a 4:1 split raw prices fall to a quarter from the last close to the open; prices that
stay where they were are adjusted, and their events a record that is not applied again. Where the
prices don't tell, the file is refused.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastflag.files import InputError
from fastflag.market.adjusted import decimals_of, recover_splits_and_dividends

# Sizes below are logarithms of what a price is divided by: log(4) of a 4:1 split.
# A split larger than so many ordinary moves of a night, and than 10%, stands out from them.
_CLEAR_MOVES, _CLEAR = 8.0, 0.1
# How much of a split's size the night's move may be off it.
_OFF = 0.4
# Log-likelihood ratio from which small events, taken together, are told: 150 to 1.
_TOLD = 5.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """R rows of bars, those of one symbol together and in the order of their dates."""

    symbols: Sequence[str]
    spans: Sequence[slice]  # each symbol's rows
    dates: np.ndarray  # [R]
    open: np.ndarray  # [R]; NaN: no bar
    close: np.ndarray
    where: str

    def at(self, row: int | np.integer) -> str:
        n = next(n for n, span in enumerate(self.spans) if span.start <= row < span.stop)
        return f"{self.symbols[n]} {self.dates[row]}, {self.where}"


def events(
    rows: Rows,
    adjusted: np.ndarray | None,
    split: np.ndarray | None,
    dividend: np.ndarray | None,
    yfinance: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Splits and dividends [R] of `rows`, as Market has them, from a file's columns [R] (None: it
    has none; NaN: nothing that day; a split of 0: none).

    With `adjusted` closes these give the events, and columns of events are compared with them.
    `yfinance`: the events have yfinance's names, and without adjusted closes its prices are
    adjusted for dividends. Raises InputError, with symbol and date, for columns that contradict
    each other or the prices, and for prices that don't tell whether they are adjusted.
    """
    ones, zeros = np.ones(len(rows.close)), np.zeros(len(rows.close))
    declared = ones if split is None else np.where(np.isnan(split) | (split == 0), 1.0, split)
    paid = zeros if dividend is None else np.where(np.isnan(dividend), 0.0, dividend)
    for name, told, right in (("split", declared, declared > 0), ("dividend", paid, paid >= 0)):
        wrong = ~right | np.isinf(told)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(f"{name} {told[row]:g} is no {name}, {rows.at(row)}")
    fall, noise, before = _moves(rows)
    # Before the first bar nothing is held.
    declared = np.where(np.isnan(before), 1.0, declared)
    paid = np.where(np.isnan(before), 0.0, paid)
    if adjusted is not None:
        found = _recovered(rows, adjusted)
        _refuse_unknown_days(rows, adjusted, found)
        if _agrees(rows, adjusted, declared, paid, fall, noise):
            _tell_undeclared(rows, found, declared, paid, split is not None, dividend is not None)
            return found
        if found[1].any():
            raise InputError(
                "dividend and adj_close have dividends on other days: take one of the columns out, "
                f"{rows.at(int(np.argmax(found[1] > 0)))}"
            )
        if (found[0] != 1).any():  # adjusted for splits alone
            return found[0], paid
    raw = _are_raw(rows, declared, paid, fall, noise, before)
    if raw is None and yfinance:
        raw = False
    if raw is None:
        row = int(np.argmax((declared != 1) | (paid > 0)))
        what = "split" if declared[row] != 1 else "dividend"
        raise InputError(
            f"prices don't show whether they are adjusted for the {what} already: give "
            f"adj_close, or take the column {what} out, {rows.at(row)}"
        )
    return (declared, paid) if raw else (ones, zeros)


def _recovered(rows: Rows, adjusted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    split, dividend = np.ones(len(rows.close)), np.zeros(len(rows.close))
    for span in rows.spans:
        found = recover_splits_and_dividends(rows.close[span], adjusted[span])
        split[span], dividend[span] = found
    return split, dividend


def _refuse_unknown_days(
    rows: Rows, adjusted: np.ndarray, found: tuple[np.ndarray, np.ndarray]
) -> None:
    """Raises InputError for an event that came on a day with a close and no adjusted close, or
    after it: which of them can't be known. Other such days are told."""
    empty = np.isfinite(rows.close) & ~np.isfinite(adjusted)
    for span in rows.spans:
        known = span.start + np.flatnonzero(
            np.isfinite(adjusted[span]) & np.isfinite(rows.close[span])
        )
        passed = np.diff(np.cumsum(empty)[known], prepend=0)
        unknown = ((found[0][known] != 1) | (found[1][known] > 0)) & (passed > 0)
        if unknown[1:].any():
            raise InputError(
                "adj_close has no value before its split or dividend, whose day is not known "
                f"then: fill it or take the column out, {rows.at(known[1:][unknown[1:]][0])}"
            )
    if empty.any():
        _LOG.warning(
            "adj_close has no value on %d of %d days with a bar: no split and no dividend is "
            "known there, %s",
            empty.sum(),
            np.isfinite(rows.close).sum(),
            rows.at(int(np.argmax(empty))),
        )


def _moves(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[R] each: how far the price fell from the last close to the open (the next bar's, where the
    row has none), what an ordinary fall is, and the last close; NaN before the first."""
    fall, noise, before = (np.full(len(rows.close), np.nan) for _ in range(3))
    for span in rows.spans:
        close = rows.close[span]
        opened = np.where(np.isfinite(rows.open[span]), rows.open[span], close)
        index = np.arange(len(close))
        last = np.maximum.accumulate(np.where(np.isfinite(close), index, -1))
        last = np.concatenate([[-1], last[:-1]])
        following = np.where(np.isfinite(opened), index, len(close))
        following = np.minimum.accumulate(following[::-1])[::-1]
        before[span] = np.where(last < 0, np.nan, close[last])
        after = np.append(opened, np.nan)[following]
        fall[span] = np.log(before[span] / after)
        known = fall[span][np.isfinite(fall[span])]
        usual = np.median(np.abs(known - np.median(known))) if len(known) else 0.0
        noise[span] = max(1.4826 * usual, 0.005)
    return fall, noise, before


def _are_raw(
    rows: Rows,
    split: np.ndarray,
    paid: np.ndarray,
    fall: np.ndarray,
    noise: np.ndarray,
    before: np.ndarray,
) -> bool | None:
    """Whether prices show the events that are declared; None where they don't tell."""
    size = np.log(split)
    clear = _clear(size, noise) & np.isfinite(fall)
    some = bool((split != 1).any() or (paid > 0).any())
    if not some:
        return True
    if clear.any():
        shown, absent = _shown(rows, size, fall, clear)
        if shown.any() and absent.any():
            raise InputError(
                f"prices are adjusted for the split of {rows.at(int(np.argmax(absent)))}, and not "
                f"for that of {rows.dates[np.argmax(shown)]}"
            )
        if shown.any():
            return True
        _refuse_other_day(rows, size, fall, absent)
        # How a dividend is given beside adjusted prices differs between vendors.
        return None if (paid > 0).any() else False
    with np.errstate(invalid="ignore", divide="ignore"):
        size = size - np.log1p(-np.minimum(paid / before, 0.99))
    known = (size != 0) & np.isfinite(size) & np.isfinite(fall)
    size, fall, spread = size[known], fall[known], 2 * noise[known]
    # No single day says more than its event could.
    ratio = np.clip(fall / size, -1, 2)
    told = float(np.sum((2 * ratio - 1) * size**2 / (2 * spread**2)))
    return told > 0 if abs(told) >= _TOLD else None


def _clear(size: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return np.abs(size) >= np.maximum(_CLEAR, _CLEAR_MOVES * noise)


def _shown(
    rows: Rows, size: np.ndarray, fall: np.ndarray, clear: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which `clear` splits the prices show, and which they don't. Raises InputError for neither."""
    ratio = np.divide(fall, size, out=np.zeros(len(size)), where=size != 0)
    shown, absent = clear & (np.abs(ratio - 1) <= _OFF), clear & (np.abs(ratio) <= _OFF)
    neither = clear & ~shown & ~absent
    if neither.any():
        row = int(np.argmax(neither))
        raise InputError(
            f"split {math.exp(size[row]):g} does not fit the prices, whose open is "
            f"{math.exp(-fall[row]):.3g} times the last close, {rows.at(row)}"
        )
    return shown, absent


def _refuse_other_day(rows: Rows, size: np.ndarray, fall: np.ndarray, absent: np.ndarray) -> None:
    """Raises InputError where prices show a split within five rows of the one that is declared."""
    for row in np.flatnonzero(absent):
        span = next(span for span in rows.spans if span.start <= row < span.stop)
        near = np.arange(max(row - 5, span.start), min(row + 6, span.stop))
        fits = near[np.abs(fall[near] / size[row] - 1) <= _OFF]
        if len(fits):
            raise InputError(
                f"the prices show the split {math.exp(size[row]):g} on {rows.dates[fits[0]]}, "
                f"{rows.at(row)}"
            )


def _agrees(
    rows: Rows,
    adjusted: np.ndarray,
    split: np.ndarray,
    paid: np.ndarray,
    fall: np.ndarray,
    noise: np.ndarray,
) -> bool:
    """Whether adjusted closes contain the dividends that are declared; False: none of them.

    Raises InputError for splits that they contradict, and where they have some dividends only.
    """
    gain, rounding = _gains(rows, adjusted)
    size = np.log(split)
    paying = np.where(np.isfinite(rows.close), paid / rows.close, 0.0)
    known = np.isfinite(gain) & ((size != 0) | (paying > 0))
    slack = 2 * rounding + 0.1 * np.abs(size) + 1.5 * paying
    in_ratio, in_prices = np.abs(gain - size) <= slack, np.abs(gain) <= slack
    wrong = known & (size != 0) & ~in_ratio & ~in_prices
    clear = _clear(size, noise) & np.isfinite(fall) & known
    shown, absent = _shown(rows, size, fall, clear)
    wrong |= clear & ((shown & ~in_ratio) | (absent & ~in_prices))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(
            f"split {split[row]:g} and adj_close contradict each other: take one of the columns "
            f"out, {rows.at(row)}"
        )
    # On a day with a split too the gain may be of either.
    alone = known & (size == 0) & (paying > 4 * rounding)
    within = alone & (np.abs(gain - np.log1p(paying)) <= 0.5 * paying + 2 * rounding)
    none = alone & (np.abs(gain) <= 0.25 * paying + rounding)
    odd = alone & ~within & ~(none if not within.any() else np.zeros_like(none))
    if odd.any():
        row = int(np.argmax(odd))
        told = rows.close[row] * math.expm1(gain[row])
        raise InputError(
            f"dividend {paid[row]:g} and adj_close, which says {told:.4g}, contradict each other: "
            f"take one of the columns out, {rows.at(row)}"
        )
    return not none.any() or bool(within.any())


def _gains(rows: Rows, adjusted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[R] logarithm of how much adjusted / close grew since the last bar, and its rounding."""
    gain, rounding = np.full(len(rows.close), np.nan), np.full(len(rows.close), np.nan)
    for span in rows.spans:
        close = rows.close[span]
        known = np.flatnonzero(np.isfinite(close) & np.isfinite(adjusted[span]))
        price = adjusted[span][known]
        unit = 0.5 * 10.0 ** -max(2, *(decimals_of(each) for each in price[-50:]), 0)
        gain[span][known[1:]] = np.diff(np.log(price / close[known]))
        rounding[span][known[1:]] = np.maximum(unit * (1 / price[1:] + 1 / price[:-1]), 1e-6)
    return gain, rounding


def _tell_undeclared(
    rows: Rows,
    found: tuple[np.ndarray, np.ndarray],
    split: np.ndarray,
    paid: np.ndarray,
    has_splits: bool,
    has_dividends: bool,
) -> None:
    """One line for events that adjusted closes have and complete columns of events have not."""
    if not (has_splits and has_dividends):
        return
    more = ((found[0] != 1) | (found[1] > 0)) & (split == 1) & (paid == 0)
    if more.any():
        _LOG.warning(
            "events of adj_close that split and dividend don't have, taken from it: %d, first %s",
            more.sum(),
            rows.at(int(np.argmax(more))),
        )
