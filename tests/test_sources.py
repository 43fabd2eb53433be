import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market.adjusted import recover_splits_and_dividends
from fastflag.market.sources import SAMPLES, load

BARS = """Date,Open,High,Low,Close,Adj Close,Volume
2024-01-02,10,11,9,10.5,5.25,100
2024-01-03,10.5,12,10,11,5.5,200
2024-01-04,5.5,6,5,5.75,5.75,300
"""
TWO_SYMBOLS = """symbol,date,open,high,low,close
A,2024-01-02,10,11,9,10
A,2024-01-04,11,12,10,11
B,2024-01-03,20,21,19,20
B,2024-01-04,21,22,20,21
"""
NEWS = """published,available,symbol,text
2024-01-03,2024-01-03,A,"a bare date, known at its end"
2024-01-03 09:00,2024-01-03 09:30:00,,"for every symbol"
2024-01-02T20:00,2024-01-02T20:15:30,A,late in the evening
"""
DAYS = {
    "2024-01-02": {"prices": 10.0, "news": ["first", "second"], "10k": [], "10q": []},
    "2024-01-03": {"prices": 11, "news": []},
}


@pytest.fixture
def file(tmp_path):
    """Writes a file and returns its path."""

    def write(name: str, content: str | bytes) -> str:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(tmp_path / name)

    return write


