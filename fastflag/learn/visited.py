"""The prompts that a rollout has met so far, each evaluated once, under the same statistics.

Shapes: U prompts, A actions.
"""

import numpy as np

from fastflag.policy.table import Policy, Table
from fastflag.prompt.prompts import PromptSet, merge


class Visited:
    """A table that grows: one pass over the days' prefixes, then prompts as they are met."""

    def __init__(self, policy: Policy, reference: PromptSet):
        """`reference` has every day that is to come; its prompts centre the features. Raises
        ValueError where two of them are the same."""
        self._policy = policy
        self._days = policy.read(reference.prefixes)
        self._sets = [reference]
        self._tables = [policy.evaluate(reference, days=self._days)]
        self._row_of = {key: row for row, key in enumerate(reference.keys())}
        if len(self._row_of) < len(reference.pairs):
            raise ValueError("a prompt is named twice")
        self.probabilities = self._tables[0].probabilities
        """[U, A] of the rows so far, as in `Table`."""

    def rows(self, prompts: PromptSet) -> np.ndarray:
        """The rows [U] of `prompts`, which are distinct, in the table to come; those not met before
        are evaluated."""
        keys = prompts.keys()
        new = [number for number, key in enumerate(keys) if key not in self._row_of]
        if new:
            some, _ = prompts.subset(np.array(new))
            table = self._policy.evaluate(some, self._tables[0].statistics, self._days)
            self._sets.append(some)
            self._tables.append(table)
            self._row_of |= {keys[number]: len(self._row_of) + n for n, number in enumerate(new)}
            self.probabilities = np.concatenate([self.probabilities, table.probabilities])
        return np.array([self._row_of[key] for key in keys])

    def table(self) -> tuple[Table, PromptSet]:
        """All rows, with their gradient, and the prompts that they are of."""
        return Table.joined(self._tables), merge(self._sets)[0]
