"""CUDA graphs of an evaluation and of the gradient step over it: a thousand launches are two.

A small policy on a big GPU waits for launches. A graph replays what was once launched, on the same
memory and in the same shapes, so the numbers are the same. Why a step is two graphs, not one:

- The rollout reads the first table on the host before the samples are known. So the forward is a
  graph, and all that follows (gather, loss, backward, clipping, optimiser: learn/step.py)
  another, which differentiates the forward that was replayed. The first ratio is 1 to the bit.
- A later gradient step replays both again, on its own samples: there is no forward more than
  without graphs, and no third form of it.
- Both lie in one pool of memory. What the forward keeps for the backward pass is held for as long
  as its graph is, because several steps (of other numbers of samples) may be captured over it.

A shape is captured when it comes a second time: capturing takes as long as some evaluations, and
the first time has compiled and allocated what must not be in a capture. Where a capture fails,
everything is launched from then on, and one line says why. None of this has run on a GPU.
"""

import gc
import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastflag.files import InputError
from fastflag.model.ops import Choice
from fastflag.policy.stage import Stage

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

_VARIABLE = "FASTFLAG_GRAPHS"
# Each holds the activations of an evaluation. What has another shape is launched: capturing one in
# the place of another, in turn, would take longer.
_KEPT = 4


class Capture(Protocol):
    """How work is captured."""

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What `work` returned, whose tensors hold nothing yet, and what replays it: it reads and
        writes the memory that `work` did. Raises whatever went wrong."""
        ...


class CudaCapture:
    """By CUDA graphs, which share memory and are replayed one at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                made = work()
        finally:
            # A capture that fails leaves its own stream behind.
            torch.cuda.set_stream(stream)
        return made, graph.replay


def choice(device: torch.device, found: Choice | None = None) -> Choice:
    """Whether evaluations are replayed on `device`: as the environment says, or as `found` does, a
    run's setting or a proof. Raises InputError where FASTFLAG_GRAPHS is none of auto, on and off.
    """
    asked = os.environ.get(_VARIABLE, "auto")
    if asked not in ("auto", "on", "off"):
        raise InputError(f"{_VARIABLE} is {asked!r}, not auto, on or off, environment")
    if device.type != "cuda":
        return Choice("off", "graphs are for GPUs")
    if asked != "auto":
        return Choice(asked, f"{_VARIABLE}={asked}", found.evidence if found else "none")
    return found or Choice("off", "not proved: `fastflag doctor --prove` does it")


class Evaluation:
    """A captured evaluation: inputs that stages are copied into, outputs that a replay fills."""

    def __init__(
        self,
        evaluate: Callable[[Stage], tuple[Tensor, ...]],
        trained: nn.ModuleList,
        stage: Stage,
        capture: Capture,
    ):
        self.capture = capture
        self.steps: list[Any] = []  # gradient steps that are captured over this evaluation
        self.replays = 0
        self._inputs = tuple(tensor.clone() for tensor in stage.tensors())
        self._stage = weakref.ref(stage)
        module = _OfTensors(evaluate, trained)
        parameters = dict(module.named_parameters())
        self.parameters = tuple(parameters.values())
        # Autograd refuses what was changed since it was kept. A replay keeps it anew, which
        # autograd can't know: these are the same memory, of which it is told no change.
        self.leaves = tuple(each.data.requires_grad_() for each in self.parameters)
        named, static = dict(zip(parameters, self.leaves, strict=True)), self._inputs
        same = tuple(tensor.data for tensor in static)
        self.outputs, self._replay = capture(lambda: functional_call(module, named, same))

    def __call__(self, stage: Stage) -> "Replay":
        if self._stage() is not stage:
            for tensor, new in zip(self._inputs, stage.tensors(), strict=True):
                tensor.copy_(new)
            self._stage = weakref.ref(stage)
        self._replay()
        self.replays += 1
        return Replay(self, self.replays)

    def gradients(self, outputs: tuple[Tensor, ...], of: tuple[Any, ...]) -> tuple[Any, ...]:
        """By the leaves, of the last replay; what a graph keeps for the backward pass stays."""
        return torch.autograd.grad(outputs, self.leaves, of, retain_graph=True, allow_unused=True)


