"""Which prompts a rollout visits, found by guessing before the policy has answered all of them.

Random numbers are counted, so how environments act is known but for the policy's answers. The
guess is that an account is answered as others of its day and side are. Environments step through
guesses, what they met is evaluated in one batch, and they step again; until nothing new is met. By
then every answer that they read is the policy's own, and they did what they would have done with
one forward a step. SmolLM2 with 64 or 256 environments of 63 days: 2 to 4 batches in place of 63.

Shapes: D days that the rollout sees, T days of the market, U prompts, A actions.
"""

import numpy as np

from fastflag.learn.batch import Group, World, days_of
from fastflag.learn.reference import reference_accounts
from fastflag.learn.stepping import step_through
from fastflag.learn.visited import Visited
from fastflag.market import simulator
from fastflag.market.simulator import ACTIONS, CODES
from fastflag.policy.table import Policy, Table
from fastflag.prompt.prompts import PromptSet, merge

_SIDE_OF_CODE = simulator.side_of(np.arange(CODES))


def reference_codes(world: World, days: list[int]) -> np.ndarray:
    """The account codes whose prompts centre the features at `days` [D]: [D, CODES] bool."""
    accounts, of_day = reference_accounts(world.bars, world.simulator, days)
    codes = np.zeros((len(days), CODES), bool)
    shown = simulator.account_code(world.bars, accounts, of_day)
    codes[np.searchsorted(days, of_day), shown] = True
    return codes


def visited_prompts(
    policy: Policy, world: World, groups: list[Group], branches: bool
) -> tuple[Table, PromptSet, np.ndarray]:
    """The rows that the groups visit, with `branches` also where every action leads, and few more:
    the table with gradient, its prompts, and the row of each day and code, [T, CODES] int32, -1
    where there is none. The groups' accounts stay where they are."""
    days = days_of(world, groups)
    centring = reference_codes(world, days)
    prompts, row_of = distinct_prompts(world, days, centring, centring)
    with policy.trunk.unpacked():
        visited = Visited(policy, prompts)
        while True:
            met = _met(world, groups, days, guessed(visited.probabilities, row_of), branches)
            new = met & (row_of < 0)
            if not new.any():
                break
            prompts, places = distinct_prompts(world, days, new)
            row_of[new] = visited.rows(prompts)[places[new]]
    of_market = np.full((len(world.bars), CODES), -1, np.int32)
    of_market[days] = row_of
    return *visited.table(), of_market


def distinct_prompts(
    world: World, days: list[int], present: np.ndarray, reference: np.ndarray | None = None
) -> tuple[PromptSet, np.ndarray]:
    """`Prompter.stepped_prompts` of days [D], those that read alike made one: two without a bar."""
    prompts, row_of = world.prompter.stepped_prompts(days, present, reference)
    prompts, (place,) = merge([prompts])
    return prompts, np.where(row_of >= 0, place[row_of], -1)


def guessed(probabilities: np.ndarray, row_of: np.ndarray) -> np.ndarray:
    """Probabilities of each day and code, [D, CODES, A]: where row_of [D, CODES] knows a row its
    own, else the mean of its day and side, or of its side on any day."""
    known = row_of >= 0  # of the others, -1, the last row is read and taken out
    told = np.where(known[..., None], probabilities[row_of], 0.0)
    for side in np.unique(_SIDE_OF_CODE):
        codes = side == _SIDE_OF_CODE
        of_day, count = told[:, codes].sum(1), known[:, codes].sum(1)[:, None]
        anywhere = of_day.sum(0) / count.sum() if count.any() else 1 / len(ACTIONS)
        mean = np.where(count > 0, of_day / np.maximum(count, 1), anywhere)
        told[:, codes] = np.where(known[:, codes, None], told[:, codes], mean[:, None])
    return told


def _met(
    world: World, groups: list[Group], days: list[int], probabilities: np.ndarray, branches: bool
) -> np.ndarray:
    """The days and codes that the groups come to, [D, CODES] bool, where they are answered by
    `probabilities` [D, CODES, A]."""
    cdf = probabilities.cumsum(-1).reshape(-1, len(ACTIONS))
    row_of = np.full((len(world.bars), CODES), -1, np.int32)
    row_of[days] = np.arange(len(cdf), dtype=np.int32).reshape(len(days), CODES)
    met = np.zeros(len(cdf), bool)
    for group in groups:
        part = step_through(world, group.copy(), cdf, row_of, branches)
        for name in ("row", "next_row", "branch_next_row"):
            if name in part:
                met[part[name]] = True
    return met.reshape(len(days), CODES)
