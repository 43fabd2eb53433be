"""The commands: one dataclass each, its flags and help made from the fields.

torch, Numba and pandas are imported by the commands that need them, so that --help answers at once.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from fastflag.config import (
    PRESETS,
    AlgorithmConfig,
    Calendar,
    Convention,
    DataConfig,
    Device,
    Optimizer,
    PlanConfig,
    PolicyConfig,
    Position,
    TrainConfig,
)
from fastflag.files import InputError

Switch = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True)
class Train:
    """Train a policy into a folder; then backtest it and write its report."""

    out: Path
    """Folder of the run."""
    preset: Literal[tuple(PRESETS)] = "default"  # type: ignore[valid-type]
    """Defaults of every setting below: default, demo (small, for a first look), paper
    (FLAG-Trader's Table 3)."""
    config: str = ""
    """JSON file of settings, nested like a run's config.json: over the preset, under the flags."""
    resume: Switch = False
    """Go on with the run in --out, where there is one. Without --preset and --config its own
    settings hold; only --memory-budget and a larger --total-timesteps may be others."""
    settings: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)

    def run(self) -> None:
        from fastflag import api

        run = api.train(self.out, self.settings, resume=self.resume, track=_progress("backtest"))
        print(_verdict(run.tested.document))
        print(f"report: {run.folder / 'report.html'}")


@dataclass(frozen=True)
class Places:
    """Where what the run was made of is now."""

    data: str = ""
    """Where the run's bars are now, or others to read; empty: where they were."""
    news: str = ""
    """News file, as in train; empty: the run's, or with --data the one beside those bars."""
    symbol: str = ""
    """Which symbol of a file that holds several, or of a run of several; empty: the run's."""
    model: str = ""
    """Where the run's model is now; empty: where it was."""
    device: Device = "auto"
    """Where the policy runs; auto: a CUDA GPU where there is one."""


@dataclass(frozen=True)
class Backtest:
    """Backtest a run's policy beside buy-and-hold and random policies."""

    run_folder: tyro.conf.Positional[Path]
    """Folder of the run."""
    split: str = "test"
    """train, test, or START..END. Only test rewrites RUN/backtest.json and the report. For train
    and test the bars must be those that the run was trained on, up to its last training day;
    START..END takes any."""
    places: tyro.conf.OmitArgPrefixes[Places] = field(default_factory=Places)
    json: Switch = False
    """Print the whole document as JSON."""

    def run(self) -> None:
        document = _opened(self).backtest(self.split, _progress("backtest")).document
        print(json.dumps(document, indent=1) if self.json else _verdict(document))


@dataclass(frozen=True)
class Decide:
    """What a run's policy would do at one day's close."""

    run_folder: tyro.conf.Positional[Path]
    """Folder of the run."""
    date: str
    """Day whose close the decision is made at."""
    position: Position = "flat"
    """Position held."""
    entry: float = 0.0
    """Price per share on the day it was entered, fees included; splits since then, and dividends
    where the run reinvests them, are accounted for."""
    since: str = ""
    """Day on which it was entered."""
    places: tyro.conf.OmitArgPrefixes[Places] = field(default_factory=Places)
    json: Switch = False
    """Print one JSON document."""

    def run(self) -> None:
        decision = _opened(self).decide(self.date, self.position, self.entry, self.since)
        if self.json:
            print(json.dumps(dataclasses.asdict(decision)))
        else:
            chances = "  ".join(f"{k} {v:.3f}" for k, v in decision.probabilities.items())
            print(f"{decision.date}  {decision.action}  ({chances})  value {decision.value:+.4f}")


@dataclass(frozen=True)
class Metrics:
    """Metrics of buying and holding, dividends reinvested: those of the adjusted closes."""

    data: str = DataConfig.data
    """Bars, as in train."""
    symbol: str = ""
    """Which symbol of a file that holds several."""
    calendar: Literal["auto", Calendar] = "auto"
    """Days of the year that are traded, as in train."""
    timezone: str = ""
    """The exchange's time zone, as in train."""
    start: str = ""
    """First day; empty: the first there is."""
    end: str = ""
    """Last day; empty: the last there is."""
    convention: Convention = "standard"
    """How the figures are defined: see the README."""
    json: Switch = False
    """Print one JSON document."""

    def run(self) -> None:
        from fastflag import api

        market = api.load(
            self.data, symbol=self.symbol, calendar=self.calendar, timezone=self.timezone
        )
        held = api.metrics(market, self.start, self.end, self.convention, self.symbol)
        if self.json:
            print(json.dumps(held.values))
        else:
            rows = held.values.items()
            print("\n".join(f"{name:>16}  {_shown(value)}" for name, value in rows))


@dataclass(frozen=True)
class Report:
    """Write a run's report.html anew."""

    run_folder: tyro.conf.Positional[Path]
    """Folder of the run."""

    def run(self) -> None:
        from fastflag import api

        print(api.open(self.run_folder).report())


