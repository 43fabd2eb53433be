"""Environment steps a second, rollout and update: FastFLAG beside transformers + PEFT.

    python -m bench.train [--json] [--rounds 3] [--envs 1 64 1024 4096 65536] [--dtype auto]

On the same days, prompts, weights, adapters, heads and loss, in one process, in turn, so that a
slow moment of the machine slows all. Each side computes in the dtype that is fastest for it. The
plain baseline runs one full prompt for every environment step, at the fastest of several batch
sizes; the other one keeps each day's prefix in transformers' own cache during the rollout, and
trains on full prompts. Neither is charged for the reference prompts that centre the features,
though FastFLAG is. Of more environments than one a baseline is
measured on a part, scaled by environment step, and its row says so.

FASTFLAG_BENCH_MODEL and FASTFLAG_BENCH_DATA name another model and other bars of the same days, for
a machine without the demo's (bench/standin.py makes both).
"""

import argparse
import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.anatomy import update_rows
from bench.baseline import PlainPolicy
from bench.results import Row, publish
from fastflag.config import PRESETS, AlgorithmConfig, TrainConfig
from fastflag.learn.batch import Batch, start_accounts
from fastflag.learn.lesson import Lesson, estimate
from fastflag.learn.objective import loss_of
from fastflag.learn.progress import PhaseTimer
from fastflag.learn.rollout import rollout
from fastflag.learn.run import build
from fastflag.learn.update import _gather, make_optimizer, update
from fastflag.market.bars import Market, split_days
from fastflag.market.sources import load
from fastflag.model.arithmetic import DTYPES, resolved
from fastflag.model.llama import prefix_pass, suffix_pass
from fastflag.model.shared_prefix import SuffixLayout
from fastflag.model.weights import open_weights
from fastflag.policy.heads import Reference, Statistics
from fastflag.policy.table import Policy, Table
from fastflag.policy.trunk import digest_of
from fastflag.prompt.prompts import PromptSet

_PART = 64  # samples that a baseline of many is measured on
_BATCHES = (4, 8, 16, 32, 64)
_DAYS = 63


def configuration(envs: int, dtype: str = "auto", account: str = "stepped") -> TrainConfig:
    """64 days of AAPL in prompts of about 150 + 14 tokens; one environment lives 40 of them, which
    is the paper's setting. Exact accounts are told in the paper's layout."""
    demo = given(PRESETS["demo"])
    steps = 40 if envs == 1 else _DAYS
    layout = "default" if account == "stepped" else "paper"
    return dataclasses.replace(
        demo,
        prompt=dataclasses.replace(demo.prompt, window=16, account=account, layout=layout),
        policy=dataclasses.replace(demo.policy, dtype=dtype),
        simulator=dataclasses.replace(demo.simulator, horizon=steps),
        rollout=dataclasses.replace(demo.rollout, num_envs=envs, num_steps=steps),
    )


def given(config: TrainConfig) -> TrainConfig:
    """The configuration with the environment's model and bars, and a trunk that this machine can
    store: NF4 is quantised by bitsandbytes."""
    policy, data = config.policy, config.data
    stored = policy.trunk_weights if importlib.util.find_spec("bitsandbytes") else "bf16"
    model = os.environ.get("FASTFLAG_BENCH_MODEL", policy.model)
    bars = os.environ.get("FASTFLAG_BENCH_DATA", data.data)
    return dataclasses.replace(
        config,
        policy=dataclasses.replace(policy, model=model, trunk_weights=stored),
        data=dataclasses.replace(data, data=bars),
    )


class Trainer:
    """FastFLAG's loop, an update at a time."""

    def __init__(self, config: TrainConfig, market: Market | None = None):
        market = market or load(config.data)
        self.weights = open_weights(config.policy.model)
        policy = resolved(config.policy, self.weights.config)
        self.config = config = dataclasses.replace(config, policy=policy)
        self.world, self.policy = build(config, market, self.weights)
        self.days, _ = split_days(market, config.data.train, config.data.test)
        self.optimizer = make_optimizer(self.policy, config.algorithm)
        self.accounts = start_accounts(config.rollout, config.simulator.cash)
        self.phase, self.updates = PhaseTimer(), 0

    def collect(self, config: TrainConfig) -> tuple[Table, Iterator[Batch]]:
        self.updates += 1
        world, number = self.world, self.updates - 1
        return rollout(self.policy, world, [self.days], self.accounts, config, number, self.phase)

    def every_step(self) -> tuple[Table, Lesson]:
        """A rollout whose samples are not added up."""
        algorithm = dataclasses.replace(self.config.algorithm, minibatch_size=10**9)
        table, batches = self.collect(dataclasses.replace(self.config, algorithm=algorithm))
        return table, estimate(table, batches, algorithm, self.phase)

    def update(self) -> dict[str, float]:
        table, batches = self.collect(self.config)
        lesson = estimate(table, batches, self.config.algorithm, self.phase)
        with self.phase("update"):
            return update(self.policy, self.optimizer, table, lesson, self.config.algorithm, 0)


