"""Epochs, minibatches, clipping, optimiser: one lesson in, a better policy out.

No gradient step of fused AdamW waits for the device: what it measured is read when all are
launched. An optimiser that is not fused waits for the gradient's norm (step.py), and a target of
the divergence for each epoch's.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastflag.config import AlgorithmConfig
from fastflag.learn.advantage import explained_variance
from fastflag.learn.lesson import Lesson
from fastflag.learn.samples import Samples
from fastflag.learn.step import Taken, check_finite, gather, launched, replayed, take_step
from fastflag.model.bnb import bitsandbytes
from fastflag.policy.table import Policy, Table

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
    groups: list[dict[str, Any]] = [
        {"params": layers, "lr": config.layer_learning_rate, "weight_decay": config.weight_decay},
        {"params": heads, "lr": config.learning_rate, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        on_gpu = policy.device.type == "cuda"
        if on_gpu:  # where a graph reads the rates
            for group in groups:
                group["lr"] = torch.tensor(group["lr"], device=policy.device)
        # Fused, all parameters are stepped in two launches.
        return torch.optim.AdamW(groups, eps=1e-5, fused=on_gpu)
    return bitsandbytes().optim.AdamW8bit(groups, eps=1e-5)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, config: AlgorithmConfig, done: int, updates: int
) -> float:
    """Linear annealing, 1 at the first update, 1/updates at the last; returns the factor."""
    factor = 1.0 - done / updates if config.anneal_lr else 1.0
    for group, rate in zip(
        optimizer.param_groups, (config.layer_learning_rate, config.learning_rate), strict=True
    ):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * factor)
        else:
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
    norms = [norm for norm in columns["grad_norm"] if math.isfinite(norm)]
    if policy.scale is None or policy.scale.value < 1:  # which is as if nothing were scaled
        for norm in columns["grad_norm"]:
            check_finite(norm)
    policy.running.track(table.statistics)
    means = {name: float(np.mean(column)) for name, column in columns.items()}
    if policy.scale is not None:
        means["grad_norm"] = float(np.mean(norms or [0.0]))
        means["skipped_steps"] = float(len(columns["grad_norm"]) - len(norms))
        means["gradient_scale"] = float(policy.scale.value)
    lowest, highest = columns["ratio_min"][0], columns["ratio_max"][0]
    means["first_ratio_error"] = max(1 - lowest, highest - 1)
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
            learn = partial(_learn, policy, optimizer, lesson, rows, index, config)
            taken = policy.recompute.attempt(learn) if history else learn(table)
            policy.recompute.commit()
            if not taken.stepped:
                take_step(policy, optimizer, taken.norm)
            names = taken.names
            history.append(taken.values)
        if config.target_kl and history[-1][names.index("kl")].item() > config.target_kl:
            break
    return names, history


def _learn(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    lesson: Lesson,
    rows: Tensor,
    index: Tensor,
    config: AlgorithmConfig,
    table: Table | None = None,
) -> Taken:
    """One gradient step on the samples at `index`, by `table` or else by an evaluation anew: of
    all prompts where their blocks lie ready on a GPU, else of those of the samples, each once, and
    the centring ones. The optimiser's own is still to be taken, where it is not of a graph."""
    samples = lesson.samples
    if table is None and policy.lies_ready(lesson.prompts):
        table = policy.evaluate(lesson.prompts)
    if table is not None:
        taken = replayed(policy, optimizer, table, samples, index, config)
        if taken is not None:
            return taken
    if len(index) < len(samples):
        # The index is moved once, not for each column.
        samples = samples.take(index.to(samples.row.device, non_blocking=True))
    some = samples.row
    if table is None:
        distinct, place = np.unique(rows[index].numpy(), return_inverse=True)
        visited, places = lesson.prompts.subset(distinct)
        some = torch.from_numpy(places[place]).to(some.device)
        table = policy.evaluate(visited)
    return launched(policy, optimizer, samples, config, *gather(table, some))


def _explained(samples: Samples[Tensor]) -> float:
    columns = (samples.old_value, samples.target, samples.weight, samples.target_spread)
    return explained_variance(*torch.stack([c.double() for c in columns]).cpu().numpy())


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