@dataclass(frozen=True)
class Doctor:
    """What this machine has, which implementation each op uses and why; or what a model needs."""

    json: Switch = False
    """Print one JSON document."""
    plan: Switch = False
    """What training takes of a GPU's memory instead, by part: in MiB, or with --json in bytes."""
    prove: Switch = False
    """First have kernels and CUDA graphs prove themselves on this GPU, for the model below: right,
    then faster. What they proved is kept until a driver, a library or a kernel changes."""
    forget: Switch = False
    """First forget what kernels proved."""
    policy: tyro.conf.OmitArgPrefixes[PolicyConfig] = field(default_factory=PolicyConfig)
    optimizer: Optimizer = AlgorithmConfig.optimizer
    """As in train."""
    batch: tyro.conf.OmitArgPrefixes[PlanConfig] = field(default_factory=PlanConfig)

    def run(self) -> None:
        from fastflag import api

        if self.plan:
            document = dataclasses.asdict(api.plan(self.policy, self.optimizer, self.batch))
            print(json.dumps(document) if self.json else _plan_table(document))
            return
        asked = Doctor(self.json, prove=self.prove, forget=self.forget)
        if self != (dataclasses.replace(asked, policy=self.policy) if self.prove else asked):
            raise InputError("settings of a policy need --plan or --prove, doctor")
        if self.forget:
            print(f"forgotten: {api.forget_proofs()} proofs", file=sys.stderr)
        if self.prove:
            api.prove(self.policy)
        document = dataclasses.asdict(api.doctor(self.policy))
        if self.json:
            print(json.dumps(document))
            return
        for part, entries in document.items():
            print(part)
            for name, value in entries.items():
                print(f"  {name:<24}{value if isinstance(value, str) else _choice_line(**value)}")


COMMANDS: dict[str, type] = {
    "train": Train,
    "backtest": Backtest,
    "decide": Decide,
    "metrics": Metrics,
    "report": Report,
    "doctor": Doctor,
}


def _opened(asked: Any) -> Any:
    """The run that a command names, where it says that things are."""
    from fastflag import api

    return api.open(asked.run_folder, **vars(asked.places))


def _choice_line(implementation: str, reason: str, evidence: str) -> str:
    return f"{implementation} ({reason}; evidence: {evidence})"


def _progress(text: str) -> Callable[[Iterable[int]], Iterable[int]]:
    """Wraps an iterable with a bar on stderr, so that stdout stays JSON."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal
    return lambda days: track(days, text, console=console, transient=True, disable=hidden)


def _verdict(document: dict[str, Any]) -> str:
    if "groups" in document:
        return _verdict_of_several(document)
    greedy, held = document["policies"]["greedy"], document["policies"]["buy_and_hold"]
    rank = document["random"]["percentile"]["greedy"]
    lines = [f"{document['symbol']}  {document['start']} to {document['end']}"]
    for name, policy in (("greedy", greedy), ("buy and hold", held)):
        standard = policy["metrics"]["standard"]
        lines.append(
            f"  {name:<14}return {_shown(standard['cr'])}%   Sharpe {_shown(standard['sr'])}"
        )
    lines.append(
        f"  greedy's Sharpe beats {rank:.0f}% of {document['random']['episodes']} random policies"
    )
    return "\n".join(lines)


def _verdict_of_several(document: dict[str, Any]) -> str:
    """A line a symbol, then what their equities in equal parts come to."""
    symbols, groups = document["symbols"], document["groups"]
    marks = {name: f"{name} *" for name in document["held_out"]}
    together = {"all": "together", "learnt": "learnt from", "held_out": "held out"}
    rows = {marks.get(name, name): told for name, told in symbols.items()}
    rows |= {f"{together[name]} ({len(told['symbols'])})": told for name, told in groups.items()}
    width = max(map(len, rows))
    head = ("return %", "held %", "Sharpe", "held", "beats % of random")
    lines = [
        f"{len(symbols)} symbols  {document['start']} to {document['end']}",
        f"  {'':<{width}}" + "".join(f"{title:>{max(11, len(title) + 2)}}" for title in head),
    ]
    for name, told in rows.items():
        greedy, held = (
            told["policies"][policy]["metrics"]["standard"] for policy in ("greedy", "buy_and_hold")
        )
        values = (greedy["cr"], held["cr"], greedy["sr"], held["sr"])
        rank = told["random"]["percentile"]["greedy"]
        cells = "".join(f"{_shown(value):>11}" for value in values)
        lines.append(f"  {name:<{width}}{cells}{rank:>19.1f}")
    if marks:
        lines.append("  * never learnt from")
    if document["left_out"]:
        lines.append(f"  fewer than 2 bars, not tested: {', '.join(document['left_out'])}")
    return "\n".join(lines)


def _plan_table(document: dict[str, Any]) -> str:
    totals = {name: size for name, size in document.items() if name.startswith("total")}
    rows = {**document["parts"], **totals}
    lines = [f"  {name.replace('_', ' '):<30}{size / 2**20:>12,.1f}" for name, size in rows.items()]
    return "\n".join([f"{document['model']}, MiB of GPU memory", *lines])


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
