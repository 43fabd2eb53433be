"""Gradients of layers in fp16, which would vanish: a power of two larger on their way through.

fp16's smallest normal number is 6e-5, and the gradient at the features begins around 1e-6. So it is
multiplied where it enters the layers, and divided in fp32 where it leaves them, with the
parameters; the heads' own is neither. By a power of two both are exact. What is still too large
gives a gradient that is not finite: that step is left out, and the factor halved (Micikevicius et
al., Mixed Precision Training, arXiv 1710.03740). The host never waits for any of it.

No run in fp16 has been held beside one in fp32 yet, so `--dtype auto` does not take it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_START, _LARGEST = 2.0**16, 2.0**24
# Steps in a row that must have been finite before the factor doubles.
_PATIENCE = 200


class GradientScale(nn.Module):
    """The factor and the number of finite steps since it changed, kept in the checkpoint."""

    value: Tensor
    finite: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(_START))
        self.register_buffer("finite", torch.zeros((), dtype=torch.int64))

    def undo(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divides the gradients of the layers' `parameters`."""
        gradients = [each.grad for each in parameters if each.grad is not None]
        if gradients:  # of heads alone there are none
            torch._foreach_mul_(gradients, self.value.reciprocal())

    @torch.no_grad()
    def track(self, finite: Tensor) -> None:
        """Halves the factor after a step that was not `finite`, a bool scalar, and doubles it after
        many that were."""
        self.finite.add_(1).mul_(finite)
        doubles = self.finite >= _PATIENCE
        self.value.mul_(0.5 + 0.5 * finite).mul_(1.0 + doubles.float()).clamp_(max=_LARGEST)
        self.finite.mul_(doubles.logical_not())


def scaled(features: Tensor, scale: GradientScale | None) -> Tensor:
    """The features as they are; what comes back for them is multiplied, if by anything."""
    if scale is None:
        return features
    made = _Scaled.apply(features, scale.value)
    return made  # pyrefly: ignore[bad-return]


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return features.view_as(features)

    @staticmethod
    # pyrefly: ignore[bad-override] (torch's own has any number of gradients; there is one)
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None
