"""Each fused op beside its baselines: times, memory and the share of what the device could do.

    python -m bench.kernels [--json] [--op NAME ...] [--provider NAME ...] [--rounds 50]

Every op of measure/cases.py at the shapes of three models, by every provider that is there
(rivals/ops.py), forward alone and forward with backward. Providers take turns, round by round;
a row has the median, the 20th and the 80th percentile, the memory that was allocated at most,
and the share of the device's measured roofline (measure/roofline.py); its ratio is to the fastest
of the others. Nothing wrong is timed: an op is refused while its test file fails, and a provider
one of whose rows or columns, of an output or a gradient, is further from fp64 than twice what
PyTorch's are (fastflag/model/exactness.py); a kernel also where one number is not what sums of
small whole numbers are. Each refusal is a line on stderr, and the exit status is 1. On a CPU the
Triton kernels are left out, since their interpreter is no measure of them, and shapes are small.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import torch

from bench.measure import clock, roofline
from bench.measure.cases import CASES, SMALL_CASES, Case, Inputs, Memory, tensors
from bench.measure.clock import Clock, Times, interleaved
from bench.measure.results import Row, publish
from bench.measure.roofline import Cost, Roof, cost_of
from bench.measure.trial import Judge, Trial, whole
from bench.rivals.ops import Absent, Function, Provider, providers

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class KernelRow(Row):
    """A time, in microseconds, and what it comes to."""

    p20: float = 0.0
    p80: float = 0.0
    launch: float | None = None  # microseconds until the host was done, on a GPU
    peak_mb: float | None = None  # allocated above the inputs, on a GPU
    gb_per_s: float = 0.0  # of the fewest bytes
    tflop_per_s: float | None = None  # of the fewest operations, where there is a product
    roofline: float = 0.0  # share of what the device could do


def row_key(row: dict) -> tuple[str, ...]:
    """The fastest of the others, which `against` names, may be another one next time."""
    return row["what"], row["shape"], row["provider"]


def run_tests(file: Path) -> str:
    """Why the results of a file of kernels are not to be trusted; empty where its tests pass."""
    if not file.exists():
        return f"there is no {file.name}"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(words, cwd=_ROOT, capture_output=True, text=True)
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
    return "" if done.returncode == 0 else f"{file.name} is red: {''.join(last)}"


@cache
def tested(name: str) -> str:
    """`run_tests` of tests/test_kernels_NAME.py, once in a process."""
    return run_tests(_ROOT / "tests" / f"test_kernels_{name}.py")


class Bench:
    """Times cases on one device. `refused` and `absent` grow with what could not be timed."""

    def __init__(
        self,
        timer: Clock,
        roof: Roof,
        rounds: int,
        seconds: float,
        tested: Callable[[str], str],
        offered: Callable[[Case, bool], list[Provider]] = providers,
        wanted: tuple[str, ...] = (),
    ):
        """`tested` says of a file of kernels why it is refused, if it is; `wanted` names the
        providers to be timed, all if none."""
        self.timer, self.roof = timer, roof
        self.rounds, self.seconds = rounds, seconds
        self.tested, self.offered, self.wanted = tested, offered, wanted
        self.refused: list[str] = []
        self.absent: set[str] = set()

    def rows(self, cases: Iterable[Case]) -> Iterator[KernelRow]:
        for name, some in groupby(cases, key=lambda case: case.file):
            if why := self.tested(name):
                self._refuse(f"{', '.join(dict.fromkeys(case.name for case in some))}: {why}")
                continue
            for case in some:
                yield from self._case(case)

    def _case(self, case: Case) -> Iterator[KernelRow]:
        memory = Memory(self.timer.device)
        for backward in (False, True) if case.trained else (False,):
            torch.manual_seed(0)
            trial = Trial.of(case, memory, backward)
            functions = dict(self._functions(case, trial.inputs))
            right = self._right(trial, functions, memory)
            works = {name: trial.maker(function) for name, function in right.items()}
            times = interleaved(works, self.timer, self.rounds, self.seconds)
            with torch.no_grad():
                outputs = tensors(case.reference(**case.given(trial.inputs)[0]))
            cost = cost_of(case, trial.inputs, outputs, backward)
            notes = {name: functions[name][0].note for name in times}
            yield from rows_of(trial.what, case.shape, times, notes, cost, self.roof)

    def _functions(
        self, case: Case, inputs: Inputs
    ) -> Iterator[tuple[str, tuple[Provider, Function]]]:
        for provider in self.offered(case, self.timer.device == "cuda"):
            if self.wanted and provider.name not in self.wanted:
                continue
            try:
                function = provider.make(case, inputs)
            except Absent as missing:
                self.absent.add(str(missing))
                continue
            if function is not None:
                yield provider.name, (provider, function)

    def _right(
        self, trial: Trial, functions: dict[str, tuple[Provider, Function]], memory: Memory
    ) -> dict[str, Function]:
        """Those that compute what they should."""
        exact = any(provider.to_the_bit for provider, _ in functions.values())
        judge = Judge(trial, Trial.of(trial.case, whole(memory), trial.backward) if exact else None)
        return {
            name: function
            for name, (provider, function) in functions.items()
            if (provider.differentiable or not trial.backward)
            and self._is_right(judge, provider, function)
        }

    def _is_right(self, judge: Judge, provider: Provider, function: Function) -> bool:
        try:
            why = judge.wrong(function, provider.to_the_bit)
        except Exception as error:  # a foreign library may fail in any way, and the others go on
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if why:
            trial = judge.trial
            self._refuse(f"{trial.what}, {trial.case.shape}, {provider.name}: {why}")
        return not why

    def _refuse(self, line: str) -> None:
        print(f"refused: {line}", file=sys.stderr, flush=True)
        self.refused.append(line)


def rows_of(
    what: str,
    shape: str,
    times: dict[str, Times],
    notes: dict[str, str],
    cost: Cost,
    roof: Roof,
) -> Iterator[KernelRow]:
    """A row for each provider; its ratio is to the fastest of the others."""
    for name, own in times.items():
        others = {other: took for other, took in times.items() if other != name}
        best = min(others, key=lambda other: others[other].percentile(50), default=None)
        seconds = own.percentile(50)
        on_gpu = own.peak is not None
        yield KernelRow(
            what,
            shape,
            name,
            1e6 * seconds,
            "us",
            None if best is None else own.faster_than(others[best]),
            best or "",
            notes[name],
            p20=1e6 * own.percentile(20),
            p80=1e6 * own.percentile(80),
            launch=1e6 * own.launch if on_gpu else None,
            peak_mb=own.peak / 1e6 if on_gpu else None,
            gb_per_s=cost.bytes / seconds / 1e9,
            tflop_per_s=cost.operations / seconds / 1e12 if cost.operations else None,
            roofline=roof.share(cost, seconds),
        )


def roof_rows(roof: Roof) -> list[Row]:
    return [
        Row("roofline: copy", "", "torch", roof.bandwidth / 1e9, "GB/s"),
        Row("roofline: product", "", "torch", roof.rate / 1e12, "TFLOP/s"),
    ]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a number from 1 on, not {text}")
    return int(text)


def cases_here() -> tuple[Case, ...]:
    return CASES if torch.cuda.is_available() else SMALL_CASES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels")
    names = sorted({case.name for case in CASES})
    parser.add_argument("--json", action="store_true", help="the last line is one JSON document")
    parser.add_argument("--op", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--provider", nargs="+", default=[], help="these alone; see the rows")
    parser.add_argument("--rounds", type=_positive, default=50, help="times that each is measured")
    parser.add_argument("--seconds", type=float, default=2.0, help="for a case's rounds, about")
    chosen = parser.parse_args()
    timer = clock.clock()
    if timer.device == "cpu":
        print("no GPU: Triton's kernels are left out, shapes are small", file=sys.stderr)
    roof = roofline.measured(timer)
    wanted = tuple(chosen.provider)
    bench = Bench(timer, roof, chosen.rounds, chosen.seconds, tested, wanted=wanted)
    cases = [case for case in cases_here() if case.name in chosen.op]
    rows = [*roof_rows(roof), *bench.rows(cases)]
    if bench.absent:
        print(f"not here: {', '.join(sorted(bench.absent))}", file=sys.stderr)
    publish("kernels", rows, chosen.json, row_key)
    sys.exit(bool(bench.refused))


if __name__ == "__main__":
    main()
