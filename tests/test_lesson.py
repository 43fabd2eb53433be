import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import make_opinionated, small_config, small_market, small_world

import fastflag.learn.rollout as rollout_module
from fastflag.config import AlgorithmConfig
from fastflag.learn.batch import Batch, Branches, start_accounts
from fastflag.learn.lesson import _samples, advantages, estimate
from fastflag.learn.objective import loss_of
from fastflag.learn.progress import PhaseTimer
from fastflag.learn.rollout import rollout
from fastflag.learn.samples import Before, Samples
from fastflag.market.accounts import Accounts
from fastflag.market.schedule import schedule
from fastflag.market.task import Steps
from fastflag.policy.heads import masked_log_softmax
from fastflag.policy.table import Table

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, ACTIONS = 5, 3
ALLOWED = torch.ones(ROWS, ACTIONS, dtype=torch.bool)
ALLOWED[0, 2] = False


def table_of(random):
    logits = torch.from_numpy(random.normal(size=(ROWS, ACTIONS)))
    value = torch.from_numpy(random.normal(size=ROWS)).requires_grad_()
    return logits.requires_grad_(), Table(masked_log_softmax(logits, ALLOWED), value, None)


def points_of(random, table, count):
    row = random.integers(0, ROWS, count)
    action = np.minimum(random.integers(0, ACTIONS, count), 1 + (row > 0))
    none = np.zeros(count)
    drawn = table.log_probabilities.detach().numpy()[row, action]
    weight, advantage, target = random.uniform(0.1, 2, count), *random.normal(size=(2, count))
    initial = masked_log_softmax(torch.zeros(ROWS, ACTIONS), ALLOWED)
    before = Before(table.value.detach(), initial)
    return Samples(row, action, weight, advantage, none, target, none, drawn, before)


