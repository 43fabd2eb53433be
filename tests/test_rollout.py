from collections import Counter

import numpy as np
import pytest
import torch
from small import holey_market, make_opinionated, small_config, small_market, small_world

import fastflag.learn.rollout as rollout_module
from fastflag.config import RolloutConfig
from fastflag.files import InputError
from fastflag.learn.batch import start_accounts
from fastflag.learn.decision import choose
from fastflag.learn.progress import PhaseTimer
from fastflag.learn.rollout import rollout
from fastflag.market.accounts import Accounts
from fastflag.market.random_numbers import uniform
from fastflag.market.schedule import schedule

UPDATES = 4


pytestmark = pytest.mark.usefixtures("one_thread")


def only_batch(policy, world, days, accounts, config, step):
    """The table and the only batch of a rollout."""
    table, batches = rollout(policy, world, [days], accounts, config, step, PhaseTimer())
    (batch,) = batches
    return table, batch


def columns(batch):
    return vars(batch.steps) | {"truncated": batch.truncated}


def roll(model, market, updates=UPDATES, uniform=False, **changes):
    """(config, world, [(table, batch) of each update]) under an untrained policy."""
    config = small_config(model, **changes)
    world, policy, days = small_world(config, market)
    if not uniform:
        make_opinionated(policy)
    accounts = start_accounts(config.rollout, config.simulator.cash)
    with torch.no_grad():
        done = [only_batch(policy, world, days, accounts, config, step) for step in range(updates)]
    return config, world, done


def replay(config, world, days, done):
    """Lives every environment's recorded actions again, one account at a time.

    Yields (batch, table, b, h, number of the step, account before it, day), then moves the account.
    """
    size = config.rollout.num_envs // config.rollout.start_groups
    steps = config.rollout.num_steps
    for b in range(config.rollout.num_envs):
        account = Accounts.start(1, config.simulator.cash)
        for update, (table, batch) in enumerate(done):
            day, restart, last = schedule(
                [days], config.simulator.horizon, world.seed, b // size, update * steps, steps
            )
            for h in range(steps):
                if restart[h]:
                    account = Accounts.start(1, config.simulator.cash)
                yield batch, table, b, h, update * steps + h, account, int(day[h])
                assert batch.steps.valid[b, h] == account.alive[0]
                reward, terminated = world.task.step(account, day[h], batch.steps.action[b, h])
                assert batch.steps.reward[b, h] == reward[0]
                assert batch.steps.terminated[b, h] == terminated[0]
                assert batch.truncated[b, h] == last[h]
                expected = text(world, account, int(day[h]) + 1)
                assert decoded(world, batch, batch.steps.next_row[b, h]) == expected


def text(world, account, day):
    prompter = world.prompter
    if prompter.config.account == "exact":
        suffix = prompter.exact_text(account, 0, day)
    else:
        suffix = prompter.stepped_text(int(world.task.code(account, day)[0]))
    return prompter.prefix_text(day) + suffix


def decoded(world, batch, row):
    return world.prompter.tokenizer.decode(batch.prompts.tokens(row))


WORLDS = {
    "stepped long_flat": {"rollout__start_groups": 2},
    "stepped long_short": {
        "simulator__positions": "long_short",
        "simulator__fill": "same_close",
        "simulator__reward": "log_return",
    },
    "stepped next_close": {"simulator__fill": "next_close", "rollout__num_steps": 13},
    "exact long_flat": {"prompt__account": "exact", "rollout__start_groups": 2},
    "exact long_short": {
        "prompt__account": "exact",
        "simulator__positions": "long_short",
        "prompt__layout": "paper",
    },
    "ruined": {"simulator__ruin": 0.995},
    "exact ruined": {"simulator__ruin": 0.995, "prompt__account": "exact"},
}


