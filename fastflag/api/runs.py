"""Runs: made, opened again, tested and asked; and the bars that they are made of."""

import errno
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastflag.config import (
    Convention,
    DataConfig,
    Device,
    Position,
    SimulatorConfig,
    TrainConfig,
    base_of,
    checked,
    from_dict,
    with_settings,
)
from fastflag.evaluate.results import Backtest, Decision, Metrics
from fastflag.files import InputError, read_json, read_text, reading

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
    config: TrainConfig = field(repr=False)

    @property
    def metrics(self) -> "DataFrame":
        """A row an update, as RUN/metrics.jsonl has it; seconds/NAME are those of a phase. Raises
        InputError for a missing or malformed file."""
        import pandas

        from fastflag.evaluate.report import read_updates

        return pandas.json_normalize(read_updates(self.folder), sep="/")

    @property
    def tested(self) -> Backtest:
        """The backtest of the held-out days, as RUN/backtest.json has it; a warning says where the
        run has gone on since. Raises InputError for a missing or malformed file."""
        from fastflag.evaluate.report import warn_of_age

        path = self.folder / "backtest.json"
        document = read_json(path)
        if not isinstance(document, dict):
            raise InputError(f"not a backtest, {path}")
        warn_of_age(self.folder)
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
        """As it was at the last checkpoint. Raises InputError where that, the model or the bars are
        missing, damaged or other ones."""
        return self._loaded[2]

    @property
    def _loaded(self) -> tuple[int, "World", "Policy"]:
        """The last checkpoint's, with its updates: a training may have written it since."""
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
        test the market must be the one that the run was trained on, up to its last training day.
        Raises InputError for what can't be read or does not fit, and OSError for a full disk; a
        folder that is not ours to write to is a warning."""
        from fastflag.evaluate.backtest import backtest
        from fastflag.learn.run import OTHER_MARKET

        if ".." not in split and not self._knows_market():
            raise InputError(
                f"{OTHER_MARKET}: name those by --data and --news, or days by --split "
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
        position: Position = "flat",
        entry: float = 0.0,
        since: str = "",
    ) -> Decision:
        """The most probable action at the close of `date`, which nothing later bears on. A position
        that is held was entered at the price `entry` on the day `since`. Raises InputError."""
        from fastflag.evaluate.decide import decide
        from fastflag.learn.run import OTHER_MARKET

        _, world, policy = self._loaded
        with suppress(InputError):  # bars of the last months decide as well as all of them
            if not self._knows_market():
                _LOG.warning("fastflag: %s, %s", OTHER_MARKET, self.config.data.data)
        day, entered = _date(date), _date(since)
        return Decision(**decide(policy, world, day, position, entry, entered))

    def report(self) -> Path:
        """Writes RUN/report.html anew; a warning says where the run went on after its backtest.
        Raises InputError for what the run lacks, and OSError where it can't be written."""
        from fastflag.evaluate.report import warn_of_age, write_report

        warn_of_age(self.folder)
        return write_report(self.folder)

    def _repr_html_(self) -> str:
        """The report that the folder holds, in a frame that can't reach the notebook."""
        from fastflag.evaluate.report import outdated

        size, age = 'width="100%" height="720"', outdated(self.folder)
        try:
            page = escape(read_text(self.folder / "report.html"))
        except InputError as error:
            return f"<p>No report: {escape(str(error))}</p>"
        note = f"<p>Its backtest: {escape(age)}.</p>" if age else ""
        return f'{note}<iframe sandbox="allow-scripts" {size} srcdoc="{page}"></iframe>'

    def _knows_market(self) -> bool:
        from fastflag.learn.run import trained_on

        return trained_on(self.folder, self.config, self.market)

    def _has_its_symbols(self) -> bool:
        """Not one of several alone."""
        from fastflag.learn.run import read_config

        return self.config.data.symbols == read_config(self.folder).data.symbols

    def _keep(self, document: dict[str, Any]) -> None:
        """Writes a backtest and the report of it; somebody else's folder stays, with a warning."""
        from fastflag.evaluate.backtest import write_backtest

        try:
            write_backtest(self.folder, document)
            self.report()
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            _LOG.warning("fastflag: not written: %s, %s", error.strerror, error.filename)


def load(data: str | DataConfig = DataConfig.data, **settings: Any) -> "Market":
    """The bars and news that `data` names, as --data does; other settings are DataConfig's. Raises
    InputError for what can't be read or does not fit."""
    from fastflag.market import several

    if isinstance(data, DataConfig):
        return several.load(checked(data, DataConfig, "load()"))
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
    unless others are named. Raises InputError for settings, data or a model that do not fit, and
    for a folder that can't be this run's; OSError where the folder can't be written to.
    """
    from fastflag.learn.checkpoint import read_state
    from fastflag.learn.run import check_claim, read_config, warn_of_changes
    from fastflag.learn.train import train
    from fastflag.model.weights import open_weights

    folder = _folder(out)
    here = _folder(".")
    if folder in (here, *here.parents):
        raise InputError("a run needs a folder of its own, --out")
    if config is not None and preset:
        raise InputError(f"the preset {preset!r} beside a config: name one of the two, train()")
    base = (
        base_of(folder, preset, resume)
        if config is None
        else checked(config, TrainConfig, "train()")
    )
    config = with_settings(base, settings)
    if resume:
        warn_of_changes(folder)
    else:
        check_claim(folder, config, resume=False)
    market = load(config.data)
    made = train(config, market, open_weights(config.policy.model), folder, resume)
    run = Run(folder, with_settings(read_config(folder), {"device": config.policy.device}))
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
    them alone, or any that it never saw. Settings are those of RUN/config.json; where one was
    changed since the run was trained, that is a warning. Raises InputError for what is no run.
    """
    from fastflag.learn.run import read_config, warn_of_changes

    folder = _folder(run)
    config = read_config(folder)
    warn_of_changes(folder)
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


def _folder(path: Path | str) -> Path:
    """With ~ as the shell writes it, and whole: a Run is the same wherever its process goes."""
    if not isinstance(path, str | Path) or "\0" in str(path):
        raise InputError(f"a run's folder is a path, not {path!r:.80}")
    with reading("the current folder"):  # which may have been taken away
        return Path(os.path.abspath(os.path.expanduser(path)))


def _date(day: Any) -> str:
    """A day as --date has it, of text or a date of Python's, NumPy's or pandas'."""
    return day if isinstance(day, str) else str(day)[:10]
