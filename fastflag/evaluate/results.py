"""What a run tells in Python: as numbers, as a table, and as a notebook shows it.

pandas is imported by what makes a table.
"""

from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, get_args

from fastflag.config import Convention
from fastflag.files import InputError

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Backtest:
    """A policy on held-out days beside buy-and-hold and random policies: the document that
    RUN/backtest.json holds."""

    document: dict[str, Any]

    def __repr__(self) -> str:
        told = self.document
        period = f"{told.get('start')}..{told.get('end')}"
        if each := told.get("symbols"):
            return f"Backtest({len(each)} symbols {period})"
        return f"Backtest({told.get('symbol')}: {len(told.get('dates', ()))} days {period})"

    @property
    def symbols(self) -> dict[str, "Backtest"]:
        """Each symbol's own."""
        each = self.document.get("symbols") or {self.document["symbol"]: self.document}
        return {name: Backtest(document) for name, document in each.items()}

    def metrics(self, convention: Convention = "standard") -> "DataFrame":
        """A row a policy: greedy, buy-and-hold, and the mean of the sampled episodes. Returns,
        volatility and drawdown in percent; how each is defined by a convention is in the README. Of
        several symbols the index is (group or symbol, policy): all of them in equal parts, those
        learnt from, those held out, then each."""
        import pandas

        if "groups" in self.document:
            each = {name: Backtest(told) for name, told in self.document["groups"].items()}
            each |= self.symbols
            frames = {name: told.metrics(convention) for name, told in each.items()}
            return pandas.concat(frames, names=["symbol", "policy"])

        if convention not in get_args(Convention):
            known = ", ".join(get_args(Convention))
            raise InputError(f"unknown convention {convention!r}, one of {known} is expected")
        policies = self.document["policies"]
        rows = {name: policy["metrics"][convention] for name, policy in policies.items()}
        sampled = self.document["sampled"]["metrics"][convention]
        rows["sampled"] = {name: of and of["mean"] for name, of in sampled.items()}
        return pandas.DataFrame.from_dict(rows, orient="index", dtype=float)

    def to_frame(self) -> "DataFrame":
        """A row a day: the close, equity at it, and of the greedy policy its position and, but for
        the last day, its action and the probability of each. Of several symbols the index is
        (symbol, date)."""
        import pandas

        if "groups" in self.document:
            frames = {name: each.to_frame() for name, each in self.symbols.items()}
            return pandas.concat(frames, names=["symbol", "date"])

        document = self.document
        if "assets" in document:
            return self._of_portfolio()
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

    def _of_portfolio(self) -> "DataFrame":
        """A row a day: equity of each policy, and of the greedy one the weight of each asset."""
        import pandas

        policies = self.document["policies"]
        equity = {name: each["equity"] for name, each in policies.items()}
        weights = zip(*policies["greedy"]["weights"], strict=True)
        weight = dict(zip(self.document["assets"], weights, strict=True))
        columns = {"equity": equity, "weight": weight}
        frames = {
            name: pandas.DataFrame(
                each, index=pandas.DatetimeIndex(self.document["dates"], name="date")
            )
            for name, each in columns.items()
        }
        return pandas.concat(frames, axis=1)

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
        return _table(self)


@dataclass(frozen=True)
class Metrics:
    """What buying and holding earned from one close to another."""

    start: str
    end: str
    convention: Convention
    values: dict[str, float | None]
    """By the names of the convention; None where one is not defined."""

    def to_frame(self) -> "DataFrame":
        """One row."""
        import pandas

        index = pandas.MultiIndex.from_tuples([(self.start, self.end)], names=["start", "end"])
        return pandas.DataFrame([self.values], index=index, dtype=float)

    def _repr_html_(self) -> str:
        return _table(self)


@dataclass(frozen=True)
class Examination:
    """What a machine has: the name of each thing, and a few words."""

    machine: dict[str, str]
    arithmetic: dict[str, str]
    packages: dict[str, str]
    caches: dict[str, str]
    ops: dict[str, dict[str, str]]
    """Of each op its implementation, the reason, and the evidence."""

    def to_frame(self) -> "DataFrame":
        """A row a thing; its index is (part, name)."""
        import pandas

        rows = {
            (part, name): told if isinstance(told, str) else "; ".join(told.values())
            for part, things in asdict(self).items()
            for name, told in things.items()
        }
        index = pandas.MultiIndex.from_tuples(rows, names=["part", "name"])
        return pandas.DataFrame({"told": list(rows.values())}, index=index)

    def _repr_html_(self) -> str:
        return _table(self)


@dataclass(frozen=True)
class MemoryPlan:
    """What training takes of a GPU's memory, in bytes."""

    model: str
    parts: dict[str, int]
    total: int
    total_without_flash_attention: int

    def to_frame(self) -> "DataFrame":
        """A row a part, then the totals."""
        import pandas

        totals = {
            "total": self.total,
            "total_without_flash_attention": self.total_without_flash_attention,
        }
        return pandas.DataFrame({"bytes": {**self.parts, **totals}}).rename_axis("part")

    def _repr_html_(self) -> str:
        return _table(self)


def _table(result: Decision | Metrics | Examination | MemoryPlan) -> str:
    import pandas

    with pandas.option_context("display.max_colwidth", None):  # paths and reasons are long
        return str(result.to_frame().to_html())
