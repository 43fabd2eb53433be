"""What reads the last token: action head and value head, both on centred features.

The last-token states of trading prompts share a vector ten times larger than what tells them apart
(norm 42 against 3.8 on SmolLM2-135M). A head that sees it goes to one constant action within ten
updates. So features are standardised over a reference batch, the flat-account prompt of every day,
*with the gradient through the statistics*: detached ones only delay the collapse, because the
trained layers move the common vector.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_EPSILON = 1e-6
_MLP_WIDTH = 64


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each feature over a reference batch, [C] each, fp32."""

    mean: Tensor
    deviation: Tensor

    @staticmethod
    def of(reference: Tensor) -> "Statistics":
        """reference [R, C] -> statistics (population deviation); gradients pass through."""
        mean = reference.mean(0)
        variance = (reference - mean).pow(2).mean(0)
        return Statistics(mean, (variance + _EPSILON).sqrt())

    def centre(self, features: Tensor) -> Tensor:
        """[U, C] -> [U, C]"""
        return (features - self.mean) / self.deviation


class RunningStatistics(nn.Module):
    """Statistics for decisions, where no reference batch is at hand: an exponential average of the
    training batches' ones, kept in the checkpoint."""

    momentum = 0.1

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def track(self, batch: Statistics) -> None:
        """Moves towards `batch`: a plain mean at first, so that the start's zeros don't count."""
        self.count += 1
        weight = max(self.momentum, 1.0 / int(self.count))
        self.mean.lerp_(batch.mean, weight)
        self.deviation.lerp_(batch.deviation, weight)

    def current(self) -> Statistics:
        return Statistics(self.mean, self.deviation)


def make_action_head(kind: str, width: int, actions: int, generator: torch.Generator) -> nn.Module:
    """Centred features [U, C] -> logits [U, A]. The last layer starts at zero: the first policy is
    uniform over the allowed actions. Its bias holds the actions' base rates."""
    return _mlp(width, actions, generator) if kind == "mlp" else _zero_linear(width, actions)


def make_value_head(width: int) -> nn.Module:
    """Centred features [U, C] -> value [U, 1], zero at the start."""
    return _zero_linear(width, 1)


def masked_log_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """[U, A] -> log-probabilities over the allowed actions; -inf, with no gradient, elsewhere."""
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _mlp(inputs: int, outputs: int, generator: torch.Generator) -> nn.Module:
    first = nn.Linear(inputs, _MLP_WIDTH)
    bound = inputs**-0.5
    nn.init.uniform_(first.weight, -bound, bound, generator=generator)
    nn.init.zeros_(first.bias)
    return nn.Sequential(first, nn.Tanh(), _zero_linear(_MLP_WIDTH, outputs))
