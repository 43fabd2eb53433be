"""Estimators for several slots, against the gradient by enumerating every joint action.

The policy is a table of random logits; the accounts are portfolios on bars with costs. Each state
has rows of its own, so that a table can hold its exact value.
"""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch

from fastflag.config import AlgorithmConfig, PortfolioConfig
from fastflag.learn.batch import Batch, Branches
from fastflag.learn.decision import branch
from fastflag.learn.lesson import _samples, advantages
from fastflag.learn.objective import loss_of
from fastflag.learn.samples import Before, Samples
from fastflag.learn.update import _minibatches_of
from fastflag.market.planted import planted_market
from fastflag.market.task import Steps
from fastflag.market.tasks.portfolio import KEEP, Portfolio
from fastflag.policy.heads import masked_log_softmax
from fastflag.policy.table import Table

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, NAMES = 3, 4
# The loss is the policy's alone, and its expectation is not whitened.
PLAIN = AlgorithmConfig(norm_adv=False, ent_coef=0.0, vf_coef=0.0, gamma=1.0, gae_lambda=1.0)


class Level:
    """The states of one step: nodes `first` and those after, and where each of the joint actions
    leads [nodes, A ** K], -1 where it is not allowed."""

    def __init__(self, task, accounts, first, step, joint):
        self.accounts, self.first, self.step = accounts, first, step
        self.allowed = task.allowed(step, np.sign(accounts.holding))  # [nodes, K, A]
        self.after = np.full((len(accounts), len(joint)), -1)
        self.reward = np.zeros(self.after.shape)
        if step < STEPS:
            can = self.allowed[:, np.arange(task.slots), joint].all(-1)
            self.node, self.which = np.nonzero(can)
            self.following = accounts.take(self.node)
            reward, terminated = task.step(self.following, step, joint[self.which])
            assert not terminated.any()
            self.after[can] = first + len(accounts) + np.arange(len(self.node))
            self.reward[can] = reward


class Tree:
    """Every state that joint actions lead to from one account in three steps, each a node with a
    row for each slot."""

    def __init__(self, slots: int, seed: int):
        random = np.random.default_rng(seed)
        rules = PortfolioConfig(fee_bps=40.0, slippage_bps=20.0)
        self.task = Portfolio.of(rules, planted_market(STEPS + 2, seed=seed, symbols=slots))
        self.slots, self.joint = slots, np.array([*product(range(NAMES), repeat=slots)])
        self.levels, first, accounts = [], 0, self.task.start(1)
        for step in range(STEPS + 1):
            self.levels.append(Level(self.task, accounts, first, step, self.joint))
            first += len(accounts)
            accounts = self.levels[-1].following if step < STEPS else None
        self.nodes = first
        allowed = np.concatenate([level.allowed.reshape(-1, NAMES) for level in self.levels])
        logits = random.normal(size=(first * slots, NAMES))
        self.logits = torch.from_numpy(logits).requires_grad_()
        self.log_p = masked_log_softmax(self.logits, torch.from_numpy(allowed))
        self.split = random.normal(size=(first, slots)) * 0.01  # of a state's value among slots
        self.last = random.normal(size=len(self.levels[-1].accounts)) * 0.01
        self.guess = random.normal(size=first) * 0.01
        self.guess[-len(self.last) :] = self.last

    def rows(self, nodes):
        return np.asarray(nodes)[..., None] * self.slots + np.arange(self.slots)

    def values(self):
        """Of each node, from the last step backwards, by every joint action; with gradient."""
        values = [torch.from_numpy(self.last)]
        for level in reversed(self.levels[:-1]):
            nodes = level.first + level.node
            action = torch.from_numpy(self.joint[level.which])
            chance = self.log_p[torch.from_numpy(self.rows(nodes)), action].sum(-1).exp()
            after = torch.from_numpy(level.reward[level.node, level.which]) + values[0]
            sums = torch.zeros(len(level.accounts), dtype=torch.float64)
            values.insert(0, sums.index_add(0, torch.from_numpy(level.node), chance * after))
        return torch.cat(values)

    def table(self, state_value):
        """A state's value is the mean of its slots', however it is split."""
        split = self.split - self.split.mean(1, keepdims=True)
        value = torch.from_numpy((state_value[:, None] + split).reshape(-1))
        return Table(self.log_p, value.requires_grad_(), None)

    def lived(self):
        """Every trajectory as an environment: its nodes [B, H + 1] and joint actions [B, H]."""
        nodes = np.zeros((1, 1), int)
        actions = np.zeros((1, 0), int)
        for level in self.levels[:-1]:
            after = level.after[nodes[:, -1] - level.first]
            path, which = np.nonzero(after >= 0)
            nodes = np.column_stack([nodes[path], after[path, which]])
            actions = np.column_stack([actions[path], which])
        return nodes, actions

    def batch(self, table, branches):
        """All trajectories, and the probability of each."""
        nodes, which = self.lived()
        action = self.joint[which].astype(np.int8)
        shape = which.shape
        reward = np.column_stack(
            [
                level.reward[nodes[:, level.step] - level.first, which[:, level.step]]
                for level in self.levels[:-1]
            ]
        )
        rows = self.rows(nodes)
        none, all_of_them = np.zeros(shape, bool), np.ones(shape, bool)
        steps = Steps(rows[:, :-1], rows[:, 1:], action, reward, none, all_of_them)
        drawn = table.detached[steps.row, steps.action]
        truncated = np.broadcast_to(np.arange(STEPS) == STEPS - 1, shape)
        chance = np.exp(drawn.sum((1, 2)))
        assert chance.sum() == pytest.approx(1.0)
        ways = self.branches(nodes, which) if branches else None
        initial = table.log_probabilities.detach()
        return Batch(None, initial, steps, drawn, truncated, ways), chance

    def branches(self, nodes, which):
        """Where each action of each slot leads with the others as they were drawn."""
        shape = (*which.shape, self.slots * NAMES)
        next_row, reward = np.zeros((*shape, self.slots), np.int32), np.zeros(shape)
        powers = NAMES ** np.arange(self.slots - 1, -1, -1)
        for level in self.levels[:-1]:
            here, drawn = nodes[:, level.step] - level.first, which[:, level.step]
            for slot, name in product(range(self.slots), range(NAMES)):
                tried = drawn + (name - self.joint[drawn, slot]) * powers[slot]
                way = slot * NAMES + name
                next_row[:, level.step, way] = self.rows(np.maximum(level.after[here, tried], 0))
                reward[:, level.step, way] = level.reward[here, tried]
        return Branches(next_row, reward, np.zeros(shape, bool))


