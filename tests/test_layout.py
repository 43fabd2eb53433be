"""The house rules that a machine can check: who may import what, what an import may do, and how
long a file may be."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = (
    "files",
    "caches",
    "config",
    "market",
    "prompt",
    "model",
    "gym",
    "policy",
    "learn",
    "evaluate",
    "study",
    "live",
    "api",
    "cli",
    "__main__",
)
TO_COME = {"study", "live"}
# Rooms of one level.
SIBLINGS = ({"model", "gym"}, {"study", "live"})
KERNELS = "fastflag.kernels"
# Kernels without a caller, and who will call them.
WAITING = {"fastflag.kernels.logprob": "the writing agent"}
# What the policy may know of prompts.
_OF_POLICY = ("prompts", "tokens", "gguf_header")
_OF_CLI = ("cli", "api", "config", "files", "caches")


def modules(*folders: str) -> dict[str, str]:
    """Each module's name and source; without `folders`, of the package's own."""
    names = {}
    for folder in folders or ("fastflag", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = ("fastflag", *parts) if folder == "kernels" else parts
            names[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return names


def imports(source: str, known: set[str]) -> Iterator[str]:
    """What a source imports, wherever in it; `from package import module` counts as the module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                module = f"{base}.{alias.name}"
                yield module if module in known else base


def broken_rules(sources: dict[str, str]) -> list[str]:
    """One line for each import that the design forbids, and each kernel that nothing imports."""
    known = {*sources, KERNELS}
    graph = {name: sorted(set(imports(source, known))) for name, source in sources.items()}
    wrong = []
    for module, imported in graph.items():
        for other in imported:
            if reason := _forbidden(module, other):
                wrong.append(f"{module} imports {other}: {reason}")
    called = {other for module in graph for other in graph[module] if other != module}
    kernels = {module for module in graph if module.startswith(f"{KERNELS}.")}
    wrong += [f"{kernel} has no caller" for kernel in sorted(kernels - called - {*WAITING})]
    wrong += [f"{kernel} has a caller: not WAITING" for kernel in sorted(called & {*WAITING})]
    try:
        ours = {m: [o for o in others if o in sources] for m, others in graph.items()}
        tuple(TopologicalSorter(ours).static_order())
    except CycleError as error:
        wrong.append(f"cycle: {' -> '.join(error.args[1])}")
    return wrong


def _forbidden(module: str, other: str) -> str:
    """Why `module` may not import `other`; empty where it may."""
    root = other.partition(".")[0]
    if root in ("", "tests", "bench", "kernels"):
        return "not by this name" if root in ("", "kernels") else "no part of the package"
    if root != "fastflag":
        no_torch = module.startswith("fastflag.gym") and root in ("torch", "triton")
        return "gym needs no torch" if no_torch else ""
    if module == "fastflag":
        return "the package itself imports nothing of its own"
    if module.startswith(KERNELS):
        return "" if other.startswith(KERNELS) else "kernels know nothing of fastflag"
    if other.startswith(KERNELS):
        return "" if module == "fastflag.model.ops" else "only model/ops.py chooses kernels"
    if module.startswith("fastflag.market.compiled"):
        of_kernel = module.endswith(".kernel") and other in ("fastflag.caches", "fastflag.files")
        inside = other.startswith("fastflag.market.compiled")
        return (
            "" if inside or of_kernel or other == "fastflag" else "compiled/ is complete in itself"
        )
    if other.startswith("fastflag.api") and _room(module) not in ("api", "cli"):
        return "only cli imports api"
    if _room(module) == "cli" and other != "fastflag" and _room(other) not in _OF_CLI:
        return "cli is written on api"
    if other != "fastflag" and _room(other) != _room(module):
        if any({_room(module), _room(other)} == siblings for siblings in SIBLINGS):
            return "siblings know nothing of each other"
        if LEVELS.index(_room(other)) > LEVELS.index(_room(module)):
            return "imports go down the levels only"
    if module.startswith(("fastflag.model.", "fastflag.policy.")):
        if other.startswith("fastflag.market"):
            return "the policy knows nothing of markets"
        if module.startswith("fastflag.model.") and other == "fastflag.prompt.prompts":
            return "the model knows nothing of prompts"
        if other.startswith("fastflag.prompt.") and other.split(".")[2] not in _OF_POLICY:
            return "the policy knows no more of prompts than their tokens"
    return ""


def _room(module: str) -> str:
    return module.split(".")[1]


