"""The command line: one dataclass a subcommand, its flags and help made from the fields.

torch, Numba and pandas are imported by the commands that need them, so that --help answers at once.
What is wrong is told in one line on stderr, with --json too: stdout is then empty, and warnings
that came before are not told.
"""

import dataclasses
import errno
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TextIO

import tyro

from fastflag import caches
from fastflag.config import (
    PRESETS,
    AlgorithmConfig,
    DataConfig,
    Optimizer,
    PlanConfig,
    PolicyConfig,
    SimulatorConfig,
    TrainConfig,
    from_dict,
    from_run,
)
from fastflag.files import InputError, read_json

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
        from fastflag.policy.weights import open_weights

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
        from fastflag.market.accounts import Bars
        from fastflag.market.metrics import metrics
        from fastflag.market.simulator import BUY
        from fastflag.market.sources import load
        from fastflag.market.tasks import fixed_action_equity

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
        bars = Bars.from_market(market, market.symbols[market.column(self.symbol)])
        costless = SimulatorConfig(fill="same_close", fee_bps=0.0, slippage_bps=0.0)
        equity = fixed_action_equity(bars, costless, days, BUY)
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


# tyro indents a flag's help below the flag by 8, and has these headings.
_HELP_INDENT = 8
_NOT_TOLD = ("For full helptext", "Argument helptext")

COMMANDS: dict[str, type] = {
    "train": Train,
    "backtest": Backtest,
    "decide": Decide,
    "metrics": Metrics,
    "report": Report,
    "doctor": Doctor,
}


_LOG = logging.getLogger(__name__)
_REFUSED = 2  # exit status
_NO_MEMORY = "not enough memory: lower --num-steps, --num-envs or --backtest-episodes, here"


class _Stream:
    """stdout or stderr that never fails, since a training must not end for its progress: what is
    written after the first error is lost. `before` is called before anything is written."""

    def __init__(self, stream: TextIO | None, before: Callable[[], None] = lambda: None):
        # Python has none where the caller closed it (`>&-`).
        self._stream = stream or open(os.devnull)  # noqa: SIM115 (until the process ends)
        self.error: OSError | None = None
        self._before = before

    def write(self, text: str) -> int:
        self._before()
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, act: Callable[..., object], *arguments: str) -> None:
        if self.error is not None:
            return
        try:
            try:
                act(*arguments)
            except UnicodeEncodeError as error:  # of which nothing has been written
                (text,) = arguments
                act(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except OSError as error:
            self.error = error
            # Else Python complains once more when it flushes at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Held(logging.Handler):
    """Warnings, kept until `tell` and from then on told at once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[logging.LogRecord] | None = []

    def emit(self, record: logging.LogRecord) -> None:
        if self._kept is not None:
            self._kept.append(record)
        else:
            logging.lastResort.handle(record)  # on stderr, as without a handler

    def tell(self) -> None:
        kept, self._kept = self._kept, None
        for record in kept or ():
            self.emit(record)


@contextmanager
def _warnings_held() -> Iterator[Callable[[], None]]:
    """Keeps this package's warnings back until what it gives is called, or the context is left
    otherwise than by a refusal, which is one line alone."""
    held, log = _Held(), logging.getLogger("fastflag")
    log.addHandler(held)
    try:
        yield held.tell
        held.tell()
    except BaseException as end:
        if not isinstance(end, SystemExit) or end.code != _REFUSED:
            held.tell()
        raise
    finally:
        log.removeHandler(held)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line. Exits with 2 and one line on stderr for what the user gave wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with (
        redirect_stderr(_Stream(sys.stderr)),
        _warnings_held() as tell,
        redirect_stdout(_Stream(sys.stdout, before=tell)) as out,
    ):
        command = _guard(words)
        out.flush()
        if out.error is not None:
            _tell_lost_output(out.error, is_result=not isinstance(command, Train | Report))


def _guard(words: list[str]) -> Any:
    """Runs a command line as `_run`; what goes wrong becomes one line and an exit status."""
    try:
        return _run(words)
    except InputError as error:
        _refuse(str(error))
    except OSError as error:
        _refuse(f"{error.strerror or error}, {error.filename or 'while writing'}")
    except UnicodeEncodeError as error:
        _refuse(f"{error.object[:80]!r} has no form in {error.encoding}, in a name or a text")
    except (MemoryError, RuntimeError) as error:
        from fastflag.policy.activations import ran_out

        if not ran_out(error):
            raise
        _refuse(_NO_MEMORY)
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last checkpoint" if words[:1] == ["train"] else ""
        print(f"\nfastflag: interrupted{hint}", file=sys.stderr)
        raise SystemExit(130) from None


def _run(arguments: list[str]) -> Any:
    """Runs a command line. Returns the command that ran; None where it was help or the version."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return None
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        import fastflag

        print(fastflag.__version__)
        return None
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}, one of {', '.join(COMMANDS)} is expected")
    command = _parse(COMMANDS[name], f"fastflag {name}", rest)
    if command is not None:
        command = _at_home(command)
        caches.settle(os.environ)
        command.run()
    return command


