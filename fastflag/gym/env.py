"""A task as one environment of Gymnasium."""

from typing import Any

import gymnasium
import numpy as np

from fastflag.gym.drawing import frame_of, line_of
from fastflag.gym.episodes import Episodes, View
from fastflag.gym.portfolio import PortfolioView
from fastflag.gym.single import SingleView
from fastflag.gym.spaces import box_of

METADATA: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 10}


class MarketEnv(gymnasium.Env):
    """One account's episodes, each a stretch of the market.

    An action that the mask forbids counts as Hold (Keep); info["action_mask"] is int8, of a
    portfolio [K, A]. Terminated by ruin, truncated by the horizon. The k-th episode after
    reset(seed=s) is a function of s and k.
    """

    metadata: dict[str, Any] = METADATA

    def __init__(self, view: View, render_mode: str | None = None):
        """Raises InputError where no episode fits into the view's period, ValueError for an unknown
        way to render."""
        if render_mode not in (None, *METADATA["render_modes"]):
            raise ValueError(f"render_mode is one of {METADATA['render_modes']}")
        self.view, self.render_mode = view, render_mode
        self.observation_space = box_of(view.columns)
        self.action_space = view.actions
        self._episodes = Episodes(view, 1, render_mode is not None)
        self._seeded = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins the next episode, with a seed the first of that seed's. Raises ValueError for
        options: there are none."""
        super().reset(seed=seed)
        if options:
            raise ValueError(f"unknown options {sorted(options)}")
        if seed is not None or not self._seeded:
            self._episodes.seed([self.np_random_seed])
            self._seeded = True
        self._episodes.reset(np.ones(1, np.bool_))
        return self._observation(), self._info()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Raises ResetNeeded where the episode is over, ValueError for an unknown action."""
        actions = np.asarray(action).reshape(self._episodes.last_action.shape)
        reward, terminated, truncated = self._episodes.step(actions, np.zeros(1, np.bool_))
        observation, info = self._observation(), self._info()
        return observation, float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def action_masks(self) -> np.ndarray:
        """[A] bool, of a portfolio [K x A], as sb3-contrib's MaskablePPO asks for it."""
        return self._episodes.masks().reshape(-1)

    def render(self) -> str | np.ndarray | None:
        """A line of text, or an image [height, width, 3] uint8 of the episode so far."""
        if self.render_mode == "ansi":
            return line_of(self._episodes, 0)
        return frame_of(self._episodes, 0) if self.render_mode else None

    def _observation(self) -> np.ndarray:
        return self._episodes.observations()[0]

    def _info(self) -> dict[str, Any]:
        return {name: values[0] for name, values in self._episodes.infos().items()}


def single(render_mode: str | None = None, **settings: Any) -> MarketEnv:
    """FastFLAG/Single-v0, by the settings of `SingleView.of`."""
    return MarketEnv(SingleView.of(**settings), render_mode)


def portfolio(render_mode: str | None = None, **settings: Any) -> MarketEnv:
    """FastFLAG/Portfolio-v0, by the settings of `PortfolioView.of`."""
    return MarketEnv(PortfolioView.of(**settings), render_mode)
