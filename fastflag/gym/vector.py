"""A task as many environments of Gymnasium, stepped at once. B environments."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fastflag.gym.drawing import frame_of, line_of
from fastflag.gym.env import METADATA
from fastflag.gym.episodes import Episodes, View
from fastflag.gym.portfolio import PortfolioView
from fastflag.gym.single import SingleView
from fastflag.gym.spaces import box_of


class MarketVectorEnv(VectorEnv):
    """B accounts' episodes. Environment i does what a `MarketEnv` with seed + i does, in each of
    the three modes of autoreset."""

    def __init__(
        self,
        view: View,
        num_envs: int = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ):
        """Raises InputError where no episode fits into the view's period, ValueError for an unknown
        mode."""
        if render_mode not in (None, *METADATA["render_modes"]):
            raise ValueError(f"render_mode is one of {METADATA['render_modes']}")
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = METADATA | {"autoreset_mode": self.autoreset_mode}
        self.view, self.num_envs, self.render_mode = view, num_envs, render_mode
        self.single_observation_space, self.single_action_space = box_of(view.columns), view.actions
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._episodes = Episodes(view, num_envs, render_mode is not None)
        self._seeded = False

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins the next episode of all, or of options["reset_mask"] [B] bool. A seed s stands for
        s, s + 1, ...; environments with a seed begin the first of its episodes.

        Raises ValueError for another option, mask or number of seeds.
        """
        mask = self._asked(dict(options or {}))
        super().reset(seed=seed if isinstance(seed, int) else None)
        if not self._seeded:
            self._episodes.seed(self._counted(self.np_random_seed or 0))
            self._seeded = True
        if seed is not None:
            seeds = self._counted(seed) if isinstance(seed, int) else list(seed)
            if len(seeds) != self.num_envs:
                raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments")
            asked = zip(seeds, mask, strict=True)
            self._episodes.seed([own if is_asked else None for own, is_asked in asked])
        self._episodes.reset(mask)
        return self._episodes.observations(), _of_those(self._episodes.infos(), mask)

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """NEXT_STEP: where an episode is over, the action is ignored and the next one begins.
        SAME_STEP: the next one has begun; info["final_obs"] and info["final_info"] are the last of
        the one before. DISABLED: raises ResetNeeded where an episode is over."""
        everyone, ended = np.ones(self.num_envs, np.bool_), self._episodes.ended.copy()
        next_step = self.autoreset_mode is AutoresetMode.NEXT_STEP
        moves = self._episodes.step(actions, ended if next_step else ~everyone)
        ended = self._episodes.ended.copy()
        final: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and ended.any():
            final = self._final(ended)
            self._episodes.reset(ended)
        infos = _of_those(self._episodes.infos(), everyone)
        return self._episodes.observations(), *moves, infos | final

    def action_masks(self) -> np.ndarray:
        """[B, A] bool, of portfolios [B, K x A]."""
        return self._episodes.masks().reshape(self.num_envs, -1)

    def render(self) -> tuple[str | np.ndarray, ...] | None:
        """Of each, as `MarketEnv.render`."""
        if self.render_mode is None:
            return None
        draw = line_of if self.render_mode == "ansi" else frame_of
        return tuple(draw(self._episodes, b) for b in range(self.num_envs))

    def _final(self, ended: np.ndarray) -> dict[str, Any]:
        """What those `ended` [B] bool saw and were told last."""
        last = np.full(self.num_envs, None, object)
        observations = self._episodes.observations()
        for b in np.flatnonzero(ended):
            last[b] = observations[b].copy()
        infos = _of_those(self._episodes.infos(), ended)
        return {
            "final_obs": last,
            "_final_obs": ended.copy(),
            "final_info": infos,
            "_final_info": ended.copy(),
        }

    def _counted(self, seed: int) -> list[int]:
        return [seed + i for i in range(self.num_envs)]

    def _asked(self, options: dict[str, Any]) -> np.ndarray:
        mask = options.pop("reset_mask", np.ones(self.num_envs, np.bool_))
        if options:
            raise ValueError(f"unknown options {sorted(options)}")
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise ValueError("reset_mask is no array of bool")
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(f"reset_mask has not {self.num_envs} entries, or none is True")
        return mask


def _of_those(infos: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """Each array with the mask `_name` of those who have one, and zeros (None) elsewhere, as
    Gymnasium's own vector environments have them."""
    told: dict[str, Any] = {}
    for name, values in infos.items():
        values[~mask] = None if values.dtype == object else 0
        told |= {name: values, f"_{name}": mask.copy()}
    return told


def single(
    num_envs: int = 1,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    render_mode: str | None = None,
    **settings: Any,
) -> MarketVectorEnv:
    """FastFLAG/Single-v0, by the settings of `SingleView.of`."""
    return MarketVectorEnv(SingleView.of(**settings), num_envs, autoreset_mode, render_mode)


def portfolio(
    num_envs: int = 1,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    render_mode: str | None = None,
    **settings: Any,
) -> MarketVectorEnv:
    """FastFLAG/Portfolio-v0, by the settings of `PortfolioView.of`."""
    return MarketVectorEnv(PortfolioView.of(**settings), num_envs, autoreset_mode, render_mode)
