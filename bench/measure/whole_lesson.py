"""An update's largest lesson: every account text on every day, and every action of each."""

import numpy as np
import torch

from bench.measure.cases import DAYS, PREFIX, SUFFIX, SUFFIXES
from fastflag.learn.lesson import Lesson
from fastflag.learn.objective import Samples
from fastflag.market.simulator import ACTIONS
from fastflag.prompt.prompts import PromptSet


def whole_lesson(vocabulary: int, device: torch.device) -> Lesson:
    """Of random tokens, with advantages at random."""
    actions = len(ACTIONS)
    random = np.random.default_rng(0)
    prefixes, suffixes = (
        tuple(random.integers(1, vocabulary, (count, length)).astype(np.int32))
        for count, length in ((DAYS, PREFIX), (SUFFIXES, SUFFIX))
    )
    pairs = np.indices((DAYS, SUFFIXES), np.int32).reshape(2, -1).T.copy()
    count = len(pairs)
    prompts = PromptSet(
        prefixes,
        suffixes,
        pairs,
        np.zeros(count, np.int8),
        np.ones((count, actions), bool),
        np.arange(0, count, SUFFIXES, dtype=np.int32),
    )
    rows = torch.arange(count).repeat_interleave(actions)
    action = torch.arange(actions).repeat(count)
    one = torch.ones(len(rows))
    uniform = -one * float(np.log(actions))
    samples = Samples(
        action=action,
        weight=one,
        advantage=torch.randn(len(rows), generator=torch.Generator().manual_seed(0)),
        advantage_spread=0 * one,
        target=0 * one,
        target_spread=0 * one,
        old_log_probability=uniform,
        old_value=0 * one,
        initial=uniform[:, None].expand(-1, actions).contiguous(),
    )
    placed = {
        name: c.to(device) for name, c in vars(samples).items() if isinstance(c, torch.Tensor)
    }
    return Lesson(prompts, rows.to(device), Samples(**placed), len(rows), 0.0)