def seconds(work: Callable[[], object]) -> float:
    """Until the device is done, too."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Fastest(NamedTuple):
    """How the plain loop is fastest: its dtype, the prompts of a forward in rollout, and those of a
    forward and backward in update."""

    dtype: str
    rollout_batch: int
    update_batch: int


class Baseline:
    """Seconds of the plain loops over the prompts of a batch."""

    def __init__(self, trainer: Trainer, fastest: Fastest | None):
        """`fastest` as another one of the same model found it."""
        table, lesson = trainer.every_step()
        self.algorithm = trainer.config.algorithm
        self.prompts = lesson.prompts
        # They come day by day: a part of them is of one day, whose prefix the cache holds.
        self.rows, self.samples = lesson.samples.row.cpu().numpy(), lesson.samples
        self.statistics = dataclasses.replace(
            table.statistics,
            mean=table.statistics.mean.detach(),
            deviation=table.statistics.deviation.detach(),
        )
        made = {
            dtype: partial(PlainPolicy, trainer.policy, trainer.weights, DTYPES[dtype])
            for dtype in ([fastest.dtype] if fastest else DTYPES)
        }
        if fastest:
            self.fastest, self.plain = fastest, made[fastest.dtype]()
        else:
            self.fastest = self._fastest(made)

    def _fastest(self, made: dict[str, Callable[[], PlainPolicy]]) -> Fastest:
        """The dtype that rolls a few prompts out in the least time, and with it batch sizes."""
        times = {}
        for dtype, make in made.items():
            self.plain = make()
            times[dtype] = min(seconds(lambda: self.roll(range(4), 4)) for _ in range(2))
        dtype = min(times, key=times.__getitem__)
        self.plain = made[dtype]()
        tried = range(min(_PART, len(self.rows)))
        rollout = min(_BATCHES, key=lambda n: seconds(lambda: self.roll(tried, n)))
        learning = min(_BATCHES, key=lambda n: seconds(lambda: self.learn(tried, n)))
        return Fastest(dtype, rollout, learning)

    def roll(self, samples: range, batch: int) -> None:
        with torch.no_grad():
            for some in _parts(samples, batch):
                rows = self.rows[some]
                features = self.plain.features([self.prompts.tokens(row) for row in rows])
                self.plain.heads(features, self.prompts, rows, self.statistics)

    def roll_with_cache(self, samples: range, envs: int) -> None:
        """As many environments of a day as there are share its prefix's cache."""
        with torch.no_grad():
            for some in _parts(samples, min(envs, _PART)):
                rows = self.rows[some]
                prefix = self.prompts.prefixes[self.prompts.pairs[rows[0], 0]]
                suffixes = [self.prompts.suffixes[self.prompts.pairs[row, 1]] for row in rows]
                cache = self.plain.prefix_cache(prefix, len(rows))
                features = self.plain.suffix_features(cache, len(prefix), suffixes)
                self.plain.heads(features, self.prompts, rows, self.statistics)

    def learn(self, samples: range, batch: int) -> None:
        for some in _parts(samples, batch):
            rows = self.rows[some]
            features = self.plain.features([self.prompts.tokens(row) for row in rows])
            made = self.plain.heads(features, self.prompts, rows, self.statistics)
            loss_of(*made, self.samples.take(torch.from_numpy(some)), self.algorithm)[0].backward()

    def seconds_of_update(self, envs: int, steps: int) -> tuple[float, float]:
        """Of the plain loop, and of the one with a cache in its rollout."""
        part = range(min(len(self.rows), _PART))
        rolled, learnt = self._seconds(envs, part)
        # A part of _PART environments pays for one prefix; so does a day of all of them.
        cached = seconds(lambda: self.roll_with_cache(part, envs))
        scale = envs * steps / len(part)
        return scale * (rolled + learnt), scale * (cached + learnt)

    def seconds_of_a_step(self, envs: int) -> float:
        """Of the plain loop, for each environment step."""
        part = range(min(len(self.rows), _PART))
        return sum(self._seconds(envs, part)) / len(part)

    def _seconds(self, envs: int, part: range) -> tuple[float, float]:
        rolled = seconds(lambda: self.roll(part, min(self.fastest.rollout_batch, envs)))
        return rolled, seconds(lambda: self.learn(part, self.fastest.update_batch))


