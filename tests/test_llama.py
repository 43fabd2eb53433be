"""The forward over shared prefixes, against transformers' full forward of each prompt."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXACT, MODELS, TINY, Given, last_states, prompt_set, relative, texts, tiny
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastflag.config import PolicyConfig, PromptConfig, SimulatorConfig
from fastflag.market.compiled.constants import CODES
from fastflag.market.planted import planted_market
from fastflag.model import attention, packed_attention
from fastflag.model.linear import FrozenLinear, LoRALinear
from fastflag.model.llama import rotary_tables
from fastflag.model.model_config import ModelConfig
from fastflag.model.quant import NF4Weight
from fastflag.model.recompute import Recompute
from fastflag.model.shared_prefix import Prefixes, SuffixLayout
from fastflag.model.weights import open_weights
from fastflag.policy.table import Policy
from fastflag.prompt.tokens import Tokenizer
from fastflag.prompt.world import World

RAGGED = (1, 2, 15, 16, 17, 63)
LAYERS = {"num_hidden_layers": 3}
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(transformers model of 3 layers, the same opened from its folder)."""
    model = tiny(request.param, **LAYERS, tie_word_embeddings=request.param != "qwen2")
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, open_weights(str(folder))


def features(policy, prompts):
    with torch.no_grad():
        return policy._features(prompts, policy.read(prompts.prefixes))


@pytest.mark.parametrize("top_layers", [0, 1, 2, 3])
def test_ragged_prefixes_and_suffixes_equal_full_forwards(pair, top_layers):
    model, weights = pair
    prompts = prompt_set(texts(RAGGED, 0), texts(RAGGED, 1))
    policy = Policy(weights, replace(EXACT, top_layers=top_layers), (1, 2, 3), seed=0)
    with torch.no_grad():
        expected = last_states(model.model, prompts)
        ours = features(policy, prompts)
        unembedding = weights.tensor("lm_head.weight")
        assert relative(ours, expected) < 1e-5
        assert relative(ours @ unembedding.T, model.lm_head(expected)) < 1e-5


def test_a_row_is_the_same_alone_and_among_hundreds(pair):
    _, weights = pair
    prefixes, suffixes = texts((5, 40, 23), 2), texts([*range(1, 33)] * 4, 3)
    policy = Policy(weights, replace(EXACT, trunk_cache_mb=0), (1, 2, 3), seed=0)
    together = features(policy, prompt_set(prefixes, suffixes))
    for day, text in [(0, 0), (1, 31), (2, 14), (1, 70)]:
        alone = features(policy, prompt_set(prefixes[day : day + 1], suffixes[text : text + 1]))
        assert relative(alone[0], together[day * len(suffixes) + text]) < 1e-5


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_rope_scaling_equals_transformers(scaling, tmp_path):
    model = tiny("llama", rope_parameters={"rope_theta": 1e4, **scaling})
    model.save_pretrained(tmp_path)
    weights = open_weights(str(tmp_path))
    assert weights.config.rope_scaling == scaling
    prompts = prompt_set(texts((63, 20), 0), texts((60, 1), 1))
    with torch.no_grad():
        expected = last_states(model.model, prompts)
    assert relative(features(Policy(weights, EXACT, (1, 2, 3), 0), prompts), expected) < 1e-5
    plain = Given(replace(weights.config, rope_scaling=None), model.state_dict())
    assert relative(features(Policy(plain, EXACT, (1, 2, 3), 0), prompts), expected) > 1e-2


@pytest.mark.parametrize("head_dim, theta", [(64, 5e5), (128, 1e6), (16, 1e4)])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies_of_published_sizes(head_dim, theta, factor):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    expected, factor_of_attention = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert factor_of_attention == 1.0
    ours = shape(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling).rotary_frequencies()
    np.testing.assert_allclose(ours, expected.double().numpy(), rtol=1e-6)


def shape(**changes):
    values = {
        "architecture": "llama",
        "layers": 2,
        "width": 576,
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
        "mlp_width": 1536,
        "vocabulary": 50,
        "rms_eps": 1e-5,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "tied_embeddings": True,
        "attention_bias": False,
        "qk_norm": False,
        "max_positions": 8192,
    }
    return ModelConfig(**{**values, **changes})


