import json

import numpy as np
import pytest
import torch
from small import DATES, DAYS, TRAIN_DAYS, make_opinionated, small_config, small_market, small_world

from fastflag.evaluate import episodes
from fastflag.evaluate.backtest import (
    backtest,
    period_of,
    write_backtest,
)
from fastflag.evaluate.episodes import greedy, run_episodes, sampler
from fastflag.evaluate.statistics import _percentile
from fastflag.files import InputError
from fastflag.learn.train import train
from fastflag.market import streams
from fastflag.market.accounts import Accounts
from fastflag.market.random_numbers import uniform
from fastflag.market.tasks.single import ACTIONS, BUY, HOLD, SELL, Single
from fastflag.model.weights import open_weights

TEST_DAYS = range(TRAIN_DAYS, DAYS)


pytestmark = pytest.mark.usefixtures("one_thread")


def opinionated(model, **changes):
    config = small_config(model, **changes)
    world, policy, _ = small_world(config, small_market())
    make_opinionated(policy, seed=1)
    return config, world, policy


def always(policy, action):
    """The policy takes one action wherever it is allowed."""
    with torch.no_grad():
        policy.action_head.body.weight.zero_()
        policy.action_head.bias.copy_(torch.eye(3)[action].expand(3, 3) * 40)
    return policy


@pytest.fixture(scope="module")
def document(tiny_model):
    """(configuration, world, document) of an opinionated policy."""
    config, world, policy = opinionated(tiny_model)
    return config, world, backtest(policy, world, config, "test")


@pytest.mark.parametrize(
    ("split", "days"),
    [
        ("train", range(TRAIN_DAYS)),
        ("test", TEST_DAYS),
        ("2001-01-10..2001-01-17", range(7, 13)),
    ],
)
def test_splits_are_days(split, days):
    assert (
        period_of(small_market(), small_config(""), split) == f"{DATES[days[0]]}..{DATES[days[-1]]}"
    )


@pytest.mark.parametrize(
    ("split", "match"),
    [
        ("validation", "neither train, test nor"),
        ("", "neither train, test nor"),
        ("2001-01-10..2001-01-10", "two days"),
        ("2031-01-10..2031-02-10", "2031"),
        ("2001-02-10..2001-01-10", "2001-02-10"),
        ("soon..later", "soon"),
        ("..", "period|date|split"),
    ],
)
def test_a_split_that_is_none_is_refused(split, match):
    with pytest.raises(InputError, match=match) as caught:
        period_of(small_market(), small_config(""), split)
    assert "\n" not in str(caught.value)


def test_greedy_takes_the_most_probable_and_of_equals_hold_then_sell():
    probabilities = np.array(
        [
            [0.5, 0.3, 0.2],
            [0.2, 0.3, 0.5],
            [0.2, 0.5, 0.3],
            [0.4, 0.4, 0.2],
            [0.1, 0.45, 0.45],
            [0.4, 0.2, 0.4],
            [1 / 3, 1 / 3, 1 / 3],
            [0.5, 0.5, 0.0],
            [0.0, 0.5, 0.5],
        ]
    )
    expected = [SELL, BUY, HOLD, HOLD, HOLD, SELL, HOLD, HOLD, HOLD]
    chosen = greedy(probabilities, 0)
    assert chosen.tolist() == expected and chosen.dtype == np.int8


