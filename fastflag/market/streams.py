"""Where each of a run's streams of random numbers begins. A run has one seed; whatever draws takes
a stream of its own, so that no two share numbers and what one draws moves no other.

Streams of accounts are counted (random_numbers.py): account i of a stream that begins at s is
account 0 of one that begins at s + i. The beginnings lie further apart than there are accounts.
"""

import numpy as np

_RANDOM_POLICIES = 0x524E << 48
_SAMPLED_EPISODES = 0x5A3B_1E00_0000


def environments(seed: int) -> int:
    """Training's actions and first days; a World's seed. Hashed: runs of seeds 0 and 1 would share
    all their environments but one, and their spread would tell nothing."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 16)


def random_policies(world: int) -> int:
    """A backtest's random policies, of a World's seed."""
    return int(world) + _RANDOM_POLICIES


def sampled_episodes(world: int) -> int:
    """A backtest's episodes with actions drawn from the policy, of a World's seed."""
    return world ^ _SAMPLED_EPISODES


def shuffles(seed: int, update: int) -> int:
    """An update's minibatches: a function of the run's seed and the update, so that nothing need be
    kept to resume."""
    return int(np.random.SeedSequence([seed, update]).generate_state(1, np.uint64)[0] >> 1)


def initial_weights(seed: int) -> int:
    """Of adapters and heads; PyTorch's generator hashes it."""
    return seed