def refusal(**data: str) -> str:
    """The one line with which `load` refuses."""
    with pytest.raises(InputError) as caught:
        load(DataConfig(**data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sample(symbol: str):
    return load(DataConfig(data=f"sample:{symbol}"))


def adjusted_closes(symbol: str) -> np.ndarray:
    from bokeh_sampledata import stocks

    return np.array(getattr(stocks, symbol)["adj_close"])


# Splits and dividends


def test_known_splits():
    found = {}
    for symbol in SAMPLES:
        market = sample(symbol)
        days = np.flatnonzero(market.split[:, 0] != 1)
        found |= {(symbol, str(market.dates[t])): market.split[t, 0] for t in days}
    assert found == {
        ("AAPL", "2000-06-21"): 2.0,
        ("AAPL", "2005-02-28"): 2.0,
        ("MSFT", "2003-02-18"): 2.0,
    }


@pytest.mark.parametrize(
    ("symbol", "date", "declared"),
    [
        ("AAPL", "2012-08-09", 2.65),
        ("AAPL", "2012-11-07", 2.65),
        ("AAPL", "2013-02-07", 2.65),
        ("MSFT", "2003-02-19", 0.08),  # the day after the split: 0.08 a new share
        ("MSFT", "2004-11-15", 3.08),  # the special 3.00 with the quarter's 0.08
        ("MSFT", "2013-02-19", 0.23),
        ("IBM", "2000-05-08", 0.13),
        ("IBM", "2013-02-06", 0.85),
    ],
)
def test_known_dividends(symbol, date, declared):
    market = sample(symbol)
    paid = market.dividend[market.dates == np.datetime64(date), 0]
    assert paid == pytest.approx([declared], abs=1e-10)


def test_every_dividend_is_whole_cents():
    count = {"AAPL": 3, "FB": 0, "GOOG": 0, "IBM": 52, "MSFT": 37}
    for symbol in SAMPLES:
        paid = sample(symbol).dividend
        assert np.count_nonzero(paid) == count[symbol]
        np.testing.assert_allclose(paid, np.round(paid, 2), atol=1e-11)


@pytest.mark.parametrize(("decimals", "tolerance"), [(15, 1e-12), (6, 2e-6), (2, 2e-2)])
@pytest.mark.parametrize("symbol", SAMPLES)
def test_the_stream_gives_the_adjusted_total_return(symbol, decimals, tolerance):
    close = sample(symbol).close[:, 0]
    adjusted = np.round(adjusted_closes(symbol), decimals)
    exact = recover_splits_and_dividends(close, adjusted_closes(symbol))
    split, dividend = recover_splits_and_dividends(close, adjusted)
    shares = np.cumprod(split * (1 + dividend / close))
    total_return = close * shares / close[0]
    np.testing.assert_allclose(total_return, adjusted / adjusted[0], rtol=tolerance)
    # Rounding invents no event and hides none.
    np.testing.assert_array_equal(split, exact[0])
    np.testing.assert_array_equal(dividend > 0, exact[1] > 0)


def test_an_account_fed_by_the_stream():
    """Cash paid before the open, reinvested at the close: the equity of adjusted prices."""
    market, shares = sample("MSFT"), 100.0
    equity = []
    for t in range(len(market.dates)):
        shares *= market.split[t, 0]
        shares += shares * market.dividend[t, 0] / market.close[t, 0]
        equity.append(shares * market.close[t, 0])
    adjusted = adjusted_closes("MSFT")
    np.testing.assert_allclose(np.array(equity) / equity[0], adjusted / adjusted[0], rtol=1e-12)


@given(st.integers(1, 3269), st.integers(0, 2**32), st.sampled_from(("AAPL", "MSFT", "IBM")))
def test_the_future_changes_no_bit(known, seed, symbol):
    # In cents so far: what is rounding there must not become an event when later rows show more.
    close, adjusted = sample(symbol).close[:, 0].copy(), np.round(adjusted_closes(symbol), 2)
    before = recover_splits_and_dividends(close, adjusted)
    random = np.random.default_rng(seed)
    close[known:] *= random.uniform(0.1, 9, len(close) - known)
    adjusted[known:] *= random.uniform(0.1, 9)
    adjusted[known:][random.random(len(close) - known) < 0.1] = np.nan
    after = recover_splits_and_dividends(close, adjusted)
    for past, again in zip(before, after, strict=True):
        assert past[:known].tobytes() == again[:known].tobytes()


def test_what_the_adjustment_is_scaled_to_does_not_matter():
    close, adjusted = sample("MSFT").close[:, 0], adjusted_closes("MSFT")
    split, dividend = recover_splits_and_dividends(close, adjusted)
    # As the same file looks after a later 7:1 split and a dividend.
    later_split, later_dividend = recover_splits_and_dividends(close, adjusted / 7 * 0.98)
    np.testing.assert_array_equal(later_split, split)
    np.testing.assert_allclose(later_dividend, dividend, atol=1e-10)


@pytest.mark.parametrize(
    ("gain", "split", "dividend"),
    [
        (2.0, 2.0, 0.0),
        (1.5, 1.5, 0.0),
        (4 / 3, 4 / 3, 0.0),
        (7.0, 7.0, 0.0),
        (0.1, 0.1, 0.0),
        (2.02, 2.0, 0.5),  # a split and a dividend on one day
        (1.1, 1.0, 5.0),  # a special dividend, or a stock dividend: the same return
        (1.289, 1.289, 0.0),  # a spin-off
        (0.97, 0.97, 0.0),
        (5000.0, 5000.0, 0.0),
    ],
)
def test_split_or_dividend(gain, split, dividend):
    close = np.array([40.0, np.nan, 50.0, 51.0])
    factor = np.array([1.0, 1.0, gain, gain])
    splits, dividends = recover_splits_and_dividends(close, close * factor)
    np.testing.assert_allclose(splits, [1, 1, split, 1], rtol=1e-12)
    np.testing.assert_allclose(dividends, [0, 0, dividend, 0], atol=1e-9)


# Formats


def test_csv(file):
    market = load(DataConfig(data="csv:" + file("bars.csv", BARS)))
    assert market.symbols == ("BARS",)
    np.testing.assert_array_equal(
        market.dates, pd.to_datetime(["2024-01-02", "2024-01-03", "2024-01-04"])
    )
    np.testing.assert_array_equal(market.open[:, 0], [10, 10.5, 5.5])
    np.testing.assert_array_equal(market.high[:, 0], [11, 12, 6])
    np.testing.assert_array_equal(market.low[:, 0], [9, 10, 5])
    np.testing.assert_array_equal(market.close[:, 0], [10.5, 11, 5.75])
    np.testing.assert_array_equal(market.volume[:, 0], [100, 200, 300])
    np.testing.assert_array_equal(market.split[:, 0], [1, 1, 2])
    np.testing.assert_array_equal(market.dividend[:, 0], [0, 0, 0])


def test_parquet_is_csv(file, tmp_path):
    frame = pd.read_csv(file("bars.csv", BARS), parse_dates=["Date"])
    expected = load(DataConfig(data=f"csv:{tmp_path}/bars.csv"))
    spellings = {
        "timestamps": frame,
        "index": frame.set_index("Date"),
        "texts": frame.astype({"Date": str}),
        "dates": frame.assign(Date=frame["Date"].dt.date),
        "zoned": frame.assign(Date=frame["Date"].dt.tz_localize("America/New_York")),
    }
    for name, spelling in spellings.items():
        spelling.to_parquet(tmp_path / f"{name}.parquet")
        market = load(DataConfig(data=f"parquet:{tmp_path}/{name}.parquet", symbol="BARS"))
        for column in ("dates", "open", "high", "low", "close", "volume", "split", "dividend"):
            np.testing.assert_array_equal(getattr(market, column), getattr(expected, column))


def test_empty_cells_are_missing_bars(file):
    text = BARS.replace("2024-01-03,10.5,12,10,11,5.5,200", "2024-01-03,,,nan,,, ")
    market = load(DataConfig(data="csv:" + file("bars.csv", text)))
    assert np.isnan(
        [getattr(market, name)[1, 0] for name in ("open", "low", "close", "volume")]
    ).all()
    np.testing.assert_array_equal(market.split[:, 0], [1, 1, 2])


def test_a_file_without_volume_and_adjusted_closes(file):
    text = "date,open,high,low,close\n2024-01-02,1,1,1,1\n2024-01-03,2,2,2,2\n"
    market = load(DataConfig(data="csv:" + file("bars.csv", text), symbol="X"))
    assert market.symbols == ("X",)
    assert np.isnan(market.volume).all()
    assert (market.split == 1).all() and (market.dividend == 0).all()


def test_one_symbol_of_several_has_its_own_days(file):
    for symbol, other in (("A", "B"), ("B", "A")):
        bars = "csv:" + file("bars.csv", TWO_SYMBOLS)
        market = load(DataConfig(data=bars, symbol=symbol))
        rows = [row for row in TWO_SYMBOLS.splitlines() if row.startswith(symbol)]
        assert market.symbols == (symbol,)
        assert [str(date) for date in market.dates] == [row.split(",")[1] for row in rows]
        np.testing.assert_array_equal(
            market.close[:, 0], [float(row.split(",")[5]) for row in rows]
        )
        assert (market.split == 1).all() and (market.dividend == 0).all()
        first = {"A": "2024-01-02", "B": "2024-01-03"}
        assert {name: str(date) for name, date in market.first_bars.items()} == first
        assert market.others == ((other, np.datetime64(first[other])),)


def test_investorbench_format(file):
    market = load(DataConfig(data="investorbench:" + file("msft.json", json.dumps(DAYS))))
    assert market.symbols == ("MSFT",)
    for name in ("open", "high", "low", "close"):
        np.testing.assert_array_equal(getattr(market, name)[:, 0], [10, 11])
    assert [(item.text, str(item.available)) for item in market.news] == [
        ("first", "2024-01-02T16:00:00"),
        ("second", "2024-01-02T16:00:00"),
    ]


def test_investorbench_data(investorbench):
    market = load(DataConfig(data=f"investorbench:{investorbench}/msft.json"))
    assert len(market.dates) == 291
    assert len(market.days("2020-07-01", "2020-09-30")) == 64
    assert len(market.days("2020-10-01", "2021-05-06")) == 150
    raw = json.loads((investorbench / "msft.json").read_text())
    assert [item.text for item in market.news] == [
        text for day in raw.values() for text in day["news"]
    ]
    crypto = load(DataConfig(data=f"investorbench:{investorbench}/btc.json"))
    assert crypto.closes[0] == np.datetime64("2022-11-29T23:59:59")


# News


def test_news_beside_the_bars(file, tmp_path):
    bars, beside = file("bars.csv", BARS), file("bars.news.csv", NEWS)
    market = load(DataConfig(data=f"csv:{bars}"))
    assert [(str(item.available), item.symbol, item.text) for item in market.news] == [
        ("2024-01-02T20:15:30", "A", "late in the evening"),
        ("2024-01-03T09:30:00", "", "for every symbol"),
        ("2024-01-03T23:59:59", "A", "a bare date, known at its end"),
    ]
    assert str(market.news[0].published) == "2024-01-02T20:00:00"
    frame = pd.read_csv(beside)
    for name in ("published", "available"):
        frame[name] = pd.to_datetime(frame[name], format="mixed")
    frame.to_parquet(tmp_path / "told.parquet")
    (tmp_path / "bars.news.csv").unlink()
    assert load(DataConfig(data=f"csv:{bars}")).news == ()
    told = load(DataConfig(data=f"csv:{bars}", news=f"{tmp_path}/told.parquet"))
    assert told.news == market.news


def test_news_of_a_file_is_added_to_the_source_s(file):
    bars, news = file("a.json", json.dumps(DAYS)), file("told.csv", NEWS)
    market = load(DataConfig(data=f"investorbench:{bars}", news=news))
    assert [item.text for item in market.news][:3] == ["first", "second", "late in the evening"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "2024-01-03 09:30:00",
            "2024-01-03 08:59",
            "available '2024-01-03 08:59' is before `published`",
        ),
        ("2024-01-03 09:30:00", "2024-01-03 09:30Z", "has a time zone"),
        ("2024-01-03 09:30:00", "soon", "available 'soon' is not a date (YYYY-MM-DD)"),
        ("for every symbol", "", "text '' is empty"),
    ],
)
def test_news_refused(file, old, new, message):
    news = file("told.csv", NEWS.replace(old, new))
    line = refusal(data="sample:AAPL", news=news)
    assert message in line
    assert line.endswith(f"{news} line 3")