@pytest.mark.parametrize("window", [4, 32])
@pytest.mark.parametrize("account", ["stepped", "exact"])
def test_episodes_are_the_decisions_of_the_running_statistics(
    tiny_model, account, window, monkeypatch
):
    """Against a replay: every day's prompt of one account, evaluated by itself."""
    monkeypatch.setattr(episodes, "_WINDOW", window)
    _, world, policy = opinionated(tiny_model, prompt__account=account)
    policy.running.mean.fill_(0.3)
    policy.running.deviation.fill_(1.7)
    lived = run_episodes(policy, world, TEST_DAYS, 3, sampler(5, 3))
    assert lived.equity.shape == lived.shares.shape == (3, len(TEST_DAYS))
    for b in range(3):
        one = Accounts.start(1, world.task.rules.cash)
        for number, day in enumerate(TEST_DAYS[:-1]):
            assert lived.equity[b, number] == one.equity[0]
            assert lived.shares[b, number] == one.shares[0]
            prompts, row = prompts_of(world, one, day)
            with torch.no_grad():
                table = policy.evaluate(prompts, policy.running.current())
            np.testing.assert_array_equal(lived.probabilities[b, number], table.probabilities[row])
            drawn = uniform(5, np.array([b]), number)[0]
            cumulative = lived.probabilities[b, number].cumsum()
            assert lived.action[b, number] == np.searchsorted(cumulative, drawn, side="right")
            world.task.step(one, day, lived.action[b, number])
        assert lived.equity[b, -1] == one.equity[0]


def test_many_decisions_are_answered_in_a_few_batches(tiny_model):
    _, world, policy = opinionated(tiny_model)
    batches, evaluate = [], policy.evaluate
    policy.evaluate = lambda *given: batches.append(1) or evaluate(*given)
    run_episodes(policy, world, TEST_DAYS, 9, sampler(1, 9))
    assert len(TEST_DAYS) - 1 > 3 * len(batches)


def prompts_of(world, account, day):
    prompter = world.prompter
    if prompter.config.account == "exact":
        prompts, row = world.shown(account, day)
        return prompts, row[0]
    code = world.task.code(account, day)[0]
    present = np.zeros((1, Single.codes), bool)
    present[0, code] = True
    prompts, row_of = world.stepped([day], present)
    return prompts, row_of[0, code]


def test_an_episode_does_not_depend_on_how_many_run_beside_it(tiny_model):
    _, world, policy = opinionated(tiny_model)
    few = run_episodes(policy, world, TEST_DAYS, 2, sampler(1, 2))
    many = run_episodes(policy, world, TEST_DAYS, 9, sampler(1, 9))
    np.testing.assert_array_equal(many.action[:2], few.action)
    assert len(np.unique(many.action, axis=0)) > 5
    assert not np.array_equal(
        run_episodes(policy, world, TEST_DAYS, 2, sampler(77, 2)).action, few.action
    )


def test_the_document_tells_what_the_greedy_policy_did(document):
    config, world, told = document
    days = TEST_DAYS
    best = told["policies"]["greedy"]
    market = small_market()
    assert told["dates"] == [str(market.dates[day]) for day in days]
    assert (told["start"], told["end"], told["split"]) == (
        told["dates"][0],
        told["dates"][-1],
        "test",
    )
    assert told["close"] == market.close[days.start :, 0].tolist()
    assert told["symbol"] == "PLANTED" and told["anonymised"] is True
    assert (told["positions"], told["fill"]) == ("long_flat", "next_open")
    assert (told["fee_bps"], told["slippage_bps"]) == (1.0, 2.0)
    assert told["dividends"] == "reinvest"
    account = Accounts.start(1, config.simulator.cash)
    for number, day in enumerate(days[:-1]):
        assert best["equity"][number] == account.equity[0]
        assert best["position"][number] == np.sign(account.shares[0])
        probabilities = best["probabilities"][number]
        assert sum(probabilities) == pytest.approx(1)
        chosen = ACTIONS.index(best["actions"][number])
        assert probabilities[chosen] == max(probabilities)
        world.task.step(account, day, chosen)
    assert best["equity"][-1] == account.equity[0]
    assert set(best["actions"]) > {"Buy"}


def test_the_news_told_is_that_of_the_prompts(document):
    _, world, told = document
    for day in TEST_DAYS:
        headlines = told["news"][str(small_market().dates[day])]
        assert headlines and all(text in world.prompter.prefix_text(day) for text in headlines)


