"""CUDA graphs of an evaluation and of its backward pass: hundreds of launches replayed as one.

A small policy on a big GPU waits for launches. A graph replays what was once launched, on the same
memory and in the same shapes, so the numbers are the same. Capturing takes as long as a few
evaluations, so a shape is captured when it comes a second time. Where a capture fails, everything
is launched from then on, and one line says why.

A replayed backward pass hands out the graph's own buffers as gradients, which the next one writes
over: gradients are cleared before each backward pass, and never added up over several.
"""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastflag.files import InputError
from fastflag.model.ops import Choice
from fastflag.policy.stage import Stage

_LOG = logging.getLogger(__name__)

_VARIABLE = "FASTFLAG_GRAPHS"
# {architecture: where bench.gpu has measured it, and how much faster it was}. None has been.
_PROVEN: dict[int, str] = {}
# PyTorch 2.13 and newer: streams of graphs of autograd's that are still alive, as the first table's
# is when the next gradient step evaluates anew, are taken for the capturing one.
_JOIN_STALE = getattr(torch.autograd.graph, "set_override_stale_capture_stream", None)
# Each holds the activations of an evaluation. What has another shape is launched: capturing one in
# the place of another, in turn, would take longer.
_KEPT = 4


def choice(device: torch.device) -> Choice:
    """Whether evaluations are replayed on `device`; raises InputError where FASTFLAG_GRAPHS is none
    of auto, on and off."""
    asked = os.environ.get(_VARIABLE, "auto")
    if asked not in ("auto", "on", "off"):
        raise InputError(f"{_VARIABLE} is {asked!r}, not auto, on or off, environment")
    if device.type != "cuda":
        return Choice("off", "graphs are for GPUs")
    major, minor = torch.cuda.get_device_capability(device)
    evidence = _PROVEN.get(10 * major + minor)
    if asked != "auto":
        return Choice(asked, f"{_VARIABLE}={asked}", evidence or "none")
    if evidence is None:
        return Choice("off", f"not measured on sm_{major}{minor}; {_VARIABLE}=on takes them")
    return Choice("on", f"faster on sm_{major}{minor}", evidence)


class Graphs:
    """A function of a stage, `evaluate`, which reads the parameters of `trained`: as it is, or as a
    graph for each set of shapes, of which the first few that come back are kept.

    Outputs, and their backward pass, are valid until the next call with the same shapes.
    """

    def __init__(
        self,
        evaluate: Callable[[Stage], tuple[Tensor, ...]],
        trained: nn.ModuleList,
        capture: Callable[..., Any] | None,
    ):
        """`capture` is torch.cuda.make_graphed_callables, None to launch everything anew."""
        self._evaluate, self._trained, self._capture = evaluate, trained, capture
        self._captured: dict[tuple[torch.Size, ...], nn.Module] = {}
        self._seen: set[tuple[torch.Size, ...]] = set()

    def __call__(self, stage: Stage) -> tuple[Tensor, ...]:
        if self._capture is None:
            return self._evaluate(stage)
        tensors = stage.tensors()
        shapes = tuple(tensor.shape for tensor in tensors)
        full = len(self._captured) == _KEPT
        if shapes not in self._captured and (full or shapes not in self._seen):
            self._seen.add(shapes)
            return self._evaluate(stage)
        missing = shapes not in self._captured
        if missing and (problem := self._try_capture(self._capture, shapes, tensors)):
            _LOG.warning("CUDA graphs are off, every kernel is launched: %s", problem)
            self._capture = None
            self.forget()
            return self._evaluate(stage)
        # A replay writes over what the one before returned.
        return tuple(output.clone() for output in self._captured[shapes](*tensors))

    def _try_capture(
        self,
        capture: Callable[..., Any],
        shapes: tuple[torch.Size, ...],
        tensors: tuple[Tensor, ...],
    ) -> str:
        """What went wrong, in one line; empty where the graph is there."""
        replayed = _OfTensors(self._evaluate, self._trained)
        try:
            # A graph's own inputs, which later stages are copied into.
            static = tuple(tensor.clone() for tensor in tensors)
            with _stale_streams_joined():
                self._captured[shapes] = capture(replayed, static, allow_unused_input=True)
        # A capture that runs out of memory says so in several ways, and a library that waits for
        # the device in its own: whatever it was, launching does without it.
        except Exception as error:
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        return ""

    def forget(self) -> None:
        """Gives the graphs' memory back."""
        self._captured.clear()
        self._seen.clear()
        # What PyTorch captures refers to itself.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def made_for(
    device: torch.device,
    evaluate: Callable[[Stage], tuple[Tensor, ...]],
    trained: nn.ModuleList,
    replay: bool,
) -> Graphs:
    """A policy's, which launch everything anew without `replay` or where graphs are not chosen."""
    if not replay or choice(device).implementation != "on":
        return Graphs(evaluate, trained, None)
    if _JOIN_STALE is None:
        # Capturing is refused while a graph of autograd's from the default stream is alive, as the
        # first table's is when the next gradient step evaluates anew.
        torch.cuda.synchronize(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))
    return Graphs(evaluate, trained, torch.cuda.make_graphed_callables)


@contextmanager
def _stale_streams_joined() -> Iterator[None]:
    if _JOIN_STALE is None:
        yield
        return
    _JOIN_STALE(True)
    try:
        yield
    finally:
        _JOIN_STALE(False)


class _OfTensors(nn.Module):
    """A function of a stage in the form that PyTorch captures: a module, of tensors."""

    def __init__(self, evaluate: Callable[[Stage], tuple[Tensor, ...]], trained: nn.ModuleList):
        super().__init__()
        self.evaluate, self.trained = evaluate, trained

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.evaluate(Stage.from_tensors(*tensors))
