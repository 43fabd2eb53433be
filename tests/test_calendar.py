"""A symbol's days, closing time, periods, prompts and figures are its own, whatever else its file
holds; and they are as they are told where they are told."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fastflag import cli
from fastflag.config import DataConfig, PromptConfig, SimulatorConfig
from fastflag.market.periods import split_days
from fastflag.market.sources import load
from fastflag.model.weights import open_weights
from fastflag.prompt.tokens import Tokenizer
from fastflag.prompt.world import World

ARRAYS = ("dates", "open", "high", "low", "close", "volume", "split", "dividend")


@pytest.fixture
def tokenizer(smollm):
    return Tokenizer.load(open_weights(smollm).tokenizer_path)


@pytest.fixture
def stock_and_coin(tmp_path) -> dict[str, str]:
    """The files: a stock of 40 weekdays, two rows of it empty and a holiday without one; a coin of
    every day from three days later on; and both. Each with news, the stock's in the evening too."""
    random = np.random.default_rng(5)

    def bars(symbol, dates):
        close = 50 * np.exp(np.cumsum(random.normal(0, 0.03, len(dates))))
        prices = dict.fromkeys(("open", "high", "low", "close"), close)
        return pd.DataFrame({"date": dates, "symbol": symbol, **prices, "volume": 1e6})

    weekdays = np.busday_offset("2024-01-01", np.arange(40)).astype("datetime64[D]")
    stock = bars("STOCK", np.delete(weekdays, 12))
    stock.loc[[7, 20], ["open", "high", "low", "close", "volume"]] = np.nan
    coin = bars("COIN", np.arange(weekdays[0] + 3, weekdays[-1] + 20))
    files = {"stock": stock, "coin": coin, "both": pd.concat([coin, stock]).sort_values("date")}
    news = [
        (f"{day} {time}", symbol, f"{symbol} item {number} of {day.astype(int)} at {time}")
        for day in np.arange(weekdays[0], weekdays[-1])
        for number, (symbol, time) in enumerate(
            [("STOCK", "09:10:00"), ("COIN", "12:00:00"), ("STOCK", "21:00:00"), ("", "23:00:00")]
        )
    ]
    for name, frame in files.items():
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
        items = [item for item in news if item[1] in ("", *frame["symbol"])]
        times, symbols, texts = zip(*items, strict=True)
        table = {"published": times, "available": times, "symbol": symbols, "text": texts}
        pd.DataFrame(table).to_csv(tmp_path / f"{name}.news.csv", index=False)
    return {name: f"csv:{tmp_path}/{name}.csv" for name in files}


@pytest.mark.parametrize("symbol", ["STOCK", "COIN"])
def test_the_file_s_other_symbols_change_nothing(symbol, stock_and_coin, tokenizer, capsys):
    alone = load(DataConfig(data=stock_and_coin[symbol.lower()]))
    beside = load(DataConfig(data=stock_and_coin["both"], symbol=symbol))
    for name in ARRAYS:
        assert getattr(alone, name).tobytes() == getattr(beside, name).tobytes(), name
    assert (alone.calendar, alone.close_time) == (beside.calendar, beside.close_time)
    assert alone.closes.tobytes() == beside.closes.tobytes()
    assert split_days(alone, "", "") == split_days(beside, "", "")
    rules = SimulatorConfig(fill="same_close")
    for config in (PromptConfig(window=3), PromptConfig(window=3, anonymise=False)):
        worlds = [World.of(config, each, symbol, rules, tokenizer, 0) for each in (alone, beside)]
        for day in range(len(alone.dates)):
            texts = [world.prompter.prefix_text(day) for world in worlds]
            assert texts[0] == texts[1]
        assert worlds[0].task.bars.matrix.tobytes() == worlds[1].task.bars.matrix.tobytes()
    figures = []
    for words in ([stock_and_coin[symbol.lower()]], [stock_and_coin["both"], "--symbol", symbol]):
        cli.main(["metrics", "--json", "--data", *words])
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0] == figures[1]


def test_a_stock_beside_a_coin_is_decided_at_its_close(stock_and_coin, tokenizer):
    market = load(DataConfig(data=stock_and_coin["both"], symbol="STOCK"))
    assert (market.calendar, market.close_time) == ("stock", np.timedelta64(16 * 3600, "s"))
    # Empty rows are days without a bar, days without a row are none; the other's are none either.
    assert len(market.dates) == 39 and np.isnan(market.close[[7, 20], 0]).all()
    named = PromptConfig(window=3, anonymise=False)
    teller = World.of(named, market, "STOCK", SimulatorConfig(), tokenizer, 0).prompter
    day = 5
    text = teller.prefix_text(day).split("Earlier")[0]
    number = market.dates[day].astype(int)
    assert f"item 0 of {number} at" in text and f"item 2 of {number - 1} at" in text
    assert f"item 2 of {number} at" not in text and f"item 3 of {number} at" not in text


