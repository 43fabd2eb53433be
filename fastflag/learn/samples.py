"""What an update learns from: rows of the table, actions, and what they came to. Pure.

Shapes: N samples, U rows of the table, K slots of a state, A actions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastflag.learn.sums import add_up_nb

Column = TypeVar("Column", np.ndarray, Tensor)


class Before(NamedTuple):
    """What was said of each row when the rollout read the table; no gradient."""

    value: Tensor  # [U]
    initial: Tensor  # [U, A], log-probabilities of the untrained policy


@dataclass(frozen=True)
class Samples(Generic[Column]):
    """Columns [N]: NumPy arrays, in float64, while samples are added up; tensors in an update.

    A sample may stand for several of one row and action: its advantage and target are their means
    by weight, its spreads the sums of their weighted squared distances from those.
    """

    row: Column  # int64 in an update
    action: Column  # likewise
    weight: Column
    advantage: Column
    advantage_spread: Column
    target: Column  # of the value
    target_spread: Column
    old_log_probability: Column  # of the action, when it was sampled
    before: Before
    # Of all samples that these are taken from; a scalar tensor in fp64 where a graph reads it.
    mean_weight: float | Tensor = 1.0
    slots: int = 1
    """K of each state: a sum over a state's slots is so many times the samples' mean."""
    joint: bool = False
    """The K slots of a state lie one after another, and have one ratio: of the probability of all
    their actions together."""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def old_value(self) -> Tensor:
        """[N]"""
        return self.before.value[self.row]

    @property
    def initial(self) -> Tensor:
        """[N, A]"""
        return self.before.initial[self.row]

    def columns(self) -> dict[str, Column]:
        """The columns by name: the samples' own, not copies."""
        return {each.name: getattr(self, each.name) for each in fields(self)[:8]}

    def take(self, index: Column) -> "Samples[Column]":
        return replace(self, **{name: column[index] for name, column in self.columns().items()})

    def mean(self: "Samples[Tensor]", values: Tensor, times: int = 1) -> Tensor:
        """values [N] -> scalar, by weight, so many times. Divides by N x the mean weight of all
        samples, so that a minibatch's mean is an unbiased estimate of theirs."""
        return self.share(self.weight * values, times)

    def share(self: "Samples[Tensor]", sums: Tensor, times: int = 1) -> Tensor:
        """As `mean`, of what is already multiplied by the weights, [N]."""
        total = len(sums) * self.mean_weight / times
        return sums.sum() / (total.to(sums.dtype) if isinstance(total, Tensor) else total)

    @staticmethod
    def joined(parts: Sequence["Samples[np.ndarray]"]) -> "Samples[np.ndarray]":
        columns: dict[str, Any] = {
            name: np.concatenate([part.columns()[name] for part in parts])
            for name in parts[0].columns()
        }
        return replace(parts[0], **columns)

    def added_up(self: "Samples[np.ndarray]") -> "Samples[np.ndarray]":
        """One sample for each row and action: means by weight, and how much what they are means of
        spreads. In the order of rows and actions."""
        if not len(self):
            return self
        actions = int(self.action.max()) + 1
        key = self.row.astype(np.int64) * actions + self.action

        sums = np.zeros((int(key.max()) + 1, 5))
        columns = (
            self.weight,
            self.advantage,
            self.advantage_spread,
            self.target,
            self.target_spread,
        )
        add_up_nb(key, *columns, sums)
        (present,) = np.nonzero(sums[:, 0])
        weight, advantage, advantage_spread, target, target_spread = sums[present].T.copy()
        old_log_probability = np.zeros(len(sums), self.old_log_probability.dtype)
        old_log_probability[key] = self.old_log_probability  # equal ones
        return Samples(
            present // actions,
            present % actions,
            weight,
            advantage,
            advantage_spread,
            target,
            target_spread,
            old_log_probability[present],
            self.before,
            slots=self.slots,
        )

    def placed(self: "Samples[np.ndarray]") -> "Samples[Tensor]":
        """As tensors beside the rows' values; numbers are fp32."""
        device = self.before.value.device

        def tensor(name: str, column: np.ndarray) -> Tensor:
            dtype = torch.int64 if name in ("row", "action") else torch.float32
            return torch.from_numpy(column).to(device, dtype)

        columns: dict[str, Any] = {
            name: tensor(name, column) for name, column in self.columns().items()
        }
        mean_weight = float(self.weight.mean()) if len(self) else 1.0
        return Samples(
            **columns,
            before=self.before,
            mean_weight=mean_weight,
            slots=self.slots,
            joint=self.joint,
        )
