"""Batches -> lesson: the samples that an update learns from, each with its weight.

A sample is a row of the table, an action, and what they came to. The sampled estimator has one of
weight 1 for each environment step; the all-actions estimator one for each action of a state,
weighted by its probability. Where an update is a single gradient step, samples of equal row and
action count as one, with their sum of weights: the loss is the same, and of a size that does not
grow with the number of environments.

Shapes: N samples, B environments, H steps, U prompts, A actions.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastflag.config import AlgorithmConfig
from fastflag.learn.advantage import generalised_advantage
from fastflag.learn.batch import Batch, Branches, Phase
from fastflag.learn.samples import Before, Samples
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
            env_steps += batch.steps.action.size
            reward += float(batch.steps.reward.sum())
    with phase("advantage"):
        samples = found[0] if len(found) == 1 else Samples.joined(found).added_up()
        return Lesson(batch.prompts, samples.placed(), env_steps, reward)


def advantages(table: Table, batch: Batch, config: AlgorithmConfig) -> np.ndarray:
    """The batch's advantages by GAE, [B, H]; values are the table's."""
    value, steps = table.values, batch.steps
    return generalised_advantage(
        steps.reward,
        value[steps.row],
        value[steps.next_row],
        steps.terminated,
        batch.truncated,
        config.gamma,
        config.gae_lambda,
    )


def _samples(
    table: Table, batch: Batch, advantage: np.ndarray, config: AlgorithmConfig
) -> Samples[np.ndarray]:
    """One for each step or, with branches, for each action of each step, in the order of steps."""
    steps, valid = batch.steps, batch.steps.valid.T

    def flat(values: np.ndarray) -> np.ndarray:
        return values.swapaxes(0, 1)[valid]

    row, action, log_probability = flat(steps.row), flat(steps.action), flat(batch.log_probability)
    weight, advantage = np.ones(len(row)), flat(advantage)
    target = advantage + table.values[row]
    if batch.branches is not None:
        # [steps, A]; the value's target stays that of the step that was taken.
        probability, advantage = (
            table.probabilities[row],
            flat(_of_every_action(table, batch.steps.row, batch.branches, config)),
        )
        possible = probability.astype(np.float32) > 0
        (step, action), weight = np.nonzero(possible), probability[possible]
        row, advantage, target = row[step], advantage[possible], target[step]
        log_probability = table.detached[row, action]
    none, before = np.zeros(len(row)), Before(table.value.detach(), batch.initial)
    return Samples(row, action, weight, advantage, none, target, none, log_probability, before)


def _of_every_action(
    table: Table, row: np.ndarray, branches: Branches, config: AlgorithmConfig
) -> np.ndarray:
    """r + gamma V(s') - V(s) of every action [B, H, A] in the states `row` [B, H]: of one that was
    not taken, nothing more is known of what comes after than the value."""
    value = table.values
    following = config.gamma * value[branches.next_row] * ~branches.terminated
    return branches.reward + following - value[row][..., None]
