"""A training run on disk: RUN/checkpoint/state.json names the one complete safetensors file.

The tensors are written first, under a name of their own, then state.json is replaced: a run killed
at any moment leaves a checkpoint that is whole. state.json holds the tensors' digest, so a damaged
file is refused rather than resumed. Nothing executable is ever loaded.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.optim import AdamW

from fastflag.files import InputError, read_json, reading, write_atomic
from fastflag.market.accounts import Accounts, Columns
from fastflag.policy.table import Policy

_Accounts = TypeVar("_Accounts", bound=Columns)


@dataclass(frozen=True)
class Checkpoint:
    updates: int  # that are done
    fingerprint: str  # of the model's weights
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]  # each parameter's state, as `_kept` writes it


def write_checkpoint(
    run: Path,
    updates: int,
    fingerprint: str,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    accounts: Sequence[Columns],
) -> None:
    """Raises OSError where the disk is full or the folder can't be written; the checkpoint before
    stays."""
    state = optimizer.state_dict()
    tensors = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    kept = {
        str(parameter): _kept(values, f"optimizer.{parameter}", tensors)
        for parameter, values in state["state"].items()
    }
    for group, group_accounts in enumerate(accounts):
        for name, array in group_accounts.arrays().items():
            tensors[f"accounts.{group}.{name}"] = torch.from_numpy(array)
    folder = run / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    name = _tensor_file(updates)
    content = save(_apart(tensors))
    write_atomic(folder / name, content)
    document = {
        "step": updates,
        "tensors": name,
        "digest": _digest(content),
        "fingerprint": fingerprint,
        "config": read_trained(run) or _config_now(run),
        "optimizer": kept,
    }
    write_atomic(folder / "state.json", json.dumps(document, indent=1))
    # The second pattern is what a kill in mid-write leaves.
    for old in (*folder.glob("*.safetensors"), *folder.glob(".*.safetensors.*")):
        if old.name != name:
            old.unlink()


def read_state(run: Path) -> tuple[int, str]:
    """How many updates a run's checkpoint has, and the digest of its tensors. Raises InputError
    where there is none."""
    path = run / "checkpoint" / "state.json"
    try:
        document = read_json(path)
        return int(document["step"]), str(document["digest"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"not a checkpoint, {path}") from None


def read_trained(run: Path) -> dict[str, Any] | None:
    """RUN/config.json as it was at the run's first checkpoint; None where there is none, or an
    earlier version wrote it. Raises InputError for a malformed state.json."""
    path = run / "checkpoint" / "state.json"
    if not path.exists():
        return None
    document = read_json(path)
    config = document.get("config") if isinstance(document, dict) else None
    if not isinstance(config, dict | None):
        raise InputError(f"not a checkpoint, {path}")
    return config


def _config_now(run: Path) -> dict[str, Any] | None:
    path = run / "config.json"
    return read_json(path) if path.exists() else None


def read_checkpoint(run: Path) -> Checkpoint:
    """Raises InputError for a checkpoint that is missing, truncated, damaged or malformed."""
    state_file = run / "checkpoint" / "state.json"
    document = read_json(state_file)
    try:
        updates, name, digest = document["step"], document["tensors"], document["digest"]
        fingerprint, kept = str(document["fingerprint"]), dict(document["optimizer"])
        # The name tells them too: one changed by hand would train some updates twice.
        if type(updates) is not int or updates < 1 or name != _tensor_file(updates):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise InputError(f"not a checkpoint, {state_file}") from None
    tensor_file = state_file.parent / name
    with reading(tensor_file):
        content = tensor_file.read_bytes()
    if _digest(content) != digest:
        raise InputError(f"truncated, or not what was written, {tensor_file}")
    return Checkpoint(updates, fingerprint, load(content), kept)


def restore_policy(checkpoint: Checkpoint, policy: Policy, fingerprint: str, where: Path) -> None:
    """Raises InputError where the checkpoint is of another model or another policy."""
    if checkpoint.fingerprint != fingerprint:
        raise InputError(f"the checkpoint was trained on other model weights, {where}")
    saved = _under(checkpoint.tensors, "policy.")
    expected = policy.state_dict()
    wrong = next(
        (
            name
            for name in sorted(saved.keys() | expected.keys())
            if name not in saved
            or name not in expected
            or saved[name].shape != expected[name].shape
        ),
        None,
    )
    if wrong is not None:
        raise InputError(f"the checkpoint does not fit this policy at {wrong!r}, {where}")
    policy.load_state_dict(saved)


def restore_optimizer(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, where: Path
) -> None:
    """Raises InputError where the optimiser's state is malformed, or of another optimiser."""
    try:
        state = {
            int(parameter): _restored(kept, checkpoint.tensors)
            for parameter, kept in checkpoint.optimizer.items()
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        if not state and _under(checkpoint.tensors, "optimizer."):  # an earlier version's form
            raise ValueError
        for parameter, values in optimizer.state.items():
            _check_moments(optimizer, parameter, values)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        raise InputError(f"the checkpoint's optimiser is malformed, {where}") from None


def _check_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, state: Any) -> None:
    """Raises ValueError unless a step finds what it needs: a state that an optimiser of another
    kind wrote, or a hand changed, would fail there in the middle of an update."""
    names = {"exp_avg", "exp_avg_sq"} if isinstance(optimizer, AdamW) else {"state1", "state2"}
    if state.get("state1") is not None and state["state1"].dtype == torch.uint8:
        names |= {"qmap1", "qmap2", "absmax1", "absmax2"}
    if not isinstance(parameter, Tensor) or state.keys() != names | {"step"}:
        raise ValueError
    moments = [state[name] for name in names if not name.startswith(("qmap", "absmax"))]
    if any(moment.shape != parameter.shape for moment in moments):
        raise ValueError


def _kept(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON holds of a nested value. Its tensors go to `tensors`, each by its path; a dict, a
    list and a tuple say which of them they are."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": {name: _kept(v, f"{path}.{name}", tensors) for name, v in value.items()}}
    if isinstance(value, list | tuple):
        parts = [_kept(part, f"{path}.{index}", tensors) for index, part in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": parts}
    return value


def _restored(kept: Any, tensors: dict[str, Tensor]) -> Any:
    """The value of which `_kept` made `kept`. Raises KeyError, TypeError, ValueError or
    AttributeError where it is of another shape."""
    if not isinstance(kept, dict):
        return kept
    ((kind, content),) = kept.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {name: _restored(value, tensors) for name, value in content.items()}
    return {"list": list, "tuple": tuple}[kind](_restored(part, tensors) for part in content)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, whole, and each in memory of its own, as safetensors wants them:
    bitsandbytes' parameters share their maps."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous().cpu()
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def restore_accounts(
    checkpoint: Checkpoint, groups: int, where: Path, kind: type[_Accounts] = Accounts
) -> list[_Accounts]:
    """Raises InputError where an account's array is missing, or is of accounts of another kind."""
    try:
        return [
            kind.from_arrays(
                {
                    name: tensor.numpy().copy()
                    for name, tensor in _under(checkpoint.tensors, f"accounts.{group}.").items()
                }
            )
            for group in range(groups)
        ]
    except ValueError:
        raise InputError(f"the checkpoint's accounts are incomplete, {where}") from None


def _tensor_file(updates: int) -> str:
    return f"{updates:08d}.safetensors"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
