"""Bars as files have them: names, separators, encodings, orders, missing and impossible bars."""

import bz2
import gzip
import json
import logging
import lzma
import random
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from market_files import PRICES, adjusted_close, raw_bars, scaled

from fastflag.cli import main
from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market.bars import Market
from fastflag.market.sources import load

Content = str | bytes | pd.DataFrame
BARS = raw_bars(40)[["date", *PRICES, "volume"]]
OTHER = scaled(BARS, np.full(40, 0.1)).round(dict.fromkeys(PRICES, 6))
TEXT = BARS.to_csv(index=False)
NO_BAR = ["null", "None", "NA", "N/A", "-", "#N/A", "nan", "NaN", "<NA>", "", " ", "--", "#N/A N/A"]


@pytest.fixture
def read(tmp_path):
    """The market of a file of some content; of kind parquet: of a frame."""

    def market(content: Content, symbol: str = "", name: str = "A.csv") -> Market:
        path = tmp_path / name
        if isinstance(content, pd.DataFrame):
            path = path.with_suffix(".parquet")
            content.to_parquet(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        kind = "parquet" if path.suffix == ".parquet" else "csv"
        return load(DataConfig(data=f"{kind}:{path}", symbol=symbol))

    return market


@pytest.fixture
def refusal(read):
    def line(content: Content, **named: str) -> str:
        with pytest.raises(InputError) as caught:
            read(content, **named)
        assert str(caught.value).isprintable()
        return str(caught.value)

    return line


def is_of(market: Market, bars: pd.DataFrame, symbol: str = "A") -> None:
    assert market.symbols == (symbol,)
    np.testing.assert_array_equal(market.dates, bars["date"].to_numpy().astype("datetime64[D]"))
    for name in PRICES:
        np.testing.assert_array_equal(getattr(market, name)[:, 0], bars[name])
    if "volume" in bars:
        np.testing.assert_array_equal(market.volume[:, 0], bars["volume"])
    assert (market.split == 1).all() and (market.dividend == 0).all()


# Names


def named(*names: str) -> str:
    return BARS.set_axis(names, axis=1).to_csv(index=False)


@pytest.mark.parametrize(
    "names",
    [
        "Date|Open|High|Low|Close|Volume",
        "Datetime|Open|High|Low|Close|Volume",
        "timestamp|open|high|low|close|volume",
        "time|open|high|low|close|Volume",
        "trade_date|open|high|low|close|vol",
        "day| Open| High| Low| Close| Vol.",
        "Date/Time|OPEN|HIGH|LOW|CLOSE|VOLUME",
        "ts|o|h|l|c|v",
        "t|o|h|l|c|v",
        "date|1. open|2. high|3. low|4. close|5. volume",
        "<DATE>|<OPEN>|<HIGH>|<LOW>|<CLOSE>|<VOL>",
        "Date|Open|High|Low|Close/Last|Volume",
        "Date|Open|High|Low|Price|Vol.",
        "Date|Open|High|Low|Settle|Volume",
        "Open time|Open|High|Low|Close|Volume",
        "|Open|High|Low|Close|Volume",
        "Unnamed: 0|Open|High|Low|Close|Volume",
        "index|open|high|low|close|volume",
        "Date|BTC-USD_open|BTC-USD_high|BTC-USD_low|BTC-USD_close|BTC-USD_volume",
        "Index|AAPL.Open|AAPL.High|AAPL.Low|AAPL.Close|AAPL.Volume",
        "Date|Open_AAPL|High_AAPL|Low_AAPL|Close_AAPL|Volume_AAPL",
        "Date|('Open', 'X')|('High', 'X')|('Low', 'X')|('Close', 'X')|('Volume', 'X')",
    ],
)
def test_names(names, read):
    market = read(named(*names.split("|")))
    is_of(market, BARS, market.symbols[0])
    assert market.symbols[0] in ("A", "AAPL", "BTC-USD", "X")


@pytest.mark.parametrize(
    "name", ["symbol", "ticker", "Symbol", "Ticker", "tic", "Name", "code", "instrument", "ts_code"]
)
def test_names_of_symbols(name, read):
    both = pd.concat([BARS.assign(**{name: "A"}), OTHER.assign(**{name: "B"})])
    is_of(read(both.to_csv(index=False), symbol="B"), OTHER, "B")


def test_a_company_s_name_beside_its_symbol(read, caplog):
    frame = BARS.assign(symbol="A", Name="Agilent")
    is_of(read(frame.to_csv(index=False)), BARS)
    assert "columns that are not used: Name, " in caplog.text


def test_short_names_beside_full_ones(read, caplog):
    is_of(read(BARS.assign(day=3, t=1, c="x", index=0).to_csv(index=False)), BARS)
    assert "columns that are not used: day, t, c, index, " in caplog.text


def test_a_counter_beside_the_date(read):
    is_of(read(BARS.to_csv()), BARS)


def test_stooq(read):
    frame = BARS.assign(date=BARS["date"].dt.strftime("%Y%m%d"))
    frame = frame.set_axis(["<DATE>", "<OPEN>", "<HIGH>", "<LOW>", "<CLOSE>", "<VOL>"], axis=1)
    frame.insert(0, "<TICKER>", "A.US")
    frame.insert(1, "<PER>", "D")
    frame.insert(3, "<TIME>", "000000")
    is_of(read(frame.assign(**{"<OPENINT>": 0}).to_csv(index=False)), BARS, "A.US")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("Date|timestamp|high|low|close|volume", "'date': 'Date' and 'timestamp', "),
        ("Date|open|high|Close|close|volume", "'close': 'Close' and 'close', "),
        ("Date|open|high|low|Close|Close Price", "'close': 'Close' and 'Close Price', "),
        ("when|open|high|low|close|volume", "no column date (bars need date, "),
        ("date|x|y|z|close|volume", "no column open, high, low (bars need date, open, high, "),
    ],
)
def test_names_refused(names, told, refusal):
    line = refusal(named(*names.split("|")))
    assert told in line and line.endswith("A.csv")


