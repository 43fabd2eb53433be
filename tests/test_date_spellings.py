"""Dates in other spellings than ISO's: read where the column can mean one thing only."""

import json

import numpy as np
import pandas as pd
import pytest
from market_files import PRICES, raw_bars

from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market.bars import Market
from fastflag.market.sources import load
from fastflag.market.times import bar_dates, moments

BARS = raw_bars(40)[["date", *PRICES, "volume"]]
ISO = ["2024-01-02", "2024-01-12", "2024-01-13"]


def column(cells) -> pd.Series:
    return pd.Series(cells, pd.Index(range(2, 2 + len(cells)), name="line"), name="date")


def refusal(cells) -> str:
    with pytest.raises(InputError) as caught:
        bar_dates(column(cells), "bars.csv", None)
    return str(caught.value)


def is_bars(market: Market, symbol: str) -> None:
    assert market.symbols == (symbol,)
    np.testing.assert_array_equal(market.dates, BARS["date"].to_numpy().astype("datetime64[D]"))
    for name in (*PRICES, "volume"):
        np.testing.assert_array_equal(getattr(market, name)[:, 0], BARS[name])


@pytest.mark.parametrize(
    "cells",
    [
        ["01/02/2024", "01/12/2024", "01/13/2024"],
        ["1/2/2024", "1/12/2024", "1/13/2024"],
        ["02/01/2024", "12/01/2024", "13/01/2024"],
        ["2.1.2024", "12.1.2024", "13.1.2024"],
        ["02-01-2024", "12-01-2024", "13-01-2024"],
        ["1/2/2024 0:00", "1/12/2024 0:00", "1/13/2024 0:00"],  # Excel
        ["2024/01/02", "2024/1/12", "2024/01/13"],
        ["2024.01.02", "2024.01.12", "2024.01.13"],
        ["20240102", "20240112", "20240113"],
        [20240102, 20240112, 20240113],
        [20240102.0, 20240112.0, 20240113.0],
    ],
)
def test_spellings(cells):
    assert bar_dates(column(cells), "", None).astype(str).tolist() == ISO
    known = moments(column(cells), "", None, ends=True).astype(str).tolist()
    assert known == [f"{date}T23:59:59" for date in ISO]


def test_times_of_day_follow_dates_in_any_spelling():
    for cells in (["1/13/2024 9:30"], ["13.1.2024 09:30:00"], ["20240113 09:30"]):
        assert str(moments(column(cells), "", None)[0]) == "2024-01-13T09:30:00"
        assert "has a time of day: daily bars only, bars.csv line 2" in refusal(cells)


def test_digits_are_dates_also_before_1990_and_counts_are_not():
    """631152000 seconds are 1990 and have nine digits; eight are a date, whichever the year."""
    assert bar_dates(column(["18960527"]), "", None).astype(str) == ["1896-05-27"]
    assert bar_dates(column([20011231]), "", None).astype(str) == ["2001-12-31"]
    counted = bar_dates(column(["0", "20044800", "1704153600"]), "", None)
    assert counted.astype(str).tolist() == ["1970-01-01", "1970-08-21", "2024-01-02"]


