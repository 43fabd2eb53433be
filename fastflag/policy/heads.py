"""What reads the last token: action head and value head, both on centred features.

The last-token states of trading prompts share a vector ten times larger than what tells them apart
(norm 42 against 3.8 on SmolLM2-135M). A head that sees it goes to one constant action within ten
updates. So features are standardised over the centring prompts, *with the gradient through the
statistics*: detached ones only delay the collapse, because the trained layers move the common
vector.

Each side of the account has statistics and a bias of its own. Whether the text says flat or long
moves the last token more than any day does: centred on flat accounts, those of long ones keep a
common vector of root mean square 7.9, and collapse as if they were not centred.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from fastflag.model.linear import TrainedLinear

SIDES = 3
"""Short, flat and long, in this order; `side` is an index into them, int64."""
_FLAT = 1
_EPSILON = 1e-6
MLP_WIDTH = 64


@dataclass(frozen=True)
class Centring:
    """The rows of a batch that centre it, sorted by side on the host: taking them never waits for
    a GPU."""

    rows: Tensor  # [R] int64
    side: Tensor  # [R] int64
    of_side: tuple[Tensor, ...]  # places among the rows, one tensor for each side
    known: Tensor  # [SIDES] bool: sides that have a row

    @staticmethod
    def of(rows: np.ndarray, side: np.ndarray, device: torch.device) -> "Centring":
        """rows [R] of a batch, and the side of each."""
        of_side = [np.flatnonzero(side == one) for one in range(SIDES)]
        known = np.array([len(places) > 0 for places in of_side])

        def moved(numbers: np.ndarray) -> Tensor:
            return torch.from_numpy(numbers).to(device)

        of_side = tuple(moved(places) for places in of_side)
        return Centring(moved(rows.astype(np.int64)), moved(side), of_side, moved(known))


@dataclass(frozen=True)
class Statistics:
    """Of each feature over the centring prompts: a mean for each side, and the standard deviation
    from it over all sides, because a side of a few rows would have one near 0."""

    mean: Tensor  # [SIDES, C] fp32
    deviation: Tensor  # [C] fp32
    known: Tensor  # [SIDES] bool: sides that had a row; the others have the mean of all

    @staticmethod
    def of(features: Tensor, centring: Centring) -> "Statistics":
        """Population statistics of a batch's features [U, C]; gradients pass through."""
        rows = features.index_select(0, centring.rows)
        parts = [
            rows.index_select(0, places) if len(places) else rows for places in centring.of_side
        ]
        mean = torch.stack([part.mean(0) for part in parts])
        variance = (rows - embedding(centring.side, mean)).pow(2).mean(0)
        return Statistics(mean, (variance + _EPSILON).sqrt(), centring.known)

    def centre(self, features: Tensor, side: Tensor) -> Tensor:
        """features [U, C], side [U] -> [U, C]"""
        return (features - embedding(side, self.mean)) / self.deviation


class RunningStatistics(nn.Module):
    """Statistics for decisions, where no centring prompts are at hand: an exponential average of
    those of training, kept in the checkpoint. A side never met has the mean of flat accounts.
    """

    momentum = 0.1

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(SIDES, width))
        self.register_buffer("deviation", torch.ones(width))
        # Batches that knew each side.
        self.register_buffer("count", torch.zeros(SIDES, dtype=torch.int64))

    @torch.no_grad()
    def track(self, batch: Statistics) -> None:
        """Moves towards `batch`: a plain mean at first, so that the start's zeros don't count."""
        self.count += batch.known
        weight = (1.0 / self.count.clamp(min=1)).clamp(min=self.momentum)
        self.mean.lerp_(batch.mean, (weight * batch.known)[:, None])
        # Flat accounts are in every batch.
        self.deviation.lerp_(batch.deviation, weight[_FLAT])

    def current(self) -> Statistics:
        known = self.count > 0
        mean = torch.where(known[:, None], self.mean, self.mean[_FLAT])
        return Statistics(mean, self.deviation, known)


class Head(nn.Module):
    """Centred features [U, C] and side [U] -> [U, O]: what `body` makes of the features, and a bias
    for each side, which holds the base rates."""

    def __init__(self, body: nn.Module, outputs: int):
        super().__init__()
        self.body = body
        self.bias = nn.Parameter(torch.zeros(SIDES, outputs))

    def forward(self, centred: Tensor, side: Tensor) -> Tensor:
        return self.body(centred) + embedding(side, self.bias)


def make_action_head(kind: str, width: int, actions: int, generator: torch.Generator) -> Head:
    """A head of logits [U, A] for so many actions. Its last layer starts at zero: the first policy
    is uniform over the allowed ones."""
    mlp = kind == "mlp"
    return Head(_mlp(width, actions, generator) if mlp else _zero_linear(width, actions), actions)


def make_value_head(width: int) -> Head:
    """A head of values [U, 1], zero at the start."""
    return Head(_zero_linear(width, 1), 1)


def masked_log_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """[U, A] -> log-probabilities over the allowed actions; -inf, with no gradient, elsewhere."""
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)


def _zero_linear(inputs: int, outputs: int) -> TrainedLinear:
    return TrainedLinear(torch.zeros(outputs, inputs), None, torch.float32)


def _mlp(inputs: int, outputs: int, generator: torch.Generator) -> nn.Module:
    bound = inputs**-0.5
    weight = torch.empty(MLP_WIDTH, inputs).uniform_(-bound, bound, generator=generator)
    first = TrainedLinear(weight, torch.zeros(MLP_WIDTH), torch.float32)
    return nn.Sequential(first, nn.Tanh(), _zero_linear(MLP_WIDTH, outputs))
