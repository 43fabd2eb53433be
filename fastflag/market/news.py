"""News files: their items, and whose they are."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from zoneinfo import ZoneInfo

import pandas as pd

from fastflag.files import InputError, one_line, reading
from fastflag.market.bars import Market, News
from fastflag.market.cells import refuse, require, texts
from fastflag.market.columns import tell_unused
from fastflag.market.frames import COMPRESSED
from fastflag.market.times import moments

_ADVICE = ": name bars that have no symbol column as the news does, with --symbol"
_PREFIX = re.compile(r"^[a-z]{2,8}:")
_BLOOMBERG = re.compile(r" [a-z]{2} equity$")
# Exchanges and countries, as data vendors write them. Single letters that tell classes of shares
# (BRK.A, BRK.B) are none.
_SUFFIX = re.compile(
    r"\.(?:us|oq|pk|ob|l|il|de|f|be|du|hm|mu|sg|xetra|pa|as|br|ls|mi|mc|sw|vx|vi|ir|st|co|he|ol|ic"
    r"|wa|bd|at|is|ta|to|v|cn|ne|mx|sa|ba|sn|t|hk|ss|sz|shg|she|ks|kq|tw|two|si|kl|bk|jk|ns|bo"
    r"|ax|nz|jo|n|o)$"
)


def news_beside(bars: Path) -> Path | None:
    """NAME.news.csv or NAME.news.parquet beside the bars, compressed or not, in any case of the
    name's end, where there is one. Raises InputError for several and for one that is no file."""
    ends = {f".news.{kind}{packed}" for kind in ("csv", "parquet") for packed in ("", *COMPRESSED)}
    with reading(bars.parent):
        beside = [*bars.parent.iterdir()] if bars.parent.is_dir() else []
    found = sorted(
        path
        for path in beside
        if path.name.startswith(bars.stem) and path.name[len(bars.stem) :].lower() in ends
    )
    if len(found) > 1:
        raise InputError(f"several files of news: name one, --news, {found[0]} {found[1].name}")
    if found and not found[0].is_file():
        raise InputError(f"not a file, {found[0]}")
    return found[0] if found else None


def news_of(frame: pd.DataFrame, where: str, zone: ZoneInfo | None) -> list[News]:
    """A frame's items, in the exchange's local time; `moments` says what is converted.

    An `available` of exactly midnight is a bare date and counts as the END of that date.
    """
    columns = ("published", "available", "symbol", "text")
    require(frame, columns, where)
    tell_unused([str(name) for name in frame if name not in columns], where)
    published = moments(frame["published"], where, zone)
    available = moments(frame["available"], where, zone, ends=True)
    refuse(frame, available < published, "is before `published`", "available", where)
    told = texts(frame["text"], where)
    refuse(frame, told == "", "is empty", "text", where)
    items = zip(published, available, texts(frame["symbol"], where), told, strict=True)
    return [News(*item) for item in items]


def assigned(news: Sequence[News], symbol: str, symbols: Sequence[str], where: str) -> list[News]:
    """`news` with `symbol`, one of the bars' `symbols`, written as the bars write it.

    Raises InputError, with both names, where no item concerns it, unless the news has names of the
    bars' other symbols: then it knows how they are written, and has nothing on this one.
    """
    names = tuple(dict.fromkeys(item.symbol for item in news if item.symbol))
    own = names_of(symbol, symbols, names)
    for_all = any(not item.symbol for item in news)
    if not own and not for_all and not any(names_of(each, symbols, names) for each in symbols):
        shown = ", ".join(one_line(name)[:60] for name in names[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise InputError(f"no news of {symbol}, only of {shown}{more}{_ADVICE}, {where}")
    return [
        dataclasses.replace(item, symbol=symbol) if item.symbol in own else item for item in news
    ]


def names_of(symbol: str, symbols: Iterable[str], names: Iterable[str]) -> set[str]:
    """Which of the news' `names` mean `symbol` of the bars' `symbols`.

    A name as it is, or in other letters' case; where there is none, the ONE name that differs by an
    exchange before or after it (NASDAQ:AAPL, AAPL.US, AAPL US Equity), on one side only: X.US and
    X.TO are two companies. What fits another symbol of the bars as well is not guessed at.
    """
    others = set(symbols) - {symbol}
    free = set(names) - others
    folded, bare = symbol.casefold(), _without_exchange(symbol)
    if folded in {other.casefold() for other in others}:
        return free & {symbol}
    same = {name for name in free if name.casefold() == folded}
    if same or bare in {_without_exchange(other) for other in others}:
        return same
    listed = {
        name
        for name in free
        if _without_exchange(name) == bare and bare in (folded, name.casefold())
    }
    return listed if len(listed) == 1 else set()


def _without_exchange(name: str) -> str:
    name = _PREFIX.sub("", name.casefold(), count=1)
    return _SUFFIX.sub("", _BLOOMBERG.sub("", name))


def with_news(market: Market, news: Iterable[News]) -> Market:
    ordered = tuple(sorted(news, key=lambda item: item.available))
    return dataclasses.replace(market, news=ordered)
