"""Numba's compiler, with a cache that is found wherever the package lies and is never stale.

Numba keeps a function's machine code by the time of the file that the function is in; what other
files it was inlined from is not watched. So the code is kept in a folder that is named by a digest
of all files here.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba

from fastflag import caches
from fastflag.files import digest_of_sources

SOURCES = Path(__file__).parent
_NAME = "compiled-"
# Versions that share a cache, and a developer's last edits.
_KEPT_FOLDERS = 3


def kernel(**options: Any) -> Callable[[Callable], Callable]:
    """`numba.njit` of a function, without the interpreter's lock, its machine code kept.

    Without the NumPy error model each division is checked: a quarter slower. Numba reads the
    setting of its cache when a function is decorated, and gets it back as it was.
    """

    def decorate(function: Callable) -> Callable:
        compiled = partial(numba.njit, nogil=True, error_model="numpy", **options)
        set_before = numba.config.CACHE_DIR
        try:
            numba.config.CACHE_DIR = str(folder_of(SOURCES))
            return compiled(cache=True)(function)
        except (OSError, RuntimeError):  # nothing can be kept, as on a full disk
            return compiled()(function)
        finally:
            numba.config.CACHE_DIR = set_before

    return decorate


def folder_of(sources: Path) -> Path:
    """Where the machine code of `sources` is kept. One that is new takes the place of the oldest
    of several."""
    root = caches.numba(sources).folder
    folder = root / f"{_NAME}{digest_of_sources(sources)}"
    if not folder.exists():
        folder.mkdir(parents=True)
        others = sorted(root.glob(f"{_NAME}*"), key=lambda path: path.stat().st_mtime)
        for old in others[:-_KEPT_FOLDERS]:
            shutil.rmtree(old, ignore_errors=True)
    return folder
