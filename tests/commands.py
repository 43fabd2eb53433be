"""Command lines to test: a finished run to ask, refusals to read, processes of their own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastflag import cli
from fastflag.config import TrainConfig, to_dict

ROOT = Path(__file__).resolve().parents[1]
FULL_DISK = "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), {})"
NO_SPACE = "No space left on device, standard output"


@pytest.fixture(scope="module")
def bars(tmp_path_factory) -> Path:
    """A small market's CSV, with news beside it."""
    from small import small_market, write_csv

    return write_csv(small_market(), tmp_path_factory.mktemp("market") / "bars.csv")


@pytest.fixture(scope="module")
def config(bars, tiny_model) -> TrainConfig:
    from small import small_config

    return small_config(tiny_model, data__data=f"csv:{bars}")


@pytest.fixture(scope="module")
def config_file(config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    return path


@pytest.fixture(scope="module")
def trained(config_file, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    cli.main(["train", "--out", str(out), "--config", str(config_file)])
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs a command line that must be refused, and returns what it says without its beginning."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return the_refusal(stop.value.code, printed.out, printed.err)

    return call


def the_refusal(code: int, out: str, error: str) -> str:
    assert (code, out) == (2, ""), error
    assert error.startswith("fastflag: error: ") and error.count("\n") == 1, error
    assert "Traceback" not in error
    return error.removeprefix("fastflag: error: ").rstrip("\n")


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Inside, no file of the folder is written, made or taken away."""

    def content() -> dict[str, bytes | None]:
        paths = sorted(folder.rglob("*"))
        return {str(path): path.read_bytes() if path.is_file() else None for path in paths}

    before = content()
    yield
    assert content().keys() == before.keys()
    assert content() == before


def command(*arguments: object, cwd: Path, prepare: str = "") -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, after the statements of `prepare`."""
    words = [str(argument) for argument in arguments]
    code = f"{prepare}\nfrom fastflag.cli import main\nmain({words})"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
