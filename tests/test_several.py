"""Several symbols on one calendar."""

import numpy as np
import pandas as pd
import pytest
from market_files import raw_bars

from fastflag.config import DataConfig, PortfolioConfig
from fastflag.files import InputError
from fastflag.market.several import aligned, load_several
from fastflag.market.sources import load
from fastflag.market.tasks.portfolio import Portfolio

TWO = """symbol,date,open,high,low,close
B,2024-01-03,20,21,19,20
B,2024-01-04,21,22,20,21
A,2024-01-02,10,11,9,10
A,2024-01-04,11,12,10,11
"""
NEWS = """published,available,symbol,text
2024-01-03 09:00,2024-01-03 09:30:00,,for all
2024-01-02 09:00,2024-01-02 09:30:00,NYSE:A,of one
"""


def several(data, *symbols):
    return load_several(DataConfig(data=data, symbols=",".join(symbols) or "all"))


def refusal(data, *symbols):
    with pytest.raises(InputError) as caught:
        several(data, *symbols)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_files_symbols_on_all_their_days(tmp_path):
    (tmp_path / "two.csv").write_text(TWO)
    (tmp_path / "two.news.csv").write_text(NEWS)
    market = several(f"csv:{tmp_path}/two.csv", "A", "B")
    assert market.symbols == ("A", "B")
    assert [str(day) for day in market.dates] == ["2024-01-02", "2024-01-03", "2024-01-04"]
    np.testing.assert_array_equal(market.close, [[10, np.nan], [np.nan, 20], [11, 21]])
    np.testing.assert_array_equal(market.split, np.ones((3, 2)))
    assert [(item.symbol, item.text) for item in market.news] == [("A", "of one"), ("", "for all")]
    for name in ("A", "B"):
        alone = load(DataConfig(data=f"csv:{tmp_path}/two.csv", symbol=name))
        mine = market.of(name)
        for column in ("open", "high", "low", "close", "split", "dividend"):
            np.testing.assert_array_equal(getattr(mine, column), getattr(alone, column))
        np.testing.assert_array_equal(mine.dates, alone.dates)
    assert several(f"csv:{tmp_path}/two.csv").symbols == ("B", "A")


def test_a_folders_files_are_symbols(tmp_path):
    """Compressed or not; each file's splits and dividends are its own, news files are no bars."""
    frames = {"one": raw_bars(120, seed=0), "two": raw_bars(160, seed=1)}
    frames["one"].to_csv(tmp_path / "one.csv.gz", index=False)
    frames["two"].to_csv(tmp_path / "two.csv", index=False)
    (tmp_path / "two.news.csv").write_text(NEWS.replace("NYSE:A", "TWO"))
    (tmp_path / ".hidden.csv").write_text("nothing")
    market = several(f"csv:{tmp_path}")
    assert market.symbols == ("ONE", "TWO") and len(market.dates) == 160
    for k, frame in enumerate(frames.values()):
        np.testing.assert_array_equal(market.close[: len(frame), k], frame["close"])
        np.testing.assert_array_equal(market.dividend[: len(frame), k], frame["dividend"])
        assert np.isnan(market.close[len(frame) :, k]).all()
    assert [item.symbol for item in market.news] == ["TWO", "TWO"]  # nothing of ONE
    assert several(f"csv:{tmp_path}", "TWO").symbols == ("TWO",)


def test_samples_make_a_portfolio():
    market = several("sample:AAPL,IBM,FB")
    assert market.symbols == ("AAPL", "IBM", "FB")
    task = Portfolio.of(PortfolioConfig(), market)
    assert task.slots == 3 and len(task.timeline) == len(market.dates)
    first = int(np.argmax(np.isfinite(market.close[:, 2])))
    allowed = task.allowed(np.array([first - 1, first]), np.zeros((2, 3)))
    assert allowed[0, 2].tolist() == [False, True, False, False]
    assert allowed[1, 2].tolist() == [False, True, True, True]


def test_refusals(tmp_path):
    (tmp_path / "two.csv").write_text(TWO)
    file = f"csv:{tmp_path}/two.csv"
    assert refusal(file, "A", "C").startswith("unknown symbol 'C' of A, B, csv:")
    assert refusal(file, "A", "A").startswith("a symbol is empty or there twice")
    assert refusal(f"parquet:{tmp_path}").startswith("no parquet files in the folder")
    pd.DataFrame(raw_bars(5)).to_csv(tmp_path / "a.csv", index=False)
    assert refusal(f"csv:{tmp_path}", "A").startswith("symbol 'A' is there twice")
    assert "unknown sample 'X'" in refusal("sample:AAPL,X")


def test_a_market_alone_is_itself():
    market = load(DataConfig(data="sample:AAPL"))
    again = aligned([market])
    for column in ("dates", "open", "close", "split", "dividend", "volume"):
        np.testing.assert_array_equal(getattr(again, column), getattr(market, column))
    assert again.hours == market.hours and again.rows.all()
