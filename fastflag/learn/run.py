"""A run's folder: whose configuration it holds, and the world and policy made from it."""

import dataclasses
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fastflag
from fastflag.config import PortfolioConfig, TrainConfig, from_run, to_dict
from fastflag.files import InputError, read_json, reading, write_atomic
from fastflag.learn.checkpoint import read_checkpoint, read_trained, restore_policy
from fastflag.market import streams
from fastflag.market.bars import Market
from fastflag.market.fingerprint import fingerprint
from fastflag.market.periods import days_of, days_within, split_days
from fastflag.market.sources import names_in
from fastflag.model.arithmetic import device_of, resolved
from fastflag.model.model_config import ModelConfig
from fastflag.model.weights import Weights, open_weights
from fastflag.policy.table import Policy
from fastflag.prompt.tokens import Tokenizer
from fastflag.prompt.world import World

_LOG = logging.getLogger(__name__)

OTHER_MARKET = "the training days' bars or news are not those that the run was trained on"

_MAY_CHANGE = ("memory_budget", "kernels", "graphs")
# What a training puts into its folder.
_WRITTEN = ("config.json", "metrics.jsonl", "checkpoint", "backtest.json", "report.html")


def read_config(run: Path) -> TrainConfig:
    """The configuration of a run.

    Raises InputError for a folder that is no run, and for a dtype that a hand has left open.
    """
    path = run / "config.json"
    document = read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"not a run's configuration, {path}")
    config = from_run(document, str(path))
    if config.policy.dtype == "auto":
        known = "bf16, fp16 or fp32"
        raise InputError(f"config key 'policy.dtype' of a run is {known}, not 'auto', {path}")
    return config


def changed_by_hand(run: Path) -> str:
    """The first setting in RUN/config.json that is not what the run was trained by, in words; empty
    where there is none, and where there is no checkpoint to tell. Raises InputError as
    `read_config` does."""
    trained = read_trained(run)
    if trained is None:
        return ""
    stored = to_dict(from_run(trained, str(run / "checkpoint" / "state.json")))
    now = to_dict(read_config(run))
    now["total_timesteps"] = stored["total_timesteps"]  # which lengthening a run changes
    # Where things lie; what they hold is known by their fingerprints.
    for section, name in (("data", "data"), ("data", "news"), ("policy", "model")):
        now[section][name] = stored[section][name]
    # A run that goes on may take others of these.
    for name in ("device", *_MAY_CHANGE):
        now["policy"][name] = stored["policy"][name]
    return _first_difference(now, stored)


def warn_of_changes(run: Path) -> None:
    """A damaged checkpoint is the business of who needs one, and no word is said of it."""
    with suppress(InputError):
        if changed := changed_by_hand(run):
            told = "fastflag: changed since the run was trained: %s, %s"
            _LOG.warning(told, changed, run / "config.json")


def check_claim(run: Path, config: TrainConfig, resume: bool) -> None:
    """Raises InputError for a run in the way, files that are nobody's run, what is no folder, or,
    with `resume`, a run of another configuration; more time steps make it no other.

    A run that failed before its first checkpoint has nothing to lose and is in nobody's way.
    """
    _refuse_no_folder(run)
    if not _is_run(run):
        for name in _WRITTEN:
            if (run / name).exists():
                raise InputError(f"{name} is there and of no run: name another folder, {run}")
        return
    if not _has_checkpoint(run):
        return
    if not resume:
        raise InputError(f"holds a run already: go on with --resume or name another, {run}")
    stored, asked = to_dict(read_config(run)), to_dict(config)
    # They bear on rounding alone, and what was out of memory, or on another machine, may need
    # others to go on.
    for name in _MAY_CHANGE:
        stored["policy"][name] = asked["policy"][name]
    stored["total_timesteps"] = max(stored["total_timesteps"], asked["total_timesteps"])
    difference = _first_difference(stored, asked)
    if difference:
        raise InputError(f"the run to resume was started with another {difference}, {run}")


def _refuse_no_folder(run: Path) -> None:
    """Raises InputError where RUN, or what it should lie in, is there and no folder."""
    for path in (run, *run.parents):
        with reading(f"--out {run}"):  # a name too long is looked up in vain
            if path.is_dir():
                return
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path} is a symbolic link to nothing, --out {run}")
        if path.exists():
            raise InputError(f"{path} is not a folder, --out {run}")