@pytest.mark.parametrize("name", WORLDS)
def test_rows_are_the_states_that_the_recorded_actions_lead_through(tiny_model, name):
    """Texts, rewards, ends and actions of every step, against a replay by simulator.step."""
    config, world, done = roll(tiny_model, holey_market(), **WORLDS[name])
    days = range(24)
    seen = 0
    for batch, table, b, h, number, account, day in replay(config, world, days, done):
        row = batch.steps.row[b, h]
        assert decoded(world, batch, row) == text(world, account, day)
        allowed = world.task.allowed(day, np.sign(account.shares))[0]
        np.testing.assert_array_equal(batch.prompts.allowed[row], allowed)
        if account.alive[0]:
            # An independent draw of the same number from the row's distribution.
            drawn_number = uniform(world.seed, np.array([b]), number)[0]
            cumulative = table.probabilities[row].cumsum()
            drawn = next(a for a in range(3) if drawn_number < cumulative[a] or a == 2)
            assert batch.steps.action[b, h] == drawn
            assert allowed[drawn]
        seen += 1
    assert seen == config.rollout.num_envs * config.rollout.num_steps * UPDATES
    if "ruined" in name:
        assert any(not batch.steps.valid.all() for _, batch in done)
        assert any(batch.steps.terminated.any() for _, batch in done)
    else:
        assert all(batch.steps.valid.all() for _, batch in done)
    rows = np.concatenate([batch.steps.action.ravel() for _, batch in done])
    assert set(rows) == {0, 1, 2}


def test_steps_can_be_cut_into_updates_anywhere(tiny_model):
    """Carried-over accounts: 4 updates of 6 steps are one of 24. (The policy is uniform: another's
    answers depend a little on which days the batch has, because they are centred on those.)"""
    settings = {"uniform": True, "rollout__start_groups": 2}
    _, _, cut = roll(tiny_model, small_market(), **settings)
    _, _, whole = roll(tiny_model, small_market(), 1, rollout__num_steps=24, **settings)
    for name in ("action", "reward", "truncated"):
        parts = np.concatenate([columns(batch)[name] for _, batch in cut], axis=1)
        np.testing.assert_array_equal(parts, columns(whole[0][1])[name])


def test_groups_start_on_days_of_their_own(tiny_model):
    _, world, done = roll(tiny_model, small_market(), updates=1, rollout__start_groups=4)
    batch = done[0][1]
    flat = Accounts.start(1, 1.0)
    day_of = {text(world, flat, day): day for day in range(24)}
    starts = [day_of[decoded(world, batch, row)] for row in batch.steps.row[:, 0]]
    assert starts == [schedule([range(24)], 9, world.seed, group, 0, 6)[0][0] for group in range(4)]
    assert len(set(starts)) > 1


def test_stepped_and_exact_accounts_live_alike_under_the_untrained_policy(tiny_model):
    """Both give uniform probabilities, so the same numbers draw the same actions."""
    batches = []
    for account in ("stepped", "exact"):
        config = small_config(tiny_model, prompt__account=account, rollout__start_groups=2)
        world, policy, days = small_world(config, holey_market())
        accounts = start_accounts(config.rollout, config.simulator.cash)
        for step in range(3):
            _, batch = only_batch(policy, world, days, accounts, config, step)
            batches.append(batch)
    for stepped, exact in zip(batches[:3], batches[3:], strict=True):
        for name in ("action", "reward", "terminated", "truncated", "valid"):
            np.testing.assert_array_equal(columns(stepped)[name], columns(exact)[name])