def test_the_other_symbol_s_name_is_hidden_from_its_first_bar_on(tmp_path, tokenizer):
    dates = np.busday_offset("2024-01-01", np.arange(6)).astype(str)
    rows = [f"{date},ONE,1,1,1,1" for date in dates] + ["2024-01-06,OTHR,1,1,1,1"]  # a Saturday
    (tmp_path / "bars.csv").write_text("date,symbol,open,high,low,close\n" + "\n".join(rows) + "\n")
    news = [f"{date},{date} 10:00,,OTHR sues ({number})" for number, date in enumerate(dates)]
    text = "published,available,symbol,text\n" + "\n".join(news) + "\n"
    (tmp_path / "bars.news.csv").write_text(text)
    market = load(DataConfig(data=f"csv:{tmp_path}/bars.csv", symbol="ONE"))
    config = PromptConfig(window=2)
    teller = World.of(config, market, "ONE", SimulatorConfig(), tokenizer, 0).prompter
    told = [teller.headlines(day)[0][0] for day in range(6)]
    assert told == [f"OTHR sues ({number}" + ")" for number in range(5)] + [
        "another asset sues (5)"
    ]


def test_a_stock_filled_up_to_every_day_is_the_stock(stock_and_coin, tmp_path, capsys):
    """As `asfreq("D")` writes it: weekends are no days, its other empty rows are missing bars."""
    path = stock_and_coin["stock"].removeprefix("csv:")
    frame = pd.read_csv(path, parse_dates=["date"]).set_index("date")
    frame.asfreq("D").assign(symbol="STOCK").to_csv(tmp_path / "filled.csv")
    market, filled = (
        load(DataConfig(data=f"csv:{each}")) for each in (path, f"{tmp_path}/filled.csv")
    )
    holiday = np.datetime64("2024-01-17")
    assert filled.dates.tolist() == sorted([*market.dates.tolist(), holiday.item()])
    assert np.isnan(filled.close[filled.dates == holiday]).all()
    assert (filled.calendar, filled.closes[0]) == ("stock", market.closes[0])


def test_what_is_told_goes_over_what_is_found(stock_and_coin, capsys):
    stock = DataConfig(data=stock_and_coin["stock"])
    told = load(dataclasses.replace(stock, calendar="crypto", close_time="09:30"))
    assert (told.calendar, told.close_time) == ("crypto", np.timedelta64(34_200, "s"))
    values = {}
    for calendar in ("auto", "stock", "crypto"):
        words = ["--data", stock_and_coin["stock"], "--calendar", calendar]
        cli.main(["metrics", "--json", *words])
        values[calendar] = json.loads(capsys.readouterr().out)["av"]
    assert values["auto"] == values["stock"]
    assert values["crypto"] / values["stock"] == pytest.approx((365 / 252) ** 0.5)


def test_news_of_a_date_s_close_is_of_the_close_that_is_told(tmp_path):
    """InvestorBench's dates have no times: their news comes with the close."""
    days = {f"2024-01-0{day}": {"prices": 1.0 + day, "news": ["told"]} for day in (2, 3, 4)}
    (tmp_path / "one.json").write_text(json.dumps(days))
    market = load(DataConfig(data=f"investorbench:{tmp_path}/one.json", close_time="13:00"))
    assert [item.available for item in market.news] == market.closes.tolist()
    assert str(market.closes[0]) == "2024-01-02T13:00:00"


def test_sunday_to_thursday_is_no_coin(cases, capsys):
    found = []
    for name in ("tel_aviv", "same_prices_mon_fri"):
        cli.main(["metrics", "--json", "--data", f"csv:{cases / name}.csv"])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and round(found[0]["sr"], 3) == 1.411


def test_weekly_bars_are_refused(cases, refused):
    path = cases / "weekly.csv"
    assert refused("metrics", "--data", f"csv:{path}") == (
        f"weekly bars (a bar every 7 days): FastFLAG trades daily bars, csv:{path}"
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--calendar", "lunar"], "Expected one of ('auto', 'stock', 'crypto')"),
        (["--timezone", "Mars/Phobos"], "--timezone 'Mars/Phobos'"),
    ],
)
def test_refused_flags(flags, told, refused):
    assert told in refused("metrics", *flags)
    assert told in refused("train", "--out", "never", *flags)
    assert "--close-time '4pm'" in refused("train", "--out", "never", "--close-time", "4pm")
    assert not Path("never").exists()
