"""The operations of an update's products, against formulas by hand."""

import pytest
import torch
from torch.nn import functional

from bench.measure.anatomy import operations_of
from fastflag.model import attention
from fastflag.model.shared_prefix import Prefixes, SuffixLayout


def leaf(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("backward", [False, True])
def test_attention_has_two_products_and_five_in_its_backward(backward, groups):
    rows, heads, queries, keys, width = 3, 6, 5, 7, 8
    query, key, value = (
        leaf(rows, heads, queries, width),
        leaf(rows, groups, keys, width),
        leaf(rows, groups, keys, width),
    )

    def work():
        attended = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        if backward:
            attended.sum().backward()

    one = 2 * rows * heads * queries * keys * width
    assert operations_of(work) == (2 + 5 * backward) * one


def test_tiles_attend_to_padded_prefixes_and_to_the_tokens_of_four_suffixes():
    heads, groups, tokens, width = 6, 2, 4, 8
    counts, lengths = (5, 3), (5, 9)  # two tiles after 16 places, one after 16
    query, own = leaf(8, heads, tokens, width), leaf(8, groups, tokens, width)
    blocks = [tuple(leaf(1, groups, n, width) for _ in range(2)) for n in lengths]
    layout = SuffixLayout.build(counts, lengths, torch.full((8,), tokens), tokens)
    first = torch.zeros(8, dtype=torch.int64)

    def work():
        attention.by_tiles(query, own, own, first, Prefixes(blocks, lengths), layout).sum()

    keys = 16 + 4 * 16  # a suffix's own keys come in sixteens
    assert operations_of(work) == 3 * 2 * (2 * (4 * heads * tokens) * keys * width)