def test_month_or_day_first_is_refused_where_no_row_tells():
    line = refusal(["05/05/2024", "06/07/2024", "12/12/2024"])
    assert line == (
        "date '06/07/2024' is 2024-06-07 (month first) or 2024-07-06 (day first), and no row tells "
        "which: write dates as YYYY-MM-DD, bars.csv line 3"
    )
    same = bar_dates(column(["05/05/2024", "06/06/2024"]), "", None)
    assert same.astype(str).tolist() == ["2024-05-05", "2024-06-06"]


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        (["1/13/2024", "1/14/2024", "15/1/2024"], "'15/1/2024' is not a date (MM/DD/YYYY), "),
        (["13/1/2024", "14/1/2024", "1/15/2024"], "'1/15/2024' is not a date (DD/MM/YYYY), "),
        (["1/2/2024", "1/3/2024", "31/31/2024"], "'31/31/2024' is not a date (MM/DD/YYYY), "),
        (["1/2/2024", "1/3/2024", ""], "'' is not a date (MM/DD/YYYY), "),
        (["1/13/2024", "1/14/2024", "2024-01-15"], "'2024-01-15' is not a date (MM/DD/YYYY), "),
        (["2024-01-13", "2024-01-14", "1/15/2024"], "'1/15/2024' is not a date (YYYY-MM-DD), "),
        (["20240113", "20240114", "2024-01-15"], "'2024-01-15' is not a date (YYYYMMDD), "),
        (["20240113", "20240114", "20240132"], "'20240132' is not a date (YYYYMMDD), "),
        (["2024/1/13", "2024/1/14", "2024/13/1"], "'2024/13/1' is not a date (YYYY/MM/DD), "),
        (["1/13/2024", "1/14/2024", "1/15/24"], "'1/15/24' is not a date (MM/DD/YYYY), "),
        (["1/13/2024", "1/14/2024", "1.15.2024"], "'1.15.2024' is not a date (MM/DD/YYYY), "),
        (["13.1.2024", "14.1.2024", "2/3/2024"], "'2/3/2024' is not a date (DD/MM/YYYY), "),
    ],
)
def test_a_column_has_one_spelling(cells, told):
    line = refusal(cells)
    assert line.startswith(f"date {told}") and line.endswith("bars.csv line 4")


def nasdaq() -> str:
    """As nasdaq.com's historical quotes are downloaded, newest first."""
    frame = BARS.assign(date=BARS["date"].dt.strftime("%m/%d/%Y"))
    frame[PRICES] = "$" + frame[PRICES].astype(str)
    frame = frame[["date", "close", "volume", "open", "high", "low"]].iloc[::-1]
    names = ["Date", "Close/Last", "Volume", "Open", "High", "Low"]
    return frame.set_axis(names, axis=1).to_csv(index=False)


def test_nasdaq(tmp_path):
    (tmp_path / "AAPL.csv").write_text(nasdaq())
    is_bars(load(DataConfig(data=f"csv:{tmp_path}/AAPL.csv")), "AAPL")


def tushare() -> pd.DataFrame:
    """As its `daily` gives them, newest first."""
    frame = BARS.rename(columns={"date": "trade_date", "volume": "vol"})
    frame["trade_date"] = frame["trade_date"].dt.strftime("%Y%m%d")
    frame.insert(0, "ts_code", "000001.SZ")
    before = frame["close"].shift()
    frame.insert(6, "pre_close", before)
    frame.insert(7, "change", frame["close"] - before)
    frame.insert(8, "pct_chg", 100 * frame["change"] / before)
    return frame.assign(amount=frame["vol"] * frame["close"]).iloc[::-1].reset_index(drop=True)


@pytest.mark.parametrize("with_index", [False, True])
def test_tushare(with_index, tmp_path):
    tushare().to_csv(tmp_path / "bars.csv", index=with_index)
    is_bars(load(DataConfig(data=f"csv:{tmp_path}/bars.csv")), "000001.SZ")
    for dtype in (str, int):
        tushare().astype({"trade_date": dtype}).to_parquet(tmp_path / "bars.parquet")
        is_bars(load(DataConfig(data=f"parquet:{tmp_path}/bars.parquet")), "000001.SZ")


@pytest.mark.parametrize("newest_first", [False, True])
def test_news_of_investorbench_stays_with_its_day(newest_first, tmp_path):
    """From one year into the next, where texts are in another order than dates."""
    dates = ["12/28/2023", "12/29/2023", "01/02/2024", "01/03/2024"]
    days = {date: {"prices": 1.0, "news": [f"of {date}"]} for date in dates}
    days = dict(list(days.items())[::-1]) if newest_first else days
    (tmp_path / "A.json").write_text(json.dumps(days))
    market = load(DataConfig(data=f"investorbench:{tmp_path}/A.json"))
    assert [(str(item.available)[:10], item.text) for item in market.news] == [
        ("2023-12-28", "of 12/28/2023"),
        ("2023-12-29", "of 12/29/2023"),
        ("2024-01-02", "of 01/02/2024"),
        ("2024-01-03", "of 01/03/2024"),
    ]
