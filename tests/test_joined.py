"""Projections of one input as one product, as on a GPU, against one after another, in fp64."""

import copy

import pytest
import torch
from models import Given, tiny
from precision import compute_as_on_a_gpu

from fastflag.model import joined
from fastflag.model.joined import JoinedLinear, adapters_cast, fit
from fastflag.model.linear import FrozenLinear, LoRALinear, TrainedLinear, matrix_numbers, unpacked
from fastflag.model.llama import Block, prefix_pass, suffix_pass
from fastflag.model.model_config import Settings, json_config
from fastflag.model.quant import NF4Weight
from fastflag.model.shared_prefix import SuffixLayout

FP64, WIDTH = torch.float64, 128


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def layer(outputs, seed, stored="plain", rank=4, biased=True, inputs=WIDTH, dtype=FP64):
    """Frozen, or adapted where the rank is not 0, as if it had been trained."""
    matrix = 0.1 * random(outputs, inputs, seed=seed)
    weight = NF4Weight.quantise(matrix.float()) if stored == "nf4" else matrix.to(dtype)
    bias = random(outputs, seed=seed + 50).to(dtype) if biased else None
    frozen = FrozenLinear(weight, bias, dtype)
    if not rank:
        return frozen
    adapted = LoRALinear(frozen, rank, 6.0, torch.Generator().manual_seed(seed)).to(FP64)
    adapted.lora_b.data = 0.3 * random(outputs, rank, seed=seed + 90)
    return adapted