def _parts(samples: range, size: int) -> list[np.ndarray]:
    return [np.array(samples[start : start + size]) for start in range(0, len(samples), size)]


def speed_rows(
    envs: int, rounds: int, fastest: Fastest | None, dtype: str, account: str = "stepped"
) -> tuple[list[Row], Fastest]:
    """Rows of one number of environments, and how the baseline is fastest."""
    trainer = Trainer(configuration(envs, dtype, account))
    steps = trainer.config.rollout.num_steps
    cold = seconds(trainer.update)
    baseline = Baseline(trainer, fastest)
    trainer.update()
    trainer.phase.take()
    ours, plain, cached = [], [], []
    for _ in range(rounds):
        ours.append(seconds(trainer.update))
        one, other = baseline.seconds_of_update(envs, steps)
        plain.append(one)
        cached.append(other)
    phases = {name: value / rounds for name, value in trainer.phase.take().items()}
    exact = ", exact accounts" if account == "exact" else ""
    count, shape = envs * steps, f"{envs} x {steps}{exact}"
    part = "" if envs == 1 else f"measured on {_PART} steps and scaled"
    chosen, own = baseline.fastest, trainer.config.policy.dtype
    sizes = f"batches of {min(chosen.rollout_batch, envs)} and {chosen.update_batch}"
    note = ", ".join(filter(None, (chosen.dtype, sizes, part)))

    def row(provider: str, times: list[float], against: list[float] | None, note: str) -> Row:
        ratio = None if against is None else float(np.median(np.array(against) / np.array(times)))
        name = (
            "" if against is None else ("hf + peft" if against is plain else "hf with prefix cache")
        )
        value = count / float(np.median(times))
        return Row("steps a second", shape, provider, value, "steps/s", ratio, name, note)

    rows = [
        row("hf + peft", plain, None, note),
        row("hf with prefix cache", cached, plain, note),
        row("fastflag", ours, plain, f"{own}, trunk cache warm"),
        row("fastflag", ours, cached, f"{own}, trunk cache warm"),
        Row("seconds of an update", shape, "fastflag", float(np.median(ours)), "s"),
        Row("seconds of the first update", shape, "fastflag", cold, "s", note="as the caches were"),
    ]
    rows += [Row(f"phase: {name}", shape, "fastflag", value, "s") for name, value in phases.items()]
    widths = trainer.weights.config.width, trainer.weights.config.mlp_width
    rows += update_rows(trainer.update, seconds, shape, own, widths, rounds)
    return rows, baseline.fastest


def gradient_rows(dtype: str) -> list[Row]:
    """The same batch, one forward of ours and one full prompt for every environment step, both
    against the latter in fp64: what each loses to rounding."""
    trainer = Trainer(configuration(1, dtype))
    trainer.update()  # adapters start at zero, where half of their gradients are zero
    table, lesson = trainer.every_step()
    algorithm: AlgorithmConfig = trainer.config.algorithm
    trainer.policy.zero_grad()
    loss_of(*_gather(table, lesson.samples.row), lesson.samples, algorithm)[0].backward()
    given = lesson.prompts, lesson.samples.row.cpu().numpy(), lesson.samples, algorithm
    exact = PlainPolicy(trainer.policy, trainer.weights, torch.float64).gradient(*given)
    made = {
        "fastflag": {name: p.grad for name, p in trainer.policy.named_parameters()},
        "hf + peft": PlainPolicy(trainer.policy, trainer.weights).gradient(*given),
    }
    shape, against = f"1 x 40, {dtype}", "hf + peft in fp64"
    rows_made = []
    for provider, gradient in made.items():
        one, other = (torch.cat([g[name].flatten() for name in exact]) for g in (gradient, exact))
        one = one.to(other.dtype)
        error = ((one - other).norm() / other.norm()).item()
        cosine = torch.nn.functional.cosine_similarity(one, other, dim=0).item()
        rows_made += [
            Row("gradient: relative error", shape, provider, error, "", against=against),
            Row("gradient: cosine", shape, provider, cosine, "", against=against),
        ]
    return rows_made