def broken_bench_rules(sources: dict[str, str]) -> list[str]:
    """One line for each import that bench/ is not to have, of its modules' `sources` by name."""
    tests = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"tests"}
    rooms, wrong = {module.rpartition(".")[0] for module in sources}, []
    for module, source in sources.items():
        room = module.rpartition(".")[0]
        for other in sorted(set(imports(source, {*sources}))):
            if other.partition(".")[0] in tests:
                wrong.append(f"{module} imports {other}: no test is part of a measurement")
            elif room == "bench.measure" and other.startswith("bench.rivals"):
                wrong.append(f"{module} imports {other}: what measures knows no rival")
            elif room != "bench" and other.rpartition(".")[0] == "bench" and other not in rooms:
                wrong.append(f"{module} imports {other}: commands import, and are not imported")
    return wrong


def run(code: str, *paths: Path, cwd: Path, **variables: str) -> str:
    """What Python prints for `code`, with `paths` as its PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), **variables}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_follow_the_design():
    sources = modules()
    rooms = {name.split(".")[1] for name in sources if "." in name}
    assert rooms | TO_COME == {*LEVELS, "kernels"}
    assert broken_rules(sources) == []


@pytest.mark.parametrize(
    ("module", "statement", "told"),
    [
        ("fastflag.config", "from fastflag.market import bars", "down the levels"),
        ("fastflag.files", "import fastflag.config", "down the levels"),
        ("fastflag.market.bars", "def f():\n    from fastflag.learn.train import train", "down"),
        ("fastflag.market.compiled.codes", "from fastflag.files import InputError", "complete"),
        ("fastflag.policy.table", "from fastflag.market.bars import Market", "nothing of markets"),
        ("fastflag.policy.table", "from fastflag.prompt.prompter import Prompter", "tokens"),
        ("fastflag.policy.table", "from fastflag.kernels.rmsnorm import rms_norm", "ops.py"),
        ("fastflag.model.llama", "from fastflag import kernels", "ops.py"),
        ("fastflag.model.llama", "from fastflag.prompt.prompts import PromptSet", "of prompts"),
        ("fastflag.model.llama", "from fastflag.gym.env import Env", "each other"),
        ("fastflag.model.ops", "import kernels.rmsnorm", "not by this name"),
        ("fastflag.model.ops", "from fastflag.kernels import logprob", "not WAITING"),
        ("fastflag.kernels.sort", "", "no caller"),
        ("fastflag.gym.env", "import torch", "no torch"),
        ("fastflag.gym.env", "from fastflag.model.llama import suffix_pass", "each other"),
        ("fastflag.policy.trunk", "from fastflag.study.grid import jobs", "down the levels"),
        ("fastflag.study.grid", "from fastflag.live.loop import decide", "each other"),
        ("fastflag.live.loop", "from fastflag.study.grid import jobs", "each other"),
        ("fastflag.live.loop", "from fastflag.api import Run", "only cli"),
        ("fastflag.__main__", "from fastflag.api import Run", "only cli"),
        ("fastflag.api", "from fastflag.cli import main", "down the levels"),
        ("fastflag.cli.commands", "from fastflag.learn.train import train", "written on api"),
        ("fastflag.kernels.rmsnorm", "from fastflag.files import InputError", "know nothing"),
        ("fastflag.learn.train", "from . import update", "not by this name"),
        ("fastflag.learn.train", "import bench.train", "no part"),
        ("fastflag.evaluate.report", "from tests import oracles", "no part"),
        ("fastflag.learn.advantage", "from fastflag.learn import train", "cycle"),
        ("fastflag", "from fastflag.config import PRESETS", "imports nothing"),
    ],
)
def test_a_broken_rule_is_told(module, statement, told):
    sources = modules()
    sources |= {"fastflag.kernels.rmsnorm": sources.get("fastflag.kernels.rmsnorm", "")}
    sources["fastflag.learn.train"] += "\nimport fastflag.learn.advantage\n"
    assert broken_rules(sources) == []
    sources[module] = sources.get(module, "") + f"\n{statement}\n"
    assert [line for line in broken_rules(sources) if told in line]


def test_bench_measures_without_its_rivals_and_the_tests():
    sources = modules("bench")
    assert {"bench.measure.roofline", "bench.rivals.ops", "bench.train"} <= {*sources}
    assert broken_bench_rules(sources) == []


@pytest.mark.parametrize(
    ("module", "statement", "told"),
    [
        ("bench.learn", "from tests.oracles import splitmix", "no test"),
        ("bench.rivals.ops", "def f():\n    import oracles", "no test"),
        ("bench.measure.roofline", "from bench.rivals.ops import adapted", "no rival"),
        ("bench.measure.roofline", "from bench import rivals", "no rival"),
        ("bench.measure.loop", "from bench.train import main", "are not imported"),
        ("bench.rivals.layer", "from bench import kernels", "are not imported"),
    ],
)
def test_a_broken_rule_of_bench_is_told(module, statement, told):
    sources = modules("bench")
    sources[module] += f"\n{statement}\n"
    assert [line for line in broken_bench_rules(sources) if told in line]


def test_no_file_is_a_drawer_for_everything():
    names = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert not names & {"utils", "util", "helpers", "common", "misc"}
    assert not (ROOT / "kernels" / "__init__.py").exists()


# Lines of a file by its folder, and of a class.
FILE_LIMITS = {"fastflag": 350, "bench": 350, "kernels": 450}
CLASS_LIMIT = 250
# Those that are longer today, and how long they may be. These lists only shrink.
LONG_FILES: dict[str, int] = {}
LONG_CLASSES: dict[str, int] = {}


def lines_of_files(folder: str) -> dict[str, int]:
    paths = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".html", ".css", ".js")]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    return {name: len(text.splitlines()) for name, text in texts.items()}


def lines_of_classes(folder: str) -> dict[str, int]:
    return {
        f"{path.relative_to(ROOT).as_posix()} {node.name}": node.end_lineno - node.lineno + 1
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }


def too_long(sizes: dict[str, int], limit: int, exceptions: dict[str, int]) -> list[str]:
    """One line for each name that is longer than it may be, and each exception that is none."""
    allowed = dict.fromkeys(sizes, limit) | exceptions
    wrong = [
        f"{name}: {lines} lines, not {allowed[name]}"
        for name, lines in sizes.items()
        if lines > allowed[name]
    ]
    return wrong + [f"{name}: no exception" for name in exceptions if sizes.get(name, 0) <= limit]


@pytest.mark.parametrize("folder", FILE_LIMITS)
def test_files_and_classes_are_short(folder):
    def here(exceptions: dict[str, int]) -> dict[str, int]:
        return {name: n for name, n in exceptions.items() if name.startswith(f"{folder}/")}

    assert too_long(lines_of_files(folder), FILE_LIMITS[folder], here(LONG_FILES)) == []
    assert too_long(lines_of_classes(folder), CLASS_LIMIT, here(LONG_CLASSES)) == []


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ({"a": 350, "long": 400}, []),
        ({"a": 350, "long": 351}, []),
        ({"a": 351, "long": 400}, ["a: 351 lines, not 350"]),
        ({"a": 350, "long": 401}, ["long: 401 lines, not 400"]),
        ({"a": 350, "long": 350}, ["long: no exception"]),
        ({"a": 350}, ["long: no exception"]),
    ],
)
def test_what_is_too_long_is_told(lines, told):
    assert too_long(lines, 350, {"long": 400}) == told


def test_market_prompt_and_gym_import_no_torch():
    rooms = ("fastflag.market", "fastflag.prompt", "fastflag.gym")
    names = [name for name in modules() if name.startswith(rooms)]
    assert _loaded(f"import {', '.join(names)}", ("torch", "triton")) == "[]"


def _loaded(code: str, unwanted: tuple[str, ...]) -> str:
    """Which of the modules a fresh Python has loaded after `code`, as the list's text."""
    told = run(
        f"import sys\n{code}\nprint([m for m in {unwanted} if m in sys.modules])", ROOT, cwd=ROOT
    )
    return told.splitlines()[-1]