def gradient(tree, table, batch, chance, config, of=None):
    """In the logits, or `of` others, of the estimator's objective in expectation, summed over the
    steps: each trajectory by its probability, samples of equal row and action added up where an
    update is one step."""
    samples = _samples(table, batch, advantages(table, batch, config), config)
    count = np.full(batch.steps.reward.shape, tree.slots)
    if batch.branches is not None:
        count = (table.probabilities[batch.steps.row] > 0).sum((2, 3))
    chances = [np.repeat(chance, count[:, step]) for step in range(STEPS)]
    samples = dataclasses.replace(samples, weight=samples.weight * np.concatenate(chances))
    if config.one_step:
        samples = samples.added_up()
    kinds = {"row": np.int64, "action": np.int64}
    columns = {
        name: torch.from_numpy(column.astype(kinds.get(name, np.float64)))
        for name, column in samples.columns().items()
    }
    mean = float(samples.weight.mean())
    samples = dataclasses.replace(samples, **columns, mean_weight=mean)
    picked = table.log_probabilities[samples.row], table.value[samples.row]
    loss, statistics = loss_of(*picked, samples, config)
    assert statistics["ratio_min"].item() == pytest.approx(1.0)
    (found,) = torch.autograd.grad(
        -STEPS * loss, tree.logits if of is None else of, retain_graph=True
    )
    return found


@pytest.fixture(scope="module", params=[2, 3])
def tree(request):
    return Tree(request.param, seed=request.param)


@pytest.fixture(scope="module")
def expected(tree):
    """The gradient of the value of the first state."""
    (found,) = torch.autograd.grad(tree.values()[0], tree.logits, retain_graph=True)
    assert found.abs().max() > 1e-4
    return found


EPOCHS = pytest.mark.parametrize("epochs", [1, 2], ids=["added up", "one by one"])


def is_close(found, expected):
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@EPOCHS
@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_sampled_actions_give_the_gradient_whatever_the_values_are(
    tree, expected, algorithm, epochs
):
    """What follows the last step is the table's value."""
    config = dataclasses.replace(PLAIN, algorithm=algorithm, update_epochs=epochs)
    table = tree.table(tree.guess)
    is_close(gradient(tree, table, *tree.batch(table, False), config), expected)


@EPOCHS
@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_all_actions_give_the_gradient_where_values_are_true(tree, expected, algorithm, epochs):
    config = dataclasses.replace(PLAIN, algorithm=algorithm, update_epochs=epochs)
    table = tree.table(tree.values().detach().numpy())
    is_close(gradient(tree, table, *tree.batch(table, True), config), expected)


@EPOCHS
def test_true_values_make_advantages_of_one_step_enough(tree, expected, epochs):
    """With lambda 0 the sampled estimator's, whose values are its slots' mean."""
    config = dataclasses.replace(PLAIN, gae_lambda=0.0, update_epochs=epochs)
    table = tree.table(tree.values().detach().numpy())
    is_close(gradient(tree, table, *tree.batch(table, False), config), expected)


