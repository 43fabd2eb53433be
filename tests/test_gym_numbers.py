"""What environments show: numbers by hand, within their box, and nothing of the future."""

import dataclasses
import math
import zlib

import gymnasium
import numpy as np
import oracles
import pandas as pd
import portfolio_oracle
import pytest
from gym_small import IDS, PORTFOLIO, SINGLE, env_of, settings_of
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import given
from hypothesis import strategies as st
from small import holey_market

from fastflag.config import PromptConfig, SimulatorConfig
from fastflag.market.bars import MARKET_COLUMNS, News
from fastflag.market.planted import planted_market
from fastflag.model.weights import open_weights
from fastflag.prompt.tokens import Tokenizer
from fastflag.prompt.world import World

WORDS = ("Profit", "Loss", "Merger", "Recall", "Guidance", "Record", "Inquiry", "Strike")


def named(env, observation):
    return dict(zip([each.name for each in env.view.columns], observation.tolist(), strict=True))


def telling_market(seed, days=40):
    """Every nuisance, and news at all hours of any symbol."""
    market = portfolio_oracle.random_market(seed, 3, days)
    random = np.random.default_rng(seed)
    hours = np.sort(random.integers(0, 24 * days, 3 * days))
    times = market.dates[0].astype("datetime64[s]") + hours * np.timedelta64(3600, "s")
    news = [News(t, t, str(random.choice(["", "S1"])), str(random.choice(WORDS))) for t in times]
    return dataclasses.replace(market, news=tuple(news))


def with_another_future(market, day, seed):
    """All that comes after the close of `day` is another's."""
    other = telling_market(seed + 1, len(market.dates))
    until = market.closes[day]
    columns = {
        name: np.concatenate([getattr(market, name)[: day + 1], getattr(other, name)[day + 1 :]])
        for name in MARKET_COLUMNS
    }
    news = [item for item in market.news if item.available <= until]
    news += [item for item in other.news if item.available > until]
    return dataclasses.replace(market, news=tuple(news), **columns)


def lived(env, seed, until):
    """All that is returned up to the close of `until`, with actions that were drawn before."""
    returned = [env.reset(seed=0)]
    random = np.random.default_rng(seed)
    for _ in range(until):
        shape = env.action_space.shape
        returned.append(env.step(random.integers(len(env.view.task.actions), size=shape)))
    return returned


@given(st.sampled_from(IDS), st.integers(0, 10**6), st.integers(1, 38), st.booleans())
def test_the_future_bears_on_nothing(name, seed, day, is_cut):
    """Another future, and none at all: the part that is left of the episode alone may differ."""
    market = telling_market(seed)
    if is_cut:
        columns = {each: getattr(market, each)[: day + 1] for each in MARKET_COLUMNS}
        later = dataclasses.replace(market, dates=market.dates[: day + 1], **columns)
    else:
        later = with_another_future(market, day, seed)
    symbol = {"symbol": "S1"} if name == SINGLE else {}
    envs = [
        env_of(name, **settings_of(name, market=each, horizon=1000), **symbol)
        for each in (market, later)
    ]
    for one, other in zip(*(lived(env, seed, day) for env in envs), strict=True):
        if is_cut:
            one, other = ((each[0][:-1], each[1:3], each[-1]) for each in (one, other))
        assert data_equivalence(one, other, exact=True)


@given(
    st.sampled_from(IDS),
    st.integers(0, 10**6),
    st.sampled_from([0.01, 0.3, 1.0]),
    st.sampled_from(["long_short", ""]),
)
def test_observations_are_finite_and_in_the_box(name, seed, volatility, positions):
    market = portfolio_oracle.random_market(seed, 2, 40, volatility=volatility)
    changes = {"positions": positions} if positions else {}
    settings = settings_of(name, market=market, horizon=30, fee_bps=100.0, **changes)
    envs = gymnasium.make_vec(name, 4, **settings)
    random = np.random.default_rng(seed)
    observations, _ = envs.reset(seed=seed)
    for _ in range(60):
        assert np.isfinite(observations).all() and observations in envs.observation_space
        actions = random.integers(len(envs.view.task.actions), size=envs.action_space.shape)
        observations, rewards, *_ = envs.step(actions)
        assert np.isfinite(rewards).all()
    box = envs.observation_space
    assert np.isfinite(box.low).all() and np.isfinite(box.high).all()


