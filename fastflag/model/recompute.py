"""Gradient checkpointing of the trained layers within a budget of memory, and what is done where
memory runs out all the same.

What does not fit into the budget is split into parts, of prefixes or of prompts, which the backward
pass recomputes: the same gradient, for a forward pass more and the memory of a part at a time.
"""

import logging
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


class Recompute:
    """A budget of bytes, half for what autograd keeps and half for the part that is recomputed.

    On out-of-memory, `attempt` retries, unless the optimiser has stepped (`commit`): with what
    `spare` gives back, then, while the work can be split further, with half the budget. Attempts
    may lie in one another: of an update that has stepped, the next step's forward and backward pass
    are retried by themselves. The command line refuses in one line what no retry mends (`ran_out`).
    """

    def __init__(self, budget: int, spare: Callable[[], int] = lambda: 0):
        """`budget`: 0 for none. `spare` gives memory of others' back and returns the bytes."""
        self._budget: float = budget or math.inf
        self._spare = spare
        self._kept = self._asked = 0
        self._divisible = self._committed = False

    def restart(self) -> None:
        """An evaluation begins; what earlier ones kept is gone."""
        self._kept = self._asked = 0

    def run(self, work: Callable[[slice], T], rows: int, cost: Callable[[int], int]) -> list[T]:
        """`work` on all of so many rows, or part by part, to be recomputed; `cost` is the bytes
        that autograd keeps of a number of them."""
        if not torch.is_grad_enabled():
            return [work(part) for part in self._parts(rows, cost)]
        if self.keeps(rows, cost(rows)):
            return [work(slice(0, rows))]
        return [
            checkpoint(work, part, use_reentrant=False, preserve_rng_state=False)
            for part in self._parts(rows, cost)
        ]

    def keeps(self, rows: int, size: int) -> bool:
        """Whether autograd may keep `size` bytes more, of work on `rows` that can be split."""
        self._asked += size
        if self._kept + size > self._budget / 2:
            return False
        self._kept += size
        self._divisible |= rows > 1
        return True

    def attempt(self, work: Callable[[], T]) -> T:
        """What `work` returns, retried on out-of-memory as the class says. Raises the error of the
        last try, and any other at once."""
        before = self._committed
        try:
            while True:
                self._committed = self._divisible = False
                try:
                    return work()
                except (RuntimeError, MemoryError) as error:
                    if not ran_out(error) or self._committed:
                        raise
                    freed = self._spare()
                    if not freed and not self._divisible:
                        raise
                # Not in the handler, where the error holds on to every tensor of the attempt.
                self._make_room(freed)
        finally:
            self._committed = before

    def commit(self) -> None:
        """From here on the attempt can't be retried: the optimiser steps."""
        self._committed = True

    def _make_room(self, freed: int) -> None:
        if freed:
            told = "out of memory: %d MB of frozen activations are given back"
            _LOG.warning(told, max(round(freed / 2**20), 1))
        else:
            self._budget = min(self._budget, self._asked) / 2
            megabytes = max(round(self._budget / 2**20), 1)
            _LOG.warning("out of memory: going on with --memory-budget %d", megabytes)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _parts(self, rows: int, cost: Callable[[int], int]) -> list[slice]:
        # What is kept whatever the number of rows, such as matrices in bf16, no split makes less.
        size, fixed = rows, cost(0)
        while size > 1 and cost(size) - fixed > self._budget / 2:
            size = -(-size // 2)
        self._divisible |= size > 1
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def ran_out(error: BaseException) -> bool:
    """Whether it says that there is no memory: Python's, PyTorch's on CUDA or on a CPU."""
    told = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(words in str(error) for words in told)
