"""Where caches lie for users with and without a home, and that nothing ends for want of one."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numba
import pytest
from commands import ROOT

from fastflag import caches
from fastflag.market.compiled import kernel as kernels_module

VARIABLES = (
    "HOME XDG_CACHE_HOME NUMBA_CACHE_DIR TRITON_HOME TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR "
    "HF_HOME LOGNAME USER LNAME USERNAME"
)
SOURCES = kernels_module.SOURCES


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without a name or a home; their temporary folder."""
    for name in VARIABLES.split():
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    forget = caches._temporary_root.cache_clear
    forget()
    yield tmp_path / f"fastflag-{os.getuid()}"
    forget()


@pytest.fixture
def read_only(monkeypatch):
    """No folder but temporary ones can be written, whoever runs the tests."""
    access = os.access

    def only_temporary(path, mode):
        return access(path, mode) and Path(path).is_relative_to(tempfile.gettempdir())

    monkeypatch.setattr(os, "access", only_temporary)


def test_with_a_home_each_has_its_own_folder(nobody, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "ann")
    assert caches.own("trunk") == caches.Place(home / ".cache/fastflag/trunk")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert caches.own("trunk") == caches.Place(tmp_path / "xdg/fastflag/trunk")
    assert caches.of_libraries() == {
        "TRITON_CACHE_DIR": caches.Place(home / ".triton/cache"),
        "TORCHINDUCTOR_CACHE_DIR": caches.Place(tmp_path / "torchinductor_ann"),
        "HF_HOME": caches.Place(tmp_path / "xdg/huggingface"),
    }
    environment = {}
    caches.settle(environment)
    assert environment == {}
    assert [*home.iterdir()] == []


def test_without_one_they_share_a_folder_of_the_users(nobody, read_only):
    assert caches.own("trunk") == caches.Place(nobody / "trunk", stands_in=True)
    assert caches.numba(SOURCES) == caches.Place(nobody / "numba", stands_in=True)
    environment = {"HF_HOME": "/mine"}
    caches.settle(environment)
    assert environment == {
        "HF_HOME": "/mine",
        "TRITON_CACHE_DIR": str(nobody / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(nobody / "torch"),
    }
    assert nobody.stat().st_mode & 0o777 == 0o700
    assert str(caches.own("trunk")).endswith("/trunk (temporary)")


def test_a_hub_cache_that_can_only_be_read_is_read(nobody, read_only, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(ROOT))
    assert caches.of_libraries()["HF_HOME"].stands_in
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    monkeypatch.setattr(os.path, "isdir", lambda path: str(path) == "/proc/huggingface")
    assert caches.of_libraries()["HF_HOME"] == caches.Place(Path("/proc/huggingface"))


def test_a_folder_that_somebody_else_could_fill_is_not_used(nobody, read_only):
    """Machine code would be read from it."""
    nobody.mkdir()
    nobody.chmod(0o777)
    folder = caches.own("trunk").folder
    assert folder.parent != nobody and folder.parent.stat().st_mode & 0o777 == 0o700
    caches._temporary_root.cache_clear()
    nobody.rmdir()
    nobody.symlink_to(folder.parent)
    assert caches.own("trunk").folder.parent not in (nobody, folder.parent)


def test_numbas_folder_is_the_users_before_ours(nobody, read_only, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "mine"))
    assert caches.numba(SOURCES) == caches.Place(tmp_path / "mine")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/proc/none")
    assert caches.numba(SOURCES).folder == nobody / "numba"


def doubled(x):
    return 2 * x


@pytest.mark.parametrize("read", [False, True])
def test_machine_code_is_kept_and_found_again(nobody, read_only, read):
    before = numba.config.CACHE_DIR
    kernels = [kernels_module.kernel()(doubled) for _ in range(1 + read)]
    assert [kernel(4) for kernel in kernels] == [8] * len(kernels)
    assert before == numba.config.CACHE_DIR
    assert list(nobody.rglob("*.nbi")) and "NUMBA_CACHE_DIR" not in os.environ
    assert not read or sum(kernels[1].stats.cache_hits.values()) == 1


def test_an_edit_of_a_constant_is_seen_in_the_files_that_read_it(tmp_path):
    """Numba itself watches the file that a function is in alone."""
    tree, cache = tmp_path / "tree", tmp_path / "cache"
    shutil.copytree(ROOT / "fastflag", tree / "fastflag")
    constants = tree / "fastflag/market/compiled/constants.py"
    code = (
        "import numpy as np\n"
        "from fastflag.market.compiled.codes import code_nb\n"
        "print(int(code_nb(1.0, 100.0, np.int64(0), 110.0, np.int64(0))))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tree), "NUMBA_CACHE_DIR": str(cache)}
    told = []
    for step in ("0.005", "0.005", "0.05"):
        source = constants.read_text().replace("PROFIT_STEP = 0.005", f"PROFIT_STEP = {step}")
        constants.write_text(source)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        told.append((int(done.stdout), len([*cache.iterdir()])))
    # A profit of a tenth: 20 steps of 0.005, or 2 of 0.05; a step is 8 codes of days held.
    row = 1 + 8 * (81 + 40)
    assert told == [(row + 8 * 20, 1), (row + 8 * 20, 1), (row + 8 * 2, 2)]


def test_old_machine_code_is_trimmed(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    sources, made = tmp_path / "sources", []
    sources.mkdir()
    for number in range(5):
        (sources / "a.py").write_text(f"A = {number}")
        made.append(kernels_module.folder_of(sources))
        os.utime(made[-1], (number, number))
    assert [folder.exists() for folder in made] == [False, False, True, True, True]


def test_without_any_folder_it_is_compiled_each_time(nobody, read_only, monkeypatch):
    def no_folder():
        raise FileNotFoundError("No usable temporary directory")

    monkeypatch.setattr(caches, "_temporary_root", no_folder)
    assert kernels_module.kernel()(doubled)(4) == 8


def open_to_all(path):
    return all(place.stat().st_mode & 0o005 == 0o005 for place in (path, *path.parents))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(
    not all(open_to_all(Path(module.__file__).parent) for module in (os, numba, caches)),
    reason="another user can't read Python or the package",
)
def test_an_unknown_user_of_a_read_only_installation():
    """In processes of its own, which can't write where this one can."""
    code = (
        "import os\n"
        "from fastflag.cli import main\n"
        "os.setgroups([]); os.setgid(54321); os.setuid(54321)\n"
        "import fastflag.market.tasks.single\n"
        "main(['metrics', '--json'])\n"
        "import torch._inductor.runtime.cache_dir_utils as inductor\n"
        "print(inductor.cache_dir())\n"
        "main(['doctor'])\n"
    )
    environment = {name: v for name, v in os.environ.items() if name not in VARIABLES.split()}
    with tempfile.TemporaryDirectory() as place:
        cwd, temporary = Path(place, "cwd"), Path(place, "temporary")
        cwd.mkdir(), temporary.mkdir()
        os.chmod(place, 0o755), cwd.chmod(0o755), temporary.chmod(0o1777)
        folder = temporary / "fastflag-54321"
        environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
        for home in ({}, {"HOME": "/nonexistent"}):
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=cwd,
                env=environment | home,
                capture_output=True,
                text=True,
            )
            assert (done.returncode, done.stderr) == (0, "")
            told = done.stdout.splitlines()
            assert told[1] == f"{folder}/torch"
            assert f"  {'frozen activations':<24}{folder}/trunk (temporary)" in told
            assert f"  {'numba':<24}{folder}/numba (temporary)" in told
            assert os.listdir(cwd) == []
        assert list(folder.rglob("*.nbi"))
