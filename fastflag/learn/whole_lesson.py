"""An update's largest lesson: every account text on every day, and every action of each."""

import numpy as np
import torch

from fastflag.config import PlanConfig
from fastflag.learn.lesson import Lesson
from fastflag.learn.samples import Before, Samples
from fastflag.market.tasks.single import ACTIONS
from fastflag.prompt.prompts import PromptSet


def whole_lesson(
    batch: PlanConfig, vocabulary: int, device: torch.device, actions: int = len(ACTIONS)
) -> Lesson:
    """Of random tokens, with advantages at random."""
    random = np.random.default_rng(0)
    prefixes, suffixes = (
        tuple(random.integers(1, vocabulary, (count, length)).astype(np.int32))
        for count, length in (
            (batch.days, batch.prefix_tokens),
            (batch.texts, batch.suffix_tokens),
        )
    )
    pairs = np.indices((batch.days, batch.texts), np.int32).reshape(2, -1).T.copy()
    count = len(pairs)
    prompts = PromptSet(
        prefixes,
        suffixes,
        pairs,
        np.zeros(count, np.int8),
        np.ones((count, actions), bool),
        np.arange(0, count, batch.texts, dtype=np.int32),
    )
    rows, one = np.arange(count).repeat(actions), np.ones(count * actions)
    value, uniform = torch.zeros(count), torch.full((count, actions), -float(np.log(actions)))
    samples = Samples(
        row=rows,
        action=np.tile(np.arange(actions), count),
        weight=one,
        advantage=random.standard_normal(len(rows)),
        advantage_spread=0 * one,
        target=0 * one,
        target_spread=0 * one,
        old_log_probability=-one * np.log(actions),
        before=Before(value.to(device), uniform.to(device)),
    )
    return Lesson(prompts, samples.placed(), len(rows), 0.0)
