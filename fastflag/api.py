"""FastFLAG from Python; the command line is written on it.

    import fastflag as ff

    run = ff.train("runs/mine", data="csv:bars.csv", symbol="AAPL")
    run.metrics                  # a row an update
    run.backtest().to_frame()    # a row a held-out day
    run.decide("2020-12-31")     # the action at one close

A run is its folder: a Run holds nothing that the folder lacks, and one that is opened again is the
same. torch and Numba are imported by what needs them. Raises InputError for what the user gave
wrong, in one line, and OSError where the system refuses to read or write.
"""

import errno
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastflag.config import (
    AlgorithmConfig,
    DataConfig,
    Device,
    Optimizer,
    PlanConfig,
    PolicyConfig,
    SimulatorConfig,
    TrainConfig,
    base_of,
    from_dict,
    to_dict,
    with_settings,
)
from fastflag.evaluate.results import (
    Backtest,
    Convention,
    Decision,
    Examination,
    MemoryPlan,
    Metrics,
)
from fastflag.files import InputError, read_json

if TYPE_CHECKING:
    from pandas import DataFrame

    from fastflag.market.bars import Market
    from fastflag.policy.table import Policy
    from fastflag.prompt.world import World

_LOG = logging.getLogger(__name__)

Track = Callable[[Iterable[int]], Iterable[int]]
"""Wraps the days of a backtest, for a progress bar."""


@dataclass(frozen=True)
class Run:
    """A training's folder, and where its bars and its model are now."""

    folder: Path
    config: TrainConfig

    @property
    def metrics(self) -> "DataFrame":
        """A row an update, as RUN/metrics.jsonl has it; seconds/NAME are those of a phase."""
        import pandas

        from fastflag.evaluate.report import read_updates

        return pandas.json_normalize(read_updates(self.folder), sep="/")

    @property
    def tested(self) -> Backtest:
        """The backtest of the held-out days, as RUN/backtest.json has it."""
        from fastflag.learn.checkpoint import read_state

        path = self.folder / "backtest.json"
        document = read_json(path)
        if not isinstance(document, dict):
            raise InputError(f"not a backtest, {path}")
        of = document.get("updates")
        with suppress(InputError):  # a copy for reading needs no checkpoint
            now, _ = read_state(self.folder)
            if of not in (None, now):
                told = "fastflag: tested after %s updates, now there are %d: backtest"
                _LOG.warning(told, of, now)
        return Backtest(document)

    @cached_property
    def market(self) -> "Market":
        return load(self.config.data)

    @property
    def world(self) -> "World":
        """What the policy is shown and what it may do."""
        return self._loaded[1]

    @property
    def policy(self) -> "Policy":
        """As it was at the last checkpoint."""
        return self._loaded[2]

    @property
    def _loaded(self) -> tuple[int, "World", "Policy"]:
        """Of the last checkpoint, which a training in the same folder may have written since, and
        how many updates it has."""
        from fastflag.learn.checkpoint import read_state
        from fastflag.learn.run import load_policy

        state = read_state(self.folder)
        if vars(self).get("_read", (None,))[0] != state:
            vars(self)["_read"] = state, load_policy(self.folder, self.config, self.market)
        return state[0], *vars(self)["_read"][1]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy in another process needs: the rest is in the folder."""
        return {"folder": self.folder, "config": self.config}

    def backtest(self, split: str = "test", track: Track = iter) -> Backtest:
        """Days of `split` (train, test or START..END) beside buy-and-hold and random policies. Only
        test, of all the run's symbols, rewrites RUN/backtest.json and the report. For train and
        test the market must be the one that the run was trained on, up to its last training day."""
        from fastflag.evaluate.backtest import backtest

        if ".." not in split and not self._knows_market():
            raise InputError(
                f"{_other_market()}: name those by --data and --news, or days by --split "
                f"START..END, {self.config.data.data}"
            )
        updates, world, policy = self._loaded
        tested = backtest(policy, world, self.config, split, track)
        document = {"updates": updates, **tested}
        if split == "test" and self._has_its_symbols():
            self._keep(document)
        return Backtest(document)

    def decide(
        self,
        date: str,
        position: Literal["flat", "long", "short"] = "flat",
        entry: float = 0.0,
        since: str = "",
    ) -> Decision:
        """The most probable action at the close of `date`, which nothing later bears on. A position
        that is held was entered at the price `entry` on the day `since`."""
        from fastflag.evaluate.decide import decide

        _, world, policy = self._loaded
        with suppress(InputError):  # bars of the last months decide as well as all of them
            if not self._knows_market():
                _LOG.warning("fastflag: %s, %s", _other_market(), self.config.data.data)
        day, entered = _date(date), _date(since)
        return Decision(**decide(policy, world, day, position, entry, entered))

    def report(self) -> Path:
        """Writes RUN/report.html anew."""
        from fastflag.evaluate.report import write_report

        return write_report(self.folder)

    def _repr_html_(self) -> str:
        """The report that the folder holds, in a frame that can't reach the notebook."""
        path = self.folder / "report.html"
        if not path.exists():
            return f"<p>No report yet: {escape(str(path))}</p>"
        page, size = escape(path.read_text(encoding="utf-8")), 'width="100%" height="720"'
        return f'<iframe sandbox="allow-scripts" {size} srcdoc="{page}"></iframe>'

    def _knows_market(self) -> bool:
        from fastflag.learn.run import trained_on

        return trained_on(self.folder, self.config, self.market)

    def _has_its_symbols(self) -> bool:
        """Not one of several alone."""
        from fastflag.learn.run import read_config

        return self.config.data.symbols == read_config(self.folder).data.symbols

    def _keep(self, document: dict[str, Any]) -> None:
        """Writes a backtest and the report of it. In a folder that is somebody else's nothing is
        written, which is told."""
        from fastflag.evaluate.backtest import write_backtest

        try:
            write_backtest(self.folder, document)
            self.report()
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            _LOG.warning("fastflag: not written: %s, %s", error.strerror, error.filename)


