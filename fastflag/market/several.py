"""Several symbols, of one file or of a folder's files, on one calendar."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market import sources
from fastflag.market.bars import MARKET_COLUMNS, Market, News
from fastflag.market.frames import COMPRESSED, path_of
from fastflag.market.news import assigned, with_news
from fastflag.market.sources import asked, news_path, of_symbol, read, read_news

# Of a symbol on a day on which it has no row.
_ABSENT = {"split": 1.0, "dividend": 0.0}
_ENDINGS = {"csv": (".csv",), "parquet": (".parquet",), "investorbench": (".json",)}


def load(data: DataConfig) -> Market:
    """The market of one symbol, or of those that `data.symbols` names."""
    return load_several(data) if data.symbols else sources.load(data)


def load_several(data: DataConfig) -> Market:
    """The market of `data.symbols`, in this order, or of all, on every day on which one of them has
    a row; each as `sources.load` reads it alone.

    `data.data` names a file of several symbols, a folder of files (csv:FOLDER, parquet:FOLDER,
    investorbench:FOLDER), or samples (sample:AAPL,IBM). A symbol without a row on a day has no bar
    then. News beside each file is added up, or is `data.news`, for all of them. Raises InputError
    as `load` does, and for a symbol that is unknown or is there twice.
    """
    parts = _parts(data)
    read_parts = [read(part) for part in parts]
    known = [name for market in read_parts for name in _names(market)]
    chosen = asked(data) or tuple(known)
    for name in chosen:
        if name not in known:
            raise InputError(f"unknown symbol {name!r} of {', '.join(known)}, {data.data}")
        if known.count(name) > 1:
            raise InputError(f"symbol {name!r} is there twice, {data.data}")
    found, news = {}, []
    for part, whole in zip(parts, read_parts, strict=True):
        own = [name for name in whole.symbols if name in chosen]
        found |= {name: of_symbol(whole, name, part) for name in own}
        if own and (path := news_path(part)):
            items = read_news(path, part)
            for name in own:
                items = assigned(items, name, known, str(path))
            news += items if data.news or len(parts) == 1 else _of_its_file(items, own)
    market = aligned([found[name] for name in chosen])
    return with_news(market, dict.fromkeys([*market.news, *news]))


def aligned(markets: Sequence[Market]) -> Market:
    """Markets of one symbol each, side by side on all days of any of them; news that several have
    once."""
    dates = np.unique(np.concatenate([market.dates for market in markets]))
    places = [np.searchsorted(dates, market.dates) for market in markets]

    def column(market: Market, place: np.ndarray, name: str) -> np.ndarray:
        values = np.full(len(dates), _ABSENT.get(name, np.nan))
        values[place] = getattr(market, name)[:, 0]
        return values

    pairs = list(zip(markets, places, strict=True))
    columns: dict[str, Any] = {
        name: np.stack([column(*pair, name) for pair in pairs], axis=1) for name in MARKET_COLUMNS
    }

    rows = np.zeros((len(dates), len(markets)), bool)
    for k, place in enumerate(places):
        rows[place, k] = True
    symbols = tuple(market.symbols[0] for market in markets)
    others = dict(pair for market in markets for pair in market.others if pair[0] not in symbols)
    market = dataclasses.replace(
        markets[0],
        dates=dates,
        symbols=symbols,
        rows=rows,
        others=tuple(others.items()),
        **columns,
    )
    return with_news(market, dict.fromkeys(item for market in markets for item in market.news))


def _names(market: Market) -> list[str]:
    """Of a file's symbols all."""
    return [*market.symbols, *(name for name, _ in market.others)]


def _of_its_file(news: Sequence[News], symbols: Sequence[str]) -> list[News]:
    """News for all symbols of a file as news of each, so that no other file's read it."""
    return [
        dataclasses.replace(item, symbol=symbol)
        for item in news
        for symbol in ([item.symbol] if item.symbol else symbols)
    ]


def _parts(data: DataConfig) -> list[DataConfig]:
    """A source for each file or sample."""
    kind, _, name = data.data.partition(":")
    if kind == "sample":
        return [dataclasses.replace(data, data=f"sample:{each}") for each in name.split(",")]
    folder = path_of(name)
    if kind not in _ENDINGS or not folder.is_dir():
        return [data]
    files = sorted(path for path in folder.iterdir() if _is_bars(path, _ENDINGS[kind]))
    if not files:
        raise InputError(f"no {kind} files in the folder, {folder}")
    return [dataclasses.replace(data, data=f"{kind}:{path}") for path in files]


def _is_bars(path: Path, endings: tuple[str, ...]) -> bool:
    """Not the news beside bars, nor files that begin with a dot."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    of_news = ".news" in suffixes
    return bool(suffixes) and suffixes[-1] in endings and not of_news and path.name[0] != "."
