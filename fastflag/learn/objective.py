"""Losses: tensors in, (loss, statistics) out; pure. N samples, K slots of a state, A actions.

Every mean is over samples by their weight. A state's log-probability, entropy and divergence are
its slots' sums, K times their mean; its value is the mean. Nothing here waits for the device.
"""

import torch
from torch import Tensor

from fastflag.config import AlgorithmConfig
from fastflag.learn.samples import Samples
from fastflag.model import ops


def loss_of(
    log_probabilities: Tensor, value: Tensor, samples: Samples[Tensor], config: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole loss: policy + vf_coef value - ent_coef entropy + kl_coef KL(policy || initial).

    log_probabilities [N, A], -inf where not allowed; value [N]; both with gradient. The
    statistics are scalars without one.
    """
    advantage = whitened(samples) if config.norm_adv else samples.advantage
    chosen, entropy, ratio, surrogate, divergence = ops.action_terms(
        log_probabilities,
        None,
        samples.action,
        samples.old_log_probability,
        advantage,
        samples.initial,
        config.clip_coef if config.algorithm == "ppo" else None,
    )
    times = slots = samples.slots
    log_ratio = chosen.detach() - samples.old_log_probability
    if samples.joint:
        log_ratio = joint(chosen - samples.old_log_probability, slots)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - config.clip_coef, 1 + config.clip_coef)
        surrogate, times = torch.max(-advantage * ratio, -advantage * clipped), 1
    policy_loss = samples.mean(surrogate, times)
    entropy, divergence = (samples.mean(each, slots) for each in (entropy, divergence))
    clip_value = config.clip_coef if config.algorithm == "ppo" and config.clip_vloss else None
    value_loss = samples.mean(squared_error(value, samples.target, samples.old_value, clip_value))
    value_loss = value_loss + 0.5 * samples.share(samples.target_spread)
    loss = (
        policy_loss
        + config.vf_coef * value_loss
        - config.ent_coef * entropy
        + config.kl_coef * divergence
    )
    with torch.no_grad():
        statistics = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "kl_initial": divergence,
            # Schulman's low-variance estimate, http://joschu.net/blog/kl-approx.html
            "kl": samples.mean(ratio - 1 - log_ratio, times),
            "clip_fraction": samples.mean(((ratio - 1).abs() > config.clip_coef).float()),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
        }
    return loss, {name: scalar.detach() for name, scalar in statistics.items()}


def joint(log_ratio: Tensor, slots: int) -> Tensor:
    """The log-ratios [N] of slots, a state's one after another -> of each its state's, their sum:
    [N]"""
    return log_ratio.view(-1, slots).sum(1, keepdim=True).expand(-1, slots).reshape(-1)


def squared_error(value: Tensor, target: Tensor, old_value: Tensor, clip: float | None) -> Tensor:
    """0.5 (V - target)^2; with `clip`, the larger of that and the same with V held within `clip` of
    its old value, as CleanRL has it. [N] each -> [N]"""
    loss = (value - target).pow(2)
    if clip is not None:
        held = old_value + (value - old_value).clamp(-clip, clip)
        loss = torch.max(loss, (held - target).pow(2))
    return 0.5 * loss


def whitened(samples: Samples[Tensor]) -> Tensor:
    """The advantages with mean 0 and standard deviation 1 (ddof 1), as CleanRL has it; one sample
    has no deviation and stays as it is. -> [N]"""
    total = samples.weight.sum()
    centred = samples.advantage - (samples.weight * samples.advantage).sum() / total
    squares = samples.weight * centred.pow(2) + samples.advantage_spread
    whitened = centred / ((squares.sum() / (total - 1)).sqrt() + 1e-8)
    return torch.where(total < 2, samples.advantage, whitened)