@pytest.mark.parametrize("account", ["stepped", "exact"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_table_made_in_parts_is_that_of_one_evaluation(tiny_model, account, groups):
    """Values and gradients: rows, days and statistics are those of one pass over all prompts."""
    config = small_config(tiny_model, prompt__account=account, rollout__start_groups=groups)
    world, policy, days = small_world(config, small_market())
    make_opinionated(policy)
    accounts = start_accounts(config.rollout, config.simulator.cash)
    table, batch = only_batch(policy, world, days, accounts, config, 0)
    gradients = []
    for made in (table, policy.evaluate(batch.prompts)):
        policy.zero_grad()
        kept = made.log_probabilities.masked_fill(made.log_probabilities.isinf(), 0.0)
        (kept.square().sum() + made.value.square().sum()).backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
        np.testing.assert_allclose(made.probabilities, table.probabilities, atol=2e-6)
        torch.testing.assert_close(made.value, table.value)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm()
    assert np.ptp(table.probabilities, axis=0).max() > 0.05


@pytest.mark.parametrize("missing", [(7, 15), (5, 6, 7, 8)], ids=["days apart", "equal days"])
@pytest.mark.parametrize("positions", ["long_flat", "long_short"])
def test_prompts_listed_before_or_found_by_guessing_give_the_same_steps(
    tiny_model, positions, missing, monkeypatch
):
    """Days without a bar or news, one after another, read alike: their prompts are one row."""
    done = []
    for all_at_once in (False, True):
        monkeypatch.setattr(rollout_module, "_MANY_STEPS", 1 if all_at_once else 10**9)
        settings = {
            "simulator__positions": positions,
            "rollout__start_groups": 2,
            "prompt__news_tokens": 0,
        }
        config, world, rolled = roll(tiny_model, holey_market(missing), **settings)
        for batch, _, b, h, _, account, day in replay(config, world, range(24), rolled):
            assert decoded(world, batch, batch.steps.row[b, h]) == text(world, account, day)
        done.append(rolled)
    for (one, lived), (other, listed) in zip(*done, strict=True):
        assert len(lived.prompts.pairs) < len(listed.prompts.pairs)
        assert len(lived.prompts.pairs) == len(one.value)
        for name in ("action", "reward", "terminated", "truncated", "valid"):
            np.testing.assert_array_equal(columns(lived)[name], columns(listed)[name])
        for name in ("row", "next_row"):
            np.testing.assert_allclose(
                one.probabilities[columns(lived)[name]],
                other.probabilities[columns(listed)[name]],
                atol=2e-6,
            )
        for batch, table in ((lived, one), (listed, other)):
            told = table.log_probabilities.numpy()[batch.steps.row, batch.steps.action]
            np.testing.assert_array_equal(batch.log_probability, told)


@pytest.mark.parametrize("estimator", ["sampled", "all-actions"])
def test_guesses_find_what_is_visited_in_a_few_batches(tiny_model, estimator, monkeypatch):
    """In steps of one day at most; and of rows that nobody visits there are few."""
    config = small_config(
        tiny_model,
        algorithm__estimator=estimator,
        rollout__num_envs=24,
        rollout__num_steps=18,
        rollout__start_groups=2,
    )
    world, policy, days = small_world(config, small_market())
    make_opinionated(policy)
    batches = []
    evaluate = policy.evaluate
    monkeypatch.setattr(
        policy, "evaluate", lambda *given, **named: batches.append(0) or evaluate(*given, **named)
    )
    accounts = start_accounts(config.rollout, config.simulator.cash)
    table, batch = only_batch(policy, world, days, accounts, config, 0)
    assert 2 <= len(batches) <= 6
    visited = np.union1d(batch.steps.row, batch.steps.next_row)
    if batch.branches:
        visited = np.union1d(visited, batch.branches.next_row)
    centring = batch.prompts.centring
    unread = np.setdiff1d(np.arange(len(batch.prompts.pairs)), np.union1d(visited, centring))
    assert len(unread) <= 0.25 * len(visited)
    assert len(table.value) == len(batch.prompts.pairs)


def test_environments_act_as_often_as_the_table_says(tiny_model):
    _, _, done = roll(
        tiny_model,
        small_market(),
        updates=1,
        rollout__num_envs=4000,
        rollout__num_steps=2,
        simulator__positions="long_short",
    )
    table, batch = done[0]
    for step in range(2):
        for row in np.unique(batch.steps.row[:, step]):
            actions = batch.steps.action[batch.steps.row[:, step] == row, step]
            share = np.bincount(actions, minlength=3) / len(actions)
            expected = table.probabilities[row]
            deviation = np.sqrt(expected * (1 - expected) / len(actions))
            assert (np.abs(share - expected) < 4.5 * deviation).all()


def test_another_seed_shares_no_environment(tiny_model):
    """Environment i + 1 of a seed must not be environment i of the next: runs of several seeds
    would then be the same run, and their spread would tell nothing."""
    actions = []
    for seed in (0, 1):
        config = small_config(tiny_model, seed=seed, rollout__num_envs=64, rollout__num_steps=9)
        world, policy, days = small_world(config, small_market())
        accounts = start_accounts(config.rollout, config.simulator.cash)
        _, batch = only_batch(policy, world, days, accounts, config, 0)
        actions.append(batch.steps.action)
    assert not np.array_equal(actions[0][1:], actions[1][:-1])


def test_choose_is_the_inverse_of_the_cumulative_distribution():
    probabilities = np.array([[0.2, 0.5, 0.3]] * 7 + [[0.0, 1.0, 0.0]] * 3 + [[0.4, 0.0, 0.6]] * 3)
    below_one = np.nextafter(1.0, 0.0)
    uniform = [0, 0.19, 0.21, 0.69, 0.71, 0.99, below_one, 0, 0.5, below_one, 0, 0.41, below_one]
    drawn = choose(probabilities, np.array(uniform))
    assert drawn.tolist() == [0, 0, 1, 1, 2, 2, 2, 1, 1, 1, 0, 2, 2]
    assert drawn.dtype == np.int8


@pytest.mark.parametrize("scale", [1.0, 1 - 1e-15, 1 + 1e-15])
def test_choose_never_takes_an_action_of_probability_0(scale):
    random = np.random.default_rng(0)
    probabilities = random.random((3000, 3)) * (random.random((3000, 3)) < 0.6)
    probabilities[probabilities.sum(1) == 0, 1] = 1
    probabilities *= scale / probabilities.sum(1, keepdims=True)
    for number in (0.0, 0.5, np.nextafter(1.0, 0.0)):
        drawn = choose(probabilities, np.full(3000, number))
        assert (probabilities[np.arange(3000), drawn] > 0).all()


def test_choose_draws_each_action_as_often_as_its_probability():
    numbers = uniform(5, np.arange(20000), 3)
    drawn = choose(np.tile([0.15, 0.6, 0.25], (20000, 1)), numbers)
    share = np.array([Counter(drawn.tolist())[action] for action in range(3)]) / 20000
    np.testing.assert_allclose(share, [0.15, 0.6, 0.25], atol=0.013)


@pytest.mark.parametrize("account", ["stepped", "exact"])
def test_prompts_now_name_what_each_account_shows(tiny_model, account):
    config = small_config(tiny_model, prompt__account=account)
    world, _, _ = small_world(config, small_market())
    accounts = Accounts.start(3, config.simulator.cash)
    world.task.step(accounts, 5, np.array([1, 2, 2]))
    prompts, row = world.shown(accounts, 6)
    assert row[1] == row[2] != row[0]
    for b in range(3):
        one = Accounts.from_arrays({k: v[b : b + 1] for k, v in accounts.arrays().items()})
        told = world.prompter.tokenizer.decode(prompts.tokens(row[b]))
        assert told == text(world, one, 6)


def test_environments_must_divide_into_groups():
    with pytest.raises(InputError, match="num_envs 5 must be a multiple of start_groups 2"):
        start_accounts(RolloutConfig(num_envs=5, start_groups=2), 1000.0)
    groups = start_accounts(RolloutConfig(num_envs=6, start_groups=2), 1000.0)
    assert [group.cash.tolist() for group in groups] == [[1000.0] * 3] * 2
