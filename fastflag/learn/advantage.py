"""Advantages: [B, H] arrays in, [B, H] arrays out; pure. B environments, H steps."""

import numpy as np

from fastflag.learn.sums import advantages_nb


def generalised_advantage(
    reward: np.ndarray,
    value: np.ndarray,
    next_value: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """GAE (arXiv 1506.02438, eq. 16): A_t = delta_t + gamma lambda A_{t+1} within an episode,
    delta_t = r_t + gamma V(s_{t+1}) - V(s_t). All arrays [B, H] -> [B, H] float64.

    `next_value` is the value of the state a step led to, before any restart. A termination has no
    value after it; a truncation keeps it and ends the sum, as the end of the batch does.
    """
    # Step by step, as a rollout stores them.
    columns = [np.ascontiguousarray(some.T) for some in (reward, value, next_value)]
    ends = [np.ascontiguousarray(some.T) for some in (terminated, truncated)]
    advantage = np.empty(columns[0].shape)
    advantages_nb(*columns, *ends, float(gamma), float(gamma * gae_lambda), advantage)
    return advantage.T


def explained_variance(
    value: np.ndarray, target: np.ndarray, weight: np.ndarray, target_spread: np.ndarray
) -> float:
    """1 - Var(target - value) / Var(target); 0 where the targets do not vary. All [N].

    A target is the mean of `weight` many, whose squared distances from it sum to `target_spread`.
    """

    def variance(numbers: np.ndarray) -> float:
        mean = np.average(numbers, weights=weight)
        return (weight * (numbers - mean) ** 2 + target_spread).sum() / weight.sum()

    whole = variance(target)
    return float(1 - variance(target - value) / whole) if whole > 0 else 0.0