def ablation_rows(rounds: int) -> list[Row]:
    """Forward and backward of what 64 environments visited, with one idea taken out at a time."""
    trainer = Trainer(configuration(64))
    _, lesson = trainer.every_step()
    trainer.update()
    policy, prompts = trainer.policy, lesson.prompts
    every = np.concatenate([prompts.reference, lesson.samples.row.cpu().numpy()])
    variants: dict[str, tuple[Policy, PromptSet, Callable[..., Table]]] = {
        "fastflag": (policy, prompts, Policy.evaluate),
        "without sharing prefixes": (policy, _unshared(prompts), Policy.evaluate),
        "without distinct prompts": (policy, _repeated(prompts, every), Policy.evaluate),
        "without the trunk cache": (_uncached(trainer), prompts, Policy.evaluate),
        "without last-token-only": (policy, prompts, _evaluate_all_tokens),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, (chosen, some, evaluate) in variants.items():
            took = seconds(lambda: evaluate(chosen, some).value.sum().backward())  # noqa: B023
            if number:  # the first fills caches
                times[name].append(took)
    base = np.array(times["fastflag"])
    return [
        Row(
            "forward and backward",
            f"64 x {_DAYS}",
            name,
            float(np.median(took)),
            "s",
            float(np.median(base / np.array(took))),
            "fastflag",
        )
        for name, took in times.items()
    ]


def _unshared(prompts: PromptSet) -> PromptSet:
    """Each prompt a text of its own after the first token, which all have in common."""
    whole = [prompts.tokens(row) for row in range(len(prompts.pairs))]
    pairs = np.stack([np.zeros(len(whole)), np.arange(len(whole))], axis=1).astype(np.int32)
    return dataclasses.replace(
        prompts,
        prefixes=(whole[0][:1],),
        suffixes=tuple(tokens[1:] for tokens in whole),
        pairs=pairs,
    )


def _repeated(prompts: PromptSet, rows: np.ndarray) -> PromptSet:
    """One prompt for every environment step, equal ones too."""
    return dataclasses.replace(
        prompts,
        pairs=prompts.pairs[rows],
        side=prompts.side[rows],
        allowed=prompts.allowed[rows],
        reference=np.arange(len(prompts.reference), dtype=np.int32),
    )


def _uncached(trainer: Trainer) -> Policy:
    none = dataclasses.replace(trainer.config.policy, trunk_cache_mb=0, trunk_disk_mb=0)
    return Policy(trainer.weights, none, [0, 1, 2], trainer.config.seed)


def _evaluate_all_tokens(policy: Policy, prompts: PromptSet) -> Table:
    """As Policy.evaluate, but the last layer computes every token of prefixes and suffixes."""
    hidden = policy.trunk.prefix_states({digest_of(prefix): prefix for prefix in prompts.prefixes})
    padded = torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True)
    whole, keys_values = prefix_pass(policy.top, padded, [len(states) for states in hidden])
    order = np.argsort(prompts.pairs[:, 0], kind="stable")
    states = policy.trunk.suffix_states(prompts)
    lengths = torch.tensor([len(states[row]) for row in order])
    suffixes = torch.nn.utils.rnn.pad_sequence([states[row] for row in order], batch_first=True)
    counts = np.bincount(prompts.pairs[:, 0]).tolist()
    layout = SuffixLayout.build(counts, list(map(len, hidden)), lengths, suffixes.shape[1])
    last = suffix_pass(policy.top, suffixes, keys_values, layout)
    features = last[torch.arange(len(last)), lengths - 1].float() + 0 * whole.sum()
    sides = prompts.side[order].astype(np.int64) + 1
    statistics = Statistics.of(features, Reference.of(np.arange(len(order)), sides, policy.device))
    side = torch.from_numpy(sides)
    value = policy.value_head(statistics.centre(features, side), side)[:, 0]
    return Table(features, value, statistics)


