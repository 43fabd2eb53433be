"""The task `portfolio` from prompts to a backtest, on a tiny model and three symbols."""

import dataclasses
import json

import numpy as np
import pytest
from small import make_opinionated, small_config

import fastflag as ff
from fastflag import cli
from fastflag.config import PortfolioConfig, RebalancingConfig
from fastflag.evaluate.backtest import backtest
from fastflag.evaluate.episodes import run_episodes, sampler
from fastflag.files import InputError
from fastflag.learn.batch import start_all
from fastflag.learn.lesson import estimate
from fastflag.learn.progress import PhaseTimer
from fastflag.learn.rollout import rollout
from fastflag.learn.run import build, training_spans
from fastflag.market.planted import planted_market
from fastflag.market.random_numbers import uniform
from fastflag.market.schedule import schedule
from fastflag.market.several import aligned
from fastflag.market.tasks.centring import centring_portfolios
from fastflag.market.tasks.portfolio import Portfolio
from fastflag.market.tasks.slot_codes import decode
from fastflag.model.weights import open_weights

pytestmark = pytest.mark.usefixtures("one_thread")

THREE = "planted:symbols=3,days=40,seed=3"
DAYS, TRAIN_DAYS, SLOTS = 40, 24, 3


def portfolio(model, **changes):
    config = small_config(model, simulator__reward="log_return", **changes)
    data = dataclasses.replace(config.data, data=THREE, symbols="all")
    return dataclasses.replace(config, task="portfolio", data=data)


def three_markets():
    """Symbols of which one has no bar on two days, and another no row on its first nine."""
    market = planted_market(DAYS, seed=3, symbols=3)
    first, second, third = (market.of(symbol) for symbol in market.symbols)
    columns = {name: getattr(second, name).copy() for name in ("open", "high", "low", "close")}
    for column in columns.values():
        column[[7, 15]] = np.nan
    later = {name: getattr(third, name)[9:] for name in (*columns, "volume", "split", "dividend")}
    third = dataclasses.replace(third, dates=third.dates[9:], **later)
    return aligned([first, dataclasses.replace(second, **columns), third])


def made(config, market=None):
    world, policy = build(config, market or three_markets(), open_weights(config.policy.model))
    make_opinionated(policy)
    return world, policy


def rolled(model, **changes):
    config = portfolio(model, rollout__start_groups=2, **changes)
    world, policy = made(config)
    accounts = start_all(config.rollout, world.task.start)
    table, batches = rollout(
        policy, world, training_spans(world, config), accounts, config, 1, PhaseTimer()
    )
    (batch,) = batches
    return config, world, policy, table, batch


def told(world, account, moment):
    prompter = world.prompter
    return [
        prompter.prefix_text(moment, slot) + prompter.stepped_text(int(code))
        for slot, code in enumerate(world.task.code(account, moment)[0])
    ]


def decoded(world, batch, rows):
    return [world.prompter.tokenizer.decode(batch.prompts.tokens(row)) for row in rows]


RULES = {
    "long_only": {},
    "long_short": {"simulator__positions": "long_short", "simulator__fill": "same_close"},
    "rebalanced": {"portfolio": RebalancingConfig(rebalance_every=3, max_weight=0.4)},
    "ruined": {"simulator__ruin": 0.999},
}


