"""Which prompts a rollout visits, found by guessing before the policy has answered all of them.

Random numbers are counted, so how environments act is known but for the policy's answers. The
guess is that an account is answered as others of its day and side are. Environments step through
guesses, what they met is evaluated in one batch, and they step again; until nothing new is met. By
then every answer that they read is the policy's own, and they did what they would have done with
one forward a step. SmolLM2 with 64 or 256 environments of 63 days: 2 to 4 batches in place of 63.

Shapes: W moments that the rollout sees, M moments of the timeline, U prompts, K slots (of a task of
one symbol at a time the axis is not there), A actions.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fastflag.learn.batch import Group, moments_of
from fastflag.learn.stepping import step_through
from fastflag.learn.visited import Visited
from fastflag.policy.table import Policy, Table
from fastflag.prompt.prompts import PromptSet
from fastflag.prompt.world import World


def visited_prompts(
    policy: Policy, world: World, groups: list[Group], branches: bool
) -> tuple[Table, PromptSet, np.ndarray]:
    """The rows that the groups visit, with `branches` also where every action leads, and few more:
    the table with gradient, its prompts, and the row of each moment and code, [M, K, CODES] int32,
    -1 where there is none. The groups' accounts stay where they are."""
    moments = moments_of(world, groups)
    centring = world.centring_codes(moments)
    prompts, row_of = world.stepped(moments, centring, centring)
    with policy.trunk.unpacked():
        visited = Visited(policy, prompts)
        settle(
            world,
            moments,
            row_of,
            visited.rows,
            lambda: visited.probabilities,
            lambda answers: _met(world, groups, moments, answers, branches),
        )
    return *visited.table(), world.over_timeline(moments, row_of)


def settle(
    world: World,
    moments: Sequence[int],
    row_of: np.ndarray,
    evaluate: Callable[[PromptSet], np.ndarray],
    probabilities: Callable[[], np.ndarray],
    met: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Guesses, and evaluates what is met, until nothing new is: the answers to each moment and code
    [W, K, CODES, A], of which those to what is met are the policy's own.

    `row_of` [W, K, CODES], -1 where there is no row, is filled in. `evaluate` gives the rows [U]
    that new prompts take among the `probabilities` [U, A]; `met` says where answers lead, [W, K,
    CODES].
    """
    side_of_code = world.task.side_of(np.arange(world.task.codes))
    while True:
        answers = guessed(probabilities(), row_of, side_of_code)
        new = met(answers) & (row_of < 0)
        if not new.any():
            return answers
        prompts, places = world.stepped(moments, new)
        row_of[new] = evaluate(prompts)[places[new]]


def guessed(probabilities: np.ndarray, row_of: np.ndarray, side_of_code: np.ndarray) -> np.ndarray:
    """Probabilities of each moment and code, [W, K, CODES, A]: where row_of [W, K, CODES] knows a
    row its own, else the mean of its moment, slot and side, or of its side anywhere."""
    shape, row_of = row_of.shape, row_of.reshape(-1, len(side_of_code))
    known = row_of >= 0  # of the others, -1, the last row is read and taken out
    told = np.where(known[..., None], probabilities[row_of], 0.0)
    for side in np.unique(side_of_code):
        codes = side == side_of_code
        at_moment, count = told[:, codes].sum(1), known[:, codes].sum(1)[:, None]
        anywhere = at_moment.sum(0) / count.sum() if count.any() else 1 / probabilities.shape[1]
        mean = np.where(count > 0, at_moment / np.maximum(count, 1), anywhere)
        told[:, codes] = np.where(known[:, codes, None], told[:, codes], mean[:, None])
    return told.reshape(*shape, -1)


def _met(
    world: World,
    groups: list[Group],
    moments: list[int],
    probabilities: np.ndarray,
    branches: bool,
) -> np.ndarray:
    """The moments and codes that the groups come to, [W, K, CODES] bool, where they are answered by
    `probabilities` [W, K, CODES, A]."""
    *shape, names = probabilities.shape
    cdf = probabilities.cumsum(-1).reshape(-1, names)
    row_of = world.over_timeline(moments, np.arange(len(cdf)).reshape(shape))
    met = np.zeros(len(cdf), bool)
    for group in groups:
        steps, ways = step_through(world, group.copy(), cdf, row_of, branches)
        met[steps.row] = met[steps.next_row] = True
        if ways is not None:
            met[ways.next_row] = True
    return met.reshape(shape)
