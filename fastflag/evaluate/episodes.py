"""Accounts that live through held-out days under a trained policy.

Shapes: B accounts, n days (n - 1 decisions), W moments of a window, U prompts, A actions.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from fastflag.learn.decision import choose
from fastflag.learn.speculation import settle
from fastflag.market.accounts import Accounts
from fastflag.market.random_numbers import uniform
from fastflag.market.tasks.single import BUY, HOLD, SELL
from fastflag.policy.table import Policy, ReadPrefixes
from fastflag.prompt.prompts import PromptSet
from fastflag.prompt.world import World

# Decisions whose prompts are guessed together: about 100 prompts in a batch, where one decision has
# few, and a batch of few takes longer than its products.
_WINDOW = 32

# (probabilities [B, A], index of the decision) -> actions [B]. It is asked more than once a
# decision, with guesses too: its answer must follow from these alone.
Chooser = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Episodes:
    """What B accounts did over n days."""

    equity: np.ndarray  # [B, n], marked at each close
    shares: np.ndarray  # [B, n], held at each close
    alive: np.ndarray  # [B, n] bool, False from ruin on
    action: np.ndarray  # [B, n - 1] int8
    probabilities: np.ndarray  # [B, n - 1, A]

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
    lived = Episodes(
        np.full((episodes, count), task.rules.cash),
        np.zeros((episodes, count)),
        np.ones((episodes, count), bool),
        np.zeros((episodes, count - 1), np.int8),
        np.zeros((episodes, count - 1, len(task.actions))),
    )
    stepped = world.prompter.config.account == "stepped"
    with policy.trunk.unpacked():
        for number in track(range(count - 1)):
            day, place = days[number], number % _WINDOW
            if place == 0:
                window = days[number : min(number + _WINDOW, count - 1)]
                read = policy.read(world.prompter.prefix(day) for day in window)
                if stepped:
                    answers = _answered(
                        policy, world, window, read, accounts, choose_actions, number
                    )
            if stepped:
                # pyrefly: ignore[unbound-name] (the first decision opens a window)
                probabilities = answers[place, task.code(accounts, day)]
            else:
                # pyrefly: ignore[unbound-name] (likewise)
                probabilities = _asked(policy, world, read, accounts, day)
            action = choose_actions(probabilities, number)
            task.step(accounts, day, action)
            lived.probabilities[:, number] = probabilities
            lived.action[:, number] = action
            lived.equity[:, number + 1] = accounts.equity
            lived.shares[:, number + 1] = accounts.shares
            lived.alive[:, number + 1] = accounts.alive
    policy.trunk.cache.flush()
    return lived


def _asked(
    policy: Policy, world: World, read: ReadPrefixes, accounts: Accounts, day: int
) -> np.ndarray:
    """The policy's answers to `accounts` at the close of `day`, [B, A]."""
    prompts, row = world.shown(accounts, day)
    return policy.evaluate(prompts, policy.running.current(), read).probabilities[row]


def _answered(
    policy: Policy,
    world: World,
    days: range,
    read: ReadPrefixes,
    accounts: Accounts,
    choose_actions: Chooser,
    first: int,
) -> np.ndarray:
    """The policy's answers at the closes of `days` [W], [W, CODES, A]: its own for every code that
    `accounts` come to, from decision `first` on.

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
    accounts: Accounts,
    answers: np.ndarray,
    choose_actions: Chooser,
    first: int,
) -> np.ndarray:
    """The codes that `accounts` come to on `days`, [W, CODES] bool, if `answers` [W, CODES, A] are
    the policy's."""
    accounts = accounts.take(np.arange(len(accounts)))
    met = np.zeros(answers.shape[:2], bool)
    for number, day in enumerate(days):
        codes = world.task.code(accounts, day)
        met[number, codes] = True
        action = choose_actions(answers[number, codes], first + number)
        world.task.step(accounts, day, action)
    return met


def greedy(probabilities: np.ndarray, _: int) -> np.ndarray:
    """The most probable action of each row; of equals, Hold before Sell before Buy."""
    order = [HOLD, SELL, BUY]
    return np.array(order, dtype=np.int8)[probabilities[:, order].argmax(1)]


def sampler(seed: int, episodes: int) -> Chooser:
    """Samples, each episode from a stream of its own."""
    environments = np.arange(episodes)
    return lambda probabilities, number: choose(probabilities, uniform(seed, environments, number))
