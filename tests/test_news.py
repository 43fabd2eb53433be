"""Whose a news file's items are."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflag import cli
from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market.news import names_of
from fastflag.market.periods import split_days
from fastflag.market.sources import load

BARS = "date,open,high,low,close\n2024-01-02,1,1,1,1\n2024-01-03,2,2,2,2\n2024-01-04,3,3,3,3\n"


@pytest.fixture
def read(tmp_path):
    """The market of one symbol's bars, or of several's, with news of `names` beside them."""

    def call(names, bars=BARS, **asked):
        (tmp_path / "bars.csv").write_text(bars)
        rows = [f"2024-01-03,2024-01-03 09:30,{name},about {name}\n" for name in names]
        text = "published,available,symbol,text\n" + "".join(rows)
        (tmp_path / "bars.news.csv").write_text(text)
        return load(DataConfig(data=f"csv:{tmp_path}/bars.csv", **asked))

    return call


def test_the_readme_s_own_bars_are_read_with_their_news(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    (line,) = re.findall(r"^    fastflag (train --data csv:bars.csv .*)$", readme, re.MULTILINE)
    days = np.busday_offset("2015-01-02", np.arange(1600), roll="forward")
    prices = dict.fromkeys(("open", "high", "low", "close"), 10.0)
    pd.DataFrame({"date": days, **prices, "volume": 5}).to_csv("bars.csv", index=False)
    news = {"published": days, "available": days, "symbol": "AAPL", "text": "Apple rises"}
    pd.DataFrame(news).to_csv("bars.news.csv", index=False)
    seen = []
    monkeypatch.setattr(cli.Train, "run", lambda self: seen.append(self.settings.data))
    cli.main(line.split())
    market = load(seen[0])
    assert market.symbols == ("AAPL",)
    assert [item.symbol for item in market.news] == ["AAPL"] * 1600
    assert min(map(len, split_days(market, seen[0].train, seen[0].test))) > 200


def several(*symbols):
    header, *rows = BARS.splitlines()
    return "\n".join([f"symbol,{header}"] + [f"{s},{row}" for s in symbols for row in rows]) + "\n"


def test_news_of_another_symbol_is_refused_with_both_names(read, tmp_path):
    with pytest.raises(InputError) as caught:
        read(["AAPL"])
    assert str(caught.value) == (
        "no news of BARS, only of AAPL: name bars that have no symbol column as the news does, "
        f"with --symbol, {tmp_path}/bars.news.csv"
    )
    with pytest.raises(InputError, match="no news of MSFT, only of S0, S1, S2, S3, S4 and 4 more"):
        read([f"S{number}" for number in range(9)], symbol="MSFT")
    market = read(["AAPL"], symbol="AAPL")
    assert [(item.symbol, item.text) for item in market.news] == [("AAPL", "about AAPL")]
    assert [item.symbol for item in read([""]).news] == [""]


def test_news_of_the_bars_other_symbols_is_none_of_this_one(read):
    market = read(["B.US", "X"], several("A", "B"), symbol="A")
    assert [item.symbol for item in market.news] == ["B.US", "X"]
    with pytest.raises(InputError, match="no news of A, only of X:"):
        read(["X"], several("A", "B"), symbol="A")


@pytest.mark.parametrize(
    ("symbol", "names", "own"),
    [
        ("AAPL", ["AAPL"], ["AAPL"]),
        ("AAPL", ["aapl", "AAPL", "MSFT"], ["aapl", "AAPL"]),
        ("AAPL", ["NASDAQ:AAPL"], ["NASDAQ:AAPL"]),
        ("AAPL", ["AAPL.US", "MSFT.US"], ["AAPL.US"]),
        ("AAPL", ["aapl.O"], ["aapl.O"]),
        ("AAPL", ["AAPL US Equity"], ["AAPL US Equity"]),
        ("NASDAQ:AAPL", ["AAPL"], ["AAPL"]),
        ("TEVA.TA", ["TEVA"], ["TEVA"]),
        ("NYSE:BRK.B", ["BRK.B"], ["BRK.B"]),
        ("BTC-USD", ["BINANCE:BTC-USD"], ["BINANCE:BTC-USD"]),
        # The exact name is there: another exchange's may be another company.
        ("X", ["X", "X.TO"], ["X"]),
        ("X", ["X.US", "X.TO"], []),
        ("X.US", ["X.TO"], []),
        ("X.US", ["NYSE:X"], []),
        # Classes of shares, and words, are no exchanges.
        ("BRK.B", ["BRK.A"], []),
        ("BRK", ["BRK.A"], []),
        ("AAPL", ["AAPLE", "AAP", "AAPL.USA", "A:AAPL", ""], []),
    ],
)
def test_names(read, symbol, names, own):
    assert names_of(symbol, [symbol], names) == set(own)
    if own:
        market = read(names, symbol=symbol)
        kept = [item.text for item in market.news if item.symbol == symbol]
        assert kept == [f"about {name}" for name in names if name in own]
        assert len(market.news) == len(names)


def test_what_fits_another_symbol_as_well_is_not_guessed_at():
    assert names_of("X.US", ["X.US", "X.TO"], ["X"]) == set()
    assert names_of("X", ["X", "X.TO"], ["X.TO"]) == set()
    assert names_of("X.TO", ["X", "X.TO"], ["X.TO", "X"]) == {"X.TO"}
    assert names_of("x", ["x", "X"], ["X"]) == set()
    assert names_of("x", ["x", "X"], ["x", "X"]) == {"x"}


NAMES = st.sampled_from(
    ["X", "x", "X.US", "X.TO", "NYSE:X", "X US Equity", "Y", "Y.US", "y", "BRK.A", "BRK.B", "BRK"]
)


@given(symbols=st.sets(NAMES, min_size=1), names=st.sets(NAMES))
def test_no_name_is_two_symbols_and_an_exact_one_is_always_found(symbols, names):
    owned = [names_of(symbol, symbols, names) for symbol in symbols]
    assert sum(map(len, owned)) == len(set().union(*owned))
    for symbol, own in zip(symbols, owned, strict=True):
        assert (symbol in own) == (symbol in names)
