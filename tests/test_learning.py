"""Does it learn? On a market whose news tells the next day, and on one whose news does not."""

from dataclasses import replace

import pytest

import fastflag.learn.lesson
from fastflag.config import (
    AlgorithmConfig,
    DataConfig,
    PolicyConfig,
    PromptConfig,
    RolloutConfig,
    SimulatorConfig,
    TrainConfig,
)
from fastflag.evaluate.backtest import backtest
from fastflag.learn.train import train
from fastflag.market.planted import planted_market
from fastflag.market.several import load
from fastflag.model.weights import open_weights

TEST_DAYS = 250

REINFORCE = AlgorithmConfig(
    algorithm="reinforce", learning_rate=0.02, layer_learning_rate=2e-3, gamma=0.9
)
PPO = replace(REINFORCE, algorithm="ppo", update_epochs=2, minibatch_size=3840)
SMALL = TrainConfig(
    prompt=PromptConfig(window=3, news_tokens=48),
    # The log return of a day depends on that day's position alone; the change of the Sharpe ratio
    # so far is as telling but several times noisier, and takes as many times the updates.
    simulator=SimulatorConfig(fee_bps=0, slippage_bps=0, reward="log_return", horizon=15),
    policy=PolicyConfig(top_layers=1, adaptation="full", trunk_weights="fp32", dtype="fp32"),
    rollout=RolloutConfig(num_envs=512, num_steps=15, start_groups=16),
    backtest_episodes=8,
)


def held_out(config, days, updates, run, shuffled=False):
    """Trains on the market's first `days` and backtests on the rest."""
    market = planted_market(days + TEST_DAYS, seed=1, shuffled=shuffled, drift=0.0003)
    dates = market.dates
    config = replace(
        config,
        data=DataConfig(
            data="planted",
            train=f"{dates[0]}..{dates[days - 1]}",
            test=f"{dates[days]}..{dates[-1]}",
        ),
        total_timesteps=updates * config.rollout.num_envs * config.rollout.num_steps,
    )
    world, policy = train(config, market, open_weights(config.policy.model), run, resume=False)
    return backtest(policy, world, config, "test")


def has_learnt(document):
    """Above 99% of random policies, and a Sharpe ratio at least twice always-long's."""
    sharpe, always_long = (
        document["policies"][name]["metrics"]["standard"]["sr"] or 0.0
        for name in ("greedy", "buy_and_hold")
    )
    beats = document["random"]["percentile"]["greedy"]
    print(f"Sharpe {sharpe:.2f}, always long {always_long:.2f}, beats {beats:.1f}% of random")
    return beats >= 99 and sharpe >= 2 * abs(always_long)


def small(tiny_model, algorithm):
    policy = replace(SMALL.policy, model=str(tiny_model))
    return replace(SMALL, policy=policy, algorithm=algorithm)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("algorithm", "updates"), [(REINFORCE, 80), (PPO, 40)], ids=["reinforce", "ppo"]
)
def test_news_that_tells_is_learnt(tiny_model, tmp_path, algorithm, updates):
    assert has_learnt(held_out(small(tiny_model, algorithm), 400, updates, tmp_path / "run"))


@pytest.mark.usefixtures("one_thread")
def test_news_dealt_at_random_teaches_nothing(tiny_model, tmp_path):
    config = small(tiny_model, PPO)
    assert not has_learnt(held_out(config, 400, 40, tmp_path / "run", shuffled=True))


@pytest.mark.usefixtures("one_thread")
def test_the_check_sees_a_flipped_sign(tiny_model, tmp_path, monkeypatch):
    right = fastflag.learn.lesson.advantages
    monkeypatch.setattr(fastflag.learn.lesson, "advantages", lambda *given: -right(*given))
    assert not has_learnt(held_out(small(tiny_model, PPO), 400, 40, tmp_path / "run"))


def large(smollm, algorithm):
    """SmolLM2-135M with two LoRA layers; its 576 features turn a step of the head into nine times
    the logits that the small model's 64 do, so rates are lower. A discount of 0 is this market's
    true horizon, and spares updates that cost seconds each."""
    rates = {"learning_rate": 1e-3, "layer_learning_rate": 1e-4, "gamma": 0.0}
    return replace(
        SMALL,
        policy=PolicyConfig(model=smollm, trunk_weights="nf4", dtype="bf16"),
        rollout=RolloutConfig(num_envs=512, num_steps=15, start_groups=8),
        algorithm=replace(algorithm, minibatch_size=0, **rates),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("algorithm", [REINFORCE, PPO], ids=["reinforce", "ppo"])
def test_smollm2_learns_news_that_tells(smollm, tmp_path, algorithm):
    assert has_learnt(held_out(large(smollm, algorithm), 128, 40, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.usefixtures("all_threads")
def test_smollm2_learns_nothing_from_shuffled_news(smollm, tmp_path):
    config = large(smollm, REINFORCE)
    assert not has_learnt(held_out(config, 128, 40, tmp_path / "run", shuffled=True))


@pytest.fixture(scope="module")
def twenty(tiny_model, tmp_path_factory):
    """The backtests of one policy on 20 symbols, 4 of them held out: of news that tells, and of
    news dealt at random."""

    def tested(shuffled):
        told = "yes" if shuffled else "no"
        data = DataConfig(
            data=f"planted:symbols=20,days=100,seed=1,drift=0.0003,shuffled={told}",
            symbols="all",
            split_by_symbol="PLANTED17,PLANTED18,PLANTED19,PLANTED20",
        )
        rollout = RolloutConfig(num_envs=256, num_steps=15, start_groups=8)
        algorithm = replace(PPO, minibatch_size=1920)
        config = replace(small(tiny_model, algorithm), data=data, rollout=rollout)
        config = replace(config, total_timesteps=24 * 256 * 15)
        run = tmp_path_factory.mktemp("twenty") / told
        market = load(data)
        world, policy = train(config, market, open_weights(str(tiny_model)), run, resume=False)
        return backtest(policy, world, config, "test")

    return {shuffled: tested(shuffled) for shuffled in (False, True)}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("group", ["learnt", "held_out"])
def test_one_policy_learns_what_all_symbols_share(twenty, group):
    """On held-out days, and on symbols that it never saw; shuffled it does not."""
    assert len(twenty[False]["groups"][group]["symbols"]) == {"learnt": 16, "held_out": 4}[group]
    assert has_learnt(twenty[False]["groups"][group])
    assert not has_learnt(twenty[True]["groups"][group])
    right, wrong = (twenty[shuffled]["groups"][group]["paired"] for shuffled in (False, True))
    assert right["mean"] > 2 * right["standard_error"]
    assert wrong["mean"] < 2 * wrong["standard_error"]
