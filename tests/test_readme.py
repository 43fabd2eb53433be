"""What the README shows of Python does what it says, as it stands there: as a script and in a
notebook. The model alone is another one, which trains in seconds.
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from commands import ROOT
from nbclient import NotebookClient
from small import small_market, write_csv

from fastflag.cli.arguments import command_of
from fastflag.config import DataConfig
from fastflag.market.several import load

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where bars.csv lies, and programs start; they find the package."""
    path = write_csv(small_market(), tmp_path / "bars.csv")
    path.with_suffix(".news.csv").unlink()
    bars = pd.read_csv(path)
    dates = pd.bdate_range(end="2020-12-31", periods=len(bars) * 4).strftime("%Y-%m-%d")
    pd.concat([bars] * 4).assign(date=dates).to_csv(path, index=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def shown_blocks() -> list[str]:
    """Of Python: what trains, and what steps environments."""
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def shown_code(model: Path) -> str:
    code, _ = shown_blocks()
    assert len(code.split("\n\n")[1].splitlines()) <= 10
    called = 'ff.train("runs/python", '
    assert code.count(called) == 1
    return code.replace(called, f"{called}model={str(model)!r}, ")


def test_the_lines_of_python_as_a_script(folder, tiny_model):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", shown_code(tiny_model)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = done.stdout
    assert "'cr':" in printed and "entropy" in printed and "buy_and_hold" in printed
    assert re.search(r"\{'Sell': 0\.0, 'Hold': 0\.\d+, 'Buy': 0\.\d+\}\n$", printed)
    assert (folder / "runs" / "python" / "report.html").exists()


def test_the_lines_of_gymnasium(folder):
    _, code = shown_blocks()
    assert len(code.split("\n\n")[1].splitlines()) <= 6
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\(1024, 79\) 100000\.0\n", done.stdout)


def test_the_lines_of_python_in_a_notebook(folder, tiny_model):
    cell = nbformat.v4.new_code_cell(shown_code(tiny_model))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute()
    last = notebook.cells[0].outputs[-1]
    assert last.output_type == "execute_result"
    assert last.data["text/html"].startswith("<iframe ") and "Backtest" in last.data["text/html"]


def test_its_commands_are_commands(tmp_path, monkeypatch):
    """Each line that starts with `fastflag`, and each source of made-up bars."""
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^    fastflag (.+)$", README, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        assert command_of(line.split()) is not None
    written = README + "".join(
        (ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "RESULTS.md")
    )
    for source in {*re.findall(r"planted:[\w=,.]*", written)}:
        several = "all" if "symbols=" in source else ""
        assert len(load(DataConfig(data=source, symbols=several)).dates) >= 2


def test_the_rooms_are_there():
    """Every folder and file that the README's table of rooms names, and no room is left out."""
    table = README.partition("## Where is what")[2].partition("## Where it stands")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+\?) \| (.*) \|$", table, re.MULTILINE)
    rooms = {room.rstrip("/") for room, _, _ in rows}
    packages = {p.parent.relative_to(ROOT).as_posix() for p in ROOT.glob("fastflag/**/__init__.py")}
    assert rooms >= packages - {"fastflag"} | {"kernels", "bench", "tests"}
    for room, _, examples in rows:
        assert (ROOT / room).exists()
        for name in re.findall(r"`([\w/]+\.py)`", examples):
            places = [ROOT / room / name, ROOT / "fastflag/market" / name, ROOT / "fastflag" / name]
            assert any(place.is_file() for place in places), name


def test_every_file_is_in_the_tree():
    """CONTRIBUTING names each module where it lists the files."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.partition("## The house")[2].partition("`market`, `prompt` and `gym` import")[0]
    named = {*re.findall(r"\w+", tree)}
    for folder in ("fastflag", "bench/measure", "bench/rivals"):
        stems = {path.stem for path in (ROOT / folder).rglob("*.py")}
        assert {stem for stem in stems if not stem.startswith("__")} <= named


def test_shapes_mean_what_the_readme_says():
    """A docstring's "Shapes:" names its capitals by a noun of the README's; N is anything."""
    _, _, told = README.partition("Shapes in docstrings: ")
    told = " ".join(told.partition("\n\n")[0].split())
    meanings: dict[str, str] = {}
    for letter, words in re.findall(r"\b([A-Z]) (.*?)(?=[,.] (?:In |[A-Z] )|\.$)", told):
        meanings[letter] = f"{meanings.get(letter, '')} {words}"
    assert meanings.keys() >= set("ABCDEFGHKMNPQRSTUVW")
    wrong = []
    for path in (ROOT / "fastflag").rglob("*.py"):
        lines = re.search(r"^Shapes: (.*?)\.\s", path.read_text(), re.MULTILINE | re.DOTALL)
        for letter, words in re.findall(r"\b([A-Z]) ([a-z/ ]+)", lines[1] if lines else ""):
            nouns = words.split(" of ")[0].split(" that ")[0].split()
            if letter != "N" and not any(noun in meanings.get(letter, "") for noun in nouns):
                wrong.append(f"{path.name}: {letter} {words}")
    assert not wrong
