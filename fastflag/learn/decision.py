"""A decision of many accounts: what they show, what they choose, where each action leads.

Shapes: B accounts, A actions.
"""

import numpy as np

from fastflag.learn.batch import World
from fastflag.market import simulator
from fastflag.market.accounts import Accounts
from fastflag.market.bars import Bars
from fastflag.market.simulator import ACTIONS
from fastflag.prompt.prompter import Prompter
from fastflag.prompt.prompts import PromptSet


def prompts_now(
    prompter: Prompter, bars: Bars, accounts: Accounts, day: int
) -> tuple[PromptSet, np.ndarray]:
    """The distinct prompts of these accounts at the close of `day`, and each account's row [B]."""
    if prompter.config.account == "exact":
        return prompter.exact_prompts(day, accounts)
    days = np.full(len(accounts.cash), day)
    codes = simulator.account_code(bars, accounts, days)
    present = np.zeros((1, simulator.CODES), dtype=bool)
    present[0, codes] = True
    prompts, row_of = prompter.stepped_prompts([day], present)
    return prompts, row_of[0, codes]


def choose(probabilities: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Inverse-CDF samples of [B, A] probabilities, uniform [B] in [0, 1) -> actions [B] int8.

    An action of probability 0 is never chosen, whatever the rounding of the sum.
    """
    cdf = probabilities.cumsum(1)
    return (uniform[:, None] * cdf[:, -1:] >= cdf[:, :-1]).sum(1).astype(np.int8)


def branch(
    world: World, accounts: Accounts, day: int
) -> tuple[list[Accounts], np.ndarray, np.ndarray]:
    """One step from the close of `day` with every action, of copies: (accounts of each action,
    reward [B, A], terminated [B, A])."""
    after = [accounts.take(np.arange(len(accounts))) for _ in ACTIONS]
    done = [
        simulator.step(world.bars, world.simulator, some, day, action)
        for action, some in enumerate(after)
    ]
    reward, terminated = (np.stack(column, 1) for column in zip(*done, strict=True))
    return after, reward, terminated
