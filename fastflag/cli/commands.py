"""The commands: one dataclass each, its flags and help made from the fields.

torch, Numba and pandas are imported by the commands that need them, so that --help answers at once.
"""

import dataclasses
import errno
import json
import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from fastflag.config import (
    PRESETS,
    AlgorithmConfig,
    DataConfig,
    Optimizer,
    PlanConfig,
    PolicyConfig,
    SimulatorConfig,
    TrainConfig,
)
from fastflag.files import InputError

_LOG = logging.getLogger(__name__)

Switch = tyro.conf.FlagCreatePairsOff[bool]
Device = Literal["auto", "cpu", "cuda"]


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
        from fastflag.evaluate.backtest import backtest, write_backtest
        from fastflag.evaluate.report import write_report
        from fastflag.learn.run import check_claim
        from fastflag.learn.train import train
        from fastflag.market.sources import load
        from fastflag.model.weights import open_weights

        if not str(self.out).strip("."):
            raise InputError("a run needs a folder of its own, --out")
        if not self.resume:
            check_claim(self.out, self.settings, resume=False)
        market = load(self.settings.data)
        weights = open_weights(self.settings.policy.model)
        world, policy = train(self.settings, market, weights, self.out, self.resume)
        document = backtest(policy, world, market, self.settings, "test", _progress("backtest"))
        write_backtest(self.out, document)
        print(_verdict(document))
        print(f"report: {write_report(self.out)}")


@dataclass(frozen=True)
class Backtest:
    """Backtest a run's policy beside buy-and-hold and random policies."""

    run_folder: tyro.conf.Positional[Path]
    """Folder of the run."""
    split: str = "test"
    """train, test, or START..END. Only test rewrites RUN/backtest.json and the report."""
    data: str = ""
    """Where the run's bars are now; empty: where they were. For train and test they must be those
    that the run was trained on, up to its last training day; START..END takes any."""
    news: str = ""
    """News file, as in train; empty: the run's, or with --data the one beside those bars."""
    symbol: str = ""
    """Which symbol of a file that holds several; empty: the run's."""
    model: str = ""
    """Where the run's model is now; empty: where it was."""
    device: Device = "auto"
    """Where the policy runs; auto: a CUDA GPU where there is one."""
    json: Switch = False
    """Print the whole document as JSON."""

    def run(self) -> None:
        from fastflag.evaluate.backtest import backtest
        from fastflag.learn.run import OTHER_MARKET, load_policy, read_config, trained_on
        from fastflag.market.sources import load

        config = _here(read_config(self.run_folder), self)
        market = load(config.data)
        if ".." not in self.split and not trained_on(self.run_folder, config, market):
            raise InputError(
                f"{OTHER_MARKET}: name those by --data and --news, or days by --split START..END, "
                f"{config.data.data}"
            )
        world, policy = load_policy(self.run_folder, config, market)
        document = backtest(policy, world, market, config, self.split, _progress("backtest"))
        if self.split == "test":
            _keep(self.run_folder, document)
        print(json.dumps(document, indent=1) if self.json else _verdict(document))


@dataclass(frozen=True)
class Decide:
    """What a run's policy would do at one day's close."""

    run_folder: tyro.conf.Positional[Path]
    """Folder of the run."""
    date: str
    """Day whose close the decision is made at."""
    data: str = ""
    """Bars to read; empty: those that the run was trained on."""
    news: str = ""
    """News file, as in train; empty: the run's, or with --data the one beside those bars."""
    symbol: str = ""
    """Which symbol of a file that holds several; empty: the run's."""
    model: str = ""
    """Where the run's model is now; empty: where it was."""
    position: Literal["flat", "long", "short"] = "flat"
    """Position held."""
    entry: float = 0.0
    """Price per share on the day it was entered, fees included; splits since then, and dividends
    where the run reinvests them, are accounted for."""
    since: str = ""
    """Day on which it was entered."""
    device: Device = "auto"
    """Where the policy runs; auto: a CUDA GPU where there is one."""
    json: Switch = False
    """Print one JSON document."""

    def run(self) -> None:
        from fastflag.evaluate.decide import decide
        from fastflag.learn.run import OTHER_MARKET, load_policy, read_config, trained_on
        from fastflag.market.sources import load

        config = _here(read_config(self.run_folder), self)
        market = load(config.data)
        world, policy = load_policy(self.run_folder, config, market)
        with suppress(InputError):  # bars of the last months decide as well as all of them
            if not trained_on(self.run_folder, config, market):
                _LOG.warning("fastflag: %s, %s", OTHER_MARKET, config.data.data)
        document = decide(policy, world, market, self.date, self.position, self.entry, self.since)
        if self.json:
            print(json.dumps(document))
        else:
            chances = "  ".join(f"{k} {v:.3f}" for k, v in document["probabilities"].items())
            value = f"value {document['value']:+.4f}"
            print(f"{document['date']}  {document['action']}  ({chances})  {value}")