@pytest.mark.parametrize("name", IDS)
def test_a_market_in_numbers_by_hand(name):
    """pandas on prices without splits; words of the day's headlines."""
    market = planted_market(60, symbols=2)
    settings = settings_of(name, market=market, horizon=59)
    symbol = {"symbol": "PLANTED2"} if name == SINGLE else {}
    env = env_of(name, news_buckets=16, **settings, **symbol)
    prefix = "" if name == SINGLE else "PLANTED2 "
    close = pd.Series(market.close[:, 1])
    deviation = np.log(close).diff().rolling(20).std()
    highest = pd.Series(market.high[:, 1]).rolling(60, min_periods=1).max()
    observation, info = env.reset(seed=0)
    for day in range(59):
        assert info["moment"] == day
        told = named(env, observation)
        for bars in (1, 5, 20):
            change = close.pct_change(bars)[day] / (deviation[day] * math.sqrt(bars))
            expected = np.clip(0 if np.isnan(change) else change, -4, 4)
            assert told[f"{prefix}return_{bars}"] == pytest.approx(expected, abs=1e-5)
        volatility = 0 if np.isnan(deviation[day]) else 10 * deviation[day]
        assert told[f"{prefix}volatility_20"] == pytest.approx(volatility, abs=1e-5)
        drawdown = close[day] / highest[day] - 1
        assert told[f"{prefix}drawdown_60"] in (0.0, pytest.approx(drawdown, abs=1e-5))
        texts = [
            item.text
            for item in market.news
            if item.symbol == "PLANTED2" and item.available.astype("M8[D]") == market.dates[day]
        ]
        assert len(texts) == 2
        buckets = {zlib.crc32(w.encode()) % 16 for text in texts for w in text.lower().split()}
        shown = {n for n in range(16) if told[f"{prefix}news_{n}"]}
        assert shown == buckets
        observation, *_, info = env.step(env.action_space.sample())


