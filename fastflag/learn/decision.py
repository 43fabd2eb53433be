"""A decision of many accounts: what they choose, and where each action leads.

Shapes: B accounts, A actions.
"""

import numpy as np

from fastflag.market.accounts import Accounts
from fastflag.market.tasks.single import Single


def choose(probabilities: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Inverse-CDF samples of [B, A] probabilities, uniform [B] in [0, 1) -> actions [B] int8.

    An action of probability 0 is never chosen, whatever the rounding of the sum.
    """
    cdf = probabilities.cumsum(1)
    return (uniform[:, None] * cdf[:, -1:] >= cdf[:, :-1]).sum(1).astype(np.int8)


def branch(
    task: Single, accounts: Accounts, moment: int
) -> tuple[list[Accounts], np.ndarray, np.ndarray]:
    """One step from `moment` with every action, of copies: (accounts of each action, reward [B, A],
    terminated [B, A])."""
    after = [accounts.take(np.arange(len(accounts))) for _ in task.actions]
    done = [task.step(some, moment, np.array(action)) for action, some in enumerate(after)]
    reward, terminated = (np.stack(column, 1) for column in zip(*done, strict=True))
    return after, reward, terminated