@pytest.mark.parametrize("name", RULES)
def test_a_rollout_is_what_each_account_does_alone(tiny_model, name):
    """Texts, masks, draws, rewards and where every action of a slot leads, against replays."""
    changes = {"algorithm__estimator": "all-actions", **RULES[name]}
    config, world, _, table, batch = rolled(tiny_model, **changes)
    task, steps, ways = world.task, batch.steps, batch.branches
    names, count = len(task.actions), config.rollout.num_steps
    assert names == (5 if name == "long_short" else 4)
    for env in range(config.rollout.num_envs):
        # Two groups of two; the second update begins at step `count`.
        days, restart, last = schedule(
            training_spans(world, config), 9, world.seed, env // 2, count, count
        )
        np.testing.assert_array_equal(batch.truncated[env], last)
        account = task.start(1)
        for step, day in enumerate(days.tolist()):
            if restart[step]:
                account = task.start(1)
            rows, alive = steps.row[env, step], account.alive[0]
            assert steps.valid[env, step] == alive
            assert decoded(world, batch, rows) == told(world, account, day)
            allowed = task.allowed(day, np.sign(account.holding))[0]
            np.testing.assert_array_equal(batch.prompts.allowed[rows], allowed)
            assert (table.probabilities[rows] > 0).tolist() == allowed.tolist()
            action = steps.action[env, step]
            if alive:
                drawn = [
                    uniform(world.seed, env, (count + step) * SLOTS + slot)[0]
                    for slot in range(SLOTS)
                ]
                bounds = table.probabilities[rows].cumsum(1)
                expected = [
                    np.searchsorted(b, u, side="right") for b, u in zip(bounds, drawn, strict=True)
                ]
                assert action.tolist() == expected
            for slot in range(SLOTS):
                for other in range(names):
                    tried = action.copy()
                    tried[slot] = other
                    there = account.take(np.array([0]))
                    reward, terminated = task.step(there, day, tried)
                    way = env, step, slot * names + other
                    assert (ways.reward[way], ways.terminated[way]) == (reward[0], terminated[0])
                    assert decoded(world, batch, ways.next_row[way]) == told(world, there, day + 1)
            reward, terminated = task.step(account, day, action)
            assert steps.reward[env, step] == reward[0]
            assert steps.terminated[env, step] == terminated[0]
            assert decoded(world, batch, steps.next_row[env, step]) == told(world, account, day + 1)
    assert steps.valid.all() != (name == "ruined")


def test_the_table_is_one_forward_of_the_prompts_that_were_visited(tiny_model):
    _, _, policy, table, batch = rolled(tiny_model)
    again = policy.evaluate(batch.prompts)
    np.testing.assert_allclose(again.probabilities, table.probabilities, atol=1e-6)
    visited = {*batch.steps.row.ravel(), *batch.steps.next_row.ravel()}
    # The others are guesses, and what centres: two sides of each slot and moment at most.
    assert len(visited) < len(table.value) < 5 * len(visited)
    sides = {
        (prefix, side)
        for (prefix, _), side in zip(batch.prompts.pairs, batch.prompts.side, strict=True)
    }
    centred = (
        batch.prompts.pairs[batch.prompts.centring, 0],
        batch.prompts.side[batch.prompts.centring],
    )
    assert sides == {*zip(*centred, strict=True)}


@pytest.mark.parametrize("estimator", ["sampled", "all-actions"])
def test_a_lesson_counts_steps_and_not_slots(tiny_model, estimator):
    config, _, _, table, batch = rolled(tiny_model, algorithm__estimator=estimator)
    lesson = estimate(table, [batch], config.algorithm, PhaseTimer())
    steps = config.rollout.num_envs * config.rollout.num_steps
    assert lesson.env_steps == steps
    assert lesson.samples.weight.sum().item() == pytest.approx(steps * SLOTS)
    assert lesson.samples.slots == SLOTS and not lesson.samples.joint


def test_what_centres_is_held_in_equal_parts_for_some_days():
    """A profit is the asset's price since it was bought, for no fee is in it."""
    market = three_markets()
    task = Portfolio.of(PortfolioConfig(positions="long_short"), market)
    moments = np.arange(12, DAYS)
    accounts, moment_of = centring_portfolios(task, moments)
    codes = task.code(accounts, moment_of)
    assert sorted(moment_of) == sorted([*moments] * 3)
    closes = market.close.copy()
    closes[[7, 15], 1] = closes[[6, 14], 1]
    periods = set()
    for row, moment in zip(codes, moment_of, strict=True):
        sides = {decode(code)[0] for code in row}
        assert len(sides) == 1
        for slot, code in enumerate(row):
            side, size, profit = decode(code)
            held = min((1, 3, 10, 30)[(moment + slot) % 4], moment - (9 if slot == 2 else 0))
            if side:
                change = side * (closes[moment, slot] / closes[moment - held, slot] - 1)
                assert size == 4
                assert abs(profit - np.clip(50 * change, -10, 10)) <= 0.5 + 1e-9
                periods.add(int(held))
    assert {1, 3, 10} < periods


