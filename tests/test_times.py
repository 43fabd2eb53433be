"""Dates and moments in every spelling, by the exchange's zone; pandas' and hand-made truths."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market.sources import load
from fastflag.market.times import bar_dates, hours_of, moments, refuse_longer_than_days, zone_of

NEW_YORK = zone_of(DataConfig(timezone="America/New_York"))
DATES = ["2024-01-02", "2024-07-03"]


def column(cells, name="date"):
    return pd.Series(cells, pd.Index(range(2, 2 + len(cells)), name="line"), name=name)


def told(times) -> list[str]:
    return [str(time) for time in times]


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "cells",
    [
        ["2024-01-02 00:00:00-05:00", "2024-07-03 00:00:00-04:00"],  # as yfinance writes them
        ["2024-01-02T00:00:00Z", "2024-07-03T00:00:00+00:00"],
        ["2024-01-02 00:00:00+0200", "2024-07-03 00:00 UTC"],
        ["1704153600", "1719964800"],
        [1704153600, 1719964800],
        [1704153600.0, 1719964800.0],
        ["1704153600000", "1719964800000"],
        [1704153600000000, 1719964800000000],
        ["1704153600000000000", "1719964800000000000"],
        pd.to_datetime(DATES),
        pd.to_datetime(DATES).tz_localize("Asia/Tokyo"),
        pd.to_datetime(DATES).date,
    ],
)
@pytest.mark.parametrize("zone", [None, NEW_YORK])
def test_a_midnight_is_its_date_wherever(cells, zone):
    dates = bar_dates(column(cells), "bars.csv", zone)
    assert dates.dtype == "datetime64[D]" and told(dates) == DATES


@pytest.mark.parametrize(
    "cells",
    [
        ["2024-01-02T05:00:00Z", "2024-07-03T04:00:00Z"],  # as Alpaca writes them
        ["2024-01-02T07:00:00+02:00", "2024-07-03 00:00:00-04:00"],
        [1704171600, 1719979200],
        ["1704171600000", "1719979200000"],
        pd.to_datetime(["2024-01-02T05:00", "2024-07-03T04:00"]).tz_localize("UTC"),
    ],
)
def test_other_times_are_midnights_of_the_exchange_s_zone(cells):
    assert told(bar_dates(column(cells), "bars.csv", NEW_YORK)) == DATES
    line = refusal(bar_dates, column(cells), "bars.csv", None)
    assert "--timezone America/New_York, bars.csv line 2" in line
    line = refusal(bar_dates, column(cells), "bars.csv", zone_of(DataConfig(timezone="Asia/Tokyo")))
    assert "has a time of day in Asia/Tokyo: daily bars only, bars.csv line 2" in line


@pytest.mark.parametrize(
    "cell",
    [
        "1",
        "-5",
        "240102",
        "02012024",
        "202401021630",
        "20240102163000",
        "20240102163000123",
        "5" * 19,
        "",
        "nan",
        "2024",
        "2024-01-02 24:01",
        "2024-01-02T00:00+99:00",
        "2024-01-02T00:00:00 EST",
    ],
)
def test_no_date(cell):
    line = refusal(bar_dates, column([cell]), "bars.csv", NEW_YORK)
    assert line == f"date {cell!r} is not a date (YYYY-MM-DD), bars.csv line 2"


def test_epochs_before_1990_are_dates_beside_later_ones():
    cells = ["-252460800", "0", "1704153600"]
    assert told(bar_dates(column(cells), "", None)) == ["1962-01-01", "1970-01-01", "2024-01-02"]


def test_intraday_bars_are_refused():
    cells = ["2024-01-02 09:30", "2024-01-02 09:31"]
    for zone in (None, NEW_YORK):
        line = refusal(bar_dates, column(cells), "bars.csv", zone)
        assert line.endswith("has a time of day: daily bars only, bars.csv line 2")
    minutes = ["1704205800", "1704205860"]  # 9:30 and 9:31 in New York
    line = refusal(bar_dates, column(minutes), "bars.csv", NEW_YORK)
    assert "has a time of day in America/New_York: daily bars only" in line


@given(
    seconds=st.lists(st.integers(694_224_000, 4_000_000_000), min_size=1, max_size=5),
    unit=st.sampled_from(["s", "ms", "us", "ns"]),
    name=st.sampled_from(["America/New_York", "Asia/Jerusalem", "Asia/Tokyo", "UTC"]),
)
def test_moments_in_the_exchange_s_zone_are_pandas_own(seconds, unit, name):
    zone = zone_of(DataConfig(timezone=name))
    truth = pd.to_datetime(seconds, unit="s", utc=True).tz_convert(name)
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    spellings = (
        [second * scale for second in seconds],
        [time.isoformat() for time in truth],
        pd.to_datetime(seconds, unit="s", utc=True),
    )
    for cells in spellings:
        found = moments(column(cells), "news.csv", zone)
        np.testing.assert_array_equal(found, truth.tz_localize(None).to_numpy())
        assert found.dtype == "datetime64[s]"


def test_times_in_a_zone_need_the_exchange_s():
    for cell in ("2024-01-03 09:30Z", 1704274200, "1704274200000"):
        line = refusal(moments, column([cell], "available"), "news.csv", None)
        what = "has a time zone: give the exchange's, as in --timezone America/New_York"
        assert line == f"available {str(cell)!r} {what}, news.csv line 2"


@pytest.mark.parametrize(
    ("cell", "known"),
    [
        ("2024-01-03", "2024-01-03T23:59:59"),
        ("2024-01-03 00:00:00", "2024-01-03T23:59:59"),
        ("2024-01-03T00:00:00Z", "2024-01-03T18:59:59"),  # the end of that date in UTC
        (1704240000, "2024-01-03T18:59:59"),  # the same
        ("2024-01-03T05:00:00Z", "2024-01-03T23:59:59"),  # midnight in New York
        ("2024-01-03T05:00:01Z", "2024-01-03T00:00:01"),
        ("2024-01-03 16:00:00.25", "2024-01-03T16:00:01"),  # after a close at 16:00
        ("2024-01-03 16:00:00.000", "2024-01-03T16:00:00"),
        ("2024-07-03T20:00:00Z", "2024-07-03T16:00:00"),
    ],
)
def test_a_bare_date_is_known_at_its_end(cell, known):
    assert told(moments(column([cell]), "", NEW_YORK, ends=True)) == [known]


def test_hours():
    def close(text):
        return hours_of(DataConfig(close_time=text)).close

    assert [close(text) for text in ("", "13:00", "09:05:07", "00:00")] == [
        None,
        np.timedelta64(13 * 3600, "s"),
        np.timedelta64(9 * 3600 + 5 * 60 + 7, "s"),
        np.timedelta64(0, "s"),
    ]
    assert hours_of(DataConfig()).calendar is None
    assert hours_of(DataConfig(calendar="crypto")).calendar == "crypto"
    for wrong in ("4pm", "16", "24:00", "16:60", "16:00:00.5", " 16:00"):
        assert refusal(close, wrong) == (
            f"not a time of day (HH:MM or HH:MM:SS), --close-time {wrong!r}"
        )


@pytest.mark.parametrize("name", ["Mars/Phobos", "America", "/etc/passwd", "../UTC", "EST5 EDT"])
def test_unknown_zone(name):
    assert "unknown time zone" in refusal(zone_of, DataConfig(timezone=name))


@pytest.mark.parametrize(
    ("frequency", "told"),
    [
        ("W-FRI", "weekly bars (a bar every 7 days): FastFLAG trades daily bars, bars.csv"),
        ("MS", "monthly bars (a bar every 31 days): FastFLAG trades daily bars, bars.csv"),
        ("QE", "quarterly bars (a bar every 92 days): FastFLAG trades daily bars, bars.csv"),
        ("10D", "bars (a bar every 10 days): FastFLAG trades daily bars, bars.csv"),
    ],
)
def test_bars_longer_than_days_are_refused(frequency, told):
    dates = pd.date_range("2023-01-01", periods=20, freq=frequency).to_numpy()
    assert refusal(refuse_longer_than_days, dates.astype("datetime64[D]"), "bars.csv") == told


def test_daily_bars_with_holes_are_daily():
    dates = np.busday_offset("2024-01-01", np.arange(200))
    for holes in (dates, dates[::2], dates[[0, 60, 61, 62]], dates[[0, 60]], dates[:1]):
        refuse_longer_than_days(holes, "bars.csv")


def test_files_in_other_zones_are_read_in_the_exchange_s(tmp_path):
    """Bars stamped at New York's midnight in UTC, news in UTC and in seconds since 1970."""
    stamps = ["2024-03-07T05:00:00Z", "2024-03-08T05:00:00Z", "2024-03-11T04:00:00Z"]
    rows = [f"{stamp},1,1,1,1\n" for stamp in stamps]
    (tmp_path / "ibm.csv").write_text("date,open,high,low,close\n" + "".join(rows))
    for times in (
        ["2024-03-08T20:59:59Z", "2024-03-08T16:00:01-05:00", "2024-03-11T20:00:00+00:00"],
        [1709931599, 1709931601, 1710187200],
    ):
        news = {"published": times, "available": times, "symbol": "IBM", "text": "told"}
        pd.DataFrame(news).to_csv(tmp_path / "ibm.news.csv", index=False)
        data = DataConfig(data=f"csv:{tmp_path}/ibm.csv", timezone="America/New_York")
        market = load(data)
        assert told(market.dates) == ["2024-03-07", "2024-03-08", "2024-03-11"]
        available = np.array([item.available for item in market.news])
        assert told(available) == [
            "2024-03-08T15:59:59",
            "2024-03-08T16:00:01",
            "2024-03-11T16:00:00",
        ]
        assert np.searchsorted(market.closes, available).tolist() == [1, 2, 2]
        line = refusal(load, dataclasses.replace(data, timezone=""))
        assert "--timezone America/New_York" in line and line.endswith("ibm.csv line 2")
