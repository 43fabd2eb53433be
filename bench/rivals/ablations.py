"""FastFLAG without one of its ideas at a time."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from bench.measure.loop import STEPS, Trainer, configuration, seconds
from bench.measure.results import Row
from fastflag.market.tasks.single import ACTIONS
from fastflag.model.llama import prefix_pass, suffix_pass
from fastflag.model.shared_prefix import SuffixLayout
from fastflag.policy.heads import Centring, Statistics
from fastflag.policy.table import Policy, Table
from fastflag.policy.trunk import digest_of
from fastflag.prompt.prompts import PromptSet


def ablation_rows(rounds: int) -> list[Row]:
    """Forward and backward of what 64 environments visited, with one idea taken out at a time."""
    trainer = Trainer(configuration(64))
    _, lesson = trainer.every_step()
    trainer.update()
    policy, prompts = trainer.policy, lesson.prompts
    every = np.concatenate([prompts.centring, lesson.samples.row.cpu().numpy()])
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
            f"64 x {STEPS}",
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
        centring=np.arange(len(prompts.centring), dtype=np.int32),
    )


def _uncached(trainer: Trainer) -> Policy:
    none = dataclasses.replace(trainer.config.policy, trunk_cache_mb=0, trunk_disk_mb=0)
    return Policy(trainer.weights, none, range(len(ACTIONS)), trainer.config.seed)


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
    statistics = Statistics.of(features, Centring.of(np.arange(len(order)), sides, policy.device))
    side = torch.from_numpy(sides)
    value = policy.value_head(statistics.centre(features, side), side)[:, 0]
    return Table(features, value, statistics)