def test_the_package_is_imported_at_once():
    """By the processor's time, the interpreter's own start taken off; what it offers is listed."""
    seconds = {"pass": [], "import fastflag": []}
    for _ in range(5):
        for code, taken in seconds.items():
            began = _processor_seconds()
            run(code, ROOT, cwd=ROOT)
            taken.append(_processor_seconds() - began)
    assert min(seconds["import fastflag"]) - min(seconds["pass"]) < 0.05, seconds
    listed = run(
        "import fastflag as ff; print({*dir(ff)} >= {'train', 'open', 'Run'})", ROOT, cwd=ROOT
    )
    assert listed == "True"
    code = "import fastflag as ff; ff.load; ff.InputError; ff.Run"
    assert _loaded(code, ("torch", "numba", "pandas", "numpy", "pyarrow")) == "[]"


# What an import may not do: start a process, use the network, write a file, ask for a GPU, set an
# environment variable that was not there.
WATCHED = """
import importlib, json, os, re, sys
CACHES = re.compile("__pycache__|/numba/")  # whether machine code can be kept there is tried
done = []
def watch(event, arguments):
    # What is opened by its number was opened by its name before, as Python's machine code is.
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and (
        not CACHES.search(str(arguments[0])) and str(arguments[0]) != os.devnull
        and not isinstance(arguments[0], int))
    if watching and (writes or event in ("subprocess.Popen", "os.system", "socket.connect")):
        done.append(f"{event} {arguments[0]}")
watching = False
sys.addaudithook(watch)
import torch, pandas, numba, rich, plotly, tokenizers, gymnasium
for name in ("is_available", "device_count", "_lazy_init"):
    def probed(*_, name=name, real=getattr(torch.cuda, name)):
        done.append(f"torch.cuda.{name}")
        return real()
    setattr(torch.cuda, name, probed)
before = dict(os.environ)
watching = True
for name in NAMES:
    importlib.import_module(name)
done += [f"environment {k}" for k in os.environ if os.environ[k] != before.get(k)]
print(json.dumps({"done": done, "initialised": torch.cuda.is_initialized()}))
"""


