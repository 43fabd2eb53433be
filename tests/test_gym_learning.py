"""Other libraries learn on the planted market, where there is something to learn."""

import gymnasium
import numpy as np
import pytest
from gym_small import PORTFOLIO, SINGLE, env_of, settings_of

from fastflag.market.planted import planted_market

LEARNERS = {"PPO": "stable_baselines3", "MaskablePPO": "sb3_contrib"}
DAYS, TRAIN_DAYS = 640, 512
STEPS = 16_384

pytestmark = pytest.mark.usefixtures("one_thread")


def played(env, decide):
    """Equity at the end of the one episode that fits."""
    observation, info = env.reset(seed=0)
    over = False
    while not over:
        observation, _, terminated, truncated, info = env.step(decide(observation))
        over = terminated or truncated
    return float(info["equity"])


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("name", [SINGLE, PORTFOLIO])
def test_it_beats_random_policies_on_days_never_seen(name, learner, shuffled):
    """And not with news that tells nothing: then what it learnt were the future."""
    library = pytest.importorskip(
        LEARNERS[learner], reason=f"pip install --no-deps {LEARNERS[learner]}: it is not installed"
    )
    market = planted_market(DAYS, shuffled=shuffled, symbols=1 if name == SINGLE else 2)
    dates = market.dates

    def settings(first, last, horizon):
        shown = settings_of(name, market=market, horizon=horizon, reward="log_return")
        return {**shown, "period": f"{dates[first]}..{dates[last - 1]}"}

    from stable_baselines3.common.env_util import make_vec_env

    training = make_vec_env(name, 8, env_kwargs=settings(0, TRAIN_DAYS, 63), seed=0)
    model = getattr(library, learner)(
        "MlpPolicy",
        training,
        n_steps=128,
        batch_size=256,
        learning_rate=1e-3,
        gamma=0.5,
        seed=0,
        device="cpu",
    )
    model.learn(STEPS)
    held_out = env_of(name, **settings(TRAIN_DAYS, DAYS, DAYS))

    def decide(observation):
        masks = {"action_masks": held_out.action_masks()} if learner == "MaskablePPO" else {}
        return model.predict(observation, deterministic=True, **masks)[0]

    equity = played(held_out, decide)
    randoms = held_out.view.task.equities(range(TRAIN_DAYS, DAYS), 1000, seed=0)[:, -1]
    assert (equity > np.quantile(randoms, 0.99)) == (not shuffled)
    if not shuffled:
        assert equity > 1.5 * randoms.max()


def test_its_spaces_are_known_to_stable_baselines():
    pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
    from stable_baselines3.common.env_checker import check_env

    for name in (SINGLE, PORTFOLIO):
        check_env(gymnasium.make(name, **settings_of(name)), warn=False)