def test_news_file_refused(file, tmp_path):
    assert refusal(data="sample:AAPL", news=f"{tmp_path}/none.csv").startswith("No such file")
    assert "no column available, symbol" in refusal(
        data="sample:AAPL", news=file("told.csv", "published,text\n2024-01-01,a\n")
    )


# Refusals


@pytest.mark.parametrize(
    ("old", "new", "message", "where"),
    [
        ("11,5.5,200", "eleven,5.5,200", "close 'eleven' is not a number", " line 3"),
        ("11,5.5,200", '"1,100",5.5,200', "close '1,100' is not a number", " line 3"),
        ("11,5.5,200", "inf,5.5,200", "close is infinite, BARS 2024-01-03", ""),
        ("11,5.5,200", "11,5.5", "6 cells under 7 names", " line 3"),
        ("11,5.5,200", '"11,5.5,200', "not CSV text (unexpected end of data)", " line 5"),
        ("11,5.5,200", "0,5.5,200", "close is not above 0, BARS 2024-01-03", ""),
        ("11,5.5,200", "-11,5.5,200", "close is not above 0, BARS 2024-01-03", ""),
        ("11,5.5,200", "13,5.5,200", "high is below open or close, BARS 2024-01-03", ""),
        ("11,5.5,200", "11,0,200", "adj_close '0' is not a finite price above 0", " line 3"),
        ("11,5.5,200", "11,5.5,-2", "volume is below 0, BARS 2024-01-03", ""),
        ("2024-01-03", "2024-01-02", "date '2024-01-02' is not after the one before", " line 3"),
        ("2024-01-03", "2024-01-01", "date '2024-01-01' is not after the one before", " line 3"),
        ("2024-01-03", "2024-13-03", "date '2024-13-03' is not a date (YYYY-MM-DD)", " line 3"),
        ("2024-01-03", "01/03/2024", "date '01/03/2024' is not a date (YYYY-MM-DD)", " line 3"),
        ("2024-01-03", "20240103", "date '20240103' is not a date (YYYY-MM-DD)", " line 3"),
        ("2024-01-03", "", "date '' is not a date (YYYY-MM-DD)", " line 3"),
        ("2024-01-03", "2024-01-03 09:31", "has a time of day: daily bars only", " line 3"),
        ("Date", "when", "no column date (bars need date,", ""),
        ("Adj Close", "close", "more than one column 'close'", ""),
    ],
)
def test_csv_refused(file, old, new, message, where):
    path = file("bars.csv", BARS.replace(old, new))
    line = refusal(data=f"csv:{path}")
    assert message in line
    assert line.endswith(path + where)


