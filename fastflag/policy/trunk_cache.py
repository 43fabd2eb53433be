"""Frozen activations, kept by content: what the trunk makes of a text never changes.

Two tiers: a dictionary in memory, and files that outlive the process and are shared by others.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from fastflag.model import ops
from fastflag.model.arithmetic import DTYPES

# Entries are written together when they reach this size, or on `flush`: a demo's days and texts are
# thousands of entries, and a dozen files.
_FILE_BYTES = 64 * 2**20
# A tenth of what CUDA itself takes: less is not what an update ran out by.
_LEAST_SHRUNK = 32 * 2**20
# A temporary file older than this was left by a process that was killed.
_STALE_SECONDS = 3600

_log = logging.getLogger(__name__)


class TrunkCache:
    """Tensors by key within a byte budget, least recently used out first; what is not there is
    looked for in `files`, where it is given."""

    def __init__(self, budget_bytes: int, files: "TrunkFiles | None" = None):
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.files = files
        self._entries: OrderedDict[bytes, tuple[Tensor, ...]] = OrderedDict()

    def get(self, key: bytes) -> tuple[Tensor, ...] | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        elif self.files is not None:
            entry = self.files.get(key)
            if entry is not None:
                self._remember(key, entry)
        return entry

    def put(self, key: bytes, *tensors: Tensor) -> None:
        """Keeps `tensors`, which must not be changed afterwards."""
        self._remember(key, tensors)
        if self.files is not None:
            self.files.put(key, tensors)

    def flush(self) -> None:
        """Writes what waits to be written."""
        if self.files is not None:
            self.files.flush()

    def shrink(self) -> int:
        """Gives three quarters of what is kept in memory back, for good, and returns the bytes, or
        nothing where they would not be worth another attempt."""
        before = self.used_bytes
        if before < _LEAST_SHRUNK:
            return 0
        self.budget_bytes = before // 4
        self._evict(self.budget_bytes)
        return before - self.used_bytes

    def _evict(self, most: int) -> None:
        """Until no more than `most` bytes are used."""
        while self.used_bytes > most:
            _, evicted = self._entries.popitem(last=False)
            self.used_bytes -= _size(evicted)

    def _remember(self, key: bytes, tensors: tuple[Tensor, ...]) -> None:
        size = _size(tensors)
        if size > self.budget_bytes or key in self._entries:
            return
        self._evict(self.budget_bytes - size)
        self._entries[key] = tensors
        self.used_bytes += size


class TrunkFiles:
    """Tensors by key in safetensors files of one folder, within a byte budget for all of it.

    Files are written whole or not at all and never changed, so that any number of processes may use
    the folder. The file used least recently goes first. An entry whose checksum is wrong is not
    used: its file is named and removed, and what it held is made anew. Where the folder can't be
    written, nothing more is kept, and this is said once.
    """

    def __init__(self, folder: Path, fingerprint: str, budget_bytes: int, device: torch.device):
        """`fingerprint` [hex digits] names what the activations are of."""
        self.folder, self.fingerprint = folder, fingerprint
        self.budget_bytes, self.device = budget_bytes, device
        self._where: dict[str, tuple[Path, list[str]]] = {}  # file and checksums of an entry
        self._open_files: dict[Path, safe_open] = {}
        self._waiting: dict[str, tuple[Tensor, ...]] = {}
        self._waiting_bytes = 0
        self._writes = True
        for path in sorted(folder.glob(f"{fingerprint}-*.safetensors")):
            self._open(path)

    def get(self, key: bytes) -> tuple[Tensor, ...] | None:
        name = key.hex()
        if name not in self._where:
            return self._waiting.get(name)
        path, sums = self._where[name]
        try:
            tensors = tuple(
                self._open_files[path].get_tensor(f"{name}.{number}") for number in range(len(sums))
            )
        except (SafetensorError, OSError) as error:
            self._discard(path, error)
            return None
        if [_checksum(tensor) for tensor in tensors] != sums:
            self._discard(path, "a checksum is wrong")
            return None
        return tuple(tensor.to(self.device) for tensor in tensors)

    def put(self, key: bytes, tensors: tuple[Tensor, ...]) -> None:
        name = key.hex()
        if not self._writes or name in self._where or name in self._waiting:
            return
        self._waiting[name] = tensors
        self._waiting_bytes += _size(tensors)
        if self._waiting_bytes >= _FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes the entries that wait, as one file, and removes old ones above the budget."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, {}, 0
        if not waiting:
            return
        tensors = {
            f"{name}.{number}": tensor.detach().cpu().contiguous()
            for name, entry in waiting.items()
            for number, tensor in enumerate(entry)
        }
        sums = {
            name: [_checksum(tensors[f"{name}.{number}"]) for number in range(len(entry))]
            for name, entry in waiting.items()
        }
        metadata = {"fingerprint": self.fingerprint, "checksums": json.dumps(sums)}
        path = self.folder / f"{self.fingerprint}-{uuid.uuid4().hex}.safetensors"
        temporary = path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self._writes = False
            _log.warning("frozen activations are not kept on disk: %s, %s", error, self.folder)
            return
        self._open(path)
        self._trim()

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != self.fingerprint:
                raise ValueError("it holds something else than its name says")
            sums = json.loads(metadata["checksums"])
            if {f"{n}.{i}" for n, s in sums.items() for i in range(len(s))} != set(file.keys()):
                raise ValueError("checksums and tensors differ")
        except FileNotFoundError:
            return  # another process removed it to make room
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            self._discard(path, error)
            return
        self._open_files[path] = file
        self._where |= {name: (path, of_entry) for name, of_entry in sums.items()}
        _touch(path)

    def _discard(self, path: Path, reason: object) -> None:
        _log.warning("frozen activations are made anew: %s, %s", reason, path)
        self._open_files.pop(path, None)
        self._where = {name: where for name, where in self._where.items() if where[0] != path}
        _remove(path)

    def _trim(self) -> None:
        files = []
        for path in self.folder.iterdir():
            try:
                state = path.stat()
            except OSError:
                continue
            if path.suffix == ".safetensors":
                files.append((state.st_mtime, state.st_size, path))
            elif path.suffix == ".tmp" and state.st_mtime < time.time() - _STALE_SECONDS:
                _remove(path)
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.budget_bytes:
                return
            # What this process has open it can still read; others find it gone.
            _remove(path)
            total -= size


def _checksum(tensor: Tensor) -> str:
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _touch(path: Path) -> None:
    # Fails in a folder of somebody else's, and where the file has just been removed.
    with contextlib.suppress(OSError):
        os.utime(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("can't be removed: %s, %s", error.strerror, path)


def _size(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bits_of_a_gpu() -> tuple[object, ...]:
    """Its kind, the libraries' version, and which kernels are taken there."""
    taken = [op.choice(torch.device("cuda")).implementation for op in ops.OPS]
    return torch.cuda.get_device_name(), torch.version.cuda, taken


def bits_of_a_cpu(dtype: str) -> tuple[str, bytes]:
    """Its vector units, and the bits of a product and of attention in both forms, causal and with a
    mask: units of bf16 round what others don't, and a folder of the user's may be seen by several
    machines."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 576, generator=random) for _ in range(2))
    query, key, value = (torch.randn(1, 3, 144, 64, generator=random) for _ in range(3))
    mask = torch.arange(144) < 137
    made = (
        ops.linear(x, weight, None, DTYPES[dtype]),
        ops.causal_attention(query, key, value),
        functional.scaled_dot_product_attention(query, key, value, attn_mask=mask.expand(144, -1)),
    )
    digest = hashlib.blake2b(digest_size=8)
    for numbers in made:
        digest.update(numbers.contiguous().numpy().tobytes())
    return torch.backends.cpu.get_cpu_capability(), digest.digest()