@contextmanager
def claim(
    run: Path, config: TrainConfig, resume: bool, prints: dict[str, str] | None = None
) -> Iterator[bool]:
    """Makes RUN/ this configuration's for as long as the context lasts; True where it has a
    checkpoint to go on from. `prints` are the `fingerprints` of what is trained on. Raises
    InputError as `check_claim` does, where that is not what the run was trained on, and where
    another training holds the folder."""
    _refuse_no_folder(run)
    run.mkdir(parents=True, exist_ok=True)
    with _locked(run):
        # What was free when training was asked for need not be now.
        check_claim(run, config, resume)
        resumes = _has_checkpoint(run)
        if not resumes:
            kept = prints or {}
            stored = kept if len(kept) > 1 else "".join(kept.values())
            document = to_dict(config) | {"fastflag": fastflag.__version__, "market": stored}
            write_atomic(run / "config.json", json.dumps(document, indent=1))
        else:
            if not _is_of(run, prints or {}):
                raise InputError(f"{OTHER_MARKET}, {config.data.data}")
            _extend(run, config)
        yield resumes


def _extend(run: Path, config: TrainConfig) -> None:
    """A longer run says so before it goes on, else a resumed one would end where it first did; and
    so does one that goes on with other implementations."""
    before = read_json(run / "config.json")
    kept = {"kernels": config.policy.kernels, "graphs": config.policy.graphs}
    document = before | {
        "total_timesteps": config.total_timesteps,
        "policy": before["policy"] | kept,
    }
    if document != before:
        write_atomic(run / "config.json", json.dumps(document, indent=1))


def fingerprints(config: TrainConfig, market: Market) -> dict[str, str]:
    """By symbol, what training reads of it; those that are held out are not there."""
    learnt = learnt_symbols(config, market)
    return {
        symbol: fingerprint(each, symbol, days_within(each, config.data.train, "--train"))
        for symbol, each in zip(market.symbols, market.each, strict=True)
        if symbol in learnt
    }


def learnt_symbols(config: TrainConfig, market: Market) -> tuple[str, ...]:
    """The symbols of `market` that are learnt from: those that are not held out whole."""
    held_out = _held_out(config)
    return tuple(name for name in market.symbols if name not in held_out)


def _held_out(config: TrainConfig) -> tuple[str, ...]:
    given = config.data.split_by_symbol
    return names_in(given, "--split-by-symbol") if given else ()


def training_spans(world: World, config: TrainConfig) -> list[range]:
    """The moments that are learnt from, of each symbol that is; of portfolios those of the market.
    Raises InputError where one is held out that is not there, where all are, and where one has
    fewer training days than an episode."""
    if config.task == "portfolio":
        return world.within(config.data.train)
    for name in _held_out(config):
        world.market.column(name)
    learnt, names = learnt_symbols(config, world.market), world.market.symbols
    if not learnt:
        given = config.data.split_by_symbol
        raise InputError(f"no symbol is left to learn from, --split-by-symbol {given}")
    spans = dict(zip(names, world.within(config.data.train), strict=True))
    longest = max(len(spans[name]) for name in learnt)
    days = min(config.simulator.horizon + 1, longest)
    short = [name for name in learnt if len(spans[name]) < days]
    if short:
        raise InputError(
            f"fewer training days than an episode's {days}: hold it out (--split-by-symbol) or "
            f"lower --horizon, {', '.join(short)}"
        )
    return [spans[name] for name in learnt]


def trained_on(run: Path, config: TrainConfig, market: Market) -> bool:
    """Whether `market` holds the bars and news that the run was trained on, of those of its symbols
    that were learnt from. Raises InputError where it does not reach over the training days."""
    if learnt_symbols(config, market):
        days_of(market, config.data.train)
    return _is_of(run, fingerprints(config, market))


def _is_of(run: Path, prints: dict[str, str]) -> bool:
    """True of an earlier version's run too, which recorded no fingerprint. One symbol's stands
    alone, without its name: a file may be given another one. Of several some may be asked for."""
    stored = read_json(run / "config.json").get("market") or prints
    if isinstance(stored, str):
        return [*prints.values()] == [stored]
    return all(stored.get(name) == value for name, value in prints.items())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock is the process's: one that is killed leaves none."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another training is at work in it, {folder}") from None
        yield
    finally:
        os.close(handle)


