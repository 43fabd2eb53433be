"""An environment's episode as a line of text and as a picture, without a plotting library."""

from itertools import pairwise

import numpy as np

from fastflag.gym.episodes import Episodes

_HEIGHT, _WIDTH, _MARGIN = 240, 400, 12
_BACKGROUND, _PRICE, _EQUITY = (255, 255, 255), (170, 170, 170), (31, 90, 180)


def line_of(episodes: Episodes, b: int) -> str:
    """Date, equity, and what was done last."""
    view, equity = episodes.view, _equity(episodes, b)
    actions = np.atleast_1d(episodes.last_action[b]).tolist()
    done = " ".join(view.task.actions[action] if action >= 0 else "-" for action in actions)
    label, change = view.label(int(episodes.moment[b])), equity[-1] / equity[0] - 1
    return f"{label} | {done} | equity {equity[-1]:,.2f} ({change:+.2%})"


def frame_of(episodes: Episodes, b: int) -> np.ndarray:
    """[height, width, 3] uint8: equity (blue) over prices (grey), all 1 at the episode's first
    close, on one logarithmic scale."""
    start, equity = int(episodes.start[b]), _equity(episodes, b)
    prices = episodes.view.prices(range(start, start + len(equity)))
    with np.errstate(divide="ignore", invalid="ignore"):
        lines = [np.log(path / path[0]) for path in (*prices.T, equity)]
    lines = [np.where(np.isfinite(line), line, 0.0) for line in lines]
    low, high = min(map(np.min, lines)), max(map(np.max, lines))
    frame = np.full((_HEIGHT, _WIDTH, 3), _BACKGROUND, np.uint8)
    inside = _HEIGHT - 2 * _MARGIN - 1
    for line, colour in zip(lines, [*[_PRICE] * prices.shape[1], _EQUITY], strict=True):
        height = (line - low) / max(high - low, 1e-9)
        _draw(frame, _MARGIN + (1 - height) * inside, episodes.length, colour)
    return frame


def _equity(episodes: Episodes, b: int) -> np.ndarray:
    """At each close of the episode so far."""
    if episodes.equity is None:
        raise ValueError("these episodes are not recorded")
    return episodes.equity[b, : episodes.moment[b] - episodes.start[b] + 1]


def _draw(frame: np.ndarray, rows: np.ndarray, length: int, colour: tuple[int, int, int]) -> None:
    """A line through `rows` [n], the first n of `length` + 1 places from left to right."""
    width = _WIDTH - 2 * _MARGIN
    until = max(round((len(rows) - 1) / length * (width - 1)), 1)
    at = np.interp(np.linspace(0, len(rows) - 1, until + 1), np.arange(len(rows)), rows)
    for x, (one, other) in enumerate(pairwise(at.tolist())):
        top, bottom = sorted((round(one), round(other)))
        frame[top : bottom + 2, _MARGIN + x] = colour