def matrix_of(layer):
    """In fp64, of the levels that bitsandbytes gives in fp32."""
    stored = (layer.base if isinstance(layer, LoRALinear) else layer).weight
    return (stored.dequantise(torch.float32) if isinstance(stored, NF4Weight) else stored).double()


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    compute_as_on_a_gpu(monkeypatch)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_it_is_each_formula_with_all_gradients(count, cast, biased):
    """Of x, of every A and of every B; x W^T + s (x A^T) B^T + bias by hand."""
    layers = [layer(64 + 8 * at, at, biased=biased) for at in range(count)]
    parameters = [side for one in layers for side in (one.lora_a, one.lora_b)]
    x, slopes = random(3, 5, WIDTH, seed=9).requires_grad_(), []
    weights = [random(3, 5, 64 + 8 * at, seed=20 + at) for at in range(count)]
    expected = []
    for one in layers:
        product = x @ matrix_of(one).T + one.scale * (x @ one.lora_a.T) @ one.lora_b.T
        expected.append(product if one.base.bias is None else product + one.base.bias)
    together = JoinedLinear(layers)
    if cast:
        with adapters_cast(together, FP64):
            made = together(x)
    else:
        made = together(x)
    for results in (expected, made):
        total = sum((y * weight).sum() for y, weight in zip(results, weights, strict=True))
        slopes.append(torch.autograd.grad(total, [x, *parameters]))
    for ours, truth in zip((*made, *slopes[1]), (*expected, *slopes[0]), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("inputs", [128, 64])
def test_nf4_matrices_are_the_same_to_the_bit(rank, inputs):
    """Joined, and of each by itself as a view; in fp32, which NF4 is undone to."""
    parts = [
        layer(outputs, at, "nf4", rank, inputs=inputs, dtype=torch.float32).float()
        for at, outputs in enumerate((48, 16, 24))
    ]
    before = [matrix_of(one) for one in parts]
    together = JoinedLinear(parts)
    assert torch.equal(together.whole.matrix(torch.float32).double(), torch.cat(before))
    assert all(torch.equal(matrix_of(one), held) for one, held in zip(parts, before, strict=True))
    x = random(7, inputs, seed=3).float()
    for one, y in zip(parts, together(x), strict=True):
        torch.testing.assert_close(y, one(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("stored", ["plain", "nf4"])
@pytest.mark.parametrize("rank", [0, 4])
def test_nothing_is_held_twice_and_names_stay(rank, stored):
    parts = [layer(outputs, at, stored, rank) for at, outputs in enumerate((128, 64, 64))]
    owner = torch.nn.ModuleDict(dict(zip("qkv", parts, strict=True)))
    names = [name for name, _ in owner.named_parameters()]
    owner["joined"] = together = JoinedLinear(parts)
    assert [name for name, _ in owner.named_parameters()] == names == [*owner.state_dict()]
    assert matrix_numbers(owner) == 256 * WIDTH
    frozen = [one.base if rank else one for one in parts]
    for of in (lambda one: one.bias, lambda one: getattr(one.weight, "packed", one.weight)):
        storages = {of(one).untyped_storage().data_ptr() for one in (*frozen, together.whole)}
        assert len(storages) == 1
    with torch.no_grad(), unpacked(owner):
        assert together.whole._ready and not any(one._ready for one in frozen)
    twin = copy.deepcopy(owner)
    x = random(4, WIDTH, seed=1).to(together.whole.dtype)
    if stored == "plain":
        assert all(map(torch.equal, twin["joined"](x), together(x)))


def test_what_does_not_fit_stays_apart():
    plain, other = layer(64, 0), layer(64, 1)
    assert fit([plain, other])
    frozen = layer(64, 2, rank=0)
    wide = layer(64, 3, dtype=torch.float32).to(FP64)
    crossing = [layer(64, at, "nf4", inputs=96) for at in (4, 5)]
    high = [layer(64, at, rank=33) for at in (6, 7)]
    trained = TrainedLinear(torch.zeros(64, WIDTH), None, FP64)
    scaled = layer(64, 8, rank=8)
    for some in (
        [plain, frozen],
        [plain, wide],
        [plain, layer(64, 9, biased=False)],
        [plain, layer(64, 10, "nf4")],
        [frozen, layer(64, 11, rank=0, inputs=64)],
        [frozen, trained],
        [trained, trained],
        [plain, scaled],
        crossing,
        high,
    ):
        assert not fit(some)
    assert fit([layer(64, at, rank=32) for at in (12, 13)])


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_block_computes_the_same(adapted, kind, last, monkeypatch):
    """Prefixes and suffixes through one block, values and the gradient of every parameter and of
    the states, in fp64; the last block of a model has queries of one token."""
    model = tiny(kind, num_hidden_layers=2)
    config = json_config(Settings(model.config.to_dict(), kind))
    weights = Given(config, {k: v.detach() for k, v in model.state_dict().items()})
    found = []
    for together in (True, False):
        monkeypatch.setattr(joined, "taken", lambda device, together=together: together)
        seeds = iter(range(100))

        def make(weight, bias, seeds=seeds):
            seed = next(seeds)
            bias = None if bias is None else bias.double()
            frozen = FrozenLinear(weight.double(), bias, FP64)
            if not adapted:
                return frozen
            one = LoRALinear(frozen, 4, 6.0, torch.Generator().manual_seed(seed)).to(FP64)
            one.lora_b.data = 0.3 * random(*one.lora_b.shape, seed=seed)
            return one

        block = Block(weights, 1 if last else 0, FP64, torch.device("cpu"), make)
        assert len(block.joined) == (2 if together else 0)
        assert ("k_v" in block.joined) == (last and together)
        width = weights.config.width
        states = [random(*shape, width, seed=at) for at, shape in enumerate(((2, 16), (5, 8)))]
        leaves = [*(side.requires_grad_() for side in states), *block.parameters()]
        lengths, tokens = [16, 11], torch.tensor([8, 3, 5, 8, 1])
        layout = SuffixLayout.build([2, 3], lengths, tokens, 8)
        _, shared = prefix_pass([block], states[0], lengths, keys_values_only=last)
        made = suffix_pass([block], states[1], shared, layout, last_only=last)
        weight = random(*made.shape, seed=7)
        found.append([made.detach(), *torch.autograd.grad((made * weight).sum(), leaves)])
        names = [name for name, _ in block.named_parameters()]
    for ours, apart in zip(*found, strict=True):
        torch.testing.assert_close(ours, apart, rtol=1e-12, atol=1e-12)
    assert all(name.split(".")[0] in ["q", "k", "v", "o", "gate", "up", "down"] for name in names)