def test_rotary_tables_at_far_positions():
    positions = torch.tensor([[0, 1, 8191]])
    frequencies = torch.from_numpy(shape().rotary_frequencies()).float()
    cos, sin = rotary_tables(frequencies, positions, torch.float32)
    assert cos.shape == sin.shape == (1, 1, 3, 32)
    for place, position in enumerate(positions[0].tolist()):
        for pair in range(32):
            angle = position * 1e4 ** (-pair / 32)
            assert cos[0, 0, place, pair].item() == pytest.approx(math.cos(angle), abs=1e-3)
            assert sin[0, 0, place, pair].item() == pytest.approx(math.sin(angle), abs=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nf4_trunk_is_the_forward_on_dequantised_weights(pair, dtype):
    _, weights = pair
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    tensors = {name: weights.tensor(name) for name in weights.names()}
    for name in tensors:
        if (".0." in name or ".1." in name) and tensors[name].dim() == 2:
            quantised = NF4Weight.quantise(tensors[name].to(torch_dtype))
            tensors[name] = quantised.dequantise(torch_dtype).float()
    prompts = prompt_set(texts((20, 3), 0), texts((1, 9, 17), 1))
    config = replace(EXACT, dtype=dtype, trunk_weights="nf4")
    quantised = features(Policy(weights, config, (1, 2, 3), 0), prompts)
    config = replace(config, trunk_weights=dtype)
    plain = features(Policy(Given(weights.config, tensors), config, (1, 2, 3), 0), prompts)
    assert torch.equal(quantised, plain)
    unquantised = features(Policy(weights, config, (1, 2, 3), 0), prompts)
    assert 0.01 < relative(quantised, unquantised) < 1.0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_qlora_is_lora_over_dequantised_weights(pair, dtype):
    """Values and every gradient, bit for bit."""
    _, weights = pair
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    tensors = {name: weights.tensor(name) for name in weights.names()}
    for name in tensors:
        if (".1." in name or ".2." in name) and tensors[name].dim() == 2:
            quantised = NF4Weight.quantise(tensors[name].to(torch_dtype))
            tensors[name] = quantised.dequantise(torch_dtype).float()
    prompts = prompt_set(texts((20, 3), 0), texts((1, 9, 17), 1))
    given, results = Given(weights.config, tensors), []
    for source, adaptation in ((weights, "qlora"), (given, "lora"), (weights, "lora")):
        config = replace(EXACT, dtype=dtype, top_layers=2, adaptation=adaptation)
        policy = Policy(source, config, (1, 2, 3), 0)
        randomise_heads(policy)
        for name, parameter in policy.top.named_parameters():
            parameter.data += 0.1 * ("lora_b" in name)
        table = policy.evaluate(prompts)
        (table.value.sum() + table.log_probabilities.exp()[:, 0].sum()).backward()
        results.append((table, [parameter.grad for parameter in policy.parameters()]))
    (ours, slopes), (plain, right), (other, _) = results
    assert torch.equal(ours.value, plain.value)
    assert all(torch.equal(one, two) for one, two in zip(slopes, right, strict=True))
    assert relative(ours.value, other.value) > 1e-3


# Training


def randomise_heads(policy, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameter_groups()[1]:
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def loss_of(log_probabilities, value, allowed, seed=4):
    """A sum with random weights, over the allowed actions alone."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(log_probabilities.shape, generator=generator)
    other = torch.randn(value.shape, generator=generator)
    kept = torch.where(allowed, log_probabilities, 0.0)
    return (weight * kept).sum() + (other * value).sum()


def by_hand(states, prompts, action_head, value_head):
    """Centring, heads and masked softmax in plain torch on last states [U, C]."""
    mean, squares = {}, []
    for side in set(prompts.side.tolist()):
        centring = states[[at for at in prompts.centring.tolist() if prompts.side[at] == side]]
        mean[side] = centring.sum(0) / len(centring)
        squares.append((centring - mean[side]) ** 2)
    deviation = (torch.cat(squares).sum(0) / len(prompts.centring) + 1e-6).sqrt()
    logits, values = [], []
    for row, side in enumerate(prompts.side.tolist()):
        centred = (states[row] - mean[side]) / deviation
        logits.append(action_head.body.weight @ centred + action_head.bias[side + 1])
        values.append(value_head.body.weight @ centred + value_head.bias[side + 1])
    logits = torch.stack(logits)
    allowed = torch.from_numpy(prompts.allowed)
    total = torch.where(allowed, logits.exp(), 0.0).sum(1, keepdim=True)
    return logits - total.log(), torch.stack(values)[:, 0]


PROMPTS = prompt_set(texts((5, 1, 17, 9), 5), texts((1, 3, 16, 7), 6))


@pytest.fixture(params=[1, 2, 3])
def top_layers(request):
    return request.param


def test_full_gradients_equal_the_full_forward_of_each_prompt(pair, top_layers):
    model, weights = pair
    model.zero_grad()
    config = replace(EXACT, top_layers=top_layers, adaptation="full")
    policy = Policy(weights, config, (1, 2, 3), 0)
    randomise_heads(policy)
    layers = model.model.layers[-top_layers:]
    gradients = gradients_of(policy)
    torch_loss(policy, last_states(model.model, PROMPTS)).backward()
    count = 0
    for index, layer in enumerate(layers):
        for short, linear in zip(MATRICES, linears(layer), strict=True):
            for kind in ("weight", "bias"):
                theirs = getattr(linear, kind)
                if theirs is None:
                    continue
                assert_close(gradients.pop(f"top.{index}.{short}.{kind}"), theirs.grad)
                count += 1
    assert count >= 7 * top_layers
    check_heads(policy, gradients)


LIMIT = TINY["max_position_embeddings"]


@given(data=st.data())
@settings(max_examples=25)
def test_any_lengths_counts_and_budgets_give_the_full_forwards_gradients(pair, data):
    """Prompts of 1 token to the model's limit, one account text a day or many of them."""
    model, weights = pair
    suffix_lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    longest = LIMIT - max(suffix_lengths)
    prefix_lengths = data.draw(
        st.lists(st.integers(1, 40) | st.just(longest), min_size=1, max_size=4)
    )
    every = list(itertools.product(range(len(prefix_lengths)), range(len(suffix_lengths))))
    pairs = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=24))
    prompts = prompt_set(texts(prefix_lengths, 1), texts(suffix_lengths, 2), pairs)
    top_layers = data.draw(st.integers(1, 3))
    config = replace(
        EXACT,
        top_layers=top_layers,
        adaptation="full",
        trunk_cache_mb=data.draw(st.sampled_from([0, 4096])),
        trunk_disk_mb=0,
    )
    policy = Policy(weights, config, (1, 2, 3), 0)
    policy.recompute = Recompute(data.draw(st.sampled_from([0, 1, 10**5, 10**6])))
    weight = torch.randn(len(pairs), 64, generator=torch.Generator().manual_seed(0))
    ours = policy._features(prompts, policy.read(prompts.prefixes))
    (ours * weight).sum().backward()
    model.zero_grad()
    theirs = last_states(model.model, prompts)
    (theirs * weight).sum().backward()
    assert relative(ours, theirs) < 1e-5
    for block, layer in zip(policy.top, model.model.layers[-top_layers:], strict=True):
        for short, linear in zip(MATRICES, linears(layer), strict=True):
            made = getattr(block, short).weight.grad
            assert (made - linear.weight.grad).norm() <= 1e-5 * linear.weight.grad.norm() + 1e-6


