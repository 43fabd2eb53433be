"""Nothing after a day's close bears on anything up to it, through the whole stack.

Everything after day t is changed: bars, holes, splits, dividends, news. Then every prompt, mask,
probability and action up to t, and every reward and account up to the close of t, must be the same,
bit for bit. Leaks planted on purpose show that the comparison sees them.
"""

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import make_opinionated

from fastflag.config import DataConfig, PolicyConfig, PromptConfig, SimulatorConfig
from fastflag.evaluate import episodes
from fastflag.evaluate.decide import decide
from fastflag.market.bars import Bars, Market, News
from fastflag.market.sources import load
from fastflag.market.tasks.single import Single
from fastflag.model.weights import open_weights
from fastflag.policy.table import Policy
from fastflag.prompt import day_texts
from fastflag.prompt.tokens import Tokenizer
from fastflag.prompt.world import World

DAYS = 26  # indicators of 20 bars are told
EPISODES = 2
LATE = 22
PRICES = ("open", "high", "low", "close")
WORDS = ("Profit", "Loss", "Merger", "Recall", "Guidance", "Record", "Inquiry", "Strike")


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclasses.dataclass
class Stack:
    """One policy, and the worlds that it is put into."""

    policy: Policy
    tokenizer: Tokenizer

    def world(self, market: Market, prompt: PromptConfig, rules: SimulatorConfig) -> World:
        return World.of(prompt, market, market.symbols[0], rules, self.tokenizer, seed=5)


@pytest.fixture(scope="module", params=[1, 2])
def stack(tiny_model, request) -> Stack:
    """With one layer trained, and with two: attention between a prefix's tokens too."""
    weights = open_weights(str(tiny_model))
    tokenizer = Tokenizer.load(weights.tokenizer_path)
    config = PolicyConfig(top_layers=request.param, trunk_weights="fp32", dtype="fp32", lora_rank=2)
    policy = Policy(weights, dataclasses.replace(config, device="cpu"), [1, 2, 3], seed=0)
    make_opinionated(policy)
    stack = Stack(policy, tokenizer)
    world = stack.world(lively_market(0), PromptConfig(window=3), SimulatorConfig())
    codes = np.zeros((DAYS, Single.codes), bool)
    codes[:, 0] = True
    prompts, _ = world.stepped(range(DAYS), codes, codes)
    policy.running.track(policy.evaluate(prompts).statistics)
    return stack


def lively_market(seed: int) -> Market:
    """Holes, splits, dividends, and news at all hours, one a second after a close."""
    random = np.random.default_rng(seed)
    close = 50 * np.exp(np.cumsum(random.normal(0, 0.04, DAYS)))
    opened = close * np.exp(random.normal(0, 0.01, DAYS))
    split = np.where(random.random(DAYS) < 0.15, random.choice([2.0, 0.5, 3.0], DAYS), 1.0)
    dividend = np.where(random.random(DAYS) < 0.15, 0.5, 0.0)
    prices = {
        "open": opened,
        "high": np.maximum(opened, close) * 1.01,
        "low": np.minimum(opened, close) * 0.99,
        "close": close,
    }
    hole = random.random(DAYS) < 0.15
    for values in prices.values():
        values /= np.cumprod(split)
        values[hole] = np.nan
    dates = np.busday_offset("2001-01-01", np.arange(DAYS)).astype("datetime64[D]")
    noon = dates.astype("datetime64[s]") + np.timedelta64(12 * 3600, "s")
    moments = noon + random.integers(-11 * 3600, 12 * 3600, DAYS).astype("timedelta64[s]")
    moments[LATE] = noon[LATE] + np.timedelta64(4 * 3600 + 1, "s")
    return Market(
        dates,
        ("ONE",),
        *(values[:, None] for values in prices.values()),
        volume=random.uniform(1e5, 1e6, (DAYS, 1)),
        split=split[:, None],
        dividend=dividend[:, None],
        news=tuple(text_at(at, " ".join(random.choice(WORDS, 4))) for at in np.sort(moments)),
    )


def text_at(moment: np.datetime64, text: str) -> News:
    return News(moment, moment, "", text)


def change_future(market: Market, day: int, scale: float, holes: int, text: str) -> Market:
    """Everything after day's close is another: prices by `scale`, missing or there on other days
    (every `holes`-th), other splits, dividends and news."""
    late = np.arange(len(market.dates)) > day
    missing = late & (np.arange(len(late)) % holes == 0)
    arrays = {}
    for name in PRICES:
        values = getattr(market, name).copy()
        values[late] = np.where(np.isfinite(values[late]), values[late] * scale, 33.0 * scale)
        values[missing] = np.nan
        arrays[name] = values
    for name in ("volume", "split", "dividend"):
        values = getattr(market, name).copy()
        values[late] = values[late] * 3.0 + 1.0
        arrays[name] = values
    past = [item for item in market.news if item.available <= market.closes[day]]
    seconds = market.closes[day] + np.array([1, 5000, 70_000, 200_000]).astype("timedelta64[s]")
    return dataclasses.replace(
        market, **arrays, news=(*past, *(text_at(at, text) for at in seconds))
    )


