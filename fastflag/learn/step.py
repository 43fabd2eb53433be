"""One gradient step: launched operator by operator, or as a CUDA graph over a replayed evaluation.

The graph holds all that follows the forward (policy/graphs.py says why not that too): gathering,
loss, backward pass, clipping and, where the optimiser can be captured, its step, with learning
rates and whatever refuses a gradient that is not finite read on the device. What differs between
steps lies in memory that stays: samples are copied there, as many as the graph has room for, and
the room that is left repeats one of them with weight 0. Other numbers of samples than fit are
captured in turn. The statistics are read after the last step, by the caller.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fastflag.config import AlgorithmConfig
from fastflag.files import InputError
from fastflag.learn.objective import loss_of
from fastflag.learn.samples import Before, Samples
from fastflag.policy.graphs import Evaluation
from fastflag.policy.table import Policy, Table


class Taken(NamedTuple):
    """What came of a gradient step."""

    names: list[str]  # of its statistics, the gradient's norm the last
    values: Tensor  # of them, [9], on the device
    stepped: bool  # whether the optimiser is done too

    @property
    def norm(self) -> Tensor:
        """Of the gradient, before clipping; scalar."""
        return self.values[-1]


def launched(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    samples: Samples[Tensor],
    config: AlgorithmConfig,
    log_probabilities: Tensor,
    value: Tensor,
) -> Taken:
    """Leaves the clipped gradient of the loss with the parameters; `take_step` follows.

    log_probabilities [N, A] and value [N] of the samples, with gradient.
    """
    optimizer.zero_grad(set_to_none=True)
    loss, statistics = loss_of(log_probabilities, value, samples, config)
    loss.backward()
    return _clipped(policy, statistics, config)


def replayed(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    table: Table,
    samples: Samples[Tensor],
    index: Tensor,
    config: AlgorithmConfig,
) -> Taken | None:
    """A step on the samples at `index` [N], which is on the host, whose rows are those of `table`:
    by a graph. None where the table is no evaluation's that was replayed last, where a state has
    several slots, where this can't be captured, and where the optimiser has not stepped yet: its
    state would begin anew each time.
    """
    graphs, replay = policy.graphs, table.replay
    if graphs is None or graphs.problem or replay is None or not replay.current:
        return None
    if samples.slots > 1:  # room that is left would be filled with parts of a state
        return None
    evaluation = replay.evaluation
    inside = _captures(optimizer)
    if inside and any(parameter not in optimizer.state for parameter in evaluation.parameters):
        return None
    fitting = [one for one in evaluation.steps if one.takes(optimizer, config, len(index))]
    if fitting:
        step = min(fitting, key=lambda one: one.room)
    else:
        room = _room(len(index), evaluation.outputs[0].numel())
        step = graphs.attempt(
            lambda: GraphedStep(policy, optimizer, evaluation, samples, room, config, inside)
        )
        if step is None:
            return None
        evaluation.steps.append(step)
    return step(samples, index)


def take_step(policy: Policy, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """The optimiser's. Where the gradient's norm is not finite no step is taken: a fused optimiser
    reads it on the device, for others it is read here, which raises InputError unless the gradient
    was scaled; the scale follows it."""
    if policy.scale is not None:
        policy.scale.track(norm.isfinite())
    if optimizer.param_groups[0].get("fused"):
        # As torch.amp.GradScaler tells it.
        # pyrefly: ignore[missing-attribute] (an optimiser looks for it when it steps)
        optimizer.found_inf = norm.isfinite().logical_not().float()
    elif policy.scale is None:
        check_finite(norm.item())
    elif not norm.isfinite():
        return
    try:
        optimizer.step()
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise InputError("a step overflows fp32: lower the learning rates, training") from None


def check_finite(norm: float) -> None:
    """Raises InputError unless it is."""
    if not math.isfinite(norm):
        raise InputError("the gradient is not finite: lower the learning rates, training")


def gather(table: Table, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, A] and values [N] of `rows` [N], with gradient.

    By index_select, whose backward adds in order on a CPU. That of `tensor[rows]` adds from several
    threads at once where there are 32,768 numbers or more, in an order that varies from run to run.
    """
    return table.log_probabilities.index_select(0, rows), table.value.index_select(0, rows)