def test_lora_gradients_equal_peft_prompt_by_prompt(tmp_path, top_layers):
    model = tiny("llama", **LAYERS)
    model.save_pretrained(tmp_path)
    weights = open_weights(str(tmp_path))
    config = replace(EXACT, top_layers=top_layers, lora_rank=4, lora_alpha=6.0)
    policy = Policy(weights, config, (1, 2, 3), 0)
    randomise_heads(policy)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=4,
            lora_alpha=6.0,
            target_modules=[
                name for name, _ in model.model.layers[0].named_modules() if name.endswith("_proj")
            ],
            layers_to_transform=list(range(3 - top_layers, 3)),
        ),
    )
    theirs = {}
    generator = torch.Generator().manual_seed(7)
    for index, layer in enumerate(adapted.base_model.model.model.layers[-top_layers:]):
        for short, linear in zip(MATRICES, linears(layer), strict=True):
            ours = getattr(policy.top[index], short)
            for letter in "ab":
                mine = getattr(ours, f"lora_{letter}")
                other = getattr(linear, f"lora_{letter.upper()}")["default"].weight
                mine.data = 0.1 * torch.randn(mine.shape, generator=generator)
                other.data = mine.data.clone()
                theirs[f"top.{index}.{short}.lora_{letter}"] = other
    with torch.no_grad():
        expected = last_states(adapted.base_model.model.model, PROMPTS)
    assert relative(features(policy, PROMPTS), expected) < 1e-5
    gradients = gradients_of(policy)
    torch_loss(policy, last_states(adapted.base_model.model.model, PROMPTS)).backward()
    for name, other in theirs.items():
        assert_close(gradients.pop(name), other.grad)
    check_heads(policy, gradients)