def live(stack: Stack, world: World, days: range) -> list[dict[str, np.ndarray]]:
    """What a backtest shows and does, one dictionary of bytes a day: known at its close."""
    decisions: dict[int, dict[str, np.ndarray]] = {}
    steps: dict[int, dict[str, np.ndarray]] = {}
    real_step = Single.step

    def recorded_step(task, accounts, day, action):
        """A day is lived through in guesses first: the last time counts. Accounts that centre the
        features step at many moments at once."""
        if np.ndim(day):
            return real_step(task, accounts, day, action)
        shown = {f"account {name}": array.copy() for name, array in accounts.arrays().items()}
        prompts, row = world.shown(accounts, day)
        shown |= {f"prompt {b}": prompts.tokens(at) for b, at in enumerate(row)}
        shown |= {"mask": prompts.allowed[row], "prefix": world.prompter.prefix(day)}
        decisions[day] = shown | {"action": action.copy()}
        reward, terminated = real_step(task, accounts, day, action)
        steps[day] = {"reward": reward, "terminated": terminated}
        return reward, terminated

    with mock.patch.object(Single, "step", recorded_step):
        choose = episodes.sampler(world.seed, EPISODES)
        lived = episodes.run_episodes(stack.policy, world, days, EPISODES, choose)
    for number, day in enumerate(days[:-1]):
        decisions[day]["probabilities"] = lived.probabilities[:, number]
        decisions[day]["equity"] = lived.equity[:, number]
        decisions[day]["shares"] = lived.shares[:, number]
        if number:  # what the decision before led to is known at this close
            decisions[day] |= steps[day - 1]
    return list(decisions.values())


def differences(before: list[dict], after: list[dict], day: int) -> list[str]:
    """What is not the same, to the bit, at the closes up to `day`."""
    assert min(len(before), len(after)) > day
    return [
        f"day {at}: {name}"
        for at in range(day + 1)
        for name in before[at].keys() | after[at].keys()
        if before[at][name].tobytes() != after[at][name].tobytes()
    ]


MODES = {
    "prompt": st.builds(
        PromptConfig,
        layout=st.sampled_from(["default", "paper"]),
        account=st.sampled_from(["stepped", "exact"]),
        anonymise=st.booleans(),
        window=st.sampled_from([2, 5]),
    ),
    "rules": st.builds(
        SimulatorConfig,
        fill=st.sampled_from(["next_open", "next_close", "same_close"]),
        positions=st.sampled_from(["long_flat", "long_short"]),
        reward=st.sampled_from(["sharpe", "log_return"]),
        dividends=st.sampled_from(["reinvest", "cash"]),
        lot=st.sampled_from([0.0, 1.0]),
    ),
}
FUTURES = {
    "seed": st.integers(0, 50),
    "day": st.integers(0, DAYS - 2),
    "scale": st.sampled_from([0.02, 0.9, 1.3, 50.0]),
    "holes": st.integers(1, 4),
    "text": st.sampled_from(["Nothing new", "Profit doubled", "Bankrupt"]),
}


@settings(max_examples=30)
@given(**MODES, **FUTURES)
def test_the_future_changes_nothing(stack, prompt, rules, seed, day, scale, holes, text):
    """Accounts live from six days before the change on; in the changed world, to the day after."""
    market = lively_market(seed)
    other = change_future(market, day, scale, holes, text)
    first = max(0, day - 6)
    before = live(stack, stack.world(market, prompt, rules), range(first, min(day + 5, DAYS)))
    after = live(stack, stack.world(other, prompt, rules), range(first, day + 2))
    assert differences(before, after, day - first) == []


def _tomorrows_indicators(*columns: np.ndarray) -> dict[str, np.ndarray]:
    from fastflag.market.features import indicators

    return {name: np.roll(values, -1) for name, values in indicators(*columns).items()}


def _tomorrows_mask(task, day, side, slot=None, real=Single.allowed):
    return real(task, np.minimum(day + 1, DAYS - 1), side)


def _tomorrows_code(task, accounts, day, real=Single.code):
    return real(task, accounts, np.minimum(day + 1, DAYS - 1))


def _bars_of_tomorrow(market: Market, symbol: str) -> Bars:
    n = market.column(symbol)
    tradable = np.isfinite(market.close[:, n])
    shifted = (np.roll(getattr(market, name)[:, n], -1) for name in ("open", "close"))
    return Bars.from_columns(
        *shifted, market.split[:, n], market.dividend[:, n], np.roll(tradable, -1)
    )


