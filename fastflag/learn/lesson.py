"""Batches -> lesson: the samples that an update learns from, each with its weight.

A sample is a row of the table, an action, and what they came to. The sampled estimator has one of
weight 1 for each environment step; the all-actions estimator one for each action of a state, as
heavy as it is probable. Where an update is a single gradient step, samples of equal row and action
count as one, with their sum of weights: the loss is the same, and of a size that does not grow with
the number of environments.

Shapes: N samples, B environments, H steps, U prompts, A actions.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastflag.config import AlgorithmConfig
from fastflag.learn.advantage import generalised_advantage
from fastflag.learn.batch import Batch, Phase
from fastflag.learn.objective import Samples
from fastflag.policy.table import Table
from fastflag.prompt.prompts import PromptSet


@dataclass(frozen=True)
class Lesson:
    """What an update learns from; rows are those of `prompts`."""

    prompts: PromptSet
    rows: Tensor  # [N] int64
    samples: Samples
    env_steps: int
    reward: float  # summed over all steps


@dataclass(frozen=True)
class _Points:
    """Samples on their way, all [N]; float64."""

    row: np.ndarray
    action: np.ndarray
    weight: np.ndarray
    advantage: np.ndarray
    advantage_spread: np.ndarray
    target: np.ndarray
    target_spread: np.ndarray
    log_probability: np.ndarray


def estimate(
    table: Table, batches: Iterable[Batch], config: AlgorithmConfig, phase: Phase
) -> Lesson:
    """The lesson of batches that `table` has the rows of."""
    found, env_steps, reward = [], 0, 0.0
    for batch in batches:
        with phase("advantage"):
            advantage = advantages(table, batch, config)
            points = _points(table, batch, advantage, config)
            found.append(_condensed(points) if config.one_step else points)
            env_steps, reward = env_steps + batch.action.size, reward + float(batch.reward.sum())
    with phase("advantage"):
        points = found[0] if len(found) == 1 else _condensed(_joined(found))
        rows, samples = _samples(table, batch.initial, points)
    return Lesson(batch.prompts, rows, samples, env_steps, reward)


def advantages(table: Table, batch: Batch, config: AlgorithmConfig) -> np.ndarray:
    """The batch's advantages by GAE, [B, H]; values are the table's."""
    value = _values(table)
    return generalised_advantage(
        batch.reward,
        value[batch.row],
        value[batch.next_row],
        batch.terminated,
        batch.truncated,
        config.gamma,
        config.gae_lambda,
    )


def _values(table: Table) -> np.ndarray:
    return table.value.detach().double().cpu().numpy()


def _points(table: Table, batch: Batch, advantage: np.ndarray, config: AlgorithmConfig) -> _Points:
    """One for each step or, with branches, for each action of each step, in the order of steps."""
    valid = batch.valid.T

    def flat(values: np.ndarray) -> np.ndarray:
        return values.swapaxes(0, 1)[valid]

    row, action, log_probability = flat(batch.row), flat(batch.action), flat(batch.log_probability)
    weight, advantage = np.ones(len(row)), flat(advantage)
    target = advantage + _values(table)[row]
    if batch.branches is not None:
        # [steps, A]; the value's target stays that of the step that was taken.
        probability, advantage = (
            table.probabilities[row],
            flat(_of_every_action(table, batch, config)),
        )
        possible = probability.astype(np.float32) > 0
        (step, action), weight = np.nonzero(possible), probability[possible]
        row, advantage, target = row[step], advantage[possible], target[step]
        log_probability = table.detached[row, action]
    none = np.zeros(len(row))
    return _Points(row, action, weight, advantage, none, target, none, log_probability)


def _of_every_action(table: Table, batch: Batch, config: AlgorithmConfig) -> np.ndarray:
    """r + gamma V(s') - V(s) of every action, [B, H, A]: of one that was not taken, nothing more is
    known of what comes after than the value."""
    value, branches = _values(table), batch.branches
    following = config.gamma * value[branches.next_row] * ~branches.terminated
    return branches.reward + following - value[batch.row][..., None]


def _joined(found: list[_Points]) -> _Points:
    columns = zip(*(vars(points).values() for points in found), strict=True)
    return _Points(*map(np.concatenate, columns))


def _condensed(points: _Points) -> _Points:
    """One point for each row and action: means by weight, and how much their points spread."""
    if not len(points.row):
        return points
    actions = int(points.action.max()) + 1
    key = points.row.astype(np.int64) * actions + points.action

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(key, values)

    weight = total(points.weight)
    (present,) = np.nonzero(weight)

    def mean_and_spread(values: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = total(points.weight * values) / np.where(weight > 0, weight, 1)
        spread = total(spread + points.weight * (values - mean[key]) ** 2)
        return mean[present], spread[present]

    log_probability = np.zeros(len(weight), points.log_probability.dtype)
    log_probability[key] = points.log_probability  # equal ones
    return _Points(
        present // actions,
        present % actions,
        weight[present],
        *mean_and_spread(points.advantage, points.advantage_spread),
        *mean_and_spread(points.target, points.target_spread),
        log_probability[present],
    )


def _samples(table: Table, initial: Tensor, points: _Points) -> tuple[Tensor, Samples]:
    """The rows [N] and the samples of points, on the table's device."""
    value = table.value.detach()

    def tensor(values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(values).to(value.device, dtype)

    rows = tensor(points.row, torch.int64)
    samples = Samples(
        action=tensor(points.action, torch.int64),
        weight=tensor(points.weight),
        advantage=tensor(points.advantage),
        advantage_spread=tensor(points.advantage_spread),
        target=tensor(points.target),
        target_spread=tensor(points.target_spread),
        old_log_probability=tensor(points.log_probability),
        old_value=value[rows],
        initial=initial[rows],
        mean_weight=float(points.weight.mean()) if len(points.weight) else 1.0,
    )
    return rows, samples
