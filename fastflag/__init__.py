"""FastFLAG: teach a language model to trade, on one GPU, by policy gradients.

Importing this package imports neither torch nor numba and touches no device: what is in `api` comes
when it is first asked for.
"""

import importlib
import os

__version__ = "0.1.0"

# Without pathlib, whose import would be half the time in which nothing can answer Ctrl-C.
_root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if os.path.isfile(os.path.join(_root, "setup.py")):
    # In a clone, kernels/ lies beside the package; wheels install it as fastflag.kernels. The bare
    # name `kernels` belongs to Hugging Face's package, so the folder has no __init__.py.
    __path__.append(_root)

_OF_API = (
    "Backtest",
    "Decision",
    "Examination",
    "InputError",
    "MemoryPlan",
    "Metrics",
    "Run",
    "doctor",
    "forget_proofs",
    "load",
    "metrics",
    "open",
    "plan",
    "prove",
    "train",
)


def __getattr__(name: str) -> object:
    if name in _OF_API:
        return getattr(importlib.import_module("fastflag.api"), name)
    raise AttributeError(f"module 'fastflag' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_OF_API]