def test_close_prices_alone(refusal):
    line = refusal(BARS[["date", "close"]].to_csv(index=False))
    assert line.startswith(
        "no column open, high, low (bars need date, open, high, low, close; there are date, close),"
    )


# Tables with two rows of names


def yfinance(frames: dict[str, pd.DataFrame], by_ticker: bool) -> pd.DataFrame:
    joined = pd.concat({name: bars.set_index("date") for name, bars in frames.items()}, axis=1)
    joined = joined.rename(columns=str.title, level=1).rename_axis("Date")
    joined.columns.names = ["Ticker", "Price"]
    return joined if by_ticker else joined.swaplevel(axis=1).sort_index(axis=1)


@pytest.mark.parametrize("by_ticker", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        lambda table: table.to_csv(),
        lambda table: table.rename_axis(columns=[None, None]).to_csv(),
        lambda table: table.reset_index().to_csv(index=False),
        lambda table: table.rename_axis(None).to_csv(),
        lambda table: table.set_axis(["_".join(pair) for pair in table], axis=1).to_csv(),
        lambda table: table.set_axis([str(tuple(pair)) for pair in table], axis=1).to_csv(),
        lambda table: pd.read_csv(StringIO(table.to_csv())).to_csv(index=False),
        lambda table: table.set_axis([str(tuple(pair)) for pair in table], axis=1),
    ],
)
def test_yfinance(write, by_ticker, read):
    late = OTHER.iloc[3:].reset_index(drop=True)
    is_of(read(write(yfinance({"AAPL": BARS}, by_ticker))), BARS, "AAPL")
    both = write(yfinance({"AAPL": BARS, "0700.HK": late}, by_ticker))
    is_of(read(both, symbol="AAPL"), BARS, "AAPL")
    is_of(read(both, symbol="0700.HK"), late, "0700.HK")