@pytest.mark.parametrize("kind", ["csv", "parquet", "investorbench"])
def test_no_such_content(file, tmp_path, kind):
    assert refusal(data=f"{kind}:{tmp_path}/none") == f"No such file or directory, {tmp_path}/none"
    assert refusal(data=f"{kind}:{tmp_path}") == f"Is a directory, {tmp_path}"
    assert refusal(data=f"{kind}:{file('empty', '')}").startswith("empty file, ")
    for content in (bytes(range(256)) * 20, b"PAR1garbagePAR1", b"\xff\xfe\x00", b"[" * 100_000):
        assert f"{tmp_path}/garbage" in refusal(data=f"{kind}:{file('garbage', content)}")


def test_csv_without_rows(file):
    assert refusal(data="csv:" + file("bars.csv", BARS.splitlines()[0])).startswith("no rows, ")


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        ("", "no symbol chosen of A, B, market csv:"),
        ("C", "unknown symbol 'C' of A, B, market csv:"),
    ],
)
def test_symbol_refused(file, symbol, message):
    assert message in refusal(data="csv:" + file("bars.csv", TWO_SYMBOLS), symbol=symbol)


def test_a_symbol_without_a_bar_is_refused_itself_alone(file):
    path = file("bars.csv", TWO_SYMBOLS + "C,2024-01-04,,,,\n")
    assert refusal(data=f"csv:{path}", symbol="C") == f"not a single bar of C, csv:{path}"
    assert load(DataConfig(data=f"csv:{path}", symbol="A")).others[0][0] == "B"