def variance_rows(updates: int = 10, seeds: int = 16) -> list[Row]:
    """How far the gradient of 64 environments' batch is from that of another seed's: mean squared
    distance from the mean gradient, over its square. Of one policy, a little trained, and from the
    same rollouts for both estimators."""
    trainer = Trainer(configuration(64))
    for _ in range(updates):
        trainer.update()
    config = trainer.config
    sampled = dataclasses.replace(config.algorithm, vf_coef=0.0, ent_coef=0.0)
    every = dataclasses.replace(sampled, estimator="all-actions")
    found: dict[str, list[torch.Tensor]] = {"sampled": [], "all-actions": []}
    for seed in range(seeds):
        world = dataclasses.replace(trainer.world, seed=seed)
        accounts = start_accounts(config.rollout, config.simulator.cash)
        branching = dataclasses.replace(config, algorithm=every)
        table, batches = rollout(
            trainer.policy, world, [trainer.days], accounts, branching, 0, trainer.phase
        )
        (batch,) = batches
        for name, some in {
            "sampled": (dataclasses.replace(batch, branches=None), sampled),
            "all-actions": (batch, every),
        }.items():
            lesson = estimate(table, [some[0]], some[1], trainer.phase)
            trainer.policy.zero_grad()
            loss = loss_of(*_gather(table, lesson.samples.row), lesson.samples, some[1])[0]
            loss.backward(retain_graph=name == "sampled")
            parameters = [p for p in trainer.policy.parameters() if p.grad is not None]
            found[name].append(torch.cat([p.grad.flatten() for p in parameters]))
    values = {}
    for name, gradients in found.items():
        all_of_them = torch.stack(gradients)
        mean = all_of_them.mean(0)
        # The mean's own square is too large by a part of the variance.
        variance = (all_of_them - mean).pow(2).sum(1).sum() / (seeds - 1)
        values[name] = (variance / (mean.pow(2).sum() - variance / seeds)).item()
    note = f"after {updates} updates, {seeds} seeds"
    return [
        Row("gradient: variance", f"64 x {_DAYS}", name, value, "of its square", note=note)
        for name, value in values.items()
    ]


def memory_rows(envs: list[int]) -> list[Row]:
    """Peak memory of a process that makes one update, each in one of its own; of the largest also
    within a budget."""
    rows = []
    for count, budget in [*((count, 0) for count in envs), (max(envs), 100)]:
        words = [sys.executable, "-m", "bench.train", "--peak", str(count), "--budget", str(budget)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        shape = f"{count} x {configuration(count).rollout.num_steps}"
        note = f"--memory-budget {budget}" if budget else ""
        rows.append(Row("peak memory", shape, "fastflag", float(done.stdout), "MB", note=note))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured")
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 64, 1024, 4096, 65536])
    parts = ["gradients", "speed", "exact", "variance", "ablations", "memory"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="FastFLAG's")
    parser.add_argument("--peak", type=int, help="print the peak memory of an update and stop")
    parser.add_argument("--budget", type=int, default=0, help="--memory-budget of that update")
    chosen = parser.parse_args()
    if chosen.peak:
        config = configuration(chosen.peak)
        policy = dataclasses.replace(config.policy, memory_budget=chosen.budget)
        trainer = Trainer(dataclasses.replace(config, policy=policy))
        trainer.update()
        print(_peak_megabytes())
        return
    rows = []
    if "gradients" in chosen.parts:
        rows += [row for dtype in ("fp32", "bf16") for row in gradient_rows(dtype)]
    if "speed" in chosen.parts:
        rows += all_speed_rows(chosen.envs, chosen.rounds, chosen.dtype)
    if "exact" in chosen.parts:
        rows += all_speed_rows([1], chosen.rounds, chosen.dtype, "exact")
    if "variance" in chosen.parts:
        rows += variance_rows()
    if "ablations" in chosen.parts:
        rows += ablation_rows(chosen.rounds)
    if "memory" in chosen.parts:
        rows += memory_rows(chosen.envs)
    publish("train", rows, chosen.json)


def all_speed_rows(
    numbers: list[int], rounds: int, dtype: str, account: str = "stepped"
) -> list[Row]:
    rows, fastest = [], None
    # The largest first: of one environment's 40 steps no batch of 64 can be tried.
    for envs in sorted(numbers, reverse=True):
        print(f"{envs} environments, {account} accounts", file=sys.stderr, flush=True)
        made, fastest = speed_rows(envs, rounds, fastest, dtype, account)
        rows += made
    return rows


def _peak_megabytes() -> float:
    """Not by getrusage: a process begins there with the peak of the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    main()
