"""Epochs, minibatches, clipping, optimiser: one lesson in, a better policy out.

No gradient step waits for the device: what it measured is read when all are launched.
"""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fastflag.config import AlgorithmConfig
from fastflag.files import InputError
from fastflag.learn.advantage import explained_variance
from fastflag.learn.lesson import Lesson
from fastflag.learn.objective import loss_of
from fastflag.learn.samples import Samples
from fastflag.model.bnb import bitsandbytes
from fastflag.policy.table import Policy, Table
from fastflag.prompt.prompts import PromptSet

STATISTICS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "kl_initial",
    "kl",
    "clip_fraction",
    "ratio_min",
    "ratio_max",
    "grad_norm",
    "first_ratio_error",
    "explained_variance",
)


def make_optimizer(policy: Policy, config: AlgorithmConfig) -> torch.optim.Optimizer:
    """AdamW with epsilon 1e-5 (CleanRL's); the heads' weights are not decayed.

    bitsandbytes' keeps the moments of tensors of 4096 numbers and more in 8 bits, those of smaller
    ones in fp32.
    """
    layers, heads = policy.parameter_groups()
    groups = [
        {"params": layers, "lr": config.layer_learning_rate, "weight_decay": config.weight_decay},
        {"params": heads, "lr": config.learning_rate, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        # Fused, all parameters are stepped in two launches.
        return torch.optim.AdamW(groups, eps=1e-5, fused=policy.device.type == "cuda")
    return bitsandbytes().optim.AdamW8bit(groups, eps=1e-5)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, config: AlgorithmConfig, done: int, updates: int
) -> float:
    """Linear annealing, 1 at the first update, 1/updates at the last; returns the factor."""
    factor = 1.0 - done / updates if config.anneal_lr else 1.0
    for group, rate in zip(
        optimizer.param_groups, (config.layer_learning_rate, config.learning_rate), strict=True
    ):
        group["lr"] = rate * factor
    return factor


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    table: Table,
    lesson: Lesson,
    config: AlgorithmConfig,
    seed: int,
) -> dict[str, float]:
    """Steps the optimiser over the lesson and returns the mean statistics of its gradient steps.

    The first one differentiates `table`, the very forward that the rollout read: its ratios are
    exactly 1. Later ones evaluate the prompts of their samples anew. `seed` shuffles the
    minibatches. Returns zeros if there are no samples.
    """
    samples = lesson.samples
    if not len(samples):
        return dict.fromkeys(STATISTICS, 0.0)
    # Read here, where nothing is under way on a GPU.
    rows = samples.row.cpu()
    names, history = _steps(policy, optimizer, table, lesson, rows, config, seed)
    columns = dict(zip(names, zip(*torch.stack(history).tolist(), strict=True), strict=True))
    for norm in columns["grad_norm"]:
        _check_finite(norm)
    policy.running.track(table.statistics)
    means = {name: float(np.mean(column)) for name, column in columns.items()}
    first, last = columns["ratio_min"][0], columns["ratio_max"][0]
    means["first_ratio_error"] = max(1 - first, last - 1)
    means["explained_variance"] = _explained(samples)
    return means


def _steps(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    table: Table,
    lesson: Lesson,
    rows: Tensor,
    config: AlgorithmConfig,
    seed: int,
) -> tuple[list[str], list[Tensor]]:
    """Names of statistics, and their values [9] in each gradient step, on the device; `rows` are
    the samples', on the host. With a target of the divergence each epoch waits for its own."""
    samples, names = lesson.samples, []
    size = config.minibatch_size or len(samples)
    generator = torch.Generator().manual_seed(seed)
    history: list[Tensor] = []
    for _ in range(config.update_epochs):
        for index in _minibatches_of(samples, size, generator):
            whole = len(index) == len(samples)
            # The index is moved once, not for each column.
            some = samples if whole else samples.take(index.to(samples.row.device))
            learn = partial(_differentiate, optimizer, some, config)
            if history:
                again = partial(_evaluated, policy, lesson.prompts, some.row, rows[index])
                statistics = policy.recompute.attempt(lambda: learn(*again()))  # noqa: B023
            else:
                statistics = learn(*_gather(table, some.row))
            policy.recompute.commit()
            statistics["grad_norm"] = _step(policy, optimizer, config.max_grad_norm)
            names = [*statistics]
            history.append(torch.stack([*statistics.values()]))
        if config.target_kl and history[-1][names.index("kl")].item() > config.target_kl:
            break
    return names, history


def _explained(samples: Samples[Tensor]) -> float:
    columns = (samples.old_value, samples.target, samples.weight, samples.target_spread)
    return explained_variance(*torch.stack([c.double() for c in columns]).cpu().numpy())


def _evaluated(
    policy: Policy, prompts: PromptSet, rows: Tensor, on_host: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, A] and values [N] of `rows` [N], with gradient: their prompts, each
    once, and the centring ones are evaluated anew; or all, where their blocks lie ready on a GPU.
    `on_host` are the rows too."""
    if policy.lies_ready(prompts):
        return _gather(policy.evaluate(prompts), rows)
    distinct, place = np.unique(on_host.numpy(), return_inverse=True)
    visited, places = prompts.subset(distinct)
    return _gather(policy.evaluate(visited), torch.from_numpy(places[place]).to(rows.device))


def _gather(table: Table, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, A] and values [N] of `rows` [N], with gradient.

    By index_select, whose backward adds in order on a CPU. That of `tensor[rows]` adds from several
    threads at once where there are 32,768 numbers or more, in an order that varies from run to run.
    """
    return table.log_probabilities.index_select(0, rows), table.value.index_select(0, rows)


def _minibatches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Every sample once, shuffled; in order where one minibatch holds them all."""
    if size >= count:
        return iter([torch.arange(count)])
    return iter(torch.randperm(count, generator=generator).split(size))


def _minibatches_of(
    samples: Samples[Tensor], size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Samples that have one ratio stay together: then `size` counts states."""
    each = samples.slots if samples.joint else 1
    for index in _minibatches(len(samples) // each, size, generator):
        yield (index[:, None] * each + torch.arange(each)).reshape(-1)


def _differentiate(
    optimizer: torch.optim.Optimizer,
    samples: Samples[Tensor],
    config: AlgorithmConfig,
    log_probabilities: Tensor,
    value: Tensor,
) -> dict[str, Tensor]:
    """Leaves the gradient of the loss with the parameters; returns the loss' statistics."""
    optimizer.zero_grad(set_to_none=True)
    loss, statistics = loss_of(log_probabilities, value, samples, config)
    loss.backward()
    return statistics


def _step(policy: Policy, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
    """One step of the optimiser; returns the gradient's norm before clipping. Where that is not
    finite no step is taken: a fused optimiser reads it on the device, for others it is read here.
    """
    norm = clip_grad_norm_(policy.parameters(), max_grad_norm or torch.inf)
    if optimizer.param_groups[0].get("fused"):
        # As torch.amp.GradScaler tells it.
        # pyrefly: ignore[missing-attribute] (an optimiser looks for it when it steps)
        optimizer.found_inf = norm.isfinite().logical_not().float()
    else:
        _check_finite(norm.item())
    try:
        optimizer.step()
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise InputError("a step overflows fp32: lower the learning rates, training") from None
    return norm


def _check_finite(norm: float) -> None:
    if not math.isfinite(norm):
        raise InputError("the gradient is not finite: lower the learning rates, training")
