"""Forms of device code that compilers got wrong, which no kernel has."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1] / "kernels"


def hazards(source: str) -> Iterator[str]:
    """A line for each return of a jitted function before its end, and each branch that is taken at
    run time. Triton 3.7.0 compiled either to wrong sums, silently (triton-lang/triton#11148,
    #11153). What is known when a kernel is compiled makes no branch: a constant in capitals, a
    type, whether a pointer is None."""
    functions = [f for f in ast.walk(ast.parse(source)) if isinstance(f, ast.FunctionDef)]
    for function in functions:
        if not any(map(is_jit, function.decorator_list)):
            continue
        for node in ast.walk(function):
            where = f"{function.name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Return) and node is not function.body[-1]:
                yield f"{where}: return"
            if isinstance(node, ast.If | ast.IfExp | ast.While) and not is_known(node.test):
                yield f"{where}: {ast.unparse(node.test)}"


def is_jit(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called).endswith("jit")


def is_known(test: ast.expr) -> bool:
    if isinstance(test, ast.Compare):
        of_type = ast.unparse(test.left) == "dtype"
        return of_type or isinstance(test.ops[0], ast.Is | ast.IsNot)
    return isinstance(test, ast.Name) and test.id.isupper()


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_kernels_have_no_early_return_and_no_branch_at_run_time(path):
    assert list(hazards(path.read_text())) == []


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("    x = 1\n    return x", []),
        ("    if P is None:\n        x = 1\n    else:\n        x = 2\n    return x", []),
        ("    if begin >= end:\n        return\n    x = 1", ["return", "begin >= end"]),
        ("    if own:\n        x = 1", ["own"]),
        ("    for i in range(n):\n        if i > 1:\n            x = i", ["i > 1"]),
        ("    x = 1 if FORWARD else 2\n    y = 1 if n else 2", ["n"]),
        ("    while n:\n        n -= 1", ["n"]),
    ],
)
@pytest.mark.parametrize("decorator", ["jit", 'jit(do_not_specialize=["n"])', "triton.jit"])
def test_a_hazard_is_told(decorator, body, told):
    found = list(hazards(f"@{decorator}\ndef kernel(n):\n{body}\n"))
    assert [line.split(": ")[1] for line in sorted(found, key=len)] == sorted(told, key=len)
    assert list(hazards(f"def host(n):\n{body}\n")) == []
