"""What counts as right and as faster, of tensors and samples that are made up."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflag.model.proof.judge import FASTER, WORST, Timed, compared, differing, faster, fastest

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS, COLUMNS = 24_576, 64


def made(dtype, rows=ROWS, columns=COLUMNS, seed=0):
    """A result, as PyTorch rounds it once, and the exact one."""
    exact = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    return exact.to(dtype), exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_more_rounding_is_right(dtype):
    torchs, exact = made(dtype)
    assert compared("y", torchs, torchs, exact).error <= 1.0
    double = (exact * 3).to(dtype).double() / 3
    told = compared("y", double.to(dtype), torchs, exact)
    assert told.why == "" and 0 < told.error <= WORST


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [[7], range(100, 111)], ids=["one row", "eleven rows"])
def test_a_few_wrong_rows_of_many_are_found(dtype, rows):
    """Eleven rows of 24,576 that nobody wrote are 2% by Frobenius' norm."""
    torchs, exact = made(dtype)
    ours = torchs.clone()
    ours[list(rows)] = 0
    assert float((ours.double() - exact).norm() / exact.norm()) < 0.03
    told = compared("y", ours, torchs, exact)
    assert told.error > 100 and "row" in told.why
    assert any(f"row {row} " in told.why for row in rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_column_that_is_a_little_off_is_found(dtype):
    """In every row it is one number of 64, and within twice the row's error."""
    torchs, exact = made(dtype)
    ours, eps = torchs.clone(), torch.finfo(dtype).eps
    ours[:, 63] = (exact[:, 63] * (1 + 6 * eps)).to(dtype)
    if dtype == torch.float32:
        ours[:, 63] = (exact[:, 63] * (1 + 40 * eps)).to(dtype)
    told = compared("y", ours, torchs, exact)
    assert told.error > WORST and "column 63 " in told.why


@given(place=st.tuples(st.integers(0, 99), st.integers(0, 63)), dtype=st.sampled_from(DTYPES))
def test_one_wrong_number_is_found(place, dtype):
    torchs, exact = made(dtype, rows=100)
    ours = torchs.clone()
    ours[place] += 1
    assert f"{place[0]} " in compared("y", ours, torchs, exact).why


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_wrong(bad):
    torchs, exact = made(torch.float32, rows=100)
    ours = torchs.clone()
    ours[5, 6] = bad
    assert compared("y", ours, torchs, exact).error == float("inf")
    assert compared("y", ours[:, 6], torchs[:, 6], exact[:, 6]).why


def test_of_another_shape_or_type():
    torchs, exact = made(torch.float32, rows=100)
    assert "[99, 64]" in compared("y", torchs[1:], torchs, exact).why
    assert "float16" in compared("y", torchs.half(), torchs, exact).why


def test_zeros_are_zeros():
    zeros = torch.zeros(8, 32)
    assert compared("dx", zeros, zeros, zeros.double()).why == ""
    assert compared("dx", zeros + 1e-9, zeros, zeros.double()).why
    empty = torch.zeros(0, 32)
    assert compared("dx", empty, empty, empty.double()).why == ""


@given(seed=st.integers(0, 10_000), count=st.integers(1, 300))
def test_luck_with_single_numbers_condemns_nothing(seed, count):
    """Rows of one number: PyTorch's error in one of them is often 0."""
    exact = torch.randn(count, generator=torch.Generator().manual_seed(seed)).double()
    once, more = exact.float(), exact.float() * 3 / 3 * 7 / 7
    assert compared("y", once, more, exact).why == compared("y", more, once, exact).why == ""


def test_whole_numbers_are_equal_or_not():
    exact = torch.arange(-8.0, 8.0).reshape(4, 4).double()
    assert differing("y", exact.bfloat16(), exact) == ""
    ours = exact.bfloat16()
    ours[2, 1] = 0.5
    assert differing("y", ours, exact) == (
        "y: 1 of whole numbers differ, the first in row 2, column 1"
    )
    assert differing("y", exact.bfloat16(), exact + 1e-222) == ""
    assert differing("y", exact.bfloat16() + 1, exact + 1e-222)
    # 257 has no bf16: it may be either of its neighbours.
    wide = exact + 257
    assert differing("y", wide.bfloat16(), wide) == ""
    assert differing("y", (exact + 240).bfloat16() + 1, exact + 240)


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