def test_before_the_first_bar_and_after_delisting_nothing_centres():
    market = three_markets()
    task = Portfolio.of(PortfolioConfig(), market)
    accounts, moment_of = centring_portfolios(task, np.arange(DAYS))
    (held,) = np.nonzero(accounts.holding[:, 2])
    assert moment_of[held].min() == 9
    closes = {name: getattr(market, name).copy() for name in ("open", "high", "low", "close")}
    for column in closes.values():
        column[20:, 0] = np.nan
    task = Portfolio.of(PortfolioConfig(delisted_after=5), dataclasses.replace(market, **closes))
    accounts, moment_of = centring_portfolios(task, np.arange(DAYS))
    (held,) = np.nonzero(accounts.holding[:, 0])
    assert 23 in moment_of[held] and 24 not in moment_of[held]


def test_a_slot_without_a_row_reads_that_the_market_is_closed(tiny_model):
    world, _ = made(portfolio(tiny_model))
    assert "The market is closed today.\nNo prices yet." in world.prompter.prefix_text(3, 2)
    assert "closed" not in world.prompter.prefix_text(3, 0)
    assert "closed" in world.prompter.prefix_text(7, 1)
    texts = {world.prompter.prefix_text(20, slot) for slot in range(SLOTS)}
    assert len(texts) == SLOTS and all("over (double)" in text for text in texts)
    assert world.prompter.stepped_text(0) == "Holding: none. Action:"
    most = world.prompter.stepped_text(world.task.codes - 1)
    assert most == "Holding: short 5 parts, +20%. Action:"


