"""Losses against the formulas of CleanRL's ppo.py, written out in NumPy, sample by sample."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflag.config import AlgorithmConfig
from fastflag.learn.objective import (
    loss_of,
    squared_error,
    whitened,
)
from fastflag.learn.samples import Before, Samples
from fastflag.model import ops
from fastflag.policy.heads import masked_log_softmax

COUNT, ACTIONS = 24, 3


def log_softmax(logits, allowed):
    exponents = np.where(allowed, np.exp(logits), 0.0)
    with np.errstate(divide="ignore"):
        return np.log(exponents / exponents.sum(1, keepdims=True))


def problem(seed, count=COUNT, spread=0.6):
    """A batch in which some ratios and values leave the clip range and some actions are masked."""
    random = np.random.default_rng(seed)
    allowed = random.random((count, ACTIONS)) < 0.7
    action = random.integers(0, ACTIONS, count)
    allowed[np.arange(count), action] = True
    logits, old_logits, initial_logits = random.normal(size=(3, count, ACTIONS)) * spread
    old = log_softmax(old_logits, allowed)[np.arange(count), action]
    value, old_value, target, advantage = random.normal(size=(4, count))
    return {
        "logits": logits,
        "allowed": allowed,
        "action": action,
        "value": value,
        "advantage": advantage,
        "target": target,
        "old": old,
        "old_value": old_value,
        "initial": log_softmax(initial_logits, allowed),
    }


def loss_by_hand(p, config):
    """The loss and its parts, one sample after another."""
    log_p = log_softmax(p["logits"], p["allowed"])
    advantage = p["advantage"]
    if config.norm_adv and len(advantage) > 1:
        mean = sum(advantage) / len(advantage)
        deviation = (sum((a - mean) ** 2 for a in advantage) / (len(advantage) - 1)) ** 0.5
        advantage = [(a - mean) / (deviation + 1e-8) for a in advantage]
    policy, value, entropy, initial_kl, kl, clipped = [], [], [], [], [], []
    for i, action in enumerate(p["action"]):
        ratio = np.exp(log_p[i, action] - p["old"][i])
        held = min(max(ratio, 1 - config.clip_coef), 1 + config.clip_coef)
        if config.algorithm == "ppo":
            policy.append(-min(advantage[i] * ratio, advantage[i] * held))
        else:
            policy.append(-advantage[i] * log_p[i, action])
        error = (p["value"][i] - p["target"][i]) ** 2
        if config.algorithm == "ppo" and config.clip_vloss:
            moved = p["value"][i] - p["old_value"][i]
            moved = min(max(moved, -config.clip_coef), config.clip_coef)
            error = max(error, (p["old_value"][i] + moved - p["target"][i]) ** 2)
        value.append(0.5 * error)
        live = [a for a in range(ACTIONS) if p["allowed"][i, a]]
        entropy.append(-sum(np.exp(log_p[i, a]) * log_p[i, a] for a in live))
        initial_kl.append(
            sum(np.exp(log_p[i, a]) * (log_p[i, a] - p["initial"][i, a]) for a in live)
        )
        kl.append((ratio - 1) - np.log(ratio))
        clipped.append(abs(ratio - 1) > config.clip_coef)
    parts = {
        "policy_loss": np.mean(policy),
        "value_loss": np.mean(value),
        "entropy": np.mean(entropy),
        "kl_initial": np.mean(initial_kl),
        "kl": np.mean(kl),
        "clip_fraction": np.mean(clipped),
    }
    loss = (
        parts["policy_loss"]
        + config.vf_coef * parts["value_loss"]
        - config.ent_coef * parts["entropy"]
        + config.kl_coef * parts["kl_initial"]
    )
    return loss, parts


def tensors(p):
    wide = {name: torch.from_numpy(np.asarray(array)) for name, array in p.items()}
    logits, value = wide["logits"].requires_grad_(), wide["value"].requires_grad_()
    samples = Samples(
        row=torch.arange(COUNT),
        action=wide["action"],
        weight=torch.ones(COUNT, dtype=torch.float64),
        advantage=wide["advantage"],
        advantage_spread=torch.zeros(COUNT, dtype=torch.float64),
        target=wide["target"],
        target_spread=torch.zeros(COUNT, dtype=torch.float64),
        old_log_probability=wide["old"],
        before=Before(wide["old_value"], wide["initial"]),
    )
    return logits, value, masked_log_softmax(logits, wide["allowed"]), samples


CONFIGS = [
    AlgorithmConfig(
        algorithm=algorithm,
        norm_adv=norm_adv,
        clip_vloss=clip_vloss,
        ent_coef=0.05,
        vf_coef=0.4,
        kl_coef=0.3,
    )
    for algorithm, norm_adv, clip_vloss in (
        ("ppo", True, True),
        ("ppo", False, True),
        ("ppo", True, False),
        ("reinforce", True, True),
        ("reinforce", False, False),
    )
]
NAMES = [f"{c.algorithm}-{c.norm_adv}-{c.clip_vloss}" for c in CONFIGS]


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_losses_are_the_formulas(config, seed):
    p = problem(seed)
    _, value, log_probabilities, samples = tensors(p)
    loss, statistics = loss_of(log_probabilities, value, samples, config)
    expected, parts = loss_by_hand(p, config)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert 0 < parts["clip_fraction"] < 1
    for name, part in parts.items():
        assert statistics[name].item() == pytest.approx(part, rel=1e-6, abs=1e-12), name


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_gradients_are_those_of_finite_differences(config):
    p = problem(7)
    logits, value, log_probabilities, samples = tensors(p)
    loss_of(log_probabilities, value, samples, config)[0].backward()
    # The advantages and targets are data: nothing flows into them.
    assert not samples.advantage.requires_grad and not samples.target.requires_grad
    step = 1e-6
    for name, tensor in (("logits", logits), ("value", value)):
        for place in np.ndindex(tensor.shape):
            moved = []
            for sign in (1, -1):
                changed = p | {name: p[name].copy()}
                changed[name][place] += sign * step
                moved.append(loss_by_hand(changed, config)[0])
            slope = (moved[0] - moved[1]) / (2 * step)
            assert tensor.grad[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_masked_actions_have_no_gradient_and_spoil_none(algorithm):
    p = problem(1)
    p["allowed"][:4] = np.eye(ACTIONS, dtype=bool)[p["action"][:4]]  # one action only
    p["old"][:4] = 0.0
    p["initial"] = log_softmax(np.zeros((COUNT, ACTIONS)), p["allowed"])
    logits, value, log_probabilities, samples = tensors(p)
    loss_of(log_probabilities, value, samples, AlgorithmConfig(algorithm=algorithm, kl_coef=1.0))[
        0
    ].backward()
    assert torch.isfinite(logits.grad).all() and torch.isfinite(value.grad).all()
    assert (logits.grad[~torch.from_numpy(p["allowed"])] == 0).all()
    assert (logits.grad[:4] == 0).all()
    assert (logits.grad[4:][torch.from_numpy(p["allowed"])[4:]] != 0).any()


def test_the_surrogate_is_flat_where_the_ratio_left_the_range_the_good_way():
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    action, zeros = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    log_p = torch.stack([log_ratio, zeros], dim=1)
    loss = ops.action_terms(log_p, None, action, zeros, advantage, zeros[:, None], 0.2)[3].mean()
    loss.backward()
    ratio = np.exp([0.5, -0.5])
    assert loss.item() == pytest.approx((-1.2 + ratio[0] - ratio[1] + 0.8) / 4)
    np.testing.assert_allclose(log_ratio.grad * 4, [0, ratio[0], -ratio[1], 0], rtol=1e-6)


def test_the_value_loss_is_the_larger_of_clipped_and_not():
    value, target = torch.tensor([2.0, 2.0, 0.1]), torch.tensor([2.5, -1.0, 1.0])
    old = torch.tensor([1.0, 0.0, 0.0])
    assert squared_error(value, target, old, 0.2).mean().item() == pytest.approx(
        0.5 * (1.3**2 + 3.0**2 + 0.9**2) / 3
    )
    assert squared_error(value, target, old, None).mean().item() == pytest.approx(
        0.5 * (0.5**2 + 3.0**2 + 0.9**2) / 3
    )


def test_entropy_and_divergence_of_known_distributions():
    uniform = torch.tensor([[1 / 3] * 3, [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]).log()
    action = torch.ones(3, dtype=torch.int64)

    def terms(log_p):
        return ops.action_terms(log_p, None, action, action, action, uniform, None)

    np.testing.assert_allclose(terms(uniform)[1], np.log([3, 2, 1]), rtol=1e-6)
    skewed = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.1, 0.0], [0.0, 1.0, 0.0]]).log()
    expected = [
        0.5 * np.log(1.5) + 0.5 * np.log(0.75),
        0.9 * np.log(1.8) + 0.1 * np.log(0.2),
        0.0,
    ]
    np.testing.assert_allclose(terms(skewed)[4], expected, rtol=1e-5, atol=1e-7)
    assert (terms(uniform)[4] == 0).all()


def weighed(advantage, weight, spread):
    """Samples of which only the advantages matter."""
    columns = (torch.as_tensor(column, dtype=torch.float64) for column in (weight, spread))
    none = torch.zeros(len(weight))
    weight, spread = columns
    advantage = torch.as_tensor(advantage, dtype=torch.float64)
    return Samples(none, none, weight, advantage, spread, none, none, none, Before(none, none))


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20))
def test_whitened_advantages_have_mean_0_and_deviation_1(values):
    advantage, one = np.array(values), np.ones(len(values))
    expected = (advantage - advantage.mean()) / (advantage.std(ddof=1) + 1e-8)
    samples = weighed(advantage, one, 0 * one)
    np.testing.assert_allclose(whitened(samples), expected, rtol=1e-9, atol=1e-9)


def test_means_are_whitened_as_what_they_are_means_of():
    advantage = np.array([1.0, 2.0, 6.0, -1.0, 0.5])
    whole = (advantage - advantage.mean()) / (advantage.std(ddof=1) + 1e-8)
    means = weighed([3.0, -1.0, 0.5], [3, 1, 1], [14.0, 0, 0])
    expected = [whole[:3].mean(), whole[3], whole[4]]
    np.testing.assert_allclose(whitened(means), expected, rtol=1e-9)


def test_one_sample_is_not_whitened():
    assert whitened(weighed([3.0], [1], [0])).tolist() == [3.0]


def test_a_minibatch_whitens_its_own_advantages():
    p, config = problem(3), AlgorithmConfig()
    _, value, log_probabilities, samples = tensors(p)
    index = torch.arange(0, COUNT, 2)
    loss, _ = loss_of(log_probabilities[index], value[index], samples.take(index), config)
    part = {name: array[::2] for name, array in p.items()}
    assert loss.item() == pytest.approx(loss_by_hand(part, config)[0], rel=1e-10)


def test_every_coefficient_counts():
    p = problem(5)
    _, value, log_probabilities, samples = tensors(p)
    base = AlgorithmConfig(vf_coef=0.0, ent_coef=0.0, kl_coef=0.0)

    def loss(**changes):
        config = dataclasses.replace(base, **changes)
        return loss_of(log_probabilities, value, samples, config)[0].item()

    parts = loss_by_hand(p, base)[1]
    assert loss(vf_coef=1.0) - loss() == pytest.approx(parts["value_loss"])
    assert loss(ent_coef=1.0) - loss() == pytest.approx(-parts["entropy"])
    assert loss(kl_coef=1.0) - loss() == pytest.approx(parts["kl_initial"])