def gradients_of(policy):
    """Of every trained parameter, by our forward."""
    allowed = torch.from_numpy(PROMPTS.allowed)
    table = policy.evaluate(PROMPTS)
    loss_of(table.log_probabilities, table.value, allowed).backward()
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    return gradients


def check_heads(policy, gradients):
    """After backward of `torch_loss`; the layers' gradients are taken out of `gradients` before."""
    for name, parameter in policy.named_parameters():
        if name.startswith(("action_head", "value_head")):
            assert_close(gradients.pop(name), parameter.grad)
    assert not gradients


def torch_loss(policy, states):
    allowed = torch.from_numpy(PROMPTS.allowed)
    log_probabilities, value = by_hand(states, PROMPTS, policy.action_head, policy.value_head)
    return loss_of(log_probabilities, value, allowed)


def linears(layer):
    attention, mlp = layer.self_attn, layer.mlp
    return (
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    )


def assert_close(ours, theirs):
    assert ours.norm() > 0
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


# Attention


@pytest.mark.parametrize(
    "counts", [(2, 3, 1), (5, 3, 9), (2, 0, 4)], ids=["a tile each", "several", "a day of none"]
)
@pytest.mark.parametrize("made_of", ["days", "block"])
@pytest.mark.parametrize("queries", ["all", "last"])
def test_all_forms_of_prefix_attention_are_a_softmax_over_prefix_and_suffix(
    queries, made_of, counts
):
    """Values and gradients, token by token in fp64; the CUDA forms too give them on a CPU."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    lengths, size, heads, groups, width = (5, 1, 9), 4, 6, 2, 8
    suffixes = sum(counts)
    last = torch.tensor([3, 0, 2, 1, 3, 2]).repeat(3)[:suffixes]
    count = size if queries == "all" else 1
    query = random(suffixes, heads, count, width)
    own = random(suffixes, groups, size, width), random(suffixes, groups, size, width)
    prefixes = [(random(groups, n, width), random(groups, n, width)) for n in lengths]
    places = torch.arange(size)
    visible = (places <= places[:, None])[None] if count > 1 else (places <= last[:, None])[:, None]
    first = torch.zeros_like(last) if count > 1 else last
    layout = SuffixLayout.build(counts, lengths, last + 1, size)
    leaves = [query, *own, *(tensor for pair in prefixes for tensor in pair)]
    weight = torch.randn(query.shape, generator=generator, dtype=torch.float64)
    made = []
    for attend in (attention.by_tiles, attention.padded, packed_attention.packed):
        shared = Prefixes([tuple(side[None] for side in pair) for pair in prefixes], lengths)
        if made_of == "block":  # longer than any prefix, as a stage's
            longer = (functional.pad(side, (0, 0, 0, 11), value=9.0) for side in shared.whole)
            shared = Prefixes([tuple(longer)], lengths)
        attended = attend(query, *own, first, shared, layout)
        made.append((attended, torch.autograd.grad((attended * weight).sum(), leaves)))
    of_prefix = [day for day, n in enumerate(counts) for _ in range(n)]
    expected = torch.zeros_like(query)
    for u, h, q in itertools.product(range(suffixes), range(heads), range(count)):
        key, value = (
            torch.cat((prefixes[of_prefix[u]][side][h // 3], own[side][u, h // 3]))
            for side in (0, 1)
        )
        seen = torch.ones(len(key), dtype=torch.bool)
        seen[-size:] = visible[u if len(visible) > 1 else 0, q]
        scores = (key @ query[u, h, q] / width**0.5)[seen]
        expected[u, h, q] = scores.softmax(0) @ value[seen]
    slopes = torch.autograd.grad((expected * weight).sum(), leaves, materialize_grads=True)
    for attended, gradients in made:
        assert relative(attended, expected) < 1e-12
        for one, right in zip(gradients, slopes, strict=True):
            # Of a day without suffixes they are zeros.
            assert (one - right).abs().max() <= 1e-12 * right.abs().max()
    assert sum(bool(slope.any()) for slope in slopes) == 3 + 2 * sum(n > 0 for n in counts)


# Adapters


def random_linear(inputs, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=generator), torch.randn(
        outputs, generator=generator
    )


def test_an_adapter_starts_as_its_base_and_adds_the_formula():
    weight, bias = random_linear(24, 40, 0)
    base = FrozenLinear(weight, bias, torch.float32)
    adapter = LoRALinear(base, 4, 6.0, torch.Generator().manual_seed(1))
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(2))
    base = x @ weight.T + bias
    assert relative(adapter(x).detach(), base) < 1e-6
    assert adapter.lora_a.abs().max() <= 24**-0.5 and adapter.lora_a.std() > 0.5 * 24**-0.5
    adapter.lora_b.data.normal_(generator=torch.Generator().manual_seed(3))
    expected = base + 6.0 / 4 * (x @ adapter.lora_a.T) @ adapter.lora_b.T
    assert relative(adapter(x).detach(), expected.detach()) < 1e-6
    assert [name for name, _ in adapter.named_parameters()] == ["lora_a", "lora_b"]


# SmolLM2


@pytest.fixture(scope="module")
def kept(smollm):
    """All of SmolLM2's tensors in fp32, shared by both implementations."""
    weights = open_weights(smollm)
    given = Given(weights.config, {name: weights.tensor(name) for name in weights.names()})
    given.tokenizer = Tokenizer.load(weights.tokenizer_path)
    return given