def test_buy_and_hold_by_hand(document):
    """All cash at the first open after the first close, fee and slippage paid once."""
    config, world, told = document
    bars = world.task.bars
    price = bars.open[TEST_DAYS[1]] * (1 + 2e-4) * (1 + 1e-4)
    shares = config.simulator.cash / price
    equity = np.array([config.simulator.cash, *(shares * bars.close[TEST_DAYS[1] :])])
    held = told["policies"]["buy_and_hold"]
    np.testing.assert_allclose(held["equity"], equity, rtol=1e-12)
    returns = equity[1:] / equity[:-1] - 1
    standard = held["metrics"]["standard"]
    assert standard["cr"] == pytest.approx(100 * (equity[-1] / equity[0] - 1))
    assert standard["sr"] == pytest.approx(returns.mean() / returns.std(ddof=1) * 252**0.5)
    logs = np.diff(np.log(equity))
    flag = held["metrics"]["flag"]
    volatility = logs.std(ddof=1) * 252**0.5
    assert flag["cr"] == pytest.approx(100 * logs.sum())
    assert flag["sr"] == pytest.approx(logs.sum() / (len(logs) / 252) / volatility)
    assert set(held["metrics"]) == {"standard", "flag", "investorbench", "paper-bh"}


def test_percentiles_by_hand(document):
    _, _, told = document
    random = told["random"]
    assert random["episodes"] == len(random["sharpes"]) == 1000
    greedy_sharpe = told["policies"]["greedy"]["metrics"]["standard"]["sr"]
    beaten = sum(sharpe < greedy_sharpe for sharpe in random["sharpes"])
    assert random["percentile"]["greedy"] == pytest.approx(beaten / 10)
    assert 0 < beaten < 1000
    median = told["sampled"]["metrics"]["standard"]["sr"]["p50"]
    beaten = sum(sharpe < median for sharpe in random["sharpes"])
    assert random["percentile"]["sampled_median"] == pytest.approx(beaten / 10)
    ordered = sorted(random["sharpes"])
    assert random["sharpe"]["p50"] == pytest.approx((ordered[499] + ordered[500]) / 2)
    assert ordered[949] <= random["sharpe"]["p95"] <= ordered[950]
    assert ordered[49] <= random["sharpe"]["p05"] <= ordered[50]
    assert ordered[989] <= random["sharpe"]["p99"] <= ordered[990]


def test_to_equal_another_is_not_to_beat_it():
    assert _percentile(1.0, np.array([0.0, 1.0, 1.0, 2.0])) == 25


def test_sampled_episodes_are_summed_up_day_by_day(tiny_model):
    config, world, policy = opinionated(tiny_model)
    told = backtest(policy, world, config, "test")["sampled"]
    lived = run_episodes(
        policy, world, TEST_DAYS, 3, sampler(streams.sampled_episodes(world.seed), 3)
    )
    low, middle, high = np.sort(lived.equity, axis=0)
    assert told["episodes"] == 3
    np.testing.assert_allclose(told["equity"]["p50"], middle)
    np.testing.assert_allclose(told["equity"]["p05"], low + 0.1 * (middle - low))
    np.testing.assert_allclose(told["equity"]["p95"], middle + 0.9 * (high - middle))
    returns = 100 * (lived.equity[:, -1] / lived.equity[:, 0] - 1)
    assert told["metrics"]["standard"]["cr"]["mean"] == pytest.approx(returns.mean())
    assert told["metrics"]["standard"]["cr"]["p50"] == pytest.approx(np.median(returns))


@pytest.mark.parametrize(
    ("fill", "column", "delay"),
    [("next_open", "open", 1), ("next_close", "close", 1), ("same_close", "close", 0)],
)
def test_trades_are_told_at_the_price_and_day_of_their_fill(tiny_model, fill, column, delay):
    config, world, policy = opinionated(
        tiny_model, simulator__fill=fill, simulator__positions="long_short"
    )
    told = backtest(policy, world, config, "test")
    best, market = told["policies"]["greedy"], small_market()
    expected = []
    for number, day in enumerate(TEST_DAYS[:-1]):
        before, after = best["position"][number : number + 2]
        if before != after:
            expected.append(
                (
                    str(market.dates[day + delay]),
                    "Buy" if after > before else "Sell",
                    getattr(market, column)[day + delay, 0],
                )
            )
    assert [(t["date"], t["action"], t["price"]) for t in told["trades"]] == expected
    assert len(expected) > 2
    signs = [np.sign(trade["shares"]) for trade in told["trades"]]
    assert all(sign in best["position"] for sign in signs)