class GraphedStep:
    """A captured step over an evaluation, of up to `room` samples."""

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        evaluation: Evaluation,
        samples: Samples[Tensor],
        room: int,
        config: AlgorithmConfig,
        inside: bool,
    ):
        """`inside`: whether the optimiser's step is captured too."""
        self.room = room
        self._optimizer, self._config, self._inside = optimizer, config, inside
        self._parameters = evaluation.parameters
        self._static = _Static(samples, room, *evaluation.outputs[0].shape)

        def work() -> tuple[Taken, tuple[Tensor | None, ...]]:
            static = self._static.samples
            log_probabilities, value = (
                output.index_select(0, static.row) for output in evaluation.outputs[:2]
            )
            loss, statistics = loss_of(log_probabilities, value, static, config)
            gradients = evaluation.gradients((loss,), (None,))
            self._leave(gradients)
            taken = _clipped(policy, statistics, config)._replace(stepped=inside)
            if inside:
                with _capturable(optimizer):
                    take_step(policy, optimizer, taken.norm)
            return taken, gradients

        (self._taken, self._gradients), self._replay = evaluation.capture(work)

    def takes(self, optimizer: torch.optim.Optimizer, config: AlgorithmConfig, count: int) -> bool:
        """Whether it is a step of this optimiser, with room for so many samples."""
        same = self._optimizer is optimizer and self._config == config
        return same and count <= self.room

    def __call__(self, samples: Samples[Tensor], index: Tensor) -> Taken:
        self._static.fill(samples, index)
        self._replay()
        self._leave(self._gradients)
        return self._taken._replace(values=self._taken.values.clone())

    def _leave(self, gradients: tuple[Tensor | None, ...]) -> None:
        """With the parameters, as a backward pass does."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient


class _Static:
    """Samples, and what was said of rows before, in memory that stays."""

    def __init__(self, like: Samples[Tensor], room: int, rows: int, actions: int):
        device = like.row.device
        # In the order of the columns; the last number is the old log-probability.
        self._indices = torch.zeros(2, room, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(6, room, device=device)
        before = Before(torch.zeros(rows, device=device), torch.zeros(rows, actions, device=device))
        self._mean_weight = torch.ones((), dtype=torch.float64, device=device)
        columns: list[Any] = [*self._indices, *self._numbers, before, self._mean_weight]
        self.samples: Samples[Tensor] = Samples(*columns)

    def fill(self, samples: Samples[Tensor], index: Tensor) -> None:
        """With the samples at `index` [N], on the host; the first of them fills the room left,
        where it weighs nothing."""
        count, room = len(index), self._indices.shape[1]
        chosen = torch.cat([index, index[:1].expand(room - count)])
        # Of memory that is not pinned a copy has left when this returns, and nothing is waited for.
        chosen = chosen.to(samples.row.device, non_blocking=True)
        for column, static in zip(
            samples.columns().values(), self.samples.columns().values(), strict=True
        ):
            torch.index_select(column, 0, chosen, out=static)
        self._numbers[:5, count:].zero_()
        for new, static in zip(samples.before, self.samples.before, strict=True):
            static[: len(new)].copy_(new)
        # A mean divides by all of the room.
        self._mean_weight.fill_(samples.mean_weight * (count / room))


def _clipped(policy: Policy, statistics: dict[str, Tensor], config: AlgorithmConfig) -> Taken:
    if policy.scale is not None:
        policy.scale.undo(policy.parameter_groups()[0])
    norm = clip_grad_norm_(policy.parameters(), config.max_grad_norm or torch.inf)
    statistics = {**statistics, "grad_norm": norm}
    return Taken([*statistics], torch.stack([*statistics.values()]), stepped=False)


def _room(count: int, condensed: int) -> int:
    """For `count` samples: one for each row and action, which is all that a condensed lesson can
    have, or more by up to an eighth, so that a few samples more or less fit too."""
    eighth = max((1 << count.bit_length()) // 16, 1)
    return condensed if count <= condensed else -(-count // eighth) * eighth


def _captures(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser steps without the host: what it reads there would stay as it is."""
    return all(
        group.get("fused") and isinstance(group["lr"], Tensor) for group in optimizer.param_groups
    )


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the optimiser may be captured. Outside it would warn that it is not."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False
