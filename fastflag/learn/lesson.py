"""Batches -> lesson: the samples that an update learns from, each with its weight.

A sample is a row of the table, an action, and what they came to. The sampled estimator has one of
weight 1 for each slot of an environment step; the all-actions estimator one for each action of a
slot, weighted by its probability, with the other slots' actions as they were drawn: Q(s, a) - V(s)
of that action is its counterfactual credit. Where an update is a single gradient step, samples of
equal row and action count as one, with their sum of weights: the loss is the same, and of a size
that does not grow with the number of environments.

The value of a state is the mean of its slots' values, V(s) = (1/K) sum over k of v(row_k). A slot's
target is its own value moved by the state's error, v(row_k) + A(s): the slots' mean squared error
is then (V(s) - target)^2, and its gradient in the first step that of the state's squared error, so
that slots can be added up row by row all the same.

Shapes: N samples, B environments, H steps, U prompts, K slots (one: the axis is not there), A
actions.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastflag.config import AlgorithmConfig
from fastflag.learn.advantage import generalised_advantage
from fastflag.learn.batch import Batch, Branches, Phase
from fastflag.learn.samples import Before, Samples
from fastflag.learn.sums import every_action_nb
from fastflag.policy.table import Table
from fastflag.prompt.prompts import PromptSet


@dataclass(frozen=True)
class Lesson:
    """What an update learns from; rows are those of `prompts`."""

    prompts: PromptSet
    samples: Samples[Tensor]
    env_steps: int
    reward: float  # summed over all steps


def estimate(
    table: Table, batches: Iterable[Batch], config: AlgorithmConfig, phase: Phase
) -> Lesson:
    """The lesson of batches that `table` has the rows of."""
    found, env_steps, reward = [], 0, 0.0
    for batch in batches:
        with phase("advantage"):
            advantage = advantages(table, batch, config)
            samples = _samples(table, batch, advantage, config)
            found.append(samples.added_up() if config.one_step else samples)
            env_steps += batch.steps.valid.size
            reward += float(batch.steps.reward.sum())
    with phase("advantage"):
        samples = found[0] if len(found) == 1 else Samples.joined(found).added_up()
        return Lesson(batch.prompts, samples.placed(), env_steps, reward)


def advantages(table: Table, batch: Batch, config: AlgorithmConfig) -> np.ndarray:
    """The batch's advantages by GAE, [B, H]; values are the table's."""
    steps = batch.steps
    return generalised_advantage(
        steps.reward,
        _of_states(table.values, steps.row),
        _of_states(table.values, steps.next_row),
        steps.terminated,
        batch.truncated,
        config.gamma,
        config.gae_lambda,
    )


def _of_states(value: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The values [B, H] of states that show `rows` [B, H] or [B, H, K]; `value` is [U]."""
    found = value[rows]
    return found.mean(-1) if rows.ndim == 3 else found


def _samples(
    table: Table, batch: Batch, advantage: np.ndarray, config: AlgorithmConfig
) -> Samples[np.ndarray]:
    """One for each slot of each step or, with branches, for each action of each, in the order of
    steps."""
    steps, valid = batch.steps, batch.steps.valid.T
    slots = steps.row.shape[2] if steps.row.ndim == 3 else 1

    def flat(values: np.ndarray) -> np.ndarray:
        return values.swapaxes(0, 1)[valid].reshape(-1)

    before = Before(table.value.detach(), batch.initial)
    if batch.branches is not None:
        row, action, numbers = _of_every_action(table, batch, batch.branches, advantage, config)
        weight, advantage, target = numbers
        log_probability = table.detached[row, action]
    else:
        row, action = flat(steps.row), flat(steps.action)
        weight, advantage = np.ones(len(row)), np.repeat(flat(advantage), slots)
        target = advantage + table.values[row]
        log_probability = flat(batch.log_probability)
    none = np.zeros(len(row))
    columns = row, action, weight, advantage, none, target, none, log_probability
    # One gradient step is taken at a ratio of 1, where the joint one has the sum of the slots'
    # gradients.
    drawn = batch.branches is None and config.algorithm == "ppo"
    joint = drawn and slots > 1 and not config.one_step
    return Samples(*columns, before, slots=slots, joint=joint)


def _of_every_action(
    table: Table, batch: Batch, branches: Branches, advantage: np.ndarray, config: AlgorithmConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, actions and numbers [3, N] of samples: weights, r + gamma V(s') - V(s), and targets,
    which stay those of the step that was taken. Of an action that was not, nothing more is known of
    what comes after than the value."""
    steps, value, probability = batch.steps, table.values, table.probabilities
    row = steps.row.reshape(*steps.valid.shape, -1)
    most = int(steps.valid.sum()) * row.shape[2] * probability.shape[1]
    rows, actions, numbers = np.empty(most, np.int64), np.empty(most, np.int64), np.empty((3, most))
    in_order = (
        np.ascontiguousarray(some.swapaxes(0, 1))
        for some in (row, steps.valid, advantage[..., None] + value[row])
    )
    next_row = branches.next_row.reshape(*branches.reward.shape, -1)
    ways = next_row, branches.reward, branches.terminated
    found = every_action_nb(
        *in_order, ways, value, probability, float(config.gamma), rows, actions, numbers
    )
    return rows[:found], actions[:found], numbers[:, :found]