@pytest.mark.parametrize("action", [HOLD, BUY])
def test_a_constant_policy_is_told_without_nan(tiny_model, tmp_path, action):
    """Nothing traded: no Sharpe ratio, ranked as one that earned nothing."""
    config, world, policy = opinionated(tiny_model)
    told = backtest(always(policy, action), world, config, "test")
    write_backtest(tmp_path, told)

    def refuse(name):
        raise AssertionError(f"{name} in the JSON")

    read = json.loads((tmp_path / "backtest.json").read_text(), parse_constant=refuse)
    assert read == told
    best = told["policies"]["greedy"]
    if action == BUY:
        assert best["equity"] == told["policies"]["buy_and_hold"]["equity"]
        assert best["metrics"] == told["policies"]["buy_and_hold"]["metrics"]
        assert len(told["trades"]) == 1
    else:
        assert best["metrics"]["standard"]["sr"] is None
        assert told["sampled"]["metrics"]["standard"]["sr"] is None
        assert told["trades"] == [] and set(best["position"]) == {0}
        earned_less = np.mean(np.array(told["random"]["sharpes"]) < 0) * 100
        assert told["random"]["percentile"]["greedy"] == pytest.approx(earned_less)


def test_missing_bars_leave_no_nan(tiny_model):
    market = small_market()
    columns = {name: getattr(market, name).copy() for name in ("open", "high", "low", "close")}
    for column in columns.values():
        column[TRAIN_DAYS + 5] = np.nan
    config = small_config(tiny_model)
    world, policy, _ = small_world(config, small_market(**columns))
    told = backtest(policy, world, config, "test")
    assert told["close"][5] is None
    json.dumps(told, allow_nan=False)


def test_a_ruined_account_leaves_no_nan(tiny_model):
    """Short of shares that multiply: the equity ends at 0, where log returns have no value."""
    market = small_market()
    steep = {}
    for name in ("open", "high", "low", "close"):
        column = getattr(market, name).copy()
        column[TRAIN_DAYS + 4 :] *= 30
        steep[name] = column
    market = small_market(**steep)
    config = small_config(tiny_model, simulator__positions="long_short")
    world, policy, _ = small_world(config, market)
    told = backtest(always(policy, SELL), world, config, "test")
    best = told["policies"]["greedy"]
    assert best["equity"][-1] == 0.0
    assert best["metrics"]["flag"]["cr"] is None
    assert best["metrics"]["standard"]["cr"] == pytest.approx(-100)
    assert [trade["action"] for trade in told["trades"]] == ["Sell"], "ruin is no fill"
    json.dumps(told, allow_nan=False)


def test_the_same_policy_gives_the_same_document(document, tiny_model):
    config, _, told = document
    _, world, policy = opinionated(tiny_model)
    assert backtest(policy, world, config, "test") == told


def test_any_period_can_be_told(tiny_model):
    config, world, policy = opinionated(tiny_model)
    told = backtest(policy, world, config, "2001-01-10..2001-01-11")
    assert told["dates"] == ["2001-01-10", "2001-01-11"]
    assert told["policies"]["buy_and_hold"]["metrics"]["standard"]["sr"] is None
    json.dumps(told, allow_nan=False)


def test_a_trained_policy_is_backtested_with_its_running_statistics(tiny_model, tmp_path):
    config = small_config(tiny_model)
    weights = open_weights(config.policy.model)
    world, policy = train(config, small_market(), weights, tmp_path, resume=False)
    told = backtest(policy, world, config, "test")
    policy.running.mean += 5.0
    other = backtest(policy, world, config, "test")
    assert (
        told["policies"]["greedy"]["probabilities"] != other["policies"]["greedy"]["probabilities"]
    )


def test_a_document_with_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_backtest(tmp_path, {"sharpe": float("nan")})
    assert not list(tmp_path.iterdir())