def test_yfinance_with_adjusted_closes(read):
    raw = raw_bars()
    bars = raw[["date", *PRICES, "volume"]].assign(**{"Adj Close": adjusted_close(raw)})
    market = read(yfinance({"A": bars}, False).to_csv())
    assert market.split[80, 0] == 4 and np.count_nonzero(market.dividend) == 2


def test_two_rows_of_names_without_bars(refusal):
    header = "".join(yfinance({"A": BARS}, False).to_csv().splitlines(keepends=True)[:3])
    assert refusal(header).startswith("no rows, ")


# Text


@pytest.mark.parametrize("separator", [";", "\t", "|", ", ", " ; "])
@pytest.mark.parametrize("decimal", [".", ","])
def test_separators(separator, decimal, read):
    rows = [line.split(",") for line in TEXT.splitlines()]
    if decimal == ",":
        if separator == ", ":
            pytest.skip("a comma can't be both")
        rows[1:] = [[cell.replace(".", ",") for cell in row] for row in rows[1:]]
    is_of(read("\n".join(separator.join(row) for row in rows)), BARS)


def test_excel_s_first_line(read):
    is_of(read("sep=;\n" + TEXT.replace(",", ";")), BARS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("date;open;high;low;close\n2024-01-02;1,5;2;1;1.5\n", "close '1.5' has a point among"),
        (
            "date;open;high;low;close\n2024-01-02;1.100,5;2;1;1\n",
            "open '1.100,5' has a point among",
        ),
        ('date,open,high,low,close\n2024-01-02,"1,100",2,1,1\n', "open '1,100' is not a number"),
        (
            "date;open;high;low;close\n2024-01-02;1,100,000;2;1;1\n",
            "open '1.100.000' is not a numb",
        ),
    ],
)
def test_thousands_are_refused(text, told, refusal):
    line = refusal(text)
    assert told in line and line.endswith(" line 2")


