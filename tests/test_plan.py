"""The plan of memory against the tensors that a policy, its cache, its optimiser and its graph
really hold. Attention is the CUDA path's, which runs on a CPU too, but where a test tells a CPU's.
"""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from models import EXACT, Given, prompt_set, texts, tiny
from precision import compute_as_on_a_gpu
from torch import Tensor

from fastflag.config import AlgorithmConfig, PlanConfig, PolicyConfig
from fastflag.learn.update import make_optimizer
from fastflag.model import packed_attention
from fastflag.model.joined import JoinedLinear
from fastflag.model.linear import FrozenLinear
from fastflag.model.model_config import Settings, json_config
from fastflag.model.quant import NF4Weight
from fastflag.model.weights import open_weights
from fastflag.policy import plan
from fastflag.policy.table import Policy

BATCH = PlanConfig(days=3, texts=7, prefix_tokens=41, suffix_tokens=12)
ADAPTED = [
    {"adaptation": "lora", "lora_rank": 4, "dtype": "bf16", "trunk_weights": "nf4"},
    {"adaptation": "lora", "lora_rank": 4, "dtype": "fp32", "trunk_weights": "bf16"},
    {"adaptation": "full", "dtype": "bf16", "trunk_weights": "fp32"},
    {"adaptation": "full", "dtype": "fp32", "trunk_weights": "nf4"},
    {"adaptation": "qlora", "lora_rank": 4, "dtype": "bf16", "trunk_weights": "bf16"},
]
LLAMA_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    compute_as_on_a_gpu(monkeypatch)


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def weights(request):
    # NF4's blocks of 64 don't end with these matrices, nor AdamW8bit's of 256.
    made = tiny(request.param, num_hidden_layers=4, hidden_size=72, intermediate_size=97)
    config = json_config(Settings(made.config.to_dict(), request.param))
    return Given(config, {name: t.detach() for name, t in made.state_dict().items()})


def prompts_of(batch: PlanConfig):
    prefixes = texts([batch.prefix_tokens] * batch.days, 0)
    return prompt_set(prefixes, texts([batch.suffix_tokens] * batch.texts, 1))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of the memory that they lie in, each once."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def frozen(block) -> list[Tensor]:
    """Every tensor of a layer that is no parameter."""
    held = [value for value in vars(block).values() if isinstance(value, Tensor)]
    for module in block.modules():
        if isinstance(module, FrozenLinear):
            stored = module.weight
            both = [stored.packed, stored.absmax] if isinstance(stored, NF4Weight) else [stored]
            held += both + ([] if module.bias is None else [module.bias])
    return held


def held_by(policy: Policy) -> dict[str, list[Tensor]]:
    heads = [*policy.parameter_groups()[1], *policy.running.buffers()]
    return {
        "trunk": [tensor for block in policy.trunk.blocks for tensor in frozen(block)],
        "embedding": [policy.trunk._embedding, policy.final_norm],
        "top_frozen": [tensor for block in policy.top for tensor in frozen(block)],
        "trained": [*policy.top.parameters()],
        "heads": heads + ([policy.word_rows] if policy.action_head is None else []),
        "initial": [*policy._initial.values()],
    }


def kept_by_autograd(policy: Policy, prompts) -> int:
    """Bytes of the distinct storages that an evaluation's graph holds and nothing else does."""
    policy.evaluate(prompts)  # fills the cache
    kept: dict[int, Tensor] = {}
    held = [tensor for part in held_by(policy).values() for tensor in part]
    held += [tensor for entry in policy.trunk.cache._entries.values() for tensor in entry]
    # Not planned: a byte for each output of joined layers and each of them.
    held += [one._blocks for one in policy.top.modules() if isinstance(one, JoinedLinear)]
    known = {tensor.untyped_storage().data_ptr() for tensor in held}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = policy.evaluate(prompts)
    assert graph.value.requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in known)


@pytest.mark.parametrize("head", ["linear", "mlp", "lm"])
@pytest.mark.parametrize("adapted", ADAPTED)
def test_weights_gradients_and_moments(weights, adapted, head):
    config = replace(EXACT, top_layers=3, head=head, **adapted)
    policy = Policy(weights, config, (7, 11, 13), 0)
    config = replace(config, device="cuda")
    planned = plan.parts(weights.config, config, "adamw", BATCH, 3)
    held = {name: bytes_of(tensors) for name, tensors in held_by(policy).items()}
    assert held == {name: planned[name] for name in held}
    optimizer = make_optimizer(policy, AlgorithmConfig())
    table = policy.evaluate(prompts_of(BATCH))
    (table.log_probabilities.exp()[:, 0].sum() + table.value.sum()).backward()
    optimizer.step()
    parameters = [*policy.parameters()]
    assert bytes_of(parameter.grad for parameter in parameters) == planned["gradients"]
    states = [optimizer.state[parameter] for parameter in parameters]
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    assert bytes_of(moments) == planned["optimizer_state"]


@pytest.mark.parametrize("adapted", ADAPTED[::2])
def test_the_state_of_the_8_bit_optimizer(weights, adapted):
    import bitsandbytes

    config = replace(EXACT, top_layers=2, head="mlp", **adapted)
    parameters = [*Policy(weights, config, (7, 11, 13), 0).parameters()]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    for number, parameter in enumerate(parameters):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, number)
    states = [value for state in optimizer.state.values() for value in state.values()]
    distinct = {state.data_ptr(): state for state in states if isinstance(state, Tensor)}
    assert {state.dtype for state in distinct.values()} == {torch.uint8, torch.float32}
    planned = plan.parts(weights.config, config, "adamw8bit", BATCH, 3)["optimizer_state"]
    assert bytes_of(distinct.values()) == planned