def load(data: str | DataConfig = DataConfig.data, **settings: Any) -> "Market":
    """The bars and news that `data` names, as --data does; other settings are DataConfig's."""
    from fastflag.market import several

    if isinstance(data, DataConfig):
        return several.load(data)
    return several.load(from_dict({"data": {"data": data, **settings}}, "load()").data)


def train(
    out: Path | str,
    config: TrainConfig | None = None,
    *,
    preset: str = "",
    resume: bool = False,
    track: Track = iter,
    **settings: Any,
) -> Run:
    """Trains into the folder `out`, then backtests and writes the report.

    `settings` are the flags of `fastflag train` by name (num_envs=64), over `config` or `preset`.
    With `resume` it goes on with the run in the folder, where there is one, by its own settings
    unless others are named.
    """
    from fastflag.learn.checkpoint import read_state
    from fastflag.learn.run import check_claim
    from fastflag.learn.train import train
    from fastflag.model.weights import open_weights

    folder = _folder(out)
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise InputError("a run needs a folder of its own, --out")
    if config is not None and preset:
        raise InputError(f"the preset {preset!r} beside a config: name one of the two, train()")
    base = base_of(folder, preset, resume) if config is None else _checked(config)
    config = with_settings(base, settings)
    if not resume:
        check_claim(folder, config, resume=False)
    market = load(config.data)
    made = train(config, market, open_weights(config.policy.model), folder, resume)
    run = open(folder, device=config.policy.device)
    vars(run).update(market=market, _read=(read_state(folder), made))  # which would be read again
    run.backtest(track=track)
    return run


def open(
    run: Path | str,
    *,
    data: str = "",
    news: str = "",
    symbol: str = "",
    model: str = "",
    device: Device = "auto",
) -> Run:
    """The run in a folder. `data`, `news`, `symbol` and `model` say where its bars and model are
    now, where they are no longer where they were. Of a run of several symbols `symbol` is one of
    them alone, or any that it never saw."""
    from fastflag.learn.run import read_config

    folder = _folder(run)
    config = read_config(folder)
    named = {"data": data, "news": news, "symbol": symbol, "model": model}
    changes: dict[str, Any] = {
        name: value for name, value in named.items() if not isinstance(value, str) or value
    }
    if "data" in changes:
        changes["news"] = news
    if "symbol" in changes:
        changes["symbols"] = ""
    return Run(folder, with_settings(config, {**changes, "device": device}))


def metrics(
    market: "Market",
    start: str = "",
    end: str = "",
    convention: Convention = "standard",
    symbol: str = "",
) -> Metrics:
    """Metrics of buying and holding from the close of `start` to that of `end`, dividends
    reinvested: those of the adjusted closes."""
    from fastflag.market import metrics as conventions
    from fastflag.market.bars import Bars
    from fastflag.market.tasks.baselines import fixed_action_equity
    from fastflag.market.tasks.single import BUY, Single

    first, last = (_date(day or market.dates[n]) for n, day in ((0, start), (-1, end)))
    days = market.days(first, last, "--start..--end")
    costless = SimulatorConfig(fill="same_close", fee_bps=0.0, slippage_bps=0.0)
    task = Single.of(costless, Bars.from_market(market, symbol))
    equity = fixed_action_equity(task, days, BUY)
    values = conventions.metrics(equity, convention, market.calendar)
    defined = {name: None if value != value else value for name, value in values.items()}
    return Metrics(first, last, convention, defined)


def doctor() -> Examination:
    """What this machine has, which implementation each op uses and why."""
    from fastflag.evaluate.doctor import examine

    return Examination(**examine())


def plan(
    policy: PolicyConfig | None = None,
    optimizer: Optimizer = AlgorithmConfig.optimizer,
    batch: PlanConfig | None = None,
) -> MemoryPlan:
    """What training takes of a GPU's memory, in bytes, by part."""
    from fastflag.evaluate import doctor

    return MemoryPlan(**doctor.plan(policy or PolicyConfig(), optimizer, batch or PlanConfig()))


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory."""
    from fastflag.model import recompute

    return recompute.ran_out(error)


def _folder(path: Path | str) -> Path:
    """With ~ as the shell writes it, and whole: a Run is the same wherever its process goes."""
    if not isinstance(path, str | Path) or "\0" in str(path):
        raise InputError(f"a run's folder is a path, not {path!r:.80}")
    return Path(os.path.abspath(os.path.expanduser(path)))


def _checked(config: TrainConfig) -> TrainConfig:
    """A configuration made in Python, held to what one in JSON is. Raises InputError."""
    if not isinstance(config, TrainConfig):
        raise InputError(f"a configuration is a TrainConfig, not {config!r:.80}, train()")
    return from_dict(to_dict(config), "train()")


def _date(day: Any) -> str:
    """A day as --date has it, of text or a date of Python's, NumPy's or pandas'."""
    return day if isinstance(day, str) else str(day)[:10]


def _other_market() -> str:
    from fastflag.learn.run import OTHER_MARKET

    return OTHER_MARKET