@pytest.mark.parametrize(
    "changes",
    [{}, {"algorithm__update_epochs": 2, "algorithm__minibatch_size": 7}],
    ids=["one step", "minibatches"],
)
def test_a_resumed_run_is_the_run(tiny_model, tmp_path, changes):
    whole = portfolio(tiny_model, **changes)
    half = dataclasses.replace(
        whole,
        total_timesteps=whole.total_timesteps // 2,
        algorithm=dataclasses.replace(whole.algorithm, anneal_lr=False),
    )
    whole = dataclasses.replace(whole, algorithm=half.algorithm)
    one = ff.train(tmp_path / "one", whole)
    ff.train(tmp_path / "two", half)
    two = ff.train(tmp_path / "two", whole, resume=True)
    lines = [
        [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    assert len(lines[0]) == 4
    for first, second in zip(*lines, strict=True):
        for name in first.keys() - {"seconds", "steps_per_second"}:
            assert first[name] == second[name], name
        assert first["first_ratio_error"] == 0 and first["grad_norm"] > 0
    if changes:
        assert any(line["ratio_max"] > 1 for line in lines[0])
    assert one.tested.document == two.tested.document


def test_a_backtest_is_what_the_policy_would_do_day_by_day(tiny_model):
    config = portfolio(tiny_model)
    world, policy = made(config)
    document = backtest(policy, world, config, "test")
    greedy, names = document["policies"]["greedy"], document["action_names"]
    account, (days,) = world.task.start(1), world.within(config.data.test)
    for number, day in enumerate(days[:-1]):
        prompts, (rows,) = world.shown(account, day)
        probabilities = policy.evaluate(prompts, policy.running.current()).probabilities[rows]
        np.testing.assert_allclose(greedy["probabilities"][number], probabilities, atol=1e-6)
        action = [names.index(name) for name in greedy["actions"][number]]
        assert (probabilities[range(SLOTS), action] >= probabilities.max(1) - 1e-6).all()
        world.task.step(account, day, np.array([action]))
        assert greedy["equity"][number + 1] == account.equity[0]
        weights = account.holding[0] / account.equity[0]
        np.testing.assert_allclose(greedy["weights"][number + 1], weights, atol=1e-12)
    assert len(document["dates"]) == len(days) == len(greedy["weights"])
    assert document["assets"] == list(world.market.symbols)
    policies = {"greedy", "buy_and_hold", "equal_weight", "inverse_volatility"}
    assert {*document["policies"]} == policies
    assert document["random"]["episodes"] == 1000


def test_a_run_is_trained_tested_and_reported(tiny_model, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [
        *("--task", "portfolio", "--data", "planted:symbols=5,days=60", "--symbols", "all"),
        *("--model", str(tiny_model), "--out", str(run), "--top-layers", "1"),
        *("--num-envs", "4", "--num-steps", "6", "--horizon", "6", "--total-timesteps", "48"),
        *("--backtest-episodes", "2", "--window", "2", "--max-weight", "0.5"),
        *("--trunk-weights", "fp32", "--dtype", "fp32"),
    ]
    assert cli.main(["train", *flags]) is None
    assert "a portfolio of 5" in capsys.readouterr().out
    opened = ff.open(run)
    assert opened.config.portfolio.max_weight == 0.5
    assert isinstance(opened.world.task, Portfolio)
    document = json.loads((run / "backtest.json").read_text())
    assert opened.backtest().document == document
    page = (run / "report.html").read_text()
    assert "Equal parts of all 5 assets" in page and '"weights"' in page
    frame = opened.tested.to_frame()
    assert frame["weight"].columns.tolist() == document["assets"]
    assert opened.tested.metrics().index.tolist() == [*document["policies"], "sampled"]
    assert "<svg" in opened.tested._repr_html_()
    with pytest.raises(InputError, match="--task portfolio"):
        opened.decide(document["dates"][-1])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"account": "exact"}, "--account exact"),
        ({"split_by_symbol": "PLANTED2"}, "--split-by-symbol"),
        ({"lot": 1.0}, "--lot"),
        ({"dividends": "cash"}, "--dividends cash"),
        ({"fee_bps": 9999.0, "slippage_bps": 2.0}, "fee and slippage"),
        ({"max_weight": 0.0}, "--max-weight"),
        ({"task": "event"}, "'task'"),
    ],
)
def test_what_portfolios_do_not_have_is_refused(tiny_model, tmp_path, settings, told):
    with pytest.raises(InputError, match=told) as caught:
        ff.train(tmp_path / "run", portfolio(tiny_model), **settings)
    assert "\n" not in str(caught.value)


def changed_after(market, day):
    """Other prices, holes, dividends and splits after the close of `day`; no news."""
    late = np.arange(len(market.dates)) > day
    arrays = {}
    for name in ("open", "high", "low", "close"):
        values = getattr(market, name) * np.where(late, 1.4, 1.0)[:, None]
        values[late & (np.arange(len(late)) % 3 == 0), 0] = np.nan
        arrays[name] = values
    arrays["dividend"] = market.dividend + late[:, None] * 0.7
    arrays["split"] = market.split * np.where(late, 2.0, 1.0)[:, None]
    known = tuple(item for item in market.news if item.available <= market.closes[day])
    return dataclasses.replace(market, news=known, **arrays)


@pytest.mark.parametrize("fill", ["next_open", "same_close"])
def test_what_comes_bears_on_no_decision(tiny_model, fill):
    """To the bit: what is shown, answered, done and owned up to a day's close."""
    config = portfolio(tiny_model, simulator__fill=fill, simulator__positions="long_short")
    days, last = range(20, 32), 26
    lived = []
    for market in (three_markets(), changed_after(three_markets(), last)):
        world, policy = made(config, market)
        lived.append(run_episodes(policy, world, days, 3, sampler(world.seed, 3)))
    one, other = lived
    upto = last - days.start + 1
    for name in ("probabilities", "action", "equity", "shares"):
        first, second = getattr(one, name), getattr(other, name)
        np.testing.assert_array_equal(first[:, :upto], second[:, :upto])
        assert (first[:, upto:] != second[:, upto:]).any()
