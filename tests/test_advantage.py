import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fastflag.learn.advantage import explained_variance, generalised_advantage


def by_definition(reward, value, next_value, terminated, truncated, gamma, gae_lambda):
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, k up to the end of t's episode or batch."""
    environments, steps = reward.shape
    advantage = np.zeros((environments, steps))
    for b in range(environments):
        for t in range(steps):
            for k in range(t, steps):
                after = 0.0 if terminated[b, k] else next_value[b, k]
                delta = reward[b, k] + gamma * after - value[b, k]
                advantage[b, t] += (gamma * gae_lambda) ** (k - t) * delta
                if terminated[b, k] or truncated[b, k]:
                    break
    return advantage


SHAPE = st.tuples(st.integers(1, 3), st.integers(1, 9))
NUMBERS = st.floats(-2, 2, width=32)


@given(st.data(), SHAPE, st.floats(0, 1), st.floats(0, 1))
def test_it_is_the_sum_over_each_episode(data, shape, gamma, gae_lambda):
    numbers = arrays(np.float64, (3, *shape), elements=NUMBERS)
    reward, value, next_value = data.draw(numbers)
    ends = data.draw(arrays(np.int8, shape, elements=st.sampled_from([0, 0, 0, 1, 2, 3])))
    inputs = (reward, value, next_value, (ends & 1) > 0, (ends & 2) > 0, gamma, gae_lambda)
    np.testing.assert_allclose(
        generalised_advantage(*inputs), by_definition(*inputs), rtol=1e-12, atol=1e-12
    )


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 9))
def test_it_has_the_bits_of_numpys_sums(seed, environments, steps):
    """Runs resume, and repeat, to the bit; also of arrays that are stored otherwise."""
    random = np.random.default_rng(seed)
    reward, value, next_value = random.normal(size=(3, environments, steps))
    ends = random.random((2, steps, environments)).transpose(0, 2, 1) < 0.2
    gamma, gae_lambda = random.random(2)
    delta = reward + gamma * next_value * ~ends[0] - value
    decay = gamma * gae_lambda * ~(ends[0] | ends[1])
    expected, following = np.zeros_like(delta), np.zeros(environments)
    for step in reversed(range(steps)):
        following = delta[:, step] + decay[:, step] * following
        expected[:, step] = following
    ours = generalised_advantage(reward, value, next_value, *ends, gamma, gae_lambda)
    assert np.array_equal(ours, expected)


def test_a_termination_has_no_value_after_it_and_a_truncation_has():
    one = np.ones((1, 1))
    yes, no = np.ones((1, 1), bool), np.zeros((1, 1), bool)

    def advantage(terminated, truncated):
        return generalised_advantage(one, 0 * one, 10 * one, terminated, truncated, 0.5, 0.9)[0, 0]

    assert advantage(yes, no) == 1
    assert advantage(no, yes) == 6
    assert advantage(no, no) == 6
    assert advantage(yes, yes) == 1


def test_lambda_one_is_the_discounted_return_less_the_value():
    random = np.random.default_rng(0)
    reward, value = random.normal(size=(2, 7)), random.normal(size=(2, 8))
    no = np.zeros((2, 7), bool)
    advantage = generalised_advantage(reward, value[:, :-1], value[:, 1:], no, no, 0.9, 1.0)
    returns = (reward * 0.9 ** np.arange(7)).sum(1) + 0.9**7 * value[:, 7]
    np.testing.assert_allclose(advantage[:, 0], returns - value[:, 0])


def test_explained_variance():
    def of(value, target):
        return explained_variance(value, target, np.ones(len(value)), np.zeros(len(value)))

    target = np.array([1.0, 2.0, 4.0])
    assert of(target, target) == 1
    assert of(np.zeros(3), target) == 0
    assert of(-target, target) == pytest.approx(-3)
    assert of(np.arange(3.0), np.ones(3)) == 0


def test_explained_variance_of_means_is_that_of_what_they_are_means_of():
    random = np.random.default_rng(0)
    value, place = random.normal(size=4), np.array([0, 0, 0, 1, 2, 2, 3])
    target = random.normal(size=7)
    weight = np.bincount(place)
    mean = np.bincount(place, target) / weight
    spread = np.bincount(place, (target - mean[place]) ** 2)
    whole = 1 - (target - value[place]).var() / target.var()
    assert explained_variance(value, mean, weight, spread) == pytest.approx(whole)