def _at_home(command: Any) -> Any:
    """The command with ~ in its paths as the shell writes it; not every shell does after =."""
    paths = {name: value for name, value in vars(command).items() if isinstance(value, Path)}
    expanded = {name: Path(os.path.expanduser(path)) for name, path in paths.items()}
    return dataclasses.replace(command, **expanded)


def _usage() -> str:
    lines = [f"  {name:<10}{command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastflag COMMAND [flags]",
            "",
            *lines,
            "",
            "fastflag COMMAND --help lists its flags.",
        ]
    )


def _parse(command: type, program: str, arguments: list[str]) -> Any:
    """The command with its flags, None where they asked for its help.

    Raises InputError, in one line, for a flag that does not fit.
    """
    default = {"default": _train_default(arguments)} if command is Train else {}
    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            return tyro.cli(command, prog=program, args=arguments, **default)
    except SystemExit as stop:
        if not stop.code:
            return None
        raise InputError(f"{_complaint(shown.getvalue())}, see {program} --help") from None


def _train_default(arguments: list[str]) -> Any:
    """Train's defaults: the preset that the arguments name, the config file's values over it; a run
    that is to go on has its own, where they name neither."""
    preset, config = _value_of("--preset", arguments) or "default", _value_of("--config", arguments)
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}, one of {', '.join(PRESETS)} is expected")
    settings = PRESETS[preset]
    if config:
        config = os.path.expanduser(config)
        document = read_json(config)
        of_run = isinstance(document, dict) and "fastflag" in document
        settings = (from_run if of_run else from_dict)(document, config, settings)
    elif "--resume" in arguments and _value_of("--preset", arguments) is None:
        own = Path(os.path.expanduser(_value_of("--out", arguments) or "."), "config.json")
        document = read_json(own) if own.exists() else None
        if isinstance(document, dict) and "fastflag" in document:
            settings = from_run(document, str(own), settings)
    return Train(out=tyro.MISSING, settings=settings)


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


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """The flag's value; of several the last, as tyro takes it."""
    value = None
    for argument, following in pairwise([*arguments, None]):
        if argument == flag:
            value = following
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
    return value


def _complaint(boxed: str) -> str:
    """What tyro says, in one line: without its box, the flags' help and where to find more."""
    sections: list[list[str]] = [[]]
    for line in boxed.splitlines()[1:]:
        row = line.strip("│╭╮╰╯")
        text = row.strip()
        if not text.strip("─-"):
            sections.append([])
        elif len(row) - len(row.lstrip()) < _HELP_INDENT:
            sections[-1].append(text)
    told = [" ".join(rows).rstrip(".") for rows in sections if rows]
    return "; ".join(text for text in told if not text.startswith(_NOT_TOLD))


def _refuse(message: str) -> None:
    print(f"fastflag: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(_REFUSED)


def _tell_lost_output(error: OSError, is_result: bool) -> None:
    """Of a command that writes files, what it prints is not its result."""
    told = f"{error.strerror or error}, standard output"
    if not is_result:
        print(f"fastflag: {told}", file=sys.stderr)
    elif isinstance(error, BrokenPipeError):  # nobody reads on (`| head`)
        raise SystemExit(141)
    else:
        _refuse(told)


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