@pytest.mark.parametrize(("adapted", "top_layers"), zip(ADAPTED, (0, 1, 4), strict=False))
def test_the_trunk_cache(weights, adapted, top_layers):
    config = replace(EXACT, top_layers=top_layers, **adapted)
    policy = Policy(weights, config, (7, 11, 13), 0)
    policy.evaluate(prompts_of(BATCH))
    config = replace(config, device="cuda")
    planned = plan.parts(weights.config, config, "adamw", BATCH, 3)["trunk_cache"]
    assert policy.trunk.cache.used_bytes == planned


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("texts_a_day", [1, 7])
def test_a_cpus_activations_are_fp32_in_either_dtype(weights, adapted, texts_a_day, monkeypatch):
    check_a_cpus(weights, adapted, texts_a_day, monkeypatch)


def test_a_cpus_keys_are_copied_for_tiles_however_few_share_them(monkeypatch):
    """Most where each day has one text and each query head keys of its own."""
    made = tiny("llama", num_hidden_layers=4, num_key_value_heads=4)
    config = json_config(Settings(made.config.to_dict(), "llama"))
    given = Given(config, {name: t.detach() for name, t in made.state_dict().items()})
    assert given.config.heads == given.config.kv_heads
    check_a_cpus(given, ADAPTED[1], 1, monkeypatch)


def check_a_cpus(weights, adapted, texts_a_day, monkeypatch):
    """The plan against what a CPU holds, by its own operators."""
    monkeypatch.undo()
    batch = replace(BATCH, texts=texts_a_day)
    config = replace(EXACT, top_layers=3, **adapted)
    policy = Policy(weights, config, (7, 11, 13), 0)
    planned = plan.parts(weights.config, config, "adamw", batch, 3)
    kept = kept_by_autograd(policy, prompts_of(batch))
    # What a product of under 64 rows gives is kept as it was padded, where nothing is added to it.
    assert planned["activations"] == pytest.approx(kept, rel=0.035 if texts_a_day == 1 else 0.01)
    held = {name: bytes_of(tensors) for name, tensors in held_by(policy).items()}
    assert held == {name: planned[name] for name in held}
    assert policy.trunk.cache.used_bytes == planned["trunk_cache"]


@pytest.mark.parametrize("megabytes", [0, 1])
def test_the_trunk_cache_keeps_to_its_budget(weights, megabytes):
    batch = replace(BATCH, days=30)
    config = replace(EXACT, trunk_cache_mb=megabytes)
    policy = Policy(weights, config, (7, 11, 13), 0)
    policy.evaluate(prompts_of(batch))
    planned = plan.parts(weights.config, config, "adamw", batch, 3)["trunk_cache"]
    assert planned == megabytes * 2**20
    assert 0.8 * planned <= policy.trunk.cache.used_bytes <= planned


@pytest.mark.parametrize("top_layers", [0, 1, 3])
@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("adapted", ADAPTED)
def test_activations(weights, adapted, head, top_layers, monkeypatch):
    config = replace(EXACT, top_layers=top_layers, head=head, **adapted)
    policy = Policy(weights, config, (7, 11, 13), 0)
    config = replace(config, device="cuda")
    planned = plan.parts(weights.config, config, "adamw", BATCH, 3)["activations"]
    # Of some hundreds of kilobytes, or the few of heads alone, what is not planned is places of
    # rows and masks of actions.
    within = 0.006 if top_layers else 0.04
    assert planned == pytest.approx(kept_by_autograd(policy, prompts_of(BATCH)), rel=within)
    planned = plan.parts(weights.config, config, "adamw", BATCH, 3, flash=False)["activations"]
    monkeypatch.setattr(packed_attention, "takes", lambda *_: False)
    kept = kept_by_autograd(policy, prompts_of(BATCH))
    assert planned == pytest.approx(kept, rel=within)


def test_a_real_model(smollm, all_threads):
    """SmolLM2-135M as it is trained by default, on a few prompts."""
    config = PolicyConfig(model=smollm, dtype="bf16", device="cpu", trunk_disk_mb=0)
    weights = open_weights(smollm)
    policy = Policy(weights, config, (7, 11, 13), 0)
    batch = PlanConfig(days=2, texts=5)
    config = replace(config, device="cuda")
    planned = plan.parts(weights.config, config, "adamw", batch, 3)
    held = {name: bytes_of(tensors) for name, tensors in held_by(policy).items()}
    assert held == {name: planned[name] for name in held}
    assert planned["activations"] == pytest.approx(
        kept_by_autograd(policy, prompts_of(batch)), rel=0.005
    )
    assert policy.trunk.cache.used_bytes == planned["trunk_cache"]


def test_published_sizes():
    """Llama 3.1 8B has 8,030,261,248 parameters (half the total_size of its index on the hub), and
    adapters of rank 16 on every linear layer have 41,943,040 (as Unsloth prints in training)."""
    model = json_config(Settings(LLAMA_8B, "Llama 3.1 8B"))
    config = PolicyConfig(dtype="bf16", trunk_weights="bf16", top_layers=32, lora_rank=16)
    planned = plan.parts(model, config, "adamw", PlanConfig(), 3)
    stored = planned["trunk"] + planned["embedding"] + planned["top_frozen"]
    rotary = 32 * 4 * 64  # fp32 frequencies of half a head in each layer
    # The unembedding is not kept.
    final_norm = 2 * 4096  # 4 bytes a number, not 2
    assert stored == 2 * (8_030_261_248 - 128_256 * 4096) + rotary + final_norm
    assert planned["trained"] == 4 * 41_943_040
