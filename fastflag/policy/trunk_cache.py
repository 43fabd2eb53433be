"""Frozen activations, kept by content: what the trunk makes of a text never changes."""

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor


class TrunkCache:
    """Tensors by key within a byte budget, least recently used out first."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()

    def get(self, key: Hashable) -> tuple[Tensor, ...] | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Hashable, *tensors: Tensor) -> None:
        """Keeps `tensors`, which must not be changed afterwards, unless they exceed the budget."""
        size = _size(tensors)
        if size > self.budget_bytes or key in self._entries:
            return
        while self.used_bytes + size > self.budget_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.used_bytes -= _size(evicted)
        self._entries[key] = tensors
        self.used_bytes += size


def _size(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