@dataclass(frozen=True)
class Metrics:
    """Metrics of buying and holding, dividends reinvested: those of the adjusted closes."""

    data: str = DataConfig.data
    """Bars, as in train."""
    symbol: str = ""
    """Which symbol of a file that holds several."""
    calendar: Literal["auto", "stock", "crypto"] = "auto"
    """Days of the year that are traded, as in train."""
    timezone: str = ""
    """The exchange's time zone, as in train."""
    start: str = ""
    """First day; empty: the first there is."""
    end: str = ""
    """Last day; empty: the last there is."""
    convention: Literal["standard", "flag", "investorbench", "paper-bh"] = "standard"
    """How the figures are defined: see the README."""
    json: Switch = False
    """Print one JSON document."""

    def run(self) -> None:
        from fastflag.market.bars import Bars
        from fastflag.market.metrics import metrics
        from fastflag.market.sources import load
        from fastflag.market.tasks.baselines import fixed_action_equity
        from fastflag.market.tasks.single import BUY, Single

        market = load(
            DataConfig(
                data=self.data,
                symbol=self.symbol,
                calendar=self.calendar,
                timezone=self.timezone,
            )
        )
        start, end = self.start or str(market.dates[0]), self.end or str(market.dates[-1])
        days = market.days(start, end, "--start..--end")
        bars = Bars.from_market(market, self.symbol)
        costless = SimulatorConfig(fill="same_close", fee_bps=0.0, slippage_bps=0.0)
        equity = fixed_action_equity(Single.of(costless, bars), days, BUY)
        values = metrics(equity, self.convention, market.calendar)
        values = {name: None if value != value else value for name, value in values.items()}
        if self.json:
            print(json.dumps(values))
        else:
            print("\n".join(f"{name:>16}  {_shown(value)}" for name, value in values.items()))


@dataclass(frozen=True)
class Report:
    """Write a run's report.html anew."""

    run_folder: tyro.conf.Positional[Path]
    """Folder of the run."""

    def run(self) -> None:
        from fastflag.evaluate.report import write_report

        print(write_report(self.run_folder))


@dataclass(frozen=True)
class Doctor:
    """What this machine has, which implementation each op uses and why; or what a model needs."""

    json: Switch = False
    """Print one JSON document."""
    plan: Switch = False
    """What training takes of a GPU's memory instead, by part: in MiB, or with --json in bytes."""
    policy: tyro.conf.OmitArgPrefixes[PolicyConfig] = field(default_factory=PolicyConfig)
    optimizer: Optimizer = AlgorithmConfig.optimizer
    """As in train."""
    batch: tyro.conf.OmitArgPrefixes[PlanConfig] = field(default_factory=PlanConfig)

    def run(self) -> None:
        from fastflag.evaluate.doctor import examine, plan

        if self.plan:
            document = plan(self.policy, self.optimizer, self.batch)
            print(json.dumps(document) if self.json else _plan_table(document))
            return
        if self != Doctor(json=self.json):
            raise InputError("settings of a policy need --plan, doctor")
        document = examine()
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


def _here(config: TrainConfig, asked: Any) -> TrainConfig:
    """A run's configuration on this machine, whichever it was trained on, with the places that are
    `asked` for."""
    named = {name: getattr(asked, name) for name in ("data", "news", "symbol")}
    changes = {name: value for name, value in named.items() if value}
    if asked.data:
        changes["news"] = asked.news
    policy = dataclasses.replace(
        config.policy, device=asked.device, model=asked.model or config.policy.model
    )
    data = dataclasses.replace(config.data, **changes)
    return dataclasses.replace(config, data=data, policy=policy)


def _keep(run: Path, document: dict[str, Any]) -> None:
    """Writes a backtest and the report of it. In a folder that is somebody else's nothing is
    written, which is told, and the backtest is printed all the same."""
    from fastflag.evaluate.backtest import write_backtest
    from fastflag.evaluate.report import write_report

    try:
        write_backtest(run, document)
        write_report(run)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"fastflag: not written: {error.strerror}, {error.filename}", file=sys.stderr)


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


def _plan_table(document: dict[str, Any]) -> str:
    totals = {name: size for name, size in document.items() if name.startswith("total")}
    rows = {**document["parts"], **totals}
    lines = [f"  {name.replace('_', ' '):<30}{size / 2**20:>12,.1f}" for name, size in rows.items()]
    return "\n".join([f"{document['model']}, MiB of GPU memory", *lines])


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
