"""One policy on several symbols: what it reads, learns from, and is tested on."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from small import make_opinionated, small_config

import fastflag as ff
from fastflag import cli
from fastflag.config import DataConfig
from fastflag.evaluate.backtest import backtest
from fastflag.files import InputError
from fastflag.learn.run import build, training_spans
from fastflag.learn.train import train
from fastflag.market.accounts import Accounts
from fastflag.market.planted import planted_market
from fastflag.market.schedule import schedule
from fastflag.market.several import load
from fastflag.model.weights import open_weights

pytestmark = pytest.mark.usefixtures("one_thread")

THREE = "planted:symbols=3,days=40,seed=3"
NAMES = ("PLANTED", "PLANTED2", "PLANTED3")


def several(model, symbols="all", **changes):
    config = small_config(model, **changes)
    data = dataclasses.replace(config.data, data=THREE, symbols=symbols)
    return dataclasses.replace(config, data=data)


def held_out(config, names):
    data = dataclasses.replace(config.data, split_by_symbol=names)
    return dataclasses.replace(config, data=data)


def one(config, name):
    data = dataclasses.replace(config.data, symbols="", symbol=name)
    return dataclasses.replace(config, data=data)


def made(config):
    world, policy = build(config, load(config.data), open_weights(config.policy.model))
    make_opinionated(policy)
    return world, policy


@pytest.fixture(scope="module")
def worlds(tiny_model):
    config = several(tiny_model)
    return config, made(config), [made(one(config, name)) for name in NAMES]


def test_a_moment_is_what_the_symbol_alone_shows(worlds):
    """Prompts of days, of steps and of exact accounts, in the joined timeline and alone."""
    _, (world, _), alone = worlds
    assert [len(span) for span in world.task.timeline.spans] == [40, 40, 40]
    texts = set()
    for span, (own, _) in zip(world.task.timeline.spans, alone, strict=True):
        accounts = Accounts.start(1, 1000.0)
        accounts.enter(np.array([1]), np.array([50.0]), np.array([span[3]]))
        mine = Accounts.start(1, 1000.0)
        mine.enter(np.array([1]), np.array([50.0]), np.array([3]))
        for day, moment in enumerate(span):
            text = world.prompter.prefix_text(moment)
            assert text == own.prompter.prefix_text(day)
            texts.add(text)
            if day >= 3:
                exact = world.prompter.exact_text(accounts, 0, moment)
                assert exact == own.prompter.exact_text(mine, 0, day)
                assert world.task.code(accounts, moment) == own.task.code(mine, day)
    assert len(texts) > 110  # days that begin with one headline are alike


def test_each_symbols_backtest_is_that_of_the_symbol_alone(worlds):
    config, (world, policy), alone = worlds
    told = backtest(policy, world, config, "test")
    assert tuple(told["symbols"]) == NAMES and not told["held_out"]
    for place, (name, (own, same)) in enumerate(zip(NAMES, alone, strict=True)):
        expected = backtest(same, own, one(config, name), "test")
        mine = told["symbols"][name]
        for key in ("dates", "close", "news", "policies", "trades", "start", "end"):
            assert mine[key] == expected[key], (name, key)
        # Chances are drawn by numbers of the symbol's own.
        assert (mine["random"] == expected["random"]) is (place == 0)
        assert (mine["sampled"] == expected["sampled"]) is (place == 0)
    sharpes = [np.array(each["random"]["sharpes"]) for each in told["symbols"].values()]
    assert abs(np.corrcoef(sharpes)[np.triu_indices(3, 1)]).max() < 0.15


def test_a_symbol_held_out_is_never_read_in_training(tiny_model, tmp_path):
    """Its prices and news changed, the same is learnt to the bit; and what is learnt from all but
    one of two is what is learnt from the other alone."""
    config = held_out(several(tiny_model), "PLANTED2,PLANTED3")
    market, weights = load(config.data), open_weights(config.policy.model)
    columns = {name: getattr(market, name).copy() for name in ("open", "high", "low", "close")}
    for column in columns.values():
        column[:, 1:] *= np.linspace(1, 3, 40)[:, None]
    news = tuple(
        item if item.symbol == "PLANTED" else dataclasses.replace(item, text="Nothing at all")
        for item in market.news
    )
    changed = dataclasses.replace(market, news=news, **columns)
    states = []
    for number, (each, settings) in enumerate(
        [(market, config), (changed, config), (None, one(held_out(config, ""), "PLANTED"))]
    ):
        given = load(settings.data) if each is None else each
        _, policy = train(settings, given, weights, tmp_path / str(number), resume=False)
        states.append(policy.state_dict())
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    stored = json.loads((tmp_path / "0" / "config.json").read_text())
    assert stored["market"] == json.loads((tmp_path / "2" / "config.json").read_text())["market"]


def test_environments_are_dealt_over_symbols_and_starts(tiny_model):
    config = held_out(several(tiny_model, rollout__start_groups=2), "PLANTED2")
    world, _ = build(config, load(config.data), open_weights(config.policy.model))
    spans = training_spans(world, config)
    assert spans == [range(24), range(80, 104)]
    horizon, episodes = 9, 6000
    moment, restart, _ = schedule(spans, horizon, world.seed, 1, 0, horizon * episodes)
    counts = np.bincount(moment[restart], minlength=120)
    starts = [*range(15), *range(80, 95)]  # an episode's ten closes fit
    assert np.flatnonzero(counts).tolist() == starts
    # The 99.99% point of chi-square with 29 degrees of freedom.
    expected = episodes / len(starts)
    assert ((counts[starts] - expected) ** 2 / expected).sum() < 66.2
    assert not np.isin(moment, [*range(24, 80), *range(104, 120)]).any()


def test_what_training_news_counts_is_of_learnt_symbols(tiny_model):
    config = held_out(several(tiny_model), "PLANTED3")
    world, _ = build(config, load(config.data), open_weights(config.policy.model))
    told = world.prompter.training_news(training_spans(world, config))
    # Two headlines a day, of 24 days and 2 symbols.
    assert told.startswith("96 headlines on 48 of 48 training days, ")


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several") / "run"
    return ff.train(folder, held_out(several(tiny_model), "PLANTED3"))


def test_a_run_tells_of_its_symbols(run, capsys):
    tested = run.tested
    assert tested.document["held_out"] == ["PLANTED3"]
    frame = tested.to_frame()
    assert frame.index.names == ["symbol", "date"] and len(frame) == 3 * 16
    metrics = tested.metrics()
    groups = ["all", "learnt", "held_out"]
    assert [*metrics.index.get_level_values(0).unique()] == [*groups, *NAMES]
    assert (
        metrics.loc[("all", "greedy"), "sr"]
        == (tested.document["groups"]["all"]["policies"]["greedy"]["metrics"]["standard"]["sr"])
    )
    cli.main(["backtest", str(run.folder)])
    told = capsys.readouterr().out
    assert told.splitlines()[0].startswith("3 symbols  ")
    assert "  PLANTED3 * " in told and "  together (3) " in told and "  held out (1) " in told
    page = (run.folder / "report.html").read_text()
    for name in NAMES:
        assert f'<th scope="row">{name}' in page
    assert "<h1>3 symbols: " in page and page.count("never seen") >= 2
    assert "<svg" in tested._repr_html_()


def test_on_training_days_held_out_symbols_are_not_told(run):
    told = run.backtest("train").document
    assert tuple(told["symbols"]) == NAMES[:2] and list(told["groups"]) == ["all"]
    alone = ff.open(run.folder, symbol="PLANTED3")
    with pytest.raises(InputError, match="PLANTED3 is held out: it has no training days"):
        alone.backtest("train")


def test_one_symbol_of_a_run_alone(run):
    before = (run.folder / "backtest.json").read_bytes()
    for name in NAMES:
        told = ff.open(run.folder, symbol=name).backtest().document
        of_all = run.tested.document["symbols"][name]
        assert told["policies"] == of_all["policies"]
    assert (run.folder / "backtest.json").read_bytes() == before
    decision = ff.open(run.folder, symbol="PLANTED3").decide(of_all["dates"][0])
    first = of_all["policies"]["greedy"]["probabilities"][0]
    assert [*decision.probabilities.values()] == pytest.approx(first)
    with pytest.raises(InputError, match="one symbol of PLANTED, PLANTED2, PLANTED3: name it"):
        run.decide(of_all["dates"][0])


def test_other_bars_of_one_symbol_are_another_market(run):
    config = dataclasses.replace(run.config.data, data=THREE.replace("seed=3", "seed=4"))
    other = ff.Run(run.folder, dataclasses.replace(run.config, data=config))
    with pytest.raises(InputError, match="are not those that the run was trained on"):
        other.backtest()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"symbols": "PLANTED,PLANTED9"}, "unknown symbol 'PLANTED9' of PLANTED, PLANTED2"),
        ({"symbols": "PLANTED,,"}, "empty or there twice, --symbols"),
        ({"symbol": "PLANTED"}, "both are named, --symbol PLANTED --symbols all"),
        ({"split_by_symbol": "NONE"}, "unknown symbol 'NONE'"),
        ({"split_by_symbol": "PLANTED,PLANTED2,PLANTED3"}, "no symbol is left to learn from"),
    ],
)
def test_refusals(tiny_model, tmp_path, changes, told):
    config = several(tiny_model)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
    with pytest.raises(InputError) as caught:
        ff.train(tmp_path / "run", config)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def shortened(missing):
    """Three symbols, the last without a row on `missing` days."""
    market = planted_market(40, 3, symbols=3)
    rows = np.ones((40, 3), bool)
    rows[missing, 2] = False
    columns = {name: getattr(market, name).copy() for name in ("open", "high", "low", "close")}
    for column in columns.values():
        column[missing, 2] = np.nan
    return dataclasses.replace(market, rows=rows, **columns)


def test_a_symbol_with_too_few_training_days_must_be_held_out(tiny_model, tmp_path):
    market, config = shortened(slice(0, 18)), several(tiny_model)
    weights = open_weights(config.policy.model)
    with pytest.raises(InputError, match=r"fewer training days than an episode's 10.*PLANTED3"):
        train(config, market, weights, tmp_path / "run", resume=False)
    world, policy = train(
        held_out(config, "PLANTED3"), market, weights, tmp_path / "run", resume=False
    )
    assert tuple(backtest(policy, world, config, "test")["symbols"]) == NAMES


def test_a_delisted_symbol_is_named_and_not_tested(tiny_model, tmp_path):
    """It is learnt from all the same: else those that survive alone would be."""
    market, config = shortened(slice(25, None)), several(tiny_model)
    weights = open_weights(config.policy.model)
    world, policy = train(config, market, weights, tmp_path / "run", resume=False)
    told = backtest(policy, world, config, "test")
    assert tuple(told["symbols"]) == NAMES[:2] and told["left_out"] == ["PLANTED3"]
    assert [len(span) for span in training_spans(world, config)] == [24, 24, 24]


def test_planted_symbols_know_nothing_of_one_another():
    market = load(DataConfig(data="planted:symbols=5,days=400", symbols="all"))
    returns = np.diff(np.log(market.close), axis=0)
    assert abs(np.corrcoef(returns.T)[np.triu_indices(5, 1)]).max() < 0.2
    first = planted_market(400)
    np.testing.assert_array_equal(market.close[:, 0], first.close[:, 0])
    assert [item.text for item in market.news if item.symbol == "PLANTED"] == [
        item.text for item in first.news
    ]