@pytest.fixture(scope="module")
def theirs(kept):
    config = kept.config
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=config.width,
                intermediate_size=config.mlp_width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                vocab_size=config.vocabulary,
                rms_norm_eps=config.rms_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                max_position_embeddings=config.max_positions,
                tie_word_embeddings=True,
            )
        )
    model.load_state_dict(kept.tensors, strict=False, assign=True)
    model.tie_weights()
    # The rotary buffers are in no state dict.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    return model.eval()


@pytest.mark.parametrize("news_tokens", [0, 64])
def test_smollm2_logits_equal_transformers(kept, theirs, news_tokens):
    market, simulator = planted_market(40, 0), SimulatorConfig()
    config = PromptConfig(news_tokens=news_tokens)
    world = World.of(config, market, "PLANTED", simulator, kept.tokenizer, seed=0)
    reachable = np.zeros((2, CODES), dtype=bool)
    reachable[0, 700] = reachable[:, 0] = True
    prompts, _ = world.stepped([25, 33], reachable)
    assert len(prompts.pairs) == 3
    assert ("forecast" in kept.tokenizer.decode(prompts.tokens(0))) or news_tokens == 0
    policy = Policy(kept, replace(EXACT, top_layers=2), (1, 2, 3), 0)
    with torch.no_grad():
        expected = theirs.lm_head(last_states(theirs.model, prompts))
        ours = features(policy, prompts) @ kept.tensor("lm_head.weight").T
    assert relative(ours, expected) < 1e-4


def test_smollm2_in_nf4_and_bf16_knows_the_capital_of_france(kept):
    policy = Policy(kept, PolicyConfig(dtype="bf16", device="cpu"), (1, 2, 3), 0)
    encode = kept.tokenizer.encode
    prompts = prompt_set((encode("The capital of"),), (encode(" France is"),))
    logits = features(policy, prompts) @ kept.tensor("lm_head.weight").T
    assert kept.tokenizer.decode(logits.argmax(-1).numpy()) == " Paris"