@dataclass(frozen=True)
class Replay:
    """One replay of an evaluation, until the next."""

    evaluation: Evaluation
    number: int

    @property
    def current(self) -> bool:
        return self.evaluation.replays == self.number

    def copies(self) -> tuple[Tensor, ...]:
        """Of the outputs, which outlive the replay, with gradient for as long as it is current."""
        made = _Launched.apply(self, *self.evaluation.parameters)
        return made  # pyrefly: ignore[bad-return]


class _Launched(torch.autograd.Function):
    """A replay's outputs, with a backward pass that is launched."""

    @staticmethod
    def forward(ctx: Any, replay: Replay, *_: Tensor) -> tuple[Tensor, ...]:
        ctx.replay = replay
        ctx.set_materialize_grads(False)
        return tuple(output.detach().clone() for output in replay.evaluation.outputs)

    @staticmethod
    def backward(ctx: Any, *of: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.replay.current:
            raise RuntimeError("a later evaluation was written over this one")
        evaluation = ctx.replay.evaluation
        some = [pair for pair in zip(evaluation.outputs, of, strict=True) if pair[1] is not None]
        return None, *evaluation.gradients(*zip(*some, strict=True))


class Graphs:
    """A function of a stage, `evaluate`, which reads the parameters of `trained`: as it is, or as a
    graph for each set of shapes, of which the first few that come back are kept.

    Outputs are valid for good, and their backward pass until the next call with the same shapes.
    """

    def __init__(
        self,
        evaluate: Callable[[Stage], tuple[Tensor, ...]],
        trained: nn.ModuleList,
        capture: Capture | None,
    ):
        """`capture`: None to launch everything anew."""
        self._evaluate, self._trained, self._capture = evaluate, trained, capture
        self.problem = ""  # of the capture that failed, in one line
        self._captured: dict[tuple[torch.Size, ...], Evaluation] = {}
        self._seen: set[tuple[torch.Size, ...]] = set()

    def __call__(self, stage: Stage) -> tuple[tuple[Tensor, ...], Replay | None]:
        """What `evaluate` returns, and of which replay it is."""
        evaluation = None if self._capture is None else self._evaluation(self._capture, stage)
        if evaluation is None:
            return self._evaluate(stage), None
        replay = evaluation(stage)
        return replay.copies(), replay

    def _evaluation(self, capture: Capture, stage: Stage) -> Evaluation | None:
        """The graph of its shapes; None where there is none."""
        shapes = tuple(tensor.shape for tensor in stage.tensors())
        if shapes in self._captured:
            return self._captured[shapes]
        if len(self._captured) == _KEPT or shapes not in self._seen:
            self._seen.add(shapes)
            return None
        made = self.attempt(lambda: Evaluation(self._evaluate, self._trained, stage, capture))
        if made is not None:
            self._captured[shapes] = made
        return made

    def attempt(self, work: Callable[[], T]) -> T | None:
        """What `work`, a capture, returns; None where it fails, and all is launched from then on.

        A capture that runs out of memory says so in several ways, and a library that waits for the
        device in its own: whatever it was, launching does without it.
        """
        try:
            return work()
        except Exception as error:
            self.problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        _LOG.warning("CUDA graphs are off, every kernel is launched: %s", self.problem)
        self._capture = None
        self.forget()
        return None

    def forget(self) -> None:
        """Gives the graphs' memory back."""
        self._captured.clear()
        self._seen.clear()
        # What was captured refers to itself.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def made_for(
    device: torch.device,
    evaluate: Callable[[Stage], tuple[Tensor, ...]],
    trained: nn.ModuleList,
    replay: bool,
    setting: str = "auto",
) -> Graphs:
    """A policy's, which launch everything anew without `replay` or where graphs are not chosen, by
    the environment or its `setting`."""
    found = None if setting == "auto" else Choice(setting, "as the run began")
    if not replay or choice(device, found).implementation != "on":
        return Graphs(evaluate, trained, None)
    return Graphs(evaluate, trained, CudaCapture())


class _OfTensors(nn.Module):
    """A function of a stage in the form of a module of tensors, whose parameters can be given."""

    def __init__(self, evaluate: Callable[[Stage], tuple[Tensor, ...]], trained: nn.ModuleList):
        super().__init__()
        self.evaluate, self.trained = evaluate, trained

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.evaluate(Stage.from_tensors(*tensors))