def test_a_currency_s_sign(read):
    frame = BARS.assign(**{name: "$" + BARS[name].astype(str) for name in PRICES})
    is_of(read(frame.to_csv(index=False)), BARS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_encodings(encoding, line_end, read):
    is_of(read(TEXT.replace("\n", line_end).encode(encoding)), BARS)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_compressed(suffix, pack, read, refusal, tmp_path):
    packed = pack(TEXT.encode())
    (tmp_path / "A.news.csv").write_text(f"published,available,symbol,text\n{DAY},{DAY},A,Up\n")
    market = read(packed, name=f"A.csv{suffix}")
    is_of(market, BARS)
    assert [item.text for item in market.news] == ["Up"]
    line = refusal(packed[: len(packed) // 2], name=f"A.csv{suffix}")
    assert line.startswith("compressed, but damaged (") and line.endswith(f"A.csv{suffix}")
    days = {str(day)[:10]: {"prices": 1.5} for day in BARS["date"]}
    (tmp_path / f"B.json{suffix}").write_bytes(pack(json.dumps(days).encode()))
    market = load(DataConfig(data=f"investorbench:{tmp_path}/B.json{suffix}"))
    assert market.symbols == ("B",) and (market.close == 1.5).all()


@pytest.mark.parametrize("name", ["A.news.csv.gz", "A.NEWS.CSV", "A.news.parquet"])
def test_news_is_found_compressed_and_in_capitals(name, read, tmp_path):
    table = pd.DataFrame(
        [[DAY, DAY, "A", "Up"]], columns=["published", "available", "symbol", "text"]
    )
    text = table.to_csv(index=False).encode()
    if name.endswith("parquet"):
        table.to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert [item.text for item in read(TEXT).news] == ["Up"]


def test_news_that_is_no_file_or_there_twice_is_refused(refusal, tmp_path):
    (tmp_path / "A.news.csv").mkdir()
    assert refusal(TEXT) == f"not a file, {tmp_path}/A.news.csv"
    (tmp_path / "A.news.csv").rmdir()
    (tmp_path / "A.news.csv").symlink_to(tmp_path / "nowhere")
    assert refusal(TEXT) == f"not a file, {tmp_path}/A.news.csv"
    (tmp_path / "A.news.parquet").touch()
    assert refusal(TEXT).startswith("several files of news: name one, --news, ")


def test_columns_of_news_that_are_not_used_are_told(read, tmp_path, caplog):
    head = "published,available,symbol,text,embargo"
    (tmp_path / "A.news.csv").write_text(f"{head}\n{DAY},{DAY},A,Up,{DAY}\n")
    with caplog.at_level(logging.WARNING):
        read(TEXT)
    assert f"columns that are not used: embargo, {tmp_path}/A.news.csv" in caplog.text


def test_thousands_beside_plain_numbers_are_no_decimals(read, refusal):
    """999 and then 1,001, in cells that tabs separate: a loss of 99.9%."""
    rows = [
        f"2019-01-0{day}\t{price}" + f"\t{price}" * 3 for day, price in ((2, 999), (3, "1,001"))
    ]
    text = "date\topen\thigh\tlow\tclose\n" + "\n".join(rows)
    assert refusal(text).startswith(
        "open '1,001' is a decimal comma or thousands, which can't be told"
    )
    market = read(text.replace("999", "0,999"))
    np.testing.assert_array_equal(market.close[:, 0], [0.999, 1.001])
    market = read(text.replace("999", "1000,5"))
    np.testing.assert_array_equal(market.close[:, 0], [1000.5, 1.001])


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "A.csv").write_text(TEXT)
    (tmp_path / "A.news.csv").write_text(f"published,available,symbol,text\n{DAY},{DAY},A,Up\n")
    (tmp_path / "B.json").write_text('{"2024-01-02": {"prices": 1}, "2024-01-03": {"prices": 2}}')
    BARS.to_parquet(tmp_path / "A.parquet")
    for data in ("csv:~/A.csv", "parquet:~/A.parquet"):
        market = load(DataConfig(data=data))
        is_of(market, BARS)
        assert [item.text for item in market.news] == ["Up"]
    told = load(DataConfig(data="csv:~/A.csv", news="~/A.news.csv"))
    assert len(told.news) == 1
    assert len(load(DataConfig(data="investorbench:~/B.json")).dates) == 2
    with pytest.raises(InputError, match=r"no such user's home folder, ~nobody-here/A.csv"):
        load(DataConfig(data="csv:~nobody-here/A.csv"))


DAY = "2019-01-03 10:00"


@pytest.mark.parametrize(
    "write",
    [
        lambda bars: bars.set_index("date"),
        lambda bars: bars.set_index("date").rename_axis(None),
        lambda bars: bars.assign(symbol="A").set_index(["symbol", "date"]),
        lambda bars: (
            bars.assign(symbol="A").set_index(["date", "symbol"]).rename_axis([None, None])
        ),
        lambda bars: bars.assign(symbol=pd.Categorical(["A"] * 40)),
        lambda bars: bars.iloc[::-1],
    ],
)
def test_parquet(write, read):
    is_of(read(write(BARS)), BARS)


# Orders, missing and impossible bars


def test_newest_first(read, refusal):
    is_of(read(BARS.iloc[::-1].to_csv(index=False)), BARS)
    both = pd.concat([BARS.assign(symbol="A"), OTHER.assign(symbol="B")])
    mixed = both.sort_values("date", ascending=False, kind="stable").to_csv(index=False)
    is_of(read(mixed, symbol="B"), OTHER, "B")
    is_of(read(pd.concat([both[:40], both[40:][::-1]]).to_csv(index=False), symbol="B"), OTHER, "B")
    twice = BARS.iloc[[*range(39, 19, -1), 20, *range(19, -1, -1)]].to_csv(index=False)
    line = refusal(twice)
    assert "is not before the one above it, where the newest row is first" in line
    assert line.endswith(" line 22")


def test_newest_first_keeps_news_with_its_day(tmp_path):
    days = {f"2024-01-0{n}": {"prices": float(n), "news": [f"of {n}"]} for n in (4, 3, 2)}
    (tmp_path / "A.json").write_text(json.dumps(days))
    market = load(DataConfig(data=f"investorbench:{tmp_path}/A.json"))
    np.testing.assert_array_equal(market.close[:, 0], [2, 3, 4])
    assert [(str(item.available)[:10], item.text) for item in market.news] == [
        (f"2024-01-0{n}", f"of {n}") for n in (2, 3, 4)
    ]


@pytest.mark.parametrize("cell", NO_BAR)
def test_missing_bars(cell, read):
    frame = BARS.astype(dict.fromkeys([*PRICES, "volume"], object))
    frame.loc[5, [*PRICES, "volume"]] = cell
    expected = BARS.astype({"volume": float})
    expected.loc[5, [*PRICES, "volume"]] = np.nan
    is_of(read(frame.to_csv(index=False)), expected)


@pytest.mark.parametrize("off", [1e-15, 1e-9, 9e-7])
def test_rounding_noise_is_clipped(off, read, caplog):
    frame = BARS.copy()
    frame.loc[3, "high"] = frame.loc[3, ["open", "close"]].max() * (1 - off)
    frame.loc[7, "low"] = frame.loc[7, ["open", "close"]].min() * (1 + off)
    expected = frame.copy()
    expected.loc[3, "high"] = frame.loc[3, ["open", "close"]].max()
    expected.loc[7, "low"] = frame.loc[7, ["open", "close"]].min()
    is_of(read(frame.to_csv(index=False)), expected)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "value"),
    [("open", 0), ("close", -1), ("high", 1), ("low", 10**6), ("low", 0)],
)
def test_a_few_bars_that_cannot_be_are_missing(name, value, read, refusal, caplog):
    frame = raw_bars(80)[["date", *PRICES, "volume"]].astype({"volume": float})
    frame = pd.concat([frame, raw_bars(160)[80:][frame.columns]])
    frame.loc[9, name] = value
    expected = frame.copy()
    expected.loc[9, PRICES] = np.nan
    is_of(read(frame.to_csv(index=False)), expected)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "bars that can't be (a price not above 0, a high or low that open or close exceeds), taken "
        "as missing: 1, A 2019-01-15, "
    )
    frame.loc[20, name] = value  # 2 of 160
    line = refusal(frame.to_csv(index=False))
    assert "A 2019-01-15, and 2 of 1" in line and "bars are like it, " in line