def test_symbol_without_a_name(file):
    text = TWO_SYMBOLS.replace("B,2024-01-03", ",2024-01-03")
    assert "symbol '' is empty" in refusal(data="csv:" + file("bars.csv", text), symbol="A")


def test_dates_of_each_symbol_are_checked(file):
    text = TWO_SYMBOLS.replace("B,2024-01-04", "B,2024-01-03")
    line = refusal(data="csv:" + file("bars.csv", text), symbol="A")
    assert "date '2024-01-03' is not after the one before" in line and line.endswith("line 5")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sample:TSLA", "unknown sample 'TSLA', bokeh_sampledata has AAPL, FB, GOOG, IBM, MSFT"),
        ("sample:", "unknown sample ''"),
        (
            "AAPL",
            "unknown data source, 'AAPL' (known: sample:, csv:, parquet:, invest",
        ),
        ("http://x", "unknown data source, 'http://x'"),
    ],
)
def test_source_refused(spec, message):
    assert refusal(data=spec).startswith(message)
    assert "unknown symbol 'MSFT' of AAPL" in refusal(data="sample:AAPL", symbol="MSFT")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a JSON object of dates"),
        ("{}", "not a JSON object of dates"),
        ('{"2024-01-02": 1}', "no number 'prices'"),
        ('{"2024-01-02": {"prices": "1"}}', "no number 'prices'"),
        ('{"2024-01-02": {"prices": true}}', "no number 'prices'"),
        ('{"2024-01-02": {"prices": 0}}', "open is not above 0, BARS 2024-01-02"),
        ('{"2024-01-02": {"prices": 1' + "0" * 400 + "}}", "open is infinite, BARS 2024-01-02"),
        ('{"2024-01-02": {"prices": 1, "news": "text"}}', "'news' is not a list of texts"),
        ('{"2024-01-02": {"prices": 1}, "2024-01-02": {"prices": 1}}', "repeated key '2024-01-02'"),
        (
            '{"2024-01-02": {"prices": 1}, "2024-01-01": {"prices": 1}, '
            '"2024-01-03": {"prices": 1}}',
            "is not after the one before",
        ),
        ('{"2 January": {"prices": 1}}', "date '2 January' is not a date"),
        ('{"2024-01-02T09:31": {"prices": 1}}', "daily bars only"),
    ],
)
def test_investorbench_refused(file, content, message):
    path = file("bars.json", content)
    line = refusal(data=f"investorbench:{path}")
    assert message in line and path in line


