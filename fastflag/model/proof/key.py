"""What a verdict holds for. Where any of it is another, there is no verdict: a driver, a library or
a kernel's source that changed may have changed numbers and times."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastflag.config import PolicyConfig
from fastflag.files import digest_of_sources
from fastflag.model import ops
from fastflag.model.model_config import ModelConfig
from fastflag.model.proof.gpu import Gpu

_FLASH = ("flash_attn", "flash_attn_3", "flash_attn_4")  # packages of model/flash.py's functions
# Variables that change what Triton compiles, or by what; where it keeps it changes nothing.
_TRITON = "TRITON_"
_PLACES = ("TRITON_HOME", "TRITON_CACHE_DIR", "TRITON_DUMP_DIR", "TRITON_OVERRIDE_DIR")


_PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Subject:
    """What is proved: a model's shapes, and how it is computed. Never how many rows there are: an
    implementation chosen by rows would make a row's bits depend on its batch."""

    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    attention_bias: bool
    actions: int
    dtype: str
    """bf16, fp16 or fp32."""
    trunk_weights: str
    adaptation: str
    lora_rank: int
    top_layers: int

    @staticmethod
    def of(model: ModelConfig, policy: PolicyConfig, dtype: str, actions: int) -> "Subject":
        shapes = ("width", "mlp_width", "heads", "kv_heads", "head_dim", "qk_norm")
        settings = ("trunk_weights", "adaptation", "lora_rank", "top_layers")
        return Subject(
            **{name: getattr(model, name) for name in (*shapes, "attention_bias")},
            **{name: getattr(policy, name) for name in settings},
            dtype=dtype,
            actions=actions,
        )


@dataclass(frozen=True)
class Surroundings:
    """What it is computed by."""

    gpu: str
    capability: str
    multiprocessors: int
    memory: int
    driver: str
    torch: str
    cuda: str
    cudnn: str
    triton: str
    ptxas: str
    flash_attn: str
    bitsandbytes: str
    kernels: str
    """Digest of kernels/."""
    model: str
    """Digest of fastflag/model/: PyTorch's side of each comparison, and the judge."""
    update: str
    """Digests of fastflag/policy/ and learn/: what graphs hold."""
    flags: str

    @staticmethod
    def of(gpu: Gpu) -> "Surroundings":
        """Those of this process."""
        return Surroundings(
            gpu=gpu.name,
            capability=gpu.capability,
            multiprocessors=gpu.multiprocessors,
            memory=gpu.memory,
            driver=gpu.driver,
            torch=f"{torch.__version__} {torch.version.git_version}",
            cuda=str(torch.version.cuda),
            cudnn=str(torch.backends.cudnn.version()),
            triton=_version("triton"),
            ptxas=_ptxas(gpu.capability),
            flash_attn=" ".join(map(_version, _FLASH)),
            bitsandbytes=_version("bitsandbytes"),
            kernels=digest_of_sources(ops.KERNELS),
            model=digest_of_sources(Path(ops.__file__).parent),
            update=" ".join(digest_of_sources(_PACKAGE / room) for room in ("policy", "learn")),
            flags=json.dumps(_flags(), sort_keys=True),
        )


def key(op: str, subject: Subject, surroundings: Surroundings) -> str:
    """A name, 24 hex digits, for all that a verdict holds for."""
    document = json.dumps([op, facts(subject, surroundings)], sort_keys=True)
    return hashlib.blake2b(document.encode(), digest_size=12).hexdigest()


def facts(subject: Subject, surroundings: Surroundings) -> dict[str, Any]:
    """By name, as a verdict's file keeps them."""
    return dataclasses.asdict(subject) | dataclasses.asdict(surroundings)


def _flags() -> dict[str, Any]:
    """What else changes the numbers: of PyTorch's products, and Triton's variables."""
    products = torch.backends.cuda.matmul
    names = (
        "allow_tf32",
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    )
    own = {name: getattr(products, name) for name in names}
    return {
        **own,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **{
            name: value
            for name, value in os.environ.items()
            if name.startswith(_TRITON) and name not in _PLACES
        },
    }


def _ptxas(capability: str) -> str:
    """The assembler that Triton takes for the GPU, by path and version."""
    found = ops.assembler(round(10 * float(capability)))
    return f"{found.version} {found.path}" if found else "none"


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