_closes = Market.__dict__["closes"].func
LEAKS: dict[str, Callable[[], mock._patch]] = {
    "indicators of tomorrow": lambda: mock.patch.object(
        day_texts, "indicators", _tomorrows_indicators
    ),
    "a mask of tomorrow": lambda: mock.patch.object(Single, "allowed", _tomorrows_mask),
    "prices of tomorrow": lambda: mock.patch.object(Bars, "from_market", _bars_of_tomorrow),
    "news a second too early": lambda: mock.patch.object(
        Market, "closes", property(lambda market: _closes(market) + np.timedelta64(1, "s"))
    ),
    "profit at tomorrow's price": lambda: mock.patch.object(Single, "code", _tomorrows_code),
}


@pytest.mark.parametrize("leak", [None, *LEAKS])
def test_leaks_are_seen(stack, leak):
    """With no leak, the very same comparisons find nothing."""
    found = []
    prompt, rules = PromptConfig(window=3), SimulatorConfig(fill="same_close")
    for seed in range(4):
        market = lively_market(seed)
        other = change_future(market, LATE, 1.3, 3, "Bankrupt")
        with LEAKS[leak]() if leak else nullcontext():
            before, after = (
                live(stack, stack.world(each, prompt, rules), range(LATE - 4, LATE + 2))
                for each in (market, other)
            )
        found += differences(before, after, 4)
    assert bool(found) == bool(leak)


def test_every_day_is_decided_upon(stack):
    """The comparison is of something: prompts, probabilities and accounts do move."""
    world = stack.world(lively_market(1), PromptConfig(window=3), SimulatorConfig())
    lived = live(stack, world, range(DAYS))
    assert len(lived) == DAYS - 1
    assert len({day["prefix"].tobytes() for day in lived}) == DAYS - 1
    assert len({day["probabilities"].tobytes() for day in lived}) > DAYS // 2
    assert len({day["equity"].tobytes() for day in lived}) > DAYS // 2
    assert {"reward", "mask", "account cash", "prompt 0", "action"} <= lived[-1].keys()


# Files cut at the day


def write_bars(market: Market, path: Path, until: int) -> DataConfig:
    """Bars up to day `until`, adjusted closes as that day's file has them, news beside them."""
    to_come = market.split[: until + 1, 0][::-1].cumprod()[::-1]
    factor = 1 / np.append(to_come[1:], 1.0)
    columns = {name: getattr(market, name)[: until + 1, 0] for name in (*PRICES, "volume")}
    frame = pd.DataFrame({"date": market.dates[: until + 1]} | columns)
    frame.assign(adj_close=frame["close"] * factor).to_csv(path, index=False)
    news = [item for item in market.news if item.available <= market.closes[until]]
    rows = [(item.published, item.available, item.symbol, item.text) for item in news]
    names = ["published", "available", "symbol", "text"]
    pd.DataFrame(rows, columns=names).to_csv(path.with_suffix(".news.csv"), index=False)
    return DataConfig(data=f"csv:{path}", symbol="ONE")


def write_investorbench(market: Market, path: Path, until: int) -> DataConfig:
    days = {
        str(market.dates[day]): {"prices": float(market.close[day, 0]), "news": [f"Item {day}"]}
        for day in range(until + 1)
        if np.isfinite(market.close[day, 0])
    }
    path.write_text(json.dumps(days))
    return DataConfig(data=f"investorbench:{path}")


def without_dividends(market: Market) -> Market:
    """One adjusted price tells splits from dividends by their size; here only splits are meant."""
    return dataclasses.replace(market, dividend=np.zeros_like(market.dividend))


@pytest.mark.parametrize("write", [write_bars, write_investorbench])
@pytest.mark.parametrize("account", ["stepped", "exact"])
def test_decide_on_a_file_cut_at_the_day(write, account, stack, tmp_path):
    prompt = PromptConfig(account=account, anonymise=False, window=3)
    rules = SimulatorConfig(positions="long_short")
    market = without_dividends(lively_market(2))
    assert (market.split != 1).sum() >= 2
    tradable = np.flatnonzero(np.isfinite(market.close[:, 0]))
    whole = load(write(market, tmp_path / "one.csv", DAYS - 1))
    world = stack.world(whole, prompt, rules)
    decisions = set()
    for day in tradable[1::3]:
        date, since = str(market.dates[day]), str(market.dates[tradable[0]])
        (tmp_path / "cut").mkdir(exist_ok=True)
        cut = load(write(market, tmp_path / "cut" / "one.csv", day))
        assert str(cut.dates[-1]) == date
        for held in ((), ("long", 50.0, since), ("short", 40.0, since)):
            decision = decide(stack.policy, world, date, *held)
            assert decision == decide(stack.policy, stack.world(cut, prompt, rules), date, *held)
            decisions.add(json.dumps(decision))
    assert len(decisions) == 3 * len(tradable[1::3])