@pytest.mark.parametrize("positions", ["long_flat", "long_short"])
def test_a_single_account_in_numbers_is_the_slow_twins(positions):
    settings = settings_of(SINGLE, 5, positions=positions, horizon=30)
    env = env_of(SINGLE, **settings)
    _, info = env.reset(seed=1)
    start = int(info["moment"])
    twin = oracles.Account(oracles.days_of(env.view.task.bars), settings["rules"])
    random, waited = np.random.default_rng(0), 0
    for day in range(start, start + 30):
        action = int(random.integers(3))
        observation, *_ = env.step(action)
        twin.step(day, env.view.task.actions[action])
        told = named(env, observation)
        side = np.sign(twin.shares)
        waits = int(twin.waiting is not None)
        waited += waits
        expected = {
            "side": side,
            "profit": np.clip(side * (twin.mark(day + 1) / twin.entry - 1), -1, 1) if side else 0,
            "held": min((day + 1 - twin.opened) / 40, 1) if side else 0,
            "waiting": waits,
            "order": env.view.task.actions.index(twin.waiting) - 1 if waits else 0,
            "growth": math.log(twin.equity / twin.config.cash),
            "sharpe": np.clip(twin.sharpe, -1, 1),
            "left": 1 - (day + 1 - start) / 30,
            "tradable": int(twin.days[day + 1]["close"] is not None),
        }
        assert {name: told[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert waited


def test_a_portfolio_in_numbers_is_the_slow_twins():
    settings = settings_of(PORTFOLIO, 5, positions="long_short", horizon=30)
    env = env_of(PORTFOLIO, **settings)
    _, info = env.reset(seed=1)
    start = int(info["moment"])
    twin = portfolio_oracle.Account(settings["market"], settings["rules"])
    random, waited = np.random.default_rng(0), 0
    for day in range(start, start + 30):
        action = random.integers(5, size=3)
        observation, *_ = env.step(action)
        twin.step(day, [env.view.task.actions[each] for each in action])
        told, expected = named(env, observation), {}
        for k, symbol in enumerate(settings["market"].symbols):
            weight, waits = twin.worth(k, day + 1) / twin.equity, int(twin.waiting[k] is not None)
            profit = np.sign(weight) * (twin.ratio(k, day + 1) - 1)
            expected |= {
                f"{symbol} weight": weight,
                f"{symbol} profit": np.clip(profit, -1, 1),
                f"{symbol} waiting": waits,
                f"{symbol} units": twin.waiting[k] if waits else 0,
            }
            waited += waits
        expected |= {
            "cash": np.clip(twin.cash / twin.equity, -2, 2),
            "growth": math.log(twin.equity / twin.config.cash),
            "sharpe": np.clip(twin.sharpe, -1, 1),
            "left": 1 - (day + 1 - start) / 30,
        }
        assert {name: told[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert waited


@pytest.mark.parametrize("account", ["stepped", "exact"])
def test_the_prompt_is_what_a_language_model_reads(account, smollm):
    """Beside the tokens that a policy is shown, of the same account stepped by hand."""
    path = open_weights(smollm).tokenizer_path
    market, rules = holey_market(), SimulatorConfig(horizon=39)
    prompt = PromptConfig(account=account, window=3)
    tokenizer = Tokenizer.load(path)
    world = World.of(prompt, market, market.symbols[0], rules, tokenizer, seed=0)
    settings = {"market": market, "rules": rules, "tokenizer": str(path), "prompt": prompt}
    envs = gymnasium.make_vec(SINGLE, 3, **settings)
    _, infos = envs.reset(seed=0)
    accounts, random = world.task.start(3), np.random.default_rng(0)
    for moment in range(39):
        prompts, rows = world.shown(accounts, moment)
        for b, row in enumerate(rows):
            prefix, suffix = prompts.pairs[row]
            ids = np.concatenate([prompts.prefixes[prefix], prompts.suffixes[suffix]])
            assert infos["prompt"][b] == tokenizer.decode(ids)
        actions = random.integers(3, size=3)
        world.task.step(accounts, moment, actions)
        infos = envs.step(actions)[-1]
    assert len({*infos["prompt"]}) > 1
    assert "prompt" not in env_of(SINGLE, market=market).reset()[1]


@pytest.mark.parametrize("name", IDS)
def test_an_episode_in_a_line_and_in_a_picture(name):
    market = planted_market(30, symbols=2)
    settings = settings_of(name, market=market, horizon=10)
    text, picture = (
        gymnasium.make_vec(name, 2, render_mode=mode, **settings) for mode in ("ansi", "rgb_array")
    )
    action = np.full(text.action_space.shape, 2)
    text.reset(seed=3), picture.reset(seed=3)
    blank = picture.render()[0]
    for _ in range(4):
        infos = text.step(action)[-1]
        picture.step(action)
    line, moment, equity = text.render()[1], int(infos["moment"][1]), infos["equity"][1]
    done = "Buy" if name == SINGLE else "Neutral Neutral"
    assert str(market.dates[moment % 30]) in line and f"| {done} |" in line
    assert f"equity {equity:,.2f} ({equity / 1e5 - 1:+.2%})" in line
    frames = picture.render()
    assert len(frames) == 2 and frames[0].shape == blank.shape and frames[0].dtype == np.uint8
    colours, counts = np.unique(frames[0].reshape(-1, 3), axis=0, return_counts=True)
    assert len(colours) == 3 and counts.min() > 20
    drawn = np.flatnonzero((frames[0] != 255).any((0, 2)))
    # Four of ten decisions: the line ends at four tenths of the width inside the margins.
    assert (drawn[-1] - drawn[0]) / (frames[0].shape[1] - 24) == pytest.approx(0.4, abs=0.01)
    with pytest.raises(ValueError, match="render_mode"):
        gymnasium.make_vec(name, 2, render_mode="human", **settings)


def test_a_portfolios_assets_have_one_closing_time():
    """One asset trades on Saturdays, so all decide at the day's end: news of 20:00 is today's."""
    market = portfolio_oracle.random_market(0, 2, 40, missing=0.0)
    days = market.dates[0] + np.arange(40)
    weekend = ~np.is_busday(days)
    columns = {name: getattr(market, name).copy() for name in ("open", "high", "low", "close")}
    for column in columns.values():
        column[weekend, 1] = np.nan
    at = days[8].astype("datetime64[s]") + np.timedelta64(20 * 3600, "s")
    market = dataclasses.replace(
        market, dates=days, news=(News(at, at, "S1", "Profit"),), **columns
    )
    assert market.calendar == "crypto" and np.is_busday(days[8])
    env = env_of(PORTFOLIO, market=market, horizon=39, news_buckets=1)
    shown = [env.reset(seed=0)[0], *(env.step([1, 1])[0] for _ in range(20))]
    days_of_news = [day for day, each in enumerate(shown) if named(env, each)["S1 news_0"]]
    assert days_of_news == [8]
