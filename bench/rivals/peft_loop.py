"""The plain loop's time: transformers + PEFT over the prompts of a batch, at its fastest."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from bench.measure.loop import Trainer, seconds
from bench.rivals.peft_policy import PlainPolicy
from fastflag.learn.objective import loss_of
from fastflag.model.arithmetic import DTYPES

PART = 64  # samples that a baseline of many is measured on
_BATCHES = (4, 8, 16, 32, 64)


class Fastest(NamedTuple):
    """How the plain loop is fastest: its dtype, the prompts of a forward in rollout, and those of a
    forward and backward in update."""

    dtype: str
    rollout_batch: int
    update_batch: int


class Baseline:
    """Seconds of the plain loops over the prompts of a batch."""

    def __init__(self, trainer: Trainer, fastest: Fastest | None):
        """`fastest` as another one of the same model found it."""
        table, lesson = trainer.every_step()
        self.algorithm = trainer.config.algorithm
        self.prompts = lesson.prompts
        # They come day by day: a part of them is of one day, whose prefix the cache holds.
        self.rows, self.samples = lesson.samples.row.cpu().numpy(), lesson.samples
        self.statistics = dataclasses.replace(
            table.statistics,
            mean=table.statistics.mean.detach(),
            deviation=table.statistics.deviation.detach(),
        )
        made = {
            dtype: partial(PlainPolicy, trainer.policy, trainer.weights, DTYPES[dtype])
            for dtype in ([fastest.dtype] if fastest else DTYPES)
        }
        if fastest:
            self.fastest, self.plain = fastest, made[fastest.dtype]()
        else:
            self.fastest = self._fastest(made)

    def _fastest(self, made: dict[str, Callable[[], PlainPolicy]]) -> Fastest:
        """The dtype that rolls a few prompts out in the least time, and with it batch sizes."""
        times = {}
        for dtype, make in made.items():
            self.plain = make()
            times[dtype] = min(seconds(lambda: self.roll(range(4), 4)) for _ in range(2))
        dtype = min(times, key=times.__getitem__)
        self.plain = made[dtype]()
        tried = range(min(PART, len(self.rows)))
        rollout = min(_BATCHES, key=lambda n: seconds(lambda: self.roll(tried, n)))
        learning = min(_BATCHES, key=lambda n: seconds(lambda: self.learn(tried, n)))
        return Fastest(dtype, rollout, learning)

    def roll(self, samples: range, batch: int) -> None:
        with torch.no_grad():
            for some in _parts(samples, batch):
                rows = self.rows[some]
                features = self.plain.features([self.prompts.tokens(row) for row in rows])
                self.plain.heads(features, self.prompts, rows, self.statistics)

    def roll_with_cache(self, samples: range, envs: int) -> None:
        """As many environments of a day as there are share its prefix's cache."""
        with torch.no_grad():
            for some in _parts(samples, min(envs, PART)):
                rows = self.rows[some]
                prefix = self.prompts.prefixes[self.prompts.pairs[rows[0], 0]]
                suffixes = [self.prompts.suffixes[self.prompts.pairs[row, 1]] for row in rows]
                cache = self.plain.prefix_cache(prefix, len(rows))
                features = self.plain.suffix_features(cache, len(prefix), suffixes)
                self.plain.heads(features, self.prompts, rows, self.statistics)

    def learn(self, samples: range, batch: int) -> None:
        for some in _parts(samples, batch):
            rows = self.rows[some]
            features = self.plain.features([self.prompts.tokens(row) for row in rows])
            made = self.plain.heads(features, self.prompts, rows, self.statistics)
            loss_of(*made, self.samples.take(torch.from_numpy(some)), self.algorithm)[0].backward()

    def seconds_of_update(self, envs: int, steps: int) -> tuple[float, float]:
        """Of the plain loop, and of the one with a cache in its rollout."""
        part = range(min(len(self.rows), PART))
        rolled, learnt = self._seconds(envs, part)
        # A part of PART environments pays for one prefix; so does a day of all of them.
        cached = seconds(lambda: self.roll_with_cache(part, envs))
        scale = envs * steps / len(part)
        return scale * (rolled + learnt), scale * (cached + learnt)

    def seconds_of_a_step(self, envs: int) -> float:
        """Of the plain loop, for each environment step."""
        part = range(min(len(self.rows), PART))
        return sum(self._seconds(envs, part)) / len(part)

    def _seconds(self, envs: int, part: range) -> tuple[float, float]:
        rolled = seconds(lambda: self.roll(part, min(self.fastest.rollout_batch, envs)))
        return rolled, seconds(lambda: self.learn(part, self.fastest.update_batch))


def _parts(samples: range, size: int) -> list[np.ndarray]:
    return [np.array(samples[start : start + size]) for start in range(0, len(samples), size)]
