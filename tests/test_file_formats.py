"""Files that are not what their names end in: read by their first bytes, or refused by name."""

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from market_files import PRICES, raw_bars

from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market.sources import load

BARS = raw_bars(40)[["date", *PRICES, "volume"]]
TEXT = BARS.to_csv(index=False)
DAY = "2019-01-03 10:00"
NEWS = f"published,available,symbol,text\n{DAY},{DAY},A,Up £\n"


def close_of(path: Path, kind: str = "csv") -> list[float]:
    return load(DataConfig(data=f"{kind}:{path}")).close[:, 0].tolist()


def zipped(**files: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return held.getvalue()


def tarred(name: str, text: str) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text.encode()))
    return held.getvalue()


WORKBOOK = {"[Content_Types].xml": "<Types/>", "xl/workbook.xml": "<workbook/>"}
SHEETS = {"mimetype": "application/vnd.oasis.opendocument.spreadsheet", "content.xml": "<x/>"}
OTHERS = {
    "zip": (zipped(**{"AAPL.csv": TEXT}), "a zip archive: unpack it and name the file inside"),
    "empty zip": (zipped(), "a zip archive: unpack it and name the file inside"),
    "xlsx": (zipped(**WORKBOOK), "a workbook, as Excel writes: save its sheet as CSV"),
    "xls": (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504),
        "a workbook, as Excel writes: save its sheet as CSV",
    ),
    "tar.gz": (
        gzip.compress(tarred("AAPL.csv", TEXT)),
        "a tar archive: unpack it and name the file inside",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("kind", "end"),
    [("csv", "csv"), ("csv", "zip"), ("parquet", "parquet"), ("investorbench", "json")],
)
def test_archives_and_workbooks_are_refused_as_what_they_are(name, kind, end, tmp_path):
    content, told = OTHERS[name]
    path = tmp_path / f"A.{end}"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(DataConfig(data=f"{kind}:{path}"))
    assert str(caught.value) == f"{told}, {path}"


def test_news_in_an_archive_is_refused(tmp_path):
    (tmp_path / "A.csv").write_text(TEXT)
    (tmp_path / "A.news.csv").write_bytes(zipped(news=NEWS))
    with pytest.raises(InputError, match=r"^a zip archive: unpack it .*A\.news\.csv$"):
        load(DataConfig(data=f"csv:{tmp_path}/A.csv"))


def test_a_sheet_of_open_document_is_a_workbook(tmp_path):
    path = tmp_path / "A.csv"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, text in SHEETS.items():
            archive.writestr(name, text)
    with pytest.raises(InputError, match="a workbook"):
        load(DataConfig(data=f"csv:{path}"))


@pytest.mark.parametrize("name", ["A.csv", "A.csv.gz", "A.txt"])
def test_parquet_and_gzip_under_another_name_are_read(name, tmp_path):
    path = tmp_path / name
    BARS.to_parquet(path)
    assert close_of(path) == BARS["close"].tolist()
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert close_of(path) == BARS["close"].tolist()
    path.write_bytes(gzip.compress(TEXT.encode()))
    assert close_of(path) == BARS["close"].tolist()


@pytest.mark.parametrize(
    "encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-8", "utf-8-sig", "utf-16"]
)
def test_encodings_without_a_mark(encoding, tmp_path):
    (tmp_path / "A.csv").write_bytes(TEXT.encode(encoding))
    (tmp_path / "A.news.csv").write_bytes(NEWS.encode(encoding))
    market = load(DataConfig(data=f"csv:{tmp_path}/A.csv"))
    np.testing.assert_array_equal(market.close[:, 0], BARS["close"])
    assert [item.text for item in market.news] == ["Up £"]
    (tmp_path / "B.json").write_bytes('{"2024-01-02": {"prices": 1.5}}'.encode(encoding))
    assert close_of(tmp_path / "B.json", "investorbench") == [1.5]