def learnt(logits, table, points, config):
    """The loss, its gradients and its statistics."""
    samples = points.placed()
    wide = {
        name: column.double()
        for name, column in samples.columns().items()
        if name not in ("row", "action")
    }
    before = Before(*map(torch.Tensor.double, samples.before))
    samples = dataclasses.replace(samples, **wide, before=before)
    chosen = table.log_probabilities[samples.row], table.value[samples.row]
    loss, statistics = loss_of(*chosen, samples, config)
    gradients = torch.autograd.grad(loss, (logits, table.value), retain_graph=True)
    return [loss, *gradients], {name: scalar.item() for name, scalar in statistics.items()}


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
@given(seed=st.integers(0, 2**31), count=st.integers(1, 60))
def test_samples_added_up_teach_what_they_teach_one_by_one(algorithm, norm_adv, seed, count):
    random = np.random.default_rng(seed)
    config = AlgorithmConfig(algorithm=algorithm, norm_adv=norm_adv, kl_coef=0.1)
    logits, table = table_of(random)
    points = points_of(random, table, count)
    whole, statistics = learnt(logits, table, points, config)
    added, same = learnt(logits, table, points.added_up(), config)
    for one, other in zip(whole, added, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert same == pytest.approx(statistics, rel=1e-5, abs=1e-6)


@given(seed=st.integers(0, 2**31), cut=st.integers(1, 29))
def test_it_does_not_matter_in_how_many_parts_they_are_added_up(seed, cut):
    random = np.random.default_rng(seed)
    points = points_of(random, table_of(random)[1], 30)
    parts = [points.take(part) for part in (slice(cut), slice(cut, None))]
    whole = points.added_up()
    by_parts = Samples.joined([part.added_up() for part in parts]).added_up()
    assert len(set(zip(whole.row, whole.action, strict=True))) == len(whole.row)
    for name, column in whole.columns().items():
        np.testing.assert_allclose(by_parts.columns()[name], column, atol=1e-12, err_msg=name)


def lived(model, piece_steps=None, monkeypatch=None, **changes):
    """(config, world, days, table, batches, lesson, accounts) of a first rollout."""
    if piece_steps:
        monkeypatch.setattr(rollout_module, "_MANY_STEPS", 1)
        monkeypatch.setattr(rollout_module, "_PIECE_STEPS", piece_steps)
    config = small_config(model, **changes)
    world, policy, days = small_world(config, small_market())
    make_opinionated(policy)
    accounts = start_accounts(config.rollout, config.simulator.cash)
    table, batches = rollout(policy, world, [days], accounts, config, 0, PhaseTimer())
    batches = list(batches)
    return (
        config,
        world,
        days,
        table,
        batches,
        estimate(table, batches, config.algorithm, PhaseTimer()),
        accounts,
    )


@pytest.mark.parametrize("estimator", ["sampled", "all-actions"])
def test_a_rollout_in_pieces_teaches_what_one_does(tiny_model, monkeypatch, estimator):
    changes = {"rollout__num_envs": 12, "rollout__start_groups": 2} | {
        "algorithm__estimator": estimator
    }
    *_, one, whole, moved = lived(tiny_model, 10**9, monkeypatch, **changes)
    *_, several, lesson, same = lived(tiny_model, 4 * 6, monkeypatch, **changes)
    assert (len(one), len(several)) == (1, 4)  # 6 environments of each group: 4 and 2
    assert lesson.env_steps == whole.env_steps == 12 * 6
    assert lesson.reward == pytest.approx(whole.reward)
    assert lesson.samples.row.tolist() == whole.samples.row.tolist()
    for name, column in whole.samples.columns().items():
        torch.testing.assert_close(lesson.samples.columns()[name], column, rtol=1e-5, atol=1e-6)
    assert lesson.samples.mean_weight == pytest.approx(12 * 6 / len(lesson.samples))
    for before, after in zip(moved, same, strict=True):
        for name, array in before.arrays().items():
            np.testing.assert_array_equal(after.arrays()[name], array)


@pytest.mark.parametrize("all_at_once", [True, False])
@pytest.mark.parametrize("positions", ["long_flat", "long_short"])
def test_all_actions_are_weighed_by_what_each_would_bring(
    tiny_model, monkeypatch, positions, all_at_once
):
    """Against every action tried on a copy of the account, one account at a time."""
    config, world, days, table, (batch,), lesson, _ = lived(
        tiny_model,
        10**9 if all_at_once else None,
        monkeypatch,
        simulator__positions=positions,
        algorithm__estimator="all-actions",
        algorithm__minibatch_size=10**6,
    )
    value = table.value.detach().double().numpy()
    row_of = {key: row for row, key in enumerate(batch.prompts.keys())}
    day, restart, _ = schedule([days], config.simulator.horizon, world.seed, 0, 0, 6)
    expected = []
    for h in range(6):
        for b in range(config.rollout.num_envs):
            expected.append((b, h))
    samples = iter(range(len(lesson.samples)))
    sampled = advantages(table, batch, config.algorithm)
    replayed = [Accounts.start(1, config.simulator.cash) for _ in range(config.rollout.num_envs)]
    for b, h in expected:
        account = replayed[b]
        if restart[h]:
            account.reset(np.ones(1, bool))
        row = batch.steps.row[b, h]
        for action in np.flatnonzero(batch.prompts.allowed[row]):
            after = account.take(np.zeros(1, int))
            reward, ruined = world.task.step(after, day[h], int(action))
            code = world.task.code(after, day[h] + 1)
            present = np.zeros((1, world.task.codes), bool)
            present[0, code] = True
            prompts, _ = world.stepped([int(day[h]) + 1], present)
            following = 0 if ruined[0] else value[row_of[prompts.keys()[0]]]
            n = next(samples)
            assert (lesson.samples.row[n], lesson.samples.action[n]) == (row, action)
            advantage = reward[0] + config.algorithm.gamma * following - value[row]
            assert lesson.samples.advantage[n].item() == pytest.approx(advantage, abs=1e-6)
            assert lesson.samples.weight[n].item() == pytest.approx(
                table.probabilities[row, action]
            )
            target = sampled[b, h] + value[row]
            assert lesson.samples.target[n].item() == pytest.approx(target, abs=1e-6)
        world.task.step(account, day[h], batch.steps.action[b, h])
    assert next(samples, None) is None


def test_the_all_actions_gradient_is_that_of_the_expected_advantage(tiny_model):
    """sum over s, a of pi(a|s) A(s, a), differentiated through pi."""
    config, *_, table, (batch,), lesson, _ = lived(
        tiny_model,
        simulator__positions="long_short",
        algorithm__estimator="all-actions",
        algorithm__norm_adv=False,
        algorithm__ent_coef=0.0,
        algorithm__vf_coef=0.0,
        algorithm__max_grad_norm=0.0,
    )
    policy_gradient = {}
    for algorithm in ("ppo", "reinforce"):
        chosen = dataclasses.replace(config.algorithm, algorithm=algorithm)
        made = table.log_probabilities[lesson.samples.row], table.value[lesson.samples.row]
        loss, _ = loss_of(*made, lesson.samples, chosen)
        (policy_gradient[algorithm],) = torch.autograd.grad(
            loss, table.log_probabilities, retain_graph=True
        )
    value = table.value.detach().double().numpy()
    branches = batch.branches
    following = value[branches.next_row] * ~branches.terminated
    gain = branches.reward + config.algorithm.gamma * following - value[batch.steps.row][..., None]
    rows = torch.from_numpy(batch.steps.row.ravel().astype(np.int64))
    probabilities = table.log_probabilities.exp()[rows]
    expected = -(probabilities * torch.from_numpy(gain.reshape(-1, 3))).sum(1).mean()
    (gradient,) = torch.autograd.grad(expected, table.log_probabilities, retain_graph=True)
    assert gradient.abs().max() > 1e-4
    for made in policy_gradient.values():
        torch.testing.assert_close(made.nan_to_num(0), gradient, rtol=1e-4, atol=1e-7)


def test_minibatches_of_all_actions_teach_on_average_what_the_whole_does():
    """Also where a sample is as light as its action is improbable."""
    random = np.random.default_rng(0)
    config = AlgorithmConfig(norm_adv=False, kl_coef=0.1)
    logits, table = table_of(random)
    points = points_of(random, table, 24)
    points.weight[:12] *= 1e-3
    samples = points.placed()

    def gradient(index):
        some = samples.take(index)
        made = table.log_probabilities[some.row], table.value[some.row]
        loss, _ = loss_of(*made, some, config)
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    parts = torch.stack([gradient(index) for index in torch.randperm(24).split(2)])
    torch.testing.assert_close(parts.mean(0), gradient(torch.arange(24)), rtol=1e-5, atol=1e-7)


def test_after_an_action_that_ruins_there_is_no_value():
    table = Table(torch.zeros(2, 3).log_softmax(-1), torch.tensor([0.5, 2.0]), None)
    branches = Branches(
        next_row=np.array([[[0, 1, 1]]], np.int32),
        reward=np.array([[[0.1, 0.2, -1.0]]]),
        terminated=np.array([[[False, False, True]]]),
    )
    steps = Steps.empty(1, 1)
    steps.valid[:] = True
    batch = Batch(None, torch.zeros(2, 3), steps, np.zeros((1, 1)), np.zeros((1, 1)), branches)
    samples = _samples(table, batch, np.zeros((1, 1)), AlgorithmConfig(gamma=0.9))
    expected = [0.1 + 0.9 * 0.5 - 0.5, 0.2 + 0.9 * 2.0 - 0.5, -1.0 - 0.5]
    np.testing.assert_allclose(samples.advantage, expected, rtol=1e-12)


# What is compiled, against NumPy, bit for bit: runs resume, and repeat, to the bit.


@given(seed=st.integers(0, 2**31), environments=st.integers(1, 7), steps=st.integers(1, 5))
def test_every_action_is_in_the_order_and_bits_of_numpy(seed, environments, steps):
    random, shape = np.random.default_rng(seed), (environments, steps)
    table = table_of(random)[1]
    batch = Batch(
        None,
        torch.zeros(ROWS, ACTIONS),
        Steps(
            random.integers(0, ROWS, shape, np.int32),
            random.integers(0, ROWS, shape, np.int32),
            random.integers(0, ACTIONS, shape, np.int8),
            random.normal(size=shape),
            random.random(shape) < 0.2,
            random.random(shape) < 0.7,
        ),
        np.zeros(shape),
        np.zeros(shape, bool),
        Branches(
            random.integers(0, ROWS, (*shape, ACTIONS), np.int32),
            random.normal(size=(*shape, ACTIONS)),
            random.random((*shape, ACTIONS)) < 0.2,
        ),
    )
    advantage, gamma = random.normal(size=shape), random.random()
    samples = _samples(table, batch, advantage, AlgorithmConfig(gamma=gamma))
    value, branches, flat = table.values, batch.branches, batch.steps.valid.T
    following = gamma * value[branches.next_row] * ~branches.terminated
    ways = branches.reward + following - value[batch.steps.row][..., None]
    row = batch.steps.row.T[flat]
    probability = table.probabilities[row]
    possible = probability.astype(np.float32) > 0
    step, action = np.nonzero(possible)
    expected = {
        "row": row[step],
        "action": action,
        "weight": probability[possible],
        "advantage": ways.swapaxes(0, 1)[flat][possible],
        "target": (advantage.T[flat] + value[row])[step],
        "old_log_probability": table.detached[row[step], action],
    }
    for name, column in expected.items():
        assert np.array_equal(samples.columns()[name], column), name


@given(seed=st.integers(0, 2**31), count=st.integers(1, 200))
def test_sums_are_numpys_bincounts_to_the_bit(seed, count):
    random = np.random.default_rng(seed)
    points = points_of(random, table_of(random)[1], count)
    spread = random.random((2, count))
    points = dataclasses.replace(points, advantage_spread=spread[0], target_spread=spread[1])
    added = points.added_up()
    key = points.row * ACTIONS + points.action
    weight = np.bincount(key, points.weight)
    kept = np.flatnonzero(weight)
    assert np.array_equal(added.row * ACTIONS + added.action, kept)
    assert np.array_equal(added.weight, weight[kept])
    for name in ("advantage", "target"):
        numbers, before = points.columns()[name], points.columns()[f"{name}_spread"]
        mean = np.bincount(key, points.weight * numbers) / np.where(weight > 0, weight, 1)
        square = points.weight * (numbers - mean[key]) ** 2
        assert np.array_equal(added.columns()[name], mean[kept])
        of_all = np.bincount(key, before + square)[kept]
        assert np.array_equal(added.columns()[f"{name}_spread"], of_all)
