"""How far results may be from exact ones: by hand, and a few wrong rows among many."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflag.model.exactness import Errors, errors_of, missed, refusal

pytestmark = pytest.mark.usefixtures("one_thread")


def test_errors_by_hand():
    exact = torch.tensor([[3.0, 4.0], [6.0, 8.0]]).double()
    result = torch.tensor([[3.0, 4.0], [6.0, 9.0]])
    # The second row is 10 long and off by 1. Columns are sqrt(45) and sqrt(80) long.
    assert errors_of(result, exact) == Errors(pytest.approx(0.1), pytest.approx(1 / 80**0.5))
    # Rows are 5 and 10 long, so that one of 5 counts as their root mean square, sqrt(62.5).
    result = torch.tensor([[3.0, 5.0], [6.0, 8.0]])
    assert errors_of(result, exact).row == pytest.approx(1 / 62.5**0.5)
    # Numbers are rows of one, and together a column.
    some = torch.tensor([1.0, 1.0, 1.5, 1.0])
    found = errors_of(some, torch.ones(4).double())
    assert found == Errors(pytest.approx(0.5), pytest.approx(0.25))
    assert errors_of(torch.zeros(2, 3), torch.zeros(2, 3).double()) == Errors(0.0, 0.0)
    assert errors_of(torch.zeros(0, 3), torch.zeros(0, 3).double()) == Errors(0.0, 0.0)
    with pytest.raises(ValueError, match=r"\[3\], not \[4\]"):
        errors_of(torch.zeros(3), exact.flatten())


@pytest.mark.parametrize("pieces", [1, 7, 2**24])
def test_pieces_add_up(pieces, monkeypatch):
    monkeypatch.setattr("fastflag.model.exactness._PIECE", pieces)
    exact = torch.randn(11, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    result = exact.bfloat16()
    off, size = (result.double() - exact).flatten(0, 1), exact.flatten(0, 1)
    expected = []
    for axis in (1, 0):
        lengths = size.norm(dim=axis)
        least = lengths.square().mean().sqrt()
        expected.append(float((off.norm(dim=axis) / lengths.clamp_min(least)).max()))
    assert errors_of(result, exact) == Errors(*map(pytest.approx, expected))


def products(rows: int = 2048, inner: int = 64, outputs: int = 48):
    """A product in bf16 as PyTorch has it, as another order of adding has it, and in fp64."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, inner, generator=generator).bfloat16() for n in (rows, outputs))
    exact = x.double() @ weight.double().T
    halves = (x[:, part].float() @ weight[:, part].float().T for part in (slice(32), slice(32, 64)))
    return x @ weight.T, sum(halves).bfloat16(), exact


def test_another_order_of_adding_is_right():
    torchs, ours, exact = products()
    assert refusal(ours, torchs, exact) == refusal(torchs, torchs, exact) == ""
    assert refusal(exact.bfloat16(), torchs, exact) == ""


@given(st.integers(0, 2047), st.sampled_from(["zero", "its neighbour's", "nan", "a tenth off"]))
def test_one_wrong_row_in_thousands_is_seen(row, fault):
    torchs, ours, exact = products()
    ours = ours.clone()
    ours[row] = {
        "zero": 0.0,
        "its neighbour's": ours[row - 1],
        "nan": torch.nan,
        "a tenth off": 1.1 * ours[row],
    }[fault]
    assert "in a row" in refusal(ours, torchs, exact)
    if fault != "nan":  # which the tensor's error as one number, at 3e-2, did not see
        assert (ours.double() - exact).norm() / exact.norm() < 0.06


def test_one_wrong_column_is_seen():
    torchs, ours, exact = products(rows=64, outputs=4096)
    ours[:, 1234] += 0.3 * exact[:, 1234].abs().mean()
    assert "in a column" in refusal(ours, torchs, exact)


def test_a_sum_kept_in_bf16_is_seen():
    """Twice PyTorch's own error is less than what adding in 16 bits makes."""
    torchs, _, exact = products()
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (2048, 48))
    ours = torch.zeros_like(torchs)
    for inner in range(64):
        ours += x[:, inner, None] * weight[None, :, inner]
    assert "is off by" in refusal(ours, torchs, exact)


def test_shapes_that_differ_are_told():
    some = torch.zeros(3, 4)
    assert refusal(some[:1], some, some.double()) == "is [1, 4], not [3, 4]"
    assert missed(some[:1], some.double()) == "is [1, 4], not [3, 4]"


def test_whole_numbers_are_compared_to_the_bit():
    exact = torch.tensor([1.0, 2.5, -3.0, 257.0, 0.0]).double()
    right = torch.tensor([1.0, 9.9, -3.0, 256.0, -0.0]).bfloat16()  # 257 rounds to 256
    assert missed(right, exact) == ""
    nearly = torch.tensor([1e-191, 1e-30], dtype=torch.float64)
    assert missed(torch.tensor([1e-45, 2e-30]), nearly) == ""
    assert missed(torch.tensor([1e-30, 1e-30]), nearly) != ""
    right[2] = -3.015625
    assert missed(right, exact) == "differs in 1 of 4 whole numbers, first at [2]"
    right[0] = torch.nan
    assert missed(right, exact) == "differs in 2 of 4 whole numbers, first at [0]"
