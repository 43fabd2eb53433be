"""Keys and values that suffixes share: what is read of which prefixes, with gradients or not."""

import pytest
import torch
from models import EXACT, Given, prompt_set, texts, tiny
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastflag.model import attention
from fastflag.model.model_config import Settings, json_config
from fastflag.model.shared_prefix import Prefixes, SuffixLayout
from fastflag.policy.table import Policy

HEADS, GROUPS, WIDTH, TOKENS = 4, 2, 8, 5


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def block(lengths, seed=0):
    """Keys and values of prefixes in one block, and the `Prefixes` of them."""
    sides = tuple(random(len(lengths), GROUPS, max(lengths), WIDTH, seed=seed + n) for n in (1, 2))
    return sides, Prefixes([sides], lengths)


@pytest.mark.parametrize("read", [lambda made: made.of_size(8), lambda made: made.whole])
def test_what_is_made_without_gradient_is_not_read_with_it(read):
    for lengths in ((7, 5), (7, 5, 20)):  # all of the block, and some of its rows
        sides, made = block(lengths)
        with torch.no_grad():
            before = [side.clone() for side in read(made)]
        after = read(made)
        assert all(map(torch.equal, before, after))
        gradients = torch.autograd.grad(sum(side.sum() for side in after), sides)
        assert all(gradient[:2].sum() > 0 for gradient in gradients)


def test_a_size_that_no_prefix_has_is_told():
    with pytest.raises(ValueError, match=r"no prefix has 32 tokens when padded, but \[8, 24\]"):
        block((7, 20))[1].of_size(32)


LENGTHS = (9, 12, 3, 16, 10, 14)
ASKED = {1: 3, 4: 6, 5: 1}  # suffixes of each day that has any


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("form", [attention.by_tiles, attention.padded])
def test_days_asked_for_give_what_all_of_them_give(form, blocks):
    """Values and gradients to the bit, from one block of all days and from several."""
    sides, _ = block(LENGTHS)
    each = len(LENGTHS) // blocks
    parts = [tuple(side[at : at + each] for side in sides) for at in range(0, len(LENGTHS), each)]
    suffixes = sum(ASKED.values())
    query, own = random(suffixes, HEADS, 1, WIDTH), random(suffixes, GROUPS, TOKENS, WIDTH, seed=3)
    first = torch.full((suffixes,), TOKENS - 1)
    results = []
    for days in (range(len(LENGTHS)), [*ASKED]):
        counts, lengths = [ASKED.get(day, 0) for day in days], [LENGTHS[day] for day in days]
        layout = SuffixLayout.build(counts, lengths, first + 1, TOKENS)
        some = Prefixes(parts, LENGTHS).select(days)
        attended = form(query, own, own, first, some, layout)
        gradients = torch.autograd.grad(attended.square().sum(), [query, own, *sides])
        results.append([attended, *gradients])
    assert all(map(torch.equal, *results))
    for gradient in results[1][3:]:
        asked = gradient.flatten(1).any(1).nonzero()[:, 0].tolist()
        assert asked == [*ASKED]


@pytest.mark.parametrize("lengths", [(8, 24, 16, 24), (16, 16, 16)])
def test_blocks_of_a_day_each_are_padded_at_once(lengths):
    """Without gradients in as many operators for any number of days, whatever their lengths; and
    the same numbers, zeros where a day has ended."""

    def operators(days):
        blocks = [block([n], seed=at)[0] for at, n in enumerate(lengths * days)]
        made = Prefixes(blocks, lengths * days)
        with torch.no_grad(), profile() as profiled:
            found = made.whole
        expected = [torch.zeros_like(side) for side in found]
        for at, sides in enumerate(blocks):
            for target, side in zip(expected, sides, strict=True):
                target[at, :, : side.shape[2]] = side[0]
        assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
        names = [event.name for event in profiled.function_events]
        return sum(names.count(f"aten::{name}") for name in ("cat", "constant_pad_nd", "copy_"))

    assert operators(2) == operators(9) <= 2 * 2


class Numbers(TorchDispatchMode):
    """How many numbers the operators inside give."""

    made = 0

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        given = operator(*arguments, **(named or {}))
        leaves = (leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor))
        self.made += sum(leaf.numel() for leaf in leaves)
        return given


def test_an_evaluation_a_day_does_not_work_on_all_days_each_time():
    """Exact accounts have one: its backward pass takes as long, however many days were read."""
    made = tiny("llama")
    config = json_config(Settings(made.config.to_dict(), "llama"))
    weights = Given(config, {name: t.detach() for name, t in made.state_dict().items()})
    policy = Policy(weights, EXACT, (1, 2, 3), 0)
    prefixes, suffixes = texts([24] * 32, 0), texts((5, 7, 6), 1)

    def work(count):
        days = policy.read(prefixes[:count])
        both = [prompt_set(prefixes[day : day + 1], suffixes) for day in range(2)]
        statistics = policy.evaluate(both[0]).statistics
        one, two = (policy.evaluate(prompts, statistics, days).value.sum() for prompts in both)
        numbers = []
        for total in (one, one + two):
            with Numbers() as counted:
                torch.autograd.grad(total, policy.top.parameters(), retain_graph=True)
            numbers.append(counted.made)
        return numbers[1] - numbers[0]

    assert work(32) < 1.1 * work(2)