def test_other_symbols_prices_stop_nobody(read, refusal, caplog):
    wrong = OTHER.assign(symbol="B", open=-1.0, split=3.0)
    text = pd.concat([wrong, BARS.assign(symbol="A")]).to_csv(index=False)
    market = read(text, symbol="A")
    is_of(market, BARS)
    assert market.others == (("B", np.datetime64("2019-01-02")),) and not caplog.records
    assert "open is not above 0, B 2019-01-02, and 40 of 40 bars are like it" in refusal(
        text, symbol="B"
    )


# Whatever a file holds


def test_half_a_character(tmp_path):
    for content in (
        '{"\\ud800": {"prices": 1.5}}',
        '{"2024-01-02": {"prices": 1.5, "news": ["\\udfff"]}}',
    ):
        (tmp_path / "A.json").write_text(content)
        with pytest.raises(InputError, match="surrogates not allowed") as caught:
            load(DataConfig(data=f"investorbench:{tmp_path}/A.json"))
        assert str(caught.value).isprintable()


def mutated(content: bytes, random: random.Random) -> bytes:
    """A few bytes changed, dropped or doubled, or pieces of what files hold put in."""
    pieces = [b"\x00", b"\xff", b"\\ud800", b'"', b"\n", b"\r", b",", b";", b"nan", b"-1", b"1e999"]
    pieces += [
        b"inf",
        b"0",
        b"split",
        b"Adj Close",
        b"date",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"[]",
    ]
    for _ in range(random.randint(1, 4)):
        at, length = random.randrange(len(content) + 1), random.choice([0, 0, 1, 3, 40])
        part = content[at : at + length]
        put = random.choice([b"", part * 2, random.choice(pieces), random.randbytes(2)])
        content = content[:at] + put + content[at + length :]
    return content


