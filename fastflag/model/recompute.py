"""How much of the top layers' work autograd may keep for the backward pass.

What does not fit into the budget is cut into parts, of days or of prompts, whose work is done again
in the backward pass: the same gradient, for a forward pass more and the memory of a part at a time.
"""

import logging
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


class Activations:
    """A budget in bytes, 0 for none: half for what is kept, half for what is done again."""

    def __init__(self, budget: int):
        self._budget: float = budget or math.inf
        self._kept = self._asked = 0
        self._divisible = self._committed = False

    def restart(self) -> None:
        """An evaluation begins; what earlier ones kept is gone."""
        self._kept = self._asked = 0

    def run(self, work: Callable[[slice], T], rows: int, cost: Callable[[int], int]) -> list[T]:
        """`work` on all of so many rows, or part by part; `cost` is the bytes that autograd keeps
        of a number of them."""
        if not torch.is_grad_enabled():
            return [work(part) for part in self._parts(rows, cost)]
        if self.keeps(rows, cost(rows)):
            return [work(slice(0, rows))]
        return [
            checkpoint(work, part, use_reentrant=False, preserve_rng_state=False)
            for part in self._parts(rows, cost)
        ]

    def keeps(self, rows: int, size: int) -> bool:
        """Whether autograd may keep `size` bytes more, of work on `rows` that could be cut."""
        self._asked += size
        if self._kept + size > self._budget / 2:
            return False
        self._kept += size
        self._divisible |= rows > 1
        return True

    def attempt(self, work: Callable[[], T]) -> T:
        """What `work` returns. Where memory runs out it is done again with half the budget, while
        there is something to cut and nothing was committed."""
        before = self._committed
        try:
            while True:
                self._committed = self._divisible = False
                try:
                    return work()
                except (RuntimeError, MemoryError) as error:
                    if not ran_out(error) or self._committed or not self._divisible:
                        raise
                # Not in the handler, where the error holds on to every tensor of the attempt.
                self._halve()
        finally:
            self._committed = before

    def commit(self) -> None:
        """What the attempt does from here on can't be done again."""
        self._committed = True

    def _halve(self) -> None:
        self._budget = min(self._budget, self._asked) / 2
        megabytes = max(round(self._budget / 2**20), 1)
        _LOG.warning("out of memory: going on with --memory-budget %d", megabytes)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _parts(self, rows: int, cost: Callable[[int], int]) -> list[slice]:
        # What is kept whatever the number of rows, such as matrices in bf16, no cut makes less.
        size, fixed = rows, cost(0)
        while size > 1 and cost(size) - fixed > self._budget / 2:
            size = -(-size // 2)
        self._divisible |= size > 1
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def ran_out(error: BaseException) -> bool:
    """Whether it says that there is no memory: Python's, PyTorch's on CUDA or on a CPU."""
    told = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(words in str(error) for words in told)
