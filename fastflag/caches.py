"""Where caches lie: each library's own folder, or a temporary one where that can't be written.

An account without a home (a container's, a batch system's) and a read-only installation work, at
the price of making anew what a temporary folder loses.
"""

import atexit
import getpass
import os
import shutil
import stat
import tempfile
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Place:
    folder: Path
    stands_in: bool = False
    """For another one that can't be written."""

    def __str__(self) -> str:
        temporary = self.folder.is_relative_to(tempfile.gettempdir())
        return f"{self.folder} ({'temporary' if temporary else 'kept'})"


def own(name: str) -> Place:
    """Ours of that name, under the user's cache folder (XDG Base Directory specification)."""
    return _first(name, _user_folder() / "fastflag" / name)


def numba(source: Path) -> Place:
    """Of the kernels in the folder `source`: NUMBA_CACHE_DIR, beside the sources as Numba has it,
    or ours."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    places = [Path(named)] if named else []
    return _first("numba", *places, source / "__pycache__", _user_folder() / "fastflag" / "numba")


def of_libraries() -> dict[str, Place]:
    """Those of libraries, by the environment variable that would name another."""
    triton = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    hub = _user_folder() / "huggingface"
    defaults = {
        "TRITON_CACHE_DIR": ("triton", Path(triton, ".triton", "cache")),
        "TORCHINDUCTOR_CACHE_DIR": ("torch", _inductor_folder()),
        "HF_HOME": ("huggingface", hub),
    }
    places = {}
    for variable, (name, default) in defaults.items():
        named = os.environ.get(variable)
        places[variable] = Place(Path(named)) if named else _first(name, default)
    # What somebody else has fetched can be read all the same.
    if places["HF_HOME"].stands_in and hub.is_absolute() and os.path.isdir(hub):
        places["HF_HOME"] = Place(hub)
    return places


def settle(environment: MutableMapping[str, str]) -> None:
    """Names a temporary folder to the libraries whose own can't be written: most would raise, or
    make a folder called ~ in the current one."""
    for variable, place in of_libraries().items():
        if place.stands_in:
            environment.setdefault(variable, str(place.folder))


def _first(name: str, *folders: Path) -> Place:
    """The first folder that can be written, or a temporary one."""
    for folder in folders:
        if folder.is_absolute() and _can_be_written(folder):
            return Place(folder)
    return Place(_temporary_root() / name, stands_in=True)


def _can_be_written(folder: Path) -> bool:
    """Whether files can be made in it, which need not be there yet."""
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def _user_folder() -> Path:
    """Relative, and so no folder to be used, where the user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))


def _inductor_folder() -> Path:
    """Relative, and so no folder to be used, where the user has no name."""
    try:
        return Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    except (KeyError, OSError):  # OSError from Python 3.13 on
        return Path()


@cache
def _temporary_root() -> Path:
    """One folder a user, for all of their processes. Machine code is read from it: where somebody
    else could have put some there, it is a new one, for this process alone."""
    root = Path(tempfile.gettempdir(), f"fastflag-{os.getuid()}")
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        state = root.lstat()
        if (state.st_uid, stat.S_IMODE(state.st_mode) & 0o022) == (os.getuid(), 0):
            return root
    except OSError:
        pass
    root = Path(tempfile.mkdtemp(prefix=f"fastflag-{os.getuid()}-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root
