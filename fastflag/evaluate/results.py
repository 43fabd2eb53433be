"""What a run tells in Python: as numbers, as a table, and as a notebook shows it.

pandas is imported by what makes a table.
"""

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pandas import DataFrame

Convention = Literal["standard", "flag", "investorbench", "paper-bh"]


@dataclass(frozen=True)
class Backtest:
    """A policy on held-out days beside buy-and-hold and random policies: the document that
    RUN/backtest.json holds."""

    document: dict[str, Any]

    def metrics(self, convention: Convention = "standard") -> "DataFrame":
        """A row a policy: greedy, buy-and-hold, and the mean of the sampled episodes. Returns,
        volatility and drawdown in percent; how each is defined by a convention is in the README."""
        import pandas

        policies = self.document["policies"]
        rows = {name: policy["metrics"][convention] for name, policy in policies.items()}
        sampled = self.document["sampled"]["metrics"][convention]
        rows["sampled"] = {name: of and of["mean"] for name, of in sampled.items()}
        return pandas.DataFrame.from_dict(rows, orient="index", dtype=float)

    def to_frame(self) -> "DataFrame":
        """A row a day: the close, equity at it, and of the greedy policy its position and, but for
        the last day, its action and the probability of each."""
        import pandas

        document = self.document
        greedy, held = (document["policies"][name] for name in ("greedy", "buy_and_hold"))
        frame = pandas.DataFrame(
            {
                "close": document["close"],
                "equity": greedy["equity"],
                "buy_and_hold": held["equity"],
                "position": greedy["position"],
                "action": [*greedy["actions"], None],
            },
            index=pandas.DatetimeIndex(document["dates"], name="date"),
        )
        for place, name in enumerate(document["action_names"]):
            frame[name] = [*(row[place] for row in greedy["probabilities"]), float("nan")]
        return frame

    def _repr_html_(self) -> str:
        """What the numbers allow one to say, equity, and the metrics."""
        from fastflag.evaluate.chart import svg
        from fastflag.evaluate.figures import backtest_figures
        from fastflag.evaluate.words import verdict

        title, paragraphs = verdict(self.document)
        told = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)
        chart = svg(backtest_figures(self.document)["equity"])
        return f"<h3>{escape(title)}</h3>{told}{chart}{self.metrics().round(3).to_html()}"


@dataclass(frozen=True)
class Decision:
    """What a policy would do at one close."""

    date: str
    action: str
    probabilities: dict[str, float]
    value: float

    def to_frame(self) -> "DataFrame":
        """One row."""
        import pandas

        row = {"action": self.action, **self.probabilities, "value": self.value}
        return pandas.DataFrame(row, index=pandas.DatetimeIndex([self.date], name="date"))

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html())
