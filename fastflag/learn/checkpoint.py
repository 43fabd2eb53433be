"""A training run on disk: RUN/checkpoint/state.json names the one complete safetensors file.

The tensors are written first, under a name of their own, then state.json is replaced: a run killed
at any moment leaves a checkpoint that is whole. state.json holds the tensors' digest, so a damaged
file is refused rather than resumed. Nothing executable is ever loaded.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fastflag.files import InputError, read_json, write_atomic
from fastflag.market.accounts import Accounts
from fastflag.policy.table import Policy


@dataclass(frozen=True)
class Checkpoint:
    step: int  # updates done
    fingerprint: str  # of the model's weights
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]  # what of the optimiser's state is no tensor


def write_checkpoint(
    run: Path,
    step: int,
    fingerprint: str,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    accounts: list[Accounts],
) -> None:
    """Raises OSError where the disk is full or the folder can't be written; the checkpoint before
    stays."""
    state = optimizer.state_dict()
    tensors = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{parameter}.{name}"] = value
            else:
                scalars.setdefault(str(parameter), {})[name] = value
    for group, group_accounts in enumerate(accounts):
        for name, array in group_accounts.arrays().items():
            tensors[f"accounts.{group}.{name}"] = torch.from_numpy(array)
    folder = run / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    name = _tensor_file(step)
    content = save({key: value.contiguous().cpu() for key, value in tensors.items()})
    write_atomic(folder / name, content)
    document = {
        "step": step,
        "tensors": name,
        "digest": _digest(content),
        "fingerprint": fingerprint,
        "optimizer": scalars,
    }
    write_atomic(folder / "state.json", json.dumps(document, indent=1))
    # The second pattern is what a kill in mid-write leaves.
    for old in (*folder.glob("*.safetensors"), *folder.glob(".*.safetensors.*")):
        if old.name != name:
            old.unlink()


def read_checkpoint(run: Path) -> Checkpoint:
    """Raises InputError for a checkpoint that is missing, truncated, damaged or malformed."""
    state_file = run / "checkpoint" / "state.json"
    document = read_json(state_file)
    try:
        step, name, digest = document["step"], document["tensors"], document["digest"]
        fingerprint, scalars = str(document["fingerprint"]), dict(document["optimizer"])
        # The name tells the step too: one changed by hand would train some updates twice.
        if type(step) is not int or step < 1 or name != _tensor_file(step):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise InputError(f"not a checkpoint, {state_file}") from None
    tensor_file = state_file.parent / name
    try:
        content = tensor_file.read_bytes()
    except OSError as error:
        raise InputError(f"{error.strerror}, {tensor_file}") from None
    if _digest(content) != digest:
        raise InputError(f"truncated, or not what was written, {tensor_file}")
    return Checkpoint(step, fingerprint, load(content), scalars)


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
    """Raises InputError where the optimiser's state is malformed."""
    try:
        _load_optimizer(checkpoint, optimizer)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"the checkpoint's optimiser is malformed, {where}") from None


def _load_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state_dict()
    restored: dict[int, dict[str, Any]] = {}
    for key, tensor in _under(checkpoint.tensors, "optimizer.").items():
        parameter, name = key.split(".", 1)
        restored.setdefault(int(parameter), {})[name] = tensor
    for parameter, values in checkpoint.optimizer.items():
        restored.setdefault(int(parameter), {}).update(values)
    optimizer.load_state_dict({"state": restored, "param_groups": state["param_groups"]})


def restore_accounts(checkpoint: Checkpoint, groups: int, where: Path) -> list[Accounts]:
    """Raises InputError where an account's array is missing."""
    try:
        return [
            Accounts.from_arrays(
                {
                    name: tensor.numpy().copy()
                    for name, tensor in _under(checkpoint.tensors, f"accounts.{group}.").items()
                }
            )
            for group in range(groups)
        ]
    except ValueError:
        raise InputError(f"the checkpoint's accounts are incomplete, {where}") from None


def _tensor_file(step: int) -> str:
    return f"{step:08d}.safetensors"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