def with_periods(config: TrainConfig, market: Market) -> TrainConfig:
    """The configuration with its periods as dates, so that another version of the data file can't
    move them. Raises InputError where they don't fit the market."""
    periods = [
        f"{market.dates[days[0]]}..{market.dates[days[-1]]}"
        for days in split_days(market, config.data.train, config.data.test, ("--train", "--test"))
    ]
    data = dataclasses.replace(config.data, train=periods[0], test=periods[1])
    return dataclasses.replace(config, data=data)


def as_it_began(config: TrainConfig, run: Path, resume: bool) -> TrainConfig:
    """The configuration with the dtype and the implementations of the run that it goes on with,
    where it leaves them open: another dtype, or another kernel, would be other numbers."""
    if not (resume and _has_checkpoint(run)):
        return config
    policy, kept = config.policy, read_config(run).policy
    names = [name for name in ("dtype", "kernels", "graphs") if getattr(policy, name) == "auto"]
    changes = {name: getattr(kept, name) for name in names}
    return dataclasses.replace(config, policy=dataclasses.replace(policy, **changes))


def with_dtype(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    """The configuration with a dtype: its own, or what this device is fastest in. Raises InputError
    for fp16 on a CPU, where nothing is computed in it."""
    if config.policy.dtype == "fp16" and device_of(config.policy.device).type == "cpu":
        raise InputError(
            "a CPU computes fp16 as fp32, of rounded matrices: train in bf16 or fp32, --dtype fp16"
        )
    return dataclasses.replace(config, policy=resolved(config.policy, model))


def updates_done(run: Path, resume: bool) -> int:
    """Of the run that is gone on with; 0 where it is a new one."""
    if not (resume and _has_checkpoint(run)):
        return 0
    state = read_json(run / "checkpoint" / "state.json")
    updates = state.get("step") if isinstance(state, dict) else 0
    return updates if isinstance(updates, int) else 0  # what is damaged is refused when it is read


def _is_run(run: Path) -> bool:
    try:
        return "fastflag" in read_json(run / "config.json")
    except (InputError, TypeError):
        return False


def _has_checkpoint(run: Path) -> bool:
    return (run / "checkpoint" / "state.json").exists()


def build(config: TrainConfig, market: Market, weights: Weights) -> tuple[World, Policy]:
    """The world that a configuration names, and its untrained policy.

    Raises InputError where the symbol is not there, or the policy or the tokenizer does not fit the
    model.
    """
    tokenizer = Tokenizer.load(weights.tokenizer_path)
    if tokenizer.largest >= weights.config.vocabulary:
        raise InputError(
            f"the tokenizer knows token {tokenizer.largest}, the model {weights.config.vocabulary} "
            f"tokens, {weights.source}"
        )
    world = _world(config, market, tokenizer)
    action_words = world.prompter.action_words
    action_tokens = [int(tokenizer.encode(word)[0]) for word in action_words]
    if config.policy.head == "lm" and len({*action_tokens}) < len(action_tokens):
        words = ", ".join(repr(word) for word in action_words)
        raise InputError(
            f"two of the words {words} begin with the same token, which an lm head can't tell "
            f"apart: choose another --head, {weights.source}"
        )
    initial = streams.initial_weights(config.seed)
    return world, Policy(weights, config.policy, action_tokens, initial)


def _world(config: TrainConfig, market: Market, tokenizer: Tokenizer) -> World:
    seed = streams.environments(config.seed)
    if config.task == "single":
        symbol, rules = config.data.symbol, config.simulator
        return World.of(config.prompt, market, symbol, rules, tokenizer, seed)
    if config.data.split_by_symbol:
        raise InputError("a portfolio holds all its symbols, --split-by-symbol")
    rules = PortfolioConfig.of(config.simulator, config.portfolio)
    return World.of_portfolio(config.prompt, market, rules, tokenizer, seed)


def load_policy(run: Path, config: TrainConfig, market: Market) -> tuple[World, Policy]:
    """The trained policy of a run, and its world over `market`.

    Raises InputError for a checkpoint that is missing, damaged, or of another model.
    """
    checkpoint = read_checkpoint(run)
    weights = open_weights(config.policy.model)
    world, policy = build(config, market, weights)
    restore_policy(checkpoint, policy, weights.fingerprint, run)
    return world, policy


def _first_difference(stored: dict[str, Any], asked: dict[str, Any]) -> str:
    """The first key whose values differ, with both values; empty where none does."""
    for key, value in stored.items():
        if isinstance(value, dict):
            if inner := _first_difference(value, asked[key]):
                return inner
        elif value != asked[key]:
            return f"{key} ({value!r}, not {asked[key]!r})"
    return ""
