"""How long work takes on the device: once on a CPU by the wall clock, once on a GPU by its events.

On a GPU the second-level cache is emptied before each sample, so that inputs come from memory, and
the device then spins until the host has launched everything: what is measured is the device's time,
not Python's. Python's own is kept beside it, for who launches without a graph.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

Work = Callable[[], Any]


@dataclass(frozen=True)
class Sample:
    seconds: float
    launch: float = 0.0  # seconds until the host was done, on a GPU
    peak: int | None = None  # bytes that the work allocated at most at one time, on a GPU


class Clock(Protocol):
    device: str

    def sample(self, prepare: Callable[[], Work], launch: float = 0.0) -> Sample:
        """Times what `prepare` returns, without `prepare`; `launch` is what the host is expected
        to take for it."""


class WallClock:
    device = "cpu"

    def sample(self, prepare: Callable[[], Work], launch: float = 0.0) -> Sample:
        work = prepare()
        start = time.perf_counter()
        work()
        return Sample(time.perf_counter() - start)


class DeviceClock:
    device = "cuda"

    def __init__(self):
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._other = torch.zeros(cache, device=self.device)  # fp32: four times the cache
        self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cycles = 10_000_000
        torch.cuda._sleep(cycles)  # the first one loads the kernel
        self._cycles = cycles / self._between(lambda: torch.cuda._sleep(cycles))

    def sample(self, prepare: Callable[[], Work], launch: float = 0.0) -> Sample:
        work = prepare()
        # Read, not written: lines to be written back would be charged to the work.
        self._other.sum()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        # Twice what the host is expected to take; a sample of a slower moment is too long by some
        # launches, and the median of many does not show it.
        torch.cuda._sleep(1 + int(2 * launch * self._cycles))
        started: list[float] = []

        def launched() -> Any:
            start = time.perf_counter()
            kept = work()
            started.append(time.perf_counter() - start)
            return kept

        seconds = self._between(launched)
        return Sample(seconds, started[0], torch.cuda.max_memory_allocated() - before)

    def _between(self, work: Work) -> float:
        self._began.record()
        kept = work()
        self._ended.record()
        self._ended.synchronize()
        del kept  # until here, as a caller would keep it
        return self._began.elapsed_time(self._ended) / 1e3


def clock() -> Clock:
    return DeviceClock() if torch.cuda.is_available() else WallClock()


@dataclass(frozen=True)
class Times:
    """Samples of one work, in the order of the rounds."""

    samples: tuple[Sample, ...]

    @property
    def seconds(self) -> np.ndarray:
        return np.array([sample.seconds for sample in self.samples])

    def percentile(self, percent: float) -> float:
        """Seconds, between samples by linear interpolation."""
        return float(np.percentile(self.seconds, percent))

    @property
    def launch(self) -> float:
        return float(np.median([sample.launch for sample in self.samples]))

    @property
    def peak(self) -> int | None:
        peaks = [sample.peak for sample in self.samples if sample.peak is not None]
        return max(peaks, default=None)

    def faster_than(self, other: "Times") -> float:
        """How many times as fast as `other`: the median over rounds, in each of which both ran, so
        that a slow moment of the machine slows both."""
        return float(np.median(other.seconds / self.seconds))


_WARM_UP = 3  # rounds that are not counted: allocators and caches fill, the host's time is learnt
_FEWEST = 5  # rounds at least, however long they take


def interleaved(
    works: dict[str, Callable[[], Work]], timer: Clock, rounds: int, seconds: float
) -> dict[str, Times]:
    """Times of each work by name: rounds in which each has its turn, `rounds` of them, or fewer
    when `seconds` have gone by. `works` make the work anew for each sample."""
    samples: dict[str, list[Sample]] = {name: [] for name in works}
    end = time.perf_counter() + seconds
    for number in range(_WARM_UP + rounds):
        if number >= _WARM_UP + _FEWEST and time.perf_counter() > end:
            break
        for name, prepare in works.items():
            # The least: work that waits for the device waits for the spinning, too, and must not
            # make the next one longer.
            launch = min((sample.launch for sample in samples[name]), default=0.0)
            samples[name].append(timer.sample(prepare, launch))
    return {name: Times(tuple(some[_WARM_UP:])) for name, some in samples.items()}