def originals(folder: Path) -> dict[str, bytes]:
    raw = raw_bars(20)
    raw.head(5).to_parquet(folder / "whole.parquet")
    table = yfinance({"A": BARS.head(6), "B": OTHER.head(6)}, False)
    days = {str(day)[:10]: {"prices": 1.5, "news": ["Up \u00a3"]} for day in BARS["date"].head(6)}
    return {
        "csv": raw.head(8).assign(adj_close=raw["close"]).to_csv(index=False).encode(),
        "wide.csv": table.to_csv().encode(),
        "semicolon.csv": BARS.head(8).to_csv(index=False, sep=";", decimal=",").encode(),
        "utf16.csv": BARS.head(8).to_csv(index=False).encode("utf-16"),
        "csv.gz": gzip.compress(TEXT.encode()),
        "json": json.dumps(days).encode(),
        "parquet": (folder / "whole.parquet").read_bytes(),
    }


@pytest.mark.parametrize(
    "kind", ["csv", "wide.csv", "semicolon.csv", "utf16.csv", "csv.gz", "json", "parquet"]
)
def test_mutated_files_are_read_or_refused_in_one_line(kind, tmp_path):
    content, path = originals(tmp_path)[kind], tmp_path / f"A.{kind}"
    symbol = "A" if kind == "wide.csv" else ""
    spec = {"json": "investorbench", "parquet": "parquet"}.get(kind, "csv")
    read = 0
    for seed in range(150):
        path.write_bytes(mutated(content, random.Random(seed)))
        try:
            read += isinstance(load(DataConfig(data=f"{spec}:{path}", symbol=symbol)), Market)
        except InputError as error:
            line = str(error)
            assert line.isprintable() and str(path) in line, (seed, line)
    assert 0 < read < 150


# Bars in the shapes of public exports


# With dividends reinvested: -9.237% is what adj_close loses from the first row to the last.
CASES: dict[str, tuple[float, float]] = {
    "base": (-9.399, -0.834),
    "adj_close": (-9.237, -0.818),
    "alphavantage_date": (-9.237, -0.818),
    "tiingo": (-9.237, -0.818),
    "float_noise": (-9.399, -0.834),
    "newest_first": (-9.399, -0.834),
    "unnamed_index": (-9.399, -0.834),
    "yfinance_three_headers": (-9.399, -0.834),
    "yahoo_null": (-9.399, -0.831),
}


@pytest.mark.parametrize("name", CASES)
def test_public_shapes(name, cases, capsys):
    main(["metrics", "--data", f"csv:{cases / name}.csv", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["cr"], found["sr"]) == pytest.approx(CASES[name], abs=6e-4)


def test_missing_bars_of_yahoo_are_those_without_a_price(cases):
    base, found = (
        load(DataConfig(data=f"csv:{cases / name}.csv")) for name in ("base", "yahoo_null")
    )
    missing = np.isnan(found.close[:, 0])
    assert [str(date) for date in found.dates[missing]] == ["2019-01-29", "2019-04-18"]
    np.testing.assert_array_equal(found.close[~missing], base.close[~missing])


def test_pandas_row_numbers_are_no_symbols(tmp_path):
    """A frame that was filtered keeps its row numbers, which Parquet stores as a column."""
    frame = pd.DataFrame(
        {"date": pd.bdate_range("2024-01-01", periods=9), "open": 1.0, "close": 1.0}
    )
    frame = frame.assign(high=1.0, low=1.0).drop(index=[4])
    frame.to_parquet(tmp_path / "bars.parquet")
    market = load(DataConfig(data=f"parquet:{tmp_path / 'bars.parquet'}"))
    assert market.symbols == ("BARS",) and len(market.dates) == 8
