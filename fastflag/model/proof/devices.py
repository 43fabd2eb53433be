"""Where a proof is made: a GPU, or a CPU, on which the prover's own code is tried."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from fastflag.model.proof.clock import Clock, DeviceClock, WallClock

Work = Callable[[], list[Tensor]]


class Device(Protocol):
    torch: torch.device
    memory: int
    """Bytes that a proof may take."""

    @property
    def clock(self) -> Clock: ...

    def replayed(self, work: Work) -> Work:
        """`work` as a CUDA graph replays it; its results are valid until the next call."""
        ...

    def busy(self) -> AbstractContextManager[None]:
        """Inside, something else is at work on the device."""
        ...


class Cpu:
    """Nothing is captured."""

    def __init__(self) -> None:
        self.torch, self.clock, self.memory = torch.device("cpu"), WallClock(), 2**30

    def replayed(self, work: Work) -> Work:
        return work

    @contextmanager
    def busy(self) -> Iterator[None]:
        yield


class Cuda:
    def __init__(self) -> None:
        self.torch, self.clock = torch.device("cuda"), DeviceClock()
        self.memory = torch.cuda.mem_get_info()[0]
        self._other = torch.cuda.Stream()
        self._matrix = torch.ones(1024, 1024, device=self.torch, dtype=torch.float16)

    def replayed(self, work: Work) -> Work:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and libraries loaded before a capture
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = work()

        def replay() -> list[Tensor]:
            graph.replay()
            return made

        return replay

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Products on another stream, which take turns with the work for the multiprocessors."""
        with torch.cuda.stream(self._other):
            for _ in range(200):
                torch.mm(self._matrix, self._matrix)
        yield
        torch.cuda.synchronize()
