"""Environment steps a second, rollout and update: FastFLAG beside transformers + PEFT.

    python -m bench.train [--json] [--rounds 3] [--envs 1 64 1024 4096 65536] [--dtype auto]

On the same days, prompts, weights, adapters, heads and loss, in one process, in turn, so that a
slow moment of the machine slows all. Each side computes in the dtype that is fastest for it. The
plain baseline runs one full prompt for every environment step, at the fastest of several batch
sizes; the other one keeps each day's prefix in transformers' own cache during the rollout, and
trains on full prompts. Neither is charged for the prompts that centre the features,
though FastFLAG is. Of more environments than one a baseline is measured on a part, scaled by
environment step, and its row says so.

FASTFLAG_BENCH_MODEL and FASTFLAG_BENCH_DATA name another model and other bars (measure/loop.py).
"""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from bench.measure.anatomy import update_rows
from bench.measure.loop import STEPS, Trainer, configuration, seconds
from bench.measure.results import Row, publish
from bench.rivals.ablations import ablation_rows
from bench.rivals.peft_loop import PART, Baseline, Fastest
from bench.rivals.peft_policy import PlainPolicy
from fastflag.config import AlgorithmConfig
from fastflag.learn.batch import start_accounts
from fastflag.learn.lesson import estimate
from fastflag.learn.objective import loss_of
from fastflag.learn.rollout import rollout
from fastflag.learn.step import gather
from fastflag.model.arithmetic import DTYPES


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
    part = "" if envs == 1 else f"measured on {PART} steps and scaled"
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
    loss_of(*gather(table, lesson.samples.row), lesson.samples, algorithm)[0].backward()
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
            loss = loss_of(*gather(table, lesson.samples.row), lesson.samples, some[1])[0]
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
        Row("gradient: variance", f"64 x {STEPS}", name, value, "of its square", note=note)
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
