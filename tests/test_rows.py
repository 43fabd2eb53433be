"""A row of the table has the same bits whatever is evaluated beside it, on a CPU."""

import numpy as np
import pytest
import torch
from small import DAYS, make_opinionated, small_config, small_market, small_world

from fastflag.market import simulator


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_alone_is_the_row_beside_others(tiny_model, dtype, threads):
    config = small_config(tiny_model, policy__dtype=dtype, simulator__positions="long_short")
    world, policy, _ = small_world(config, small_market())
    make_opinionated(policy)
    random = np.random.default_rng(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        days = list(range(4, DAYS))
        present = random.random((len(days), simulator.CODES)) < 0.01
        present[:, simulator.CODES // 2] = True
        prompts, _ = world.prompter.stepped_prompts(days, present)
        with torch.no_grad():
            table = policy.evaluate(prompts, policy.running.current())
            for _ in range(25):
                count = random.integers(1, 20)
                rows = random.choice(len(prompts.pairs), count, replace=False)
                some, place = prompts.subset(rows)
                of_some = policy.evaluate(some, policy.running.current())
                for name in ("log_probabilities", "value"):
                    got, expected = getattr(of_some, name)[place], getattr(table, name)[rows]
                    assert torch.equal(got, expected), (name, count)
    finally:
        torch.set_num_threads(before)
