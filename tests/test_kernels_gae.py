"""Generalised advantages in Triton against the ones on the CPU in fp64 and against their sum."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

pytest.importorskip("triton", reason="Triton exists for Linux only")

from precision import DEVICE, DTYPES, assert_no_worse, poisoned
from test_advantage import NUMBERS, by_definition

from fastflag.kernels.gae import generalised_advantage, generalised_advantage_reference
from fastflag.learn import advantage as on_cpu

# H below, at and above what a program holds, and B that fills no program.
SHAPES = [(1, 1), (700, 1), (3, 2), (1, 63), (33, 63), (5, 64), (2, 123), (3, 507), (2, 1025)]


def problem(shape, dtype=torch.float32, ends=0.05):
    """reward, value, next_value, terminated, truncated."""
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(3))
    flags = (torch.rand(shape, generator=generator).to(DEVICE) < ends for _ in range(2))
    return *numbers, *flags


def exact(columns, gamma, gae_lambda):
    numbers = (column.double().cpu().numpy() for column in columns[:3])
    flags = (column.cpu().numpy() for column in columns[3:])
    found = on_cpu.generalised_advantage(*numbers, *flags, gamma, gae_lambda)
    return torch.from_numpy(found).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_one_on_the_cpu(shape, dtype):
    columns = problem(shape, dtype)
    torchs = generalised_advantage_reference(*columns, 0.95, 0.98)
    with poisoned():
        ours = generalised_advantage(*columns, 0.95, 0.98)
    assert_no_worse(ours, torchs, exact(columns, 0.95, 0.98))


def test_the_reference_is_the_one_on_the_cpu():
    columns = problem((5, 63), torch.float64, ends=0.2)
    found = generalised_advantage_reference(*columns, 0.95, 0.98)
    torch.testing.assert_close(found, exact(columns, 0.95, 0.98), rtol=1e-12, atol=1e-12)


@given(st.data(), st.tuples(st.integers(1, 3), st.integers(1, 9)), st.floats(0, 1), st.floats(0, 1))
def test_it_is_the_sum_over_each_episode(data, shape, gamma, gae_lambda):
    numbers = data.draw(arrays(np.float32, (3, *shape), elements=NUMBERS))
    ends = data.draw(arrays(np.int8, shape, elements=st.sampled_from([0, 0, 0, 1, 2, 3])))
    columns = *numbers, (ends & 1) > 0, (ends & 2) > 0
    ours = generalised_advantage(
        *(torch.from_numpy(column).to(DEVICE) for column in columns), gamma, gae_lambda
    )
    wide = (column.astype(np.float64) for column in numbers)
    expected = by_definition(*wide, *columns[3:], gamma, gae_lambda)
    np.testing.assert_allclose(ours.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_an_episode_of_many_tiles_counts_its_steps():
    """Without discount and values the advantage is the reward that is left: whole numbers."""
    steps = 4096
    one = torch.ones(2, steps, device=DEVICE)
    never = torch.zeros_like(one, dtype=torch.bool)
    end = never.clone()
    end[1, 1500] = True
    ours = generalised_advantage(one, 0 * one, 0 * one, never, end, 1.0, 1.0)
    left = torch.arange(steps, 0, -1, device=DEVICE, dtype=torch.float32)
    assert torch.equal(ours[0], left)
    assert torch.equal(ours[1, 1501:], left[1501:])
    assert torch.equal(ours[1, :1501], left[-1501:])


def test_what_follows_a_termination_counts_for_nothing():
    reward, value, next_value, terminated, truncated = problem((5, 63), ends=0.2)
    arguments = (terminated, truncated, 0.95, 0.98)
    ours = generalised_advantage(reward, value, next_value, *arguments)
    spoilt = next_value.masked_fill(terminated, torch.nan)
    assert torch.equal(generalised_advantage(reward, value, spoilt, *arguments), ours)


# The interpreter's NumPy tells of 0 x inf, which is not taken.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_a_later_episode_that_is_not_finite_leaves_earlier_ones_alone(end):
    generator = torch.Generator().manual_seed(0)
    reward, value, next_value = torch.randn(3, 2, 700, generator=generator)
    ends = {name: torch.zeros(2, 700, dtype=torch.bool) for name in ("terminated", "truncated")}
    ends[end][:, [80, 600]] = True
    reward[0, 90], reward[1, 650] = torch.nan, torch.inf
    columns = (reward, value, next_value, ends["terminated"], ends["truncated"])
    columns = [column.to(DEVICE) for column in columns]
    ours = generalised_advantage(*columns, 0.9, 0.8)
    right = generalised_advantage_reference(*columns, 0.9, 0.8)
    assert right[0, :81].isfinite().all() and right[1, :601].isfinite().all()
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_columns_may_lie_in_memory_by_steps():
    columns = problem((63, 5))
    turned = tuple(column.T for column in columns)
    ours = generalised_advantage(*turned, 0.95, 0.98)
    assert torch.equal(ours, generalised_advantage(*(c.contiguous() for c in turned), 0.95, 0.98))
    assert_no_worse(ours, ours, exact(turned, 0.95, 0.98))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
def test_no_steps_have_no_advantages(shape):
    assert generalised_advantage(*problem(shape), 0.95, 0.98).shape == shape


def test_it_is_a_well_formed_operator():
    torch.library.opcheck(generalised_advantage, (*problem((3, 5)), 0.95, 0.98))
