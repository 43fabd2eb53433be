"""A figure of the report as SVG: what a notebook shows without a script."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from fastflag.evaluate.figures import Figure
from fastflag.evaluate.words import percent

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 26, 22
_TEXT = 'font-family="sans-serif" font-size="11" fill="currentColor"'


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    count: int

    def y(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low or 1.0)
        return _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)

    def points(self, values: list[float | None]) -> list[str]:
        step = (_WIDTH - _LEFT - _RIGHT) / (self.count - 1)
        return [
            f"{_LEFT + n * step:.1f},{self.y(value):.1f}"
            for n, value in enumerate(values)
            if value is not None
        ]


def svg(figure: Figure) -> str:
    """The lines and bands of a figure whose traces share two days or more, and are shares of 1."""
    values = [y for trace in figure.data for y in trace["y"] if y is not None]
    days = figure.data[0]["x"]
    scale = _Scale(min(values), max(values), len(days))
    parts = [*_rules(scale), *_ends(days), *_shapes(figure.data, scale), *_legend(figure.data)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(figure.title)}" style="max-width: {_WIDTH}px">{"".join(parts)}</svg>'
    )


def _shapes(traces: list[dict[str, Any]], scale: _Scale) -> Iterator[str]:
    """Lines; a band comes as its lower edge, which is not shown, and its upper one."""
    edge: list[str] = []
    for trace in traces:
        points, line = scale.points(trace["y"]), trace["line"]
        if trace.get("fill") == "tonexty":
            band = " ".join([*edge, *reversed(points)])
            yield f'<polygon points="{band}" fill="{trace["fillcolor"]}"/>'
        elif _is_shown(trace):
            dash = line.get("dash", "solid").replace("px", "").replace("solid", "none")
            look = f'stroke="{line["color"]}" stroke-width="{line["width"]}" fill="none"'
            yield f'<polyline points="{" ".join(points)}" stroke-dasharray="{dash}" {look}/>'
        edge = points


def _legend(traces: list[dict[str, Any]]) -> Iterator[str]:
    left = _LEFT
    for trace in filter(_is_shown, traces):
        colour, name = trace.get("fillcolor") or trace["line"]["color"], trace["name"]
        yield f'<rect x="{left}" y="6" width="10" height="10" fill="{colour}"/>'
        yield f'<text x="{left + 14}" y="15" {_TEXT}>{escape(name)}</text>'
        left += 30 + 7 * len(name)


def _is_shown(trace: dict[str, Any]) -> bool:
    return trace.get("showlegend", True)


def _rules(scale: _Scale) -> Iterator[str]:
    """The lowest value, the highest, and 0 where it is between them."""
    zero = {0.0} if scale.low < 0 < scale.high else set()
    for value in sorted({scale.low, scale.high} | zero):
        y, text = scale.y(value), percent(100 * value, 1)
        yield f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#808b9955"/>'
        yield f'<text x="{_LEFT - 4}" y="{y + 4:.1f}" text-anchor="end" {_TEXT}>{text}</text>'


def _ends(days: list[str]) -> Iterator[str]:
    for x, anchor, day in ((_LEFT, "start", days[0]), (_WIDTH - _RIGHT, "end", days[-1])):
        at = f'x="{x}" y="{_HEIGHT - 6}" text-anchor="{anchor}"'
        yield f"<text {at} {_TEXT}>{escape(day)}</text>"
