"""What counts as faster, of samples that are made up."""

import numpy as np
import pytest

from fastflag.model.proof.speed import FASTER, Timed, faster, fastest


def samples(median, noise=0.02, seed=0, host=0.0, rounds=30):
    random = np.random.default_rng(seed)
    return Timed(median * (1 + noise * random.standard_normal(rounds)), np.full(rounds, host))


def test_the_clearly_faster_one_is_taken():
    timed = {"torch": samples(1.0), "triton": samples(0.8, seed=1), "flash-attn": samples(0.5)}
    name, gain = fastest(timed, replayed=False)
    assert name == "flash-attn" and gain == pytest.approx(2.0, rel=0.05)
    del timed["flash-attn"]
    assert fastest(timed, replayed=True)[0] == "triton"


@pytest.mark.parametrize("ours", [1.0, 1.2, 0.97])
def test_a_tie_and_a_slower_one_stay_with_pytorch(ours):
    timed = {"torch": samples(1.0), "triton": samples(ours, seed=1)}
    assert fastest(timed, replayed=False) == ("torch", 1.0)


def test_alone_pytorch_is_taken():
    assert fastest({"torch": samples(1.0)}, replayed=False) == ("torch", 1.0)


def test_without_graphs_the_host_counts():
    """Twice as fast on the device, and slower to launch."""
    timed = {"torch": samples(30e-6, host=40e-6), "triton": samples(15e-6, seed=1, host=60e-6)}
    assert fastest(timed, replayed=True)[0] == "triton"
    assert fastest(timed, replayed=False)[0] == "torch"


def test_a_drift_slows_both():
    slower = np.linspace(1.0, 3.0, 30)  # as a laptop gets hot
    base = Timed(slower, 0 * slower)
    ours = Timed(slower / 1.2, 0 * slower)
    assert faster(ours, base, replayed=True) == pytest.approx(1.2)


def test_one_outlier_is_none_the_faster():
    base = samples(1.0)
    base.device[3] = 100.0
    assert faster(samples(1.0, seed=1), base, replayed=True) < FASTER


def test_what_wins_by_turns_is_noise():
    """Faster by half in three rounds of four, slower in the others."""
    ours = samples(1.0, noise=0.0)
    ours.device[:] = np.where(np.arange(30) % 4, 1 / 1.5, 2.0)
    assert fastest({"torch": samples(1.0, noise=0.0), "triton": ours}, False) == ("torch", 1.0)
