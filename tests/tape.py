"""In the place of CUDA graphs, on a CPU: what work computes is recorded once, and computed again on
the same memory at each replay.

As in a capture, nothing is computed while it is recorded, as far as anyone can see: what was there
before is as it was, and what is new holds NaN. No number may be asked for, and whatever Python read
on the way stays as it was, so no tensor may be made of it: what copies it is no launch.
"""

from collections.abc import Callable
from typing import Any

import torch
from precision import never_waiting
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


class Tape:
    """A capture, and how often it was made, replayed, and what it was made of."""

    def __init__(self, fails: Callable[[int], bool] = lambda number: False):
        """`fails`: whether the capture of this number, from 1 on, does."""
        self.captured, self.replays = 0, []
        self._fails = fails

    def __call__(self, work):
        self.captured += 1
        recorder, number = _Recorder(), self.captured
        try:
            with never_waiting(), recorder:
                made = work()
                if self._fails(number):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        finally:
            recorder.restore()
        recorder.poison()

        def replay():
            self.replays.append(number)
            recorder.replay()

        return made, replay


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self._own: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._overloadpacket is torch.ops.aten.lift_fresh:  # torch.tensor
            raise AssertionError(f"{func} copies a number from the host")
        for tensor in _written(func, args, kwargs):
            if tensor.untyped_storage().data_ptr() not in self._own:
                self._before.append((tensor.data, tensor.detach().clone()))
        given = {_place(tensor) for tensor in tree_flatten((args, kwargs))[0] if _is(tensor)}
        made = func(*args, **kwargs)
        new = [
            (at, tensor.data)
            for at, tensor in enumerate(tree_flatten(made)[0])
            if _is(tensor) and _place(tensor) not in given
        ]
        self._own |= {_place(tensor) for _, tensor in new}
        if new or [*_written(func, args, kwargs)]:
            # Without the counts of changes, by which autograd would know of replays.
            same = tree_map_only(Tensor, lambda tensor: tensor.data, (args, kwargs))
            self.calls.append((func, *same, new))
        return made

    def restore(self):
        for tensor, before in reversed(self._before):
            tensor.copy_(before)

    def poison(self):
        for *_, new in self.calls:
            for _, tensor in new:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def replay(self):
        self.poison()
        with torch.no_grad():
            for func, args, kwargs, new in self.calls:
                made = tree_flatten(func(*args, **kwargs))[0]
                for at, tensor in new:
                    tensor.copy_(made[at])


def _is(value):
    return isinstance(value, Tensor)


def _place(tensor):
    return tensor.untyped_storage().data_ptr()


def _written(func, args, kwargs):
    for at, argument in enumerate(func._schema.arguments):
        value = args[at] if at < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from (one for one in tree_flatten(value)[0] if _is(one))
