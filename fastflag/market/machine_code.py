"""Numba's compiler, with a cache that is found wherever the package lies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from fastflag import caches


def kernel(**options: Any) -> Callable[[Callable], Callable]:
    """`numba.njit(**options)` of a function, its machine code kept as `caches.numba` says.

    Numba would refuse to compile where it can write neither beside the source nor in the user's
    cache folder. It reads its setting when a function is decorated, and gets it back as it was.
    """

    def decorate(function: Callable) -> Callable:
        sources = Path(function.__code__.co_filename).parent
        set_before = numba.config.CACHE_DIR
        try:
            folder = caches.numba(sources).folder
            if folder != sources / "__pycache__":
                numba.config.CACHE_DIR = str(folder)
            return numba.njit(cache=True, **options)(function)
        except (OSError, RuntimeError):  # nothing can be kept, as on a full disk
            return numba.njit(**options)(function)
        finally:
            numba.config.CACHE_DIR = set_before

    return decorate