def test_imports_touch_nothing(tmp_path):
    told = run(WATCHED.replace("NAMES", repr([*modules()])), ROOT, cwd=tmp_path)
    assert json.loads(told) == {"done": [], "initialised": False}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["decide", "--help"]])
def test_help_answers_at_once(arguments, tmp_path):
    call = f"from fastflag.cli import main\ntry: main({arguments})\nexcept SystemExit: pass"
    assert _loaded(call, ("torch", "numba", "pandas", "numpy", "pyarrow")) == "[]"
    seconds = []
    for _ in range(3):
        began = _processor_seconds()
        assert "usage: fastflag" in run(call, ROOT, cwd=tmp_path)
        seconds.append(_processor_seconds() - began)
    assert min(seconds) < 0.5, seconds


def _processor_seconds() -> float:
    """Of the processes started so far: a busy machine makes an answer late, not longer."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, made outside of it and without the network."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("fastflag", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "README.md").write_text("What it is.")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "-w", "dist", "."], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (tree / "dist").glob("fastflag-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the wheel's content and nothing else."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", target, wheel], check=True, capture_output=True)
    return target


def test_the_wheel_holds_every_file_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if ".dist-info/" not in name}
    expected = {
        f"{folder}/{path.relative_to(ROOT / home).as_posix()}"
        for home, folder in (("fastflag", "fastflag"), ("kernels", "fastflag/kernels"))
        for path in (ROOT / home).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected


@pytest.mark.parametrize("where", ["clone", "wheel"])
def test_kernels_is_ours_only_under_fastflag(where, installed, tmp_path):
    """`kernels` is the name of Hugging Face's package, which wins where it is installed."""
    home = ROOT if where == "clone" else installed
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("")
    found = run("import kernels; print(kernels.__file__)", home, site, cwd=tmp_path)
    assert Path(found) == site / "kernels" / "__init__.py"
    code = (
        "import importlib.util as u, fastflag, fastflag.cli\n"
        "print(fastflag.__file__)\n"
        "print(*u.find_spec('fastflag.kernels').submodule_search_locations)\n"
    )
    package, kernels = run(code, home, site, cwd=tmp_path).splitlines()
    assert Path(package) == home / "fastflag" / "__init__.py"
    expected = ROOT / "kernels" if where == "clone" else installed / "fastflag" / "kernels"
    assert Path(kernels) == expected
    if where == "wheel":
        alone = run("import importlib.util as u; print(u.find_spec('kernels'))", home, cwd=tmp_path)
        assert "fastflag" not in alone


def test_the_installed_wheel_runs(installed, tmp_path):
    run(f"import {', '.join(modules())}", installed, cwd=tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "fastflag", "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "0.1.0"
    script = installed / "bin" / "fastflag"
    assert "from fastflag.__main__ import main" in script.read_text()


def test_every_benchmark_finds_what_it_imports(tmp_path):
    """No test runs all of them, and the type checker reads the package alone."""
    names = [name for name in modules("bench") if not name.endswith("__main__")]
    assert len(names) > 20
    calls = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    run(calls, ROOT, cwd=tmp_path)
