"""Losses: tensors in, (loss, statistics) out; pure. N samples, A actions.

Every mean is over samples by their weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastflag.config import AlgorithmConfig
from fastflag.model import ops


@dataclass(frozen=True)
class Samples:
    """What a batch remembers of each sample; none of it carries a gradient.

    A sample may stand for several of one state and action: its advantage and target are their
    means by weight, its spreads the sums of their weighted squared distances from those.
    """

    action: Tensor  # [N] int64
    weight: Tensor  # [N]
    advantage: Tensor  # [N]
    advantage_spread: Tensor  # [N]
    target: Tensor  # [N] value target
    target_spread: Tensor  # [N]
    old_log_probability: Tensor  # [N] of the action, when it was sampled
    old_value: Tensor  # [N]
    initial: Tensor  # [N, A] log-probabilities of the untrained policy
    mean_weight: float = 1.0  # of all samples that these are taken from

    def take(self, index: Tensor) -> "Samples":
        columns = {name: c[index] for name, c in vars(self).items() if isinstance(c, Tensor)}
        return Samples(**columns, mean_weight=self.mean_weight)

    def mean(self, values: Tensor) -> Tensor:
        """values [N] -> scalar, by weight. A minibatch's is on average that of the whole, because
        it is divided by what so many samples weigh on average, not by what these weigh."""
        return (self.weight * values).sum() / (len(values) * self.mean_weight)


def loss_of(
    log_probabilities: Tensor, value: Tensor, samples: Samples, config: AlgorithmConfig
) -> tuple[Tensor, dict[str, float]]:
    """The whole loss: policy + vf_coef value - ent_coef entropy + kl_coef KL(policy || initial).

    log_probabilities [N, A], -inf where not allowed; value [N]; both with gradient.
    """
    chosen, entropy, ratio, surrogate, divergence = ops.action_terms(
        log_probabilities,
        None,
        samples.action,
        samples.old_log_probability,
        whitened(samples) if config.norm_adv else samples.advantage,
        samples.initial,
        config.clip_coef if config.algorithm == "ppo" else None,
    )
    policy_loss, entropy, divergence = map(samples.mean, (surrogate, entropy, divergence))
    clip_value = config.clip_coef if config.algorithm == "ppo" and config.clip_vloss else None
    value_loss = samples.mean(squared_error(value, samples.target, samples.old_value, clip_value))
    value_loss = value_loss + samples.mean(0.5 * samples.target_spread / samples.weight)
    loss = (
        policy_loss
        + config.vf_coef * value_loss
        - config.ent_coef * entropy
        + config.kl_coef * divergence
    )
    with torch.no_grad():
        log_ratio = chosen - samples.old_log_probability
        statistics = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "kl_initial": divergence,
            # Schulman's low-variance estimate, http://joschu.net/blog/kl-approx.html
            "kl": samples.mean(ratio - 1 - log_ratio),
            "clip_fraction": samples.mean(((ratio - 1).abs() > config.clip_coef).float()),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
        }
        # Together, because a GPU is waited for at each transfer.
        numbers = torch.stack([*statistics.values()]).tolist()
    return loss, dict(zip(statistics, numbers, strict=True))


def squared_error(value: Tensor, target: Tensor, old_value: Tensor, clip: float | None) -> Tensor:
    """0.5 (V - target)^2; with `clip`, the larger of that and the same with V held within `clip` of
    its old value, as CleanRL has it. [N] each -> [N]"""
    loss = (value - target).pow(2)
    if clip is not None:
        held = old_value + (value - old_value).clamp(-clip, clip)
        loss = torch.max(loss, (held - target).pow(2))
    return 0.5 * loss


def whitened(samples: Samples) -> Tensor:
    """The advantages with mean 0 and standard deviation 1 (ddof 1), as CleanRL has it; one sample
    has no deviation and stays as it is. -> [N]"""
    total = samples.weight.sum()
    if total < 2:
        return samples.advantage
    centred = samples.advantage - (samples.weight * samples.advantage).sum() / total
    squares = samples.weight * centred.pow(2) + samples.advantage_spread
    return centred / ((squares.sum() / (total - 1)).sqrt() + 1e-8)
