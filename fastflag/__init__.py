"""FastFLAG: teach a language model to trade, on one GPU, by policy gradients.

Importing this package imports neither torch nor numba and touches no device.
"""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file():
    # In a clone, kernels/ lies beside the package; wheels install it as fastflag.kernels. The bare
    # name `kernels` belongs to Hugging Face's package, so the folder has no __init__.py.
    __path__.append(str(_root))
