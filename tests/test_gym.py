"""Gymnasium's door: its own checker, its own loop over single environments, and the slow twins."""

import warnings

import gymnasium
import numpy as np
import oracles
import portfolio_oracle
import pytest
from gym_small import IDS, PORTFOLIO, SINGLE, env_of, settings_of
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode
from hypothesis import given
from hypothesis import strategies as st

from bench.rivals.simulators import NumPyEnvs
from fastflag.files import InputError
from fastflag.market.planted import planted_market


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("render_mode", [None, "ansi", "rgb_array"])
@pytest.mark.parametrize("data", ["planted", "random"])
def test_gymnasium_finds_nothing_wrong(name, render_mode, data):
    settings = {"market": planted_market(80)} if data == "planted" else settings_of(name)
    env = gymnasium.make(name, render_mode=render_mode, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("mode", AutoresetMode)
def test_environment_i_is_the_single_one_with_its_seed(name, mode):
    """Beside Gymnasium's own loop over single ones, in everything, to the bit. Ruin ends some."""
    settings = settings_of(name, reward="log_return", fee_bps=50.0, ruin=0.9)
    ours = gymnasium.make_vec(name, 5, autoreset_mode=mode, **settings)
    theirs = gymnasium.make_vec(name, 5, "sync", vector_kwargs={"autoreset_mode": mode}, **settings)
    assert ours.metadata["autoreset_mode"] is mode
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert data_equivalence(ours.reset(seed=11), theirs.reset(seed=11), exact=True)
    random, ends = np.random.default_rng(0), []
    for _ in range(60):
        actions = random.integers(len(ours.view.task.actions), size=ours.action_space.shape)
        got, expected = ours.step(actions), theirs.step(actions)
        assert data_equivalence(got, expected, exact=True)
        ended = got[2] | got[3]
        ends.append((got[2].sum(), got[3].sum()))
        if mode is AutoresetMode.DISABLED and ended.any():
            got, expected = (
                envs.reset(options={"reset_mask": ended.copy()}) for envs in (ours, theirs)
            )
            assert data_equivalence(got, expected, exact=True)
    assert np.all(np.sum(ends, axis=0) > 0)


@pytest.mark.parametrize("name", IDS)
def test_an_episode_that_is_over_needs_a_reset(name):
    env = env_of(name, **settings_of(name))
    with pytest.raises(ResetNeeded):
        env.step(env.action_space.sample())
    env.reset(seed=0)
    while not any(env.step(env.action_space.sample())[2:4]):
        pass
    with pytest.raises(ResetNeeded):
        env.step(env.action_space.sample())
    env.reset()
    env.step(env.action_space.sample())


@pytest.mark.parametrize("fill", ["next_open", "same_close"])
@pytest.mark.parametrize("positions", ["long_flat", "long_short"])
@pytest.mark.parametrize("seed", range(3))
def test_a_single_episode_is_the_slow_twins(fill, positions, seed):
    settings = settings_of(SINGLE, seed, fill=fill, positions=positions, horizon=20)
    env = env_of(SINGLE, **settings)
    bars, span = env.view.task.bars, env.view.spans
    random, moments = np.random.default_rng(seed), set()
    for _ in range(4):
        _, info = env.reset(seed=seed) if not moments else env.reset()
        twin = oracles.Account(oracles.days_of(bars), settings["rules"])
        moments.add(int(info["moment"]))
        assert any(info["moment"] in each for each in span)
        over = False
        while not over:
            allowed = [env.view.task.actions[a] for a in np.flatnonzero(info["action_mask"])]
            assert allowed == twin.allowed(int(info["moment"]))
            action = int(random.integers(3))
            day = int(info["moment"])
            _, reward, terminated, truncated, info = env.step(action)
            expected = twin.step(day, env.view.task.actions[action])
            assert (reward, terminated) == pytest.approx(expected, abs=1e-9)
            assert info["equity"] == pytest.approx(twin.equity, rel=1e-9)
            over = terminated or truncated
        assert truncated == (not terminated)
        assert terminated or len(twin.rewards) == 20
    assert len(moments) > 1


@pytest.mark.parametrize("positions", ["long_only", "long_short"])
@pytest.mark.parametrize("seed", range(3))
def test_a_portfolios_episode_is_the_slow_twins(positions, seed):
    settings = settings_of(PORTFOLIO, seed, positions=positions, horizon=20)
    env = env_of(PORTFOLIO, **settings)
    names, random = env.view.task.actions, np.random.default_rng(seed)
    for _ in range(2):
        _, info = env.reset(seed=seed)
        twin = portfolio_oracle.Account(settings["market"], settings["rules"])
        over = False
        while not over:
            day = int(info["moment"])
            for k, mask in enumerate(info["action_mask"]):
                assert {names[a] for a in np.flatnonzero(mask)} == {*twin.allowed(k, day)}
            actions = random.integers(0, env.action_space.nvec)
            _, reward, terminated, truncated, info = env.step(actions)
            expected = twin.step(day, [names[action] for action in actions])
            assert (reward, terminated) == pytest.approx(expected[:2], abs=1e-9)
            assert info["equity"] == pytest.approx(twin.equity, rel=1e-9)
            over = terminated or truncated


@pytest.mark.parametrize("name", IDS)
def test_bad_input_is_one_line(name):
    settings = settings_of(name)
    with pytest.raises(InputError, match="an episode needs 2 days"):
        gymnasium.make(name, **settings, period="1990-01-01..1990-02-01")
    with pytest.raises(InputError, match="unknown data source"):
        gymnasium.make(name, market="moon:AAPL")
    envs = gymnasium.make_vec(name, 3, **settings)
    for options in ({"mask": 1}, {"reset_mask": [True] * 3}, {"reset_mask": np.zeros(3, bool)}):
        with pytest.raises(ValueError, match=r"reset_mask|unknown options"):
            envs.reset(options=options)
    with pytest.raises(ValueError, match="2 seeds for 3"):
        envs.reset(seed=[1, 2])
    envs.reset(seed=[3, None, 5])
    with pytest.raises(ValueError, match="actions are"):
        envs.step(np.zeros(2, int))
    with pytest.raises(ValueError, match="actions must lie in"):
        envs.step(np.full_like(envs.action_space.sample(), 9))


@given(st.sampled_from(IDS), st.integers(0, 10**6), st.booleans())
def test_a_masked_action_is_no_action(name, seed, long_short):
    """Whatever is forbidden leaves the same numbers as Hold or Keep, in the same place."""
    positions = "long_short" if long_short else "long_flat" if name == SINGLE else "long_only"
    settings = settings_of(name, seed, positions=positions)
    envs = [env_of(name, **settings) for _ in range(2)]
    infos = [env.reset(seed=seed)[1] for env in envs]
    random, over = np.random.default_rng(seed), False
    while not over:
        action = random.integers(len(envs[0].view.task.actions), size=envs[0].action_space.shape)
        mask = infos[0]["action_mask"]
        assert np.array_equal(envs[0].action_masks(), mask.reshape(-1))
        is_allowed = np.take_along_axis(mask, action[..., None], -1)[..., 0]
        instead = np.where(is_allowed, action, 1)
        steps = [env.step(each) for env, each in zip(envs, (action, instead), strict=True)]
        assert data_equivalence(*steps, exact=True)
        infos, over = [step[-1] for step in steps], steps[0][2] or steps[0][3]


@pytest.mark.parametrize("name", IDS)
def test_an_episode_depends_on_its_seed_and_number_alone(name):
    """Not on what was done before, nor on how many there are, nor on where they were reset."""
    settings = settings_of(name)

    def starts(envs, seeds):
        infos = [envs.reset(seed=seeds)[1], *(envs.reset()[1] for _ in range(5))]
        return np.stack([info["moment"] for info in infos])

    one, many = env_of(name, **settings), gymnasium.make_vec(name, 4, **settings)
    of_many = starts(many, 20)
    assert len(np.unique(of_many)) > 4
    assert np.array_equal(starts(many, [23, 22, 21, 20]), of_many[:, ::-1])
    for i in range(4):
        one.step(1) if i and name == SINGLE else None
        assert np.array_equal(starts(one, 20 + i), of_many[:, i])
    unseeded = {int(env_of(name, **settings).reset()[1]["moment"]) for _ in range(20)}
    assert len(unseeded) > 1
    many.reset(seed=20)
    mask = np.array([False, True, False, False])
    _, infos = many.reset(options={"reset_mask": mask})
    assert infos["moment"].tolist() == [0, of_many[1, 1], 0, 0]
    assert np.array_equal(infos["_moment"], mask)


def test_ruin_at_the_last_decision_terminates_and_does_not_truncate():
    falling = 100 * 0.5 ** np.arange(4.0)
    columns = [(falling, falling, np.ones(4), np.zeros(4), np.ones(4, bool))]
    market = portfolio_oracle.market_of(columns)
    for name, action in ((SINGLE, 2), (PORTFOLIO, [2])):
        settings = settings_of(name, market=market, horizon=1, fill="same_close", ruin=0.9)
        env = env_of(name, **settings)
        env.reset(seed=0)
        assert env.step(action)[2:4] == (True, False)
        env.reset()
        assert env.step(np.ones_like(action))[2:4] == (False, True)


def test_the_plain_twin_that_speed_is_measured_against_is_the_same():
    settings = settings_of(SINGLE, market=planted_market(60), horizon=9)
    ours = gymnasium.make_vec(SINGLE, 5, autoreset_mode=AutoresetMode.SAME_STEP, **settings)
    plain = NumPyEnvs(ours.view, 5)
    random, returned = np.random.default_rng(0), [ours.reset(seed=0), plain.reset()]
    for _ in range(40):
        (*arrays, infos), (*others, told) = returned
        for one, other in zip(arrays, others, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
        for name in told:
            if name != "final_obs":
                np.testing.assert_allclose(infos[name], told[name], rtol=1e-12)
        actions = random.integers(3, size=5)
        returned = [ours.step(actions), plain.step(actions)]
