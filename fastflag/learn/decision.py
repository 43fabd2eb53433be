"""A decision of many accounts: what they choose, and where each action leads.

Shapes: B accounts, K slots (one: the axis is not there), A actions, W ways, one a slot and action.
"""

from typing import TypeVar

import numpy as np

from fastflag.market.accounts import Columns
from fastflag.market.task import Task

_Accounts = TypeVar("_Accounts", bound=Columns)


def choose(probabilities: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Inverse-CDF samples of [..., A] probabilities, uniform [...] in [0, 1) -> actions [...] int8.

    An action of probability 0 is never chosen, whatever the rounding of the sum.
    """
    cdf = probabilities.cumsum(-1)
    return (uniform[..., None] * cdf[..., -1:] >= cdf[..., :-1]).sum(-1).astype(np.int8)


def branch(
    task: Task[_Accounts], accounts: _Accounts, moment: int, drawn: np.ndarray
) -> tuple[list[_Accounts], np.ndarray, np.ndarray]:
    """One step from `moment`, of copies, with every action of each slot in turn, the other slots'
    as they were `drawn` ([B] or [B, K]): (accounts of each way, reward [B, W], terminated [B, W]).
    Of slot k's action a the way is k x A + a."""
    after, done = [], []
    for slot in range(task.slots):
        for action in range(len(task.actions)):
            tried = drawn.copy()
            tried.reshape(len(accounts), -1)[:, slot] = action
            after.append(accounts.take(np.arange(len(accounts))))
            done.append(task.step(after[-1], moment, tried))
    reward, terminated = (np.stack(column, 1) for column in zip(*done, strict=True))
    return after, reward, terminated