def test_parquet_refused(tmp_path):
    good = pd.DataFrame({"date": pd.to_datetime(["2024-01-02", "2024-01-03"]), "open": [1.0, 2.0]})
    good = good.assign(high=good.open, low=good.open, close=good.open)
    wrong = {
        "no rows": good.iloc[:0],
        "no column close": good.drop(columns="close"),
        "close 'x' is not a number": good.assign(close=["1", "x"]),
        "close '2024-01-02 00:00:00' is not a number": good.assign(close=good.date),
        "daily bars only": good.assign(date=good.date + pd.to_timedelta(["0h", "10h"])),
        "date '1' is not a date": good.assign(date=[1, 2]),
        "date 'NaT' is not a date": good.assign(date=[pd.NaT, good.date[1]]),
    }
    for message, frame in wrong.items():
        frame.to_parquet(tmp_path / "bars.parquet")
        line = refusal(data=f"parquet:{tmp_path}/bars.parquet")
        assert message in line and f"{tmp_path}/bars.parquet" in line


@pytest.mark.parametrize("kind", ["string", "binary"])
@pytest.mark.parametrize(
    ("file", "name"),
    [("bars", name) for name in ("date", "close", "symbol")]
    + [("bars.news", name) for name in ("published", "available", "symbol", "text")],
)
def test_parquet_texts_that_are_not_utf8(file, name, kind, tmp_path):
    dates, prices = ["2024-01-02", "2024-01-03"], [1.0, 2.0]
    bars = dict.fromkeys(("open", "high", "low", "close"), prices)
    bars |= {"date": dates, "symbol": ["A", "A"]}
    news = {"published": dates, "available": dates, "symbol": ["A", "A"], "text": ["Up", "Down"]}
    tables = {"bars": bars, "bars.news": news}
    cells = pa.array([str(tables[file][name][0]).encode(), b"\xff"])
    tables[file][name] = cells if kind == "binary" else cells.view(pa.string())
    for stem, table in tables.items():
        parquet.write_table(pa.table(table), tmp_path / f"{stem}.parquet")
    line = refusal(data=f"parquet:{tmp_path}/bars.parquet")
    told = "not Parquet (Column " if kind == "string" else f"{name} is not text ("
    assert line.startswith(told) and line.endswith(f", {tmp_path}/{file}.parquet")


@pytest.mark.parametrize("kind", ["csv", "parquet", "investorbench"])
def test_truncated_anywhere(file, kind, tmp_path):
    """Refused, unless a CSV file happens to be cut within its last column: nothing shows that."""
    if kind == "parquet":
        pd.read_csv(file("whole.csv", BARS)).to_parquet(tmp_path / "whole")
    else:
        file("whole", BARS if kind == "csv" else json.dumps(DAYS))
    content = (tmp_path / "whole").read_bytes()
    for length in range(0, len(content), max(1, len(content) // 150)):
        path = file("cut", content[:length])
        complete = content[:length].decode(errors="ignore").splitlines()
        if kind == "csv" and len(complete) > 1 and complete[-1].count(",") == 6:
            assert len(load(DataConfig(data=f"csv:{path}")).dates) == len(complete) - 1
        else:
            assert path in refusal(data=f"{kind}:{path}")


def test_importing_the_arrays_imports_no_reader():
    code = (
        "import sys, fastflag.market.bars, fastflag.market.metrics\n"
        "assert not {'pandas', 'numba', 'torch', 'pyarrow'} & sys.modules.keys()\n"
        "import fastflag.market.sources, fastflag.market.features\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
