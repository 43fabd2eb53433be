"""Where the streams of random numbers begin."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflag.market import streams

SEEDS = st.integers(0, 2**63 - 1)


@pytest.mark.parametrize(
    ("seed", "world", "sampled", "random", "shuffled"),
    [
        (0, 240985647329524, 141939171635444, 5930918744940851444, 4625441644015172652),
        (1, 113445368589671, 67167129529703, 5930791204662111591, 8995600287511374582),
        (2**63 - 1, 8512034806544, 102833375386384, 5930686271328328464, 1968110152401461778),
    ],
)
def test_they_begin_where_they_did_in_version_0_1(seed, world, sampled, random, shuffled):
    """So that a run of before can be made again, and resumed, to the bit."""
    assert streams.environments(seed) == world
    assert streams.sampled_episodes(world) == sampled
    assert streams.random_policies(world) == random
    assert streams.shuffles(seed, 7) == shuffled
    assert streams.initial_weights(seed) == seed


@given(SEEDS)
def test_no_two_of_a_run_share_numbers(seed):
    """Of 2^32 accounts each."""
    world = streams.environments(seed)
    begins = [world, streams.sampled_episodes(world), streams.random_policies(world)]
    apart = [abs(a - b) for a, b in itertools.combinations(begins, 2)]
    assert min(apart) > 2**32 and max(begins) + 2**32 < 2**64


@given(SEEDS)
def test_each_update_of_each_seed_shuffles_its_own_way(seed):
    seeds = {streams.shuffles(s, update) for s in (seed, seed ^ 1) for update in range(5)}
    assert len(seeds) == 10 and all(0 <= s < 2**63 for s in seeds)