def test_branches_step_each_slot_with_the_others_as_they_were_drawn(tree):
    level = tree.levels[1]
    drawn = np.array([np.flatnonzero(row >= 0)[-1] for row in level.after])
    action = tree.joint[drawn]
    after, reward, _ = branch(tree.task, level.accounts, level.step, action)
    assert len(after) == tree.slots * NAMES and reward.shape == (len(action), len(after))
    for slot, name in product(range(tree.slots), range(NAMES)):
        tried = action.copy()
        # What is not allowed counts as Keep.
        tried[:, slot] = np.where(level.allowed[:, slot, name], name, KEEP)
        which = (tried * NAMES ** np.arange(tree.slots - 1, -1, -1)).sum(1)
        place = np.arange(len(action)), which
        way = slot * NAMES + name
        np.testing.assert_array_equal(reward[:, way], level.reward[place])
        nodes = level.after[place] - tree.levels[2].first
        np.testing.assert_array_equal(
            after[way].holding, tree.levels[2].accounts.take(nodes).holding
        )


def test_the_values_gradient_is_that_of_the_states_squared_error(tree):
    """Where samples are added up row by row too; the mean of a state's slots is its value."""
    config = dataclasses.replace(PLAIN, vf_coef=1.0, gae_lambda=0.9)
    table = tree.table(tree.guess)
    batch, chance = tree.batch(table, False)
    advantage = torch.from_numpy(advantages(table, batch, config))
    value = table.value[torch.from_numpy(batch.steps.row)].mean(-1)
    error = 0.5 * (value - (value.detach() + advantage)).pow(2)
    mean = (torch.from_numpy(chance)[:, None] * error).sum() / STEPS
    (expected,) = torch.autograd.grad(mean, table.value)
    found = gradient(tree, table, batch, chance, config, table.value)
    is_close(-found / STEPS, expected)


def by_hand(log_p, samples, clip, kl):
    """PPO's loss of states whose slots' log-probabilities add up, one state after another."""
    policy, entropy, divergence, apart = [], [], [], []
    for at in range(0, len(samples), samples.slots):
        state = range(at, at + samples.slots)
        new = sum(log_p[i, samples.action[i]] for i in state)
        ratio = (new - sum(samples.old_log_probability[i] for i in state)).exp()
        advantage = samples.advantage[at]
        policy.append(-torch.min(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip)))
        entropy.append(-sum((log_p[i].exp() * log_p[i]).sum() for i in state))
        apart.append(sum((log_p[i].exp() * (log_p[i] - samples.initial[i])).sum() for i in state))
        divergence.append(ratio - 1 - ratio.log())
    policy, entropy, apart, divergence = map(torch.stack, (policy, entropy, apart, divergence))
    loss = policy.mean() - 0.1 * entropy.mean() + kl * apart.mean()
    return loss, divergence.mean()


@pytest.mark.parametrize("seed", range(3))
def test_the_ratio_that_is_clipped_is_of_all_slots_together(seed):
    states, slots, clip = 40, 3, 0.2
    count, random = states * slots, torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    logits = (0.3 * normal(count, NAMES)).requires_grad_()
    log_p = logits.log_softmax(-1)
    action = torch.randint(NAMES, (count,), generator=random)
    old = log_p.detach()[torch.arange(count), action] + 0.1 * normal(count)
    none, advantage = torch.zeros(count), normal(states).repeat_interleave(slots)
    initial = normal(count, NAMES).log_softmax(-1)
    columns = torch.arange(count), action, torch.ones(count), advantage, none, none, none, old
    samples = Samples(*columns, Before(none, initial), slots=slots, joint=True)
    config = dataclasses.replace(PLAIN, ent_coef=0.1, kl_coef=0.3, clip_coef=clip)
    loss, statistics = loss_of(log_p, none, samples, config)
    expected, divergence = by_hand(log_p, samples, clip, 0.3)
    assert 0.1 < statistics["clip_fraction"] < 0.9
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert statistics["kl"].item() == pytest.approx(divergence.item(), rel=1e-6)
    found, right = (
        torch.autograd.grad(one, logits, retain_graph=True)[0] for one in (loss, expected)
    )
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


def test_minibatches_keep_the_slots_of_a_state_together():
    column = torch.zeros(30)
    samples = Samples(*[column] * 8, Before(column, column), slots=3, joint=True)
    parts = [*_minibatches_of(samples, 4, torch.Generator().manual_seed(0))]
    assert [len(part) for part in parts] == [12, 12, 6]
    states = torch.cat(parts).view(-1, 3)
    assert (states % 3).tolist() == [[0, 1, 2]] * 10
    assert sorted((states[:, 0] // 3).tolist()) == [*range(10)] != (states[:, 0] // 3).tolist()
