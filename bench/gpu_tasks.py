"""What bench.gpu has measured on the GPU, each in a process of its own.

    python -m bench.gpu_tasks NAME [WORDS ...]

The last line is JSON. One that breaks the device breaks it for its process.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench import kernels
from bench.measure import roofline
from bench.measure.cases import (
    CASES,
    DAYS,
    MODELS,
    PREFIX,
    SMALL_CASES,
    SUFFIX,
    SUFFIXES,
    Memory,
    Model,
)
from bench.measure.loop import Trainer, configuration, given, seconds
from bench.measure.parts import Found
from bench.measure.results import Row
from bench.measure.standin import write_model
from bench.rivals.layer import layer_rows
from fastflag.config import PRESETS, PlanConfig
from fastflag.evaluate.doctor import examine
from fastflag.kernels.lora import lora_linear
from fastflag.learn.update import make_optimizer, update
from fastflag.learn.whole_lesson import whole_lesson
from fastflag.market.tasks.single import ACTIONS
from fastflag.model.proof.clock import clock
from fastflag.model.weights import open_weights
from fastflag.policy.plan import parts
from fastflag.policy.table import Policy


def _kernels_task(name: str, *green: str) -> Found:
    """The rows of one file of kernels; `green` where its tests have passed already."""
    timer = clock()
    roof = roofline.measured(timer)
    verdict = (lambda file: "") if green else kernels.tested
    bench = kernels.Bench(timer, roof, rounds=50, seconds=1.0, tested=verdict)
    made = list(bench.rows([case for case in CASES if case.file == name]))
    slower = [
        f"{row.what}, {row.shape}: {row.ratio:.2f} x {row.against}"
        for row in made
        if row.provider == "triton" and row.ratio is not None and row.ratio < 1
    ]
    return {
        "rows": [dataclasses.asdict(row) for row in [*kernels.roof_rows(roof), *made]],
        "refused": bench.refused,
        "absent": sorted(bench.absent),
        "slower": slower,
        "red": bool(bench.refused),
    }


def _small_task() -> int:
    for case in SMALL_CASES:
        case.run(Memory("cuda", rows=256))
    torch.cuda.synchronize()
    return len(SMALL_CASES)


def _layer_task() -> Found:
    """Forward and backward through a layer's seven adapted matrices, in NF4 and in bf16."""
    timer = clock()
    made = (
        layer_rows(model, tokens, lora_linear, timer)
        for model in MODELS
        for tokens in (2048, 4096, 8192)
    )
    return {"rows": [dataclasses.asdict(row) for row in chain.from_iterable(made)]}


def _update_task(variant: str) -> list[dict]:
    """One evaluation and one gradient step, where every account text is met on every day; and
    memory, beside what `doctor --plan` says."""
    config = configuration(64)
    weights = open_weights(config.policy.model)
    policy = Policy(weights, config.policy, range(len(ACTIONS)), config.seed)
    optimizer = make_optimizer(policy, config.algorithm)
    batch = PlanConfig(DAYS, SUFFIXES, PREFIX, SUFFIX)
    lesson = whole_lesson(batch, weights.config.vocabulary, policy.device)

    def one_update() -> None:
        table = policy.evaluate(lesson.prompts)
        update(policy, optimizer, table, lesson, config.algorithm, 0)

    for _ in range(5):  # the trunk is read, kernels are compiled and graphs captured
        one_update()
    torch.cuda.reset_peak_memory_stats()
    took = float(np.median([seconds(one_update) for _ in range(30)]))
    plan = parts(weights.config, config.policy, config.algorithm.optimizer, batch, len(ACTIONS))
    shape = f"{DAYS} days x {SUFFIXES} texts"
    peak = torch.cuda.max_memory_allocated() / 1e6
    rows = [
        Row("update", shape, variant, 1e3 * took, "ms"),
        Row("update: peak memory", shape, variant, peak, "MB"),
        Row("update: planned memory", shape, variant, sum(plan.values()) / 1e6, "MB"),
    ]
    return [dataclasses.asdict(row) for row in rows]


def _loop_task(variant: str) -> list[dict]:
    """Rollout and update of 64 environments, whose prompts are those that they meet."""
    trainer = Trainer(configuration(64))
    for _ in range(10):
        trainer.update()
    took = float(np.median([seconds(trainer.update) for _ in range(20)]))
    steps = trainer.config.rollout.num_steps
    row = Row("rollout + update", f"64 x {steps}", variant, 1e3 * took, "ms")
    return [dataclasses.asdict(row)]


def _paper_task(variant: str) -> list[dict]:
    """The paper's 13,860 steps in its own setting, on this machine's bars, with cold caches."""
    paper, demo = PRESETS["paper"], PRESETS["demo"]
    config = given(dataclasses.replace(paper, data=demo.data))
    policy = dataclasses.replace(config.policy, trunk_disk_mb=0)
    trainer = Trainer(dataclasses.replace(config, policy=policy))

    def budget() -> None:
        for _ in range(config.updates):
            trainer.update()

    shape = f"{config.updates} updates of 1 x {config.rollout.num_steps}"
    row = Row("the paper's budget", shape, variant, seconds(budget), "s")
    return [dataclasses.asdict(row)]


def _curve_task(dtype: str) -> list[dict[str, float]]:
    """Statistics of the first updates of a random model of two layers."""
    tiny = Model("tiny", 64, 128, 4, 2, 16, 8192)
    with TemporaryDirectory() as folder:
        model = str(write_model(Path(folder), tiny, layers=3))
        config = configuration(64, dtype)
        policy = dataclasses.replace(
            config.policy, model=model, trunk_weights=dtype, trunk_disk_mb=0
        )
        # Large rates, so that a wrong gradient soon shows.
        algorithm = dataclasses.replace(
            config.algorithm, learning_rate=2e-2, layer_learning_rate=5e-3
        )
        trainer = Trainer(dataclasses.replace(config, policy=policy, algorithm=algorithm))
        return [trainer.update() for _ in range(8)]


TASKS: dict[str, Callable[..., Any]] = {
    "doctor": examine,
    "kernels": _kernels_task,
    "small": _small_task,
    "layer": _layer_task,
    "update": _update_task,
    "loop": _loop_task,
    "paper": _paper_task,
    "curve": _curve_task,
}


def main() -> None:
    name, *words = sys.argv[1:]
    print(json.dumps(TASKS[name](*words)))


if __name__ == "__main__":
    main()
