"""Accounts that live through held-out days under a trained policy.

Shapes: B accounts, n days (n - 1 decisions), W moments of a window, U prompts, A actions, K slots
(of a task of one symbol at a time the axis is not there).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from fastflag.learn.decision import choose
from fastflag.learn.speculation import settle
from fastflag.market.accounts import Accounts, Columns
from fastflag.market.portfolio_accounts import PortfolioAccounts
from fastflag.market.random_numbers import uniform
from fastflag.market.tasks.single import HOLD
from fastflag.policy.table import Policy, ReadPrefixes
from fastflag.prompt.prompts import PromptSet
from fastflag.prompt.world import World, of_codes

# Decisions whose prompts are guessed together: about 100 prompts in a batch, where one decision has
# few, and a batch of few takes longer than its products.
_WINDOW = 32

# (probabilities [B, K, A], index of the decision) -> actions [B, K]. It is asked more than once a
# decision, with guesses too: its answer must follow from these alone.
Chooser = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Episodes:
    """What B accounts did over n days."""

    equity: np.ndarray  # [B, n], marked at each close
    shares: np.ndarray  # [B, n], held at each close; of a portfolio [B, n, K], values in money
    alive: np.ndarray  # [B, n] bool, False from ruin on
    action: np.ndarray  # [B, n - 1, K] int8
    probabilities: np.ndarray  # [B, n - 1, K, A]

    def __repr__(self) -> str:
        return "Episodes({} accounts, {} days)".format(*self.equity.shape)

    def part(self, episodes: slice) -> "Episodes":
        return Episodes(**{name: array[episodes] for name, array in vars(self).items()})


@torch.no_grad()
def run_episodes(
    policy: Policy,
    world: World,
    days: range,
    episodes: int,
    choose_actions: Chooser,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Episodes:
    """Lives through `days` one by one with `episodes` accounts. Decisions read the running
    statistics, so that nothing of a later day bears on an earlier one (on a GPU but for last bits,
    which follow from what is evaluated together). `track` wraps the decisions, for a progress
    bar."""
    task, count = world.task, len(days)
    accounts = task.start(episodes)
    slots = _held(accounts).shape[1:]
    lived = Episodes(
        np.full((episodes, count), task.rules.cash),
        np.zeros((episodes, count, *slots)),
        np.ones((episodes, count), bool),
        np.zeros((episodes, count - 1, *slots), np.int8),
        np.zeros((episodes, count - 1, *slots, len(task.actions))),
    )
    stepped = world.prompter.config.account == "stepped"
    with policy.trunk.unpacked():
        for number in track(range(count - 1)):
            day, place = days[number], number % _WINDOW
            if place == 0:
                window = days[number : min(number + _WINDOW, count - 1)]
                read = policy.read(world.prompter.prefixes(window))
                if stepped:
                    answers = _answered(
                        policy, world, window, read, accounts, choose_actions, number
                    )
            if stepped:
                # pyrefly: ignore[unbound-name] (the first decision opens a window)
                probabilities = answers[place][of_codes(task.code(accounts, day))]
            else:
                # pyrefly: ignore[unbound-name] (likewise)
                probabilities = _asked(policy, world, read, accounts, day)
            action = choose_actions(probabilities, number)
            task.step(accounts, day, action)
            lived.probabilities[:, number] = probabilities
            lived.action[:, number] = action
            lived.equity[:, number + 1] = accounts.equity
            lived.shares[:, number + 1] = _held(accounts)
            lived.alive[:, number + 1] = accounts.alive
    policy.trunk.cache.flush()
    return lived


def _held(accounts: Columns) -> np.ndarray:
    if isinstance(accounts, PortfolioAccounts):
        return accounts.holding
    assert isinstance(accounts, Accounts)
    return accounts.shares


def _asked(
    policy: Policy, world: World, read: ReadPrefixes, accounts: Columns, day: int
) -> np.ndarray:
    """The policy's answers to `accounts` at the close of `day`, [B, A]."""
    prompts, row = world.shown(accounts, day)
    return policy.evaluate(prompts, policy.running.current(), read).probabilities[row]


def _answered(
    policy: Policy,
    world: World,
    days: range,
    read: ReadPrefixes,
    accounts: Columns,
    choose_actions: Chooser,
    first: int,
) -> np.ndarray:
    """The policy's answers at the closes of `days` [W], [W, K, CODES, A]: its own for every code
    that `accounts` come to, from decision `first` on.

    They are found as a rollout's are (learn/speculation.py). `accounts` stay where they are.
    """
    statistics = policy.running.current()
    tables: list[np.ndarray] = []

    def evaluate(prompts: PromptSet) -> np.ndarray:
        begin = sum(map(len, tables))
        tables.append(policy.evaluate(prompts, statistics, read).probabilities)
        return begin + np.arange(len(tables[-1]))

    prompts, row_of = world.stepped(days, world.centring_codes(days))
    evaluate(prompts)
    return settle(
        world,
        days,
        row_of,
        evaluate,
        lambda: np.concatenate(tables),
        lambda answers: _met(world, days, accounts, answers, choose_actions, first),
    )


def _met(
    world: World,
    days: range,
    accounts: Columns,
    answers: np.ndarray,
    choose_actions: Chooser,
    first: int,
) -> np.ndarray:
    """The codes that `accounts` come to on `days`, [W, K, CODES] bool, if `answers` [W, K, CODES,
    A] are the policy's."""
    accounts = accounts.take(np.arange(len(accounts)))
    met = world.nowhere(days)
    for number, day in enumerate(days):
        codes = of_codes(world.task.code(accounts, day))
        met[number][codes] = True
        action = choose_actions(answers[number][codes], first + number)
        world.task.step(accounts, day, action)
    return met


def greedy(probabilities: np.ndarray, _: int) -> np.ndarray:
    """The most probable action of each row; of equals, Hold before Sell before Buy, Keep before the
    others in their order."""
    order = [HOLD, *(action for action in range(probabilities.shape[-1]) if action != HOLD)]
    return np.array(order, dtype=np.int8)[probabilities[..., order].argmax(-1)]


def sampler(seed: int, episodes: int) -> Chooser:
    """Samples, each episode from a stream of its own."""
    environments = np.arange(episodes)

    def chosen(probabilities: np.ndarray, number: int) -> np.ndarray:
        slots = int(np.prod(probabilities.shape[1:-1]))
        drawn = [uniform(seed, environments, number * slots + slot) for slot in range(slots)]
        return choose(probabilities, np.stack(drawn, 1).reshape(probabilities.shape[:-1]))

    return chosen


def first_greedy(others: Chooser) -> Chooser:
    """The first episode greedily and the others by `others`, in one pass: each day's prompts are
    then one batch."""
    return lambda probabilities, number: np.concatenate(
        [greedy(probabilities[:1], number), others(probabilities[1:], number)]
    )
