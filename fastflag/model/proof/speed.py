"""What counts as faster: of samples of time alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

FASTER = 1.05
"""Times as fast as PyTorch's that an implementation has to be."""
_LEAST = 20  # percentile of the rounds' ratios that must be above 1


@dataclass(frozen=True)
class Timed:
    """An implementation's samples of an op's whole work, a number a round."""

    device: np.ndarray  # seconds
    host: np.ndarray  # seconds until the host had launched it; 0 on a CPU

    def cost(self, replayed: bool) -> np.ndarray:
        """What an update waits for: the device alone where a graph is replayed."""
        return self.device if replayed else np.maximum(self.device, self.host)


def faster(ours: Timed, base: Timed, replayed: bool) -> float:
    """How many times as fast as `base`: the median over rounds, in each of which both ran, so that
    a slow moment slows both. 0 where a fifth of the rounds say otherwise: that is noise."""
    rounds = min(len(ours.device), len(base.device))
    ratios = base.cost(replayed)[:rounds] / ours.cost(replayed)[:rounds]
    return float(np.median(ratios)) if np.percentile(ratios, _LEAST) > 1.0 else 0.0


def fastest(timed: Mapping[str, Timed], replayed: bool) -> tuple[str, float]:
    """Which implementation is taken, and how many times as fast as the first one it is: the first,
    PyTorch's, unless another is clearly faster."""
    base, *others = timed
    gains = {name: faster(timed[name], timed[base], replayed) for name in others}
    best = max(gains, key=lambda name: gains[name], default=base)
    return (best, gains[best]) if gains.get(best, 0.0) >= FASTER else (base, 1.0)
