"""Evaluation by stages: padded blocks give what ragged prompts give, and a shape that comes back is
captured. Capturing itself, which is PyTorch's, wants a GPU; here it is a stand-in that checks what
a graph relies on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import EXACT, Given, prompt_set, relative, texts, tiny
from precision import compute_as_on_a_gpu

from fastflag.files import InputError
from fastflag.model.model_config import Settings, json_config
from fastflag.model.recompute import Recompute
from fastflag.policy import graphs, plan
from fastflag.policy.stage import Stage, content_of
from fastflag.policy.table import Policy
from fastflag.policy.trunk import Trunk

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder:
    """In the place of PyTorch's capture: a module that writes over its static inputs and outputs,
    as a graph does, and only takes the shapes that it was captured with."""

    def __init__(self):
        self.captured = 0

    def __call__(self, module, inputs, allow_unused_input):
        self.captured += 1
        static, outputs = inputs, []
        refused = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__")
        assert allow_unused_input and all(not tensor.requires_grad for tensor in inputs)

        def replay(*tensors):
            for kept, tensor in zip(static, tensors, strict=True):
                assert kept.shape == tensor.shape
                kept.copy_(tensor)
            for output in outputs:
                output.fill_(torch.nan)
            with pytest.MonkeyPatch.context() as patch:
                for name in refused:  # each waits for the device, which no capture allows
                    patch.setattr(torch.Tensor, name, None)
                made = module(*static)
            outputs[:] = [output.detach() for output in made]
            return made

        return replay


@pytest.fixture(params=["linear", "lm"])
def policies(request, monkeypatch):
    """The same policy twice: as a CPU evaluates, and by stages that are captured."""
    compute_as_on_a_gpu(monkeypatch)
    model = tiny("qwen3", num_hidden_layers=3)
    config = json_config(Settings(model.config.to_dict(), "memory"))
    weights = Given(config, {name: t.detach() for name, t in model.state_dict().items()})
    made = []
    for _ in range(2):
        policy = Policy(weights, replace(EXACT, top_layers=2, head=request.param), (1, 2, 3), 0)
        generator = torch.Generator().manual_seed(1)
        for parameter in policy.parameter_groups()[1]:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        made.append(policy)
    made[1].graphs = made[1]._graphs()
    made[1].graphs._capture = Recorder()
    return made


def random_prompts(seed, days=3, suffixes=5):
    random = np.random.default_rng(seed)
    return prompt_set(
        texts(random.integers(3, 17, days), seed), texts(random.integers(2, 7, suffixes), seed + 50)
    )


def graded(policy, prompts):
    """Every row, and the gradient of a sum of them with weights of their own."""
    table = policy.evaluate(prompts)
    weight = torch.randn(table.value.shape, generator=torch.Generator().manual_seed(2))
    policy.zero_grad()
    finite = table.log_probabilities.masked_fill(table.log_probabilities.isinf(), 0.0)
    (weight * (table.value + finite.sum(1))).sum().backward()
    gradients = [parameter.grad.clone() for parameter in policy.parameters()]
    return table, gradients


def test_stages_replayed_or_not_give_the_table_and_gradient_of_ragged_prompts(policies):
    # 15 prompts, padded to one shape: launched, captured, replayed three times.
    for seed in (0, 1, 0, 2, 1):
        prompts = random_prompts(seed)
        (right, slopes), (table, gradients) = (graded(policy, prompts) for policy in policies)
        assert (table.log_probabilities.isinf() == right.log_probabilities.isinf()).all()
        assert relative(table.log_probabilities.exp(), right.log_probabilities.exp()) < 1e-5
        assert relative(table.value, right.value) < 1e-5
        assert relative(table.statistics.mean, right.statistics.mean) < 1e-5
        assert relative(table.statistics.deviation, right.statistics.deviation) < 1e-5
        assert torch.equal(table.statistics.known, right.statistics.known)
        for gradient, slope in zip(gradients, slopes, strict=True):
            assert (gradient - slope).norm() <= 1e-4 * max(slope.norm(), 1e-3)
    assert policies[1].graphs._capture.captured == 1


def test_days_of_equal_texts(policies):
    """A stock that stood still is told in the same words twice."""
    prompts = random_prompts(0)
    first = prompts.prefixes[0]
    prompts = replace(prompts, prefixes=(first, prompts.prefixes[1], first))
    (right, slopes), (table, gradients) = (graded(policy, prompts) for policy in policies)
    assert relative(table.value, right.value) < 1e-5
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert (gradient - slope).norm() <= 1e-4 * max(slope.norm(), 1e-3)


def test_what_does_not_fit_any_more_gives_its_memory_back(policies):
    staged = policies[1]
    for _ in range(2):
        staged.evaluate(random_prompts(0))
    assert staged.graphs._captured and staged._staged
    staged.recompute = Recompute(1)
    staged.evaluate(random_prompts(0))
    assert not staged.graphs._captured and not staged._staged


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore"),
        torch.AcceleratorError("stream capture was invalidated"),
        ValueError(""),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_capture_that_fails_is_launched_instead_and_told_once(policies, error, caplog):
    plain, staged = policies
    staged.graphs._capture = lambda *_, **__: exec("raise error", {"error": error})
    right, slopes = graded(plain, random_prompts(0))
    for _ in range(4):
        table, gradients = graded(staged, random_prompts(0))
        assert relative(table.value, right.value) < 1e-5
        for gradient, slope in zip(gradients, slopes, strict=True):
            assert (gradient - slope).norm() <= 1e-4 * max(slope.norm(), 1e-3)
    (told,) = (record.message for record in caplog.records)
    problem = str(error).splitlines()[0] if str(error) else "ValueError"
    assert told == f"CUDA graphs are off, every kernel is launched: {problem}"
    assert not staged.graphs._captured


@pytest.mark.parametrize("fails", [False, True])
def test_stale_streams_are_joined_for_the_capture_alone(policies, monkeypatch, fails):
    staged, told = policies[1], []
    monkeypatch.setattr(graphs, "_JOIN_STALE", told.append)
    recorder = staged.graphs._capture

    def capture(*arguments, **options):
        assert told == [True]
        if fails:
            raise RuntimeError("no")
        return recorder(*arguments, **options)

    staged.graphs._capture = capture
    for _ in range(3):
        staged.evaluate(random_prompts(0))
    assert told == [True, False]


def test_what_a_replay_returned_outlives_the_next(policies):
    staged = policies[1]
    for _ in range(2):
        kept = staged.evaluate(random_prompts(0))
    before = kept.log_probabilities.detach().clone(), kept.statistics.mean.detach().clone()
    staged.evaluate(random_prompts(1))
    assert torch.equal(kept.log_probabilities, before[0])
    assert torch.equal(kept.statistics.mean, before[1])


def test_a_replay_leaves_other_stages_alone(policies):
    staged = policies[1]
    for _ in range(2):
        staged.evaluate(random_prompts(0))
    stage = staged._staged[1]
    before = [tensor.clone() for tensor in stage.tensors()]
    staged.evaluate(random_prompts(1))
    assert all(torch.equal(*pair) for pair in zip(before, stage.tensors(), strict=True))


def test_the_first_shapes_that_come_back_are_captured_once(policies):
    staged = policies[1]
    for _ in range(4):
        for days in range(1, 2 * graphs._KEPT):
            staged.evaluate(random_prompts(0, days))
    assert staged.graphs._capture.captured == len(staged.graphs._captured) == graphs._KEPT


def test_a_stage_is_made_once_for_prompts_of_equal_content(policies, monkeypatch):
    staged, made = policies[1], []
    right = Trunk.suffix_states
    monkeypatch.setattr(Trunk, "suffix_states", lambda *a: made.append(0) or right(*a))
    for seed in (0, 0, 1, 0):
        staged.evaluate(random_prompts(seed))
    assert len(made) == 3


@pytest.mark.parametrize("name", ["prefixes", "suffixes", "pairs", "side", "allowed", "reference"])
def test_other_content_is_told_apart(name):
    prompts = random_prompts(0)
    value = getattr(prompts, name)
    if name == "reference":
        changed = value[1:]
    elif isinstance(value, tuple):
        changed = (value[0][:-1], *value[1:])
    else:
        changed = value.copy()
        # Row 0's pair and row 1's trade places: the same texts in another order.
        changed[[0, 1]] = value[[1, 0]]
        changed = changed if (changed != value).any() else ~changed
    assert content_of(replace(prompts, **{name: changed})) != content_of(prompts)
    assert content_of(random_prompts(0)) == content_of(prompts)


def test_within_a_memory_budget_nothing_is_staged(policies):
    plain, staged = policies
    staged.recompute = Recompute(1)
    right, slopes = graded(plain, random_prompts(0))
    table, gradients = graded(staged, random_prompts(0))
    assert staged._staged is None
    assert relative(table.value, right.value) < 1e-5
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert (gradient - slope).norm() <= 1e-4 * max(slope.norm(), 1e-3)


@pytest.mark.parametrize("fits", [True, False])
def test_a_budget_counts_padded_blocks(policies, fits):
    """Of a stage's shapes, which are up to 63 prompts and 15 tokens a text more than the set's."""
    staged, prompts = policies[1], random_prompts(0)
    shape = staged.model, staged.config
    stage = Stage.of(
        prompts,
        [torch.zeros(len(tokens), 1) for tokens in prompts.prefixes],
        [torch.zeros(len(prompts.suffixes[text]), 1) for text in prompts.pairs[:, 1]],
    )
    (days, prefix, _), (rows, suffix, _) = stage.prefixes.shape, stage.suffixes.shape
    assert Stage.shape_of(prompts) == (days, prefix, rows, suffix)
    planned = plan.prefix_bytes(*shape, days, prefix, True)
    planned += plan.suffix_bytes(*shape, rows, suffix, days, prefix, staged._flash())
    staged.recompute = Recompute(2 * planned - (0 if fits else 2))  # half of it is kept
    staged.evaluate(prompts)
    assert (staged._staged is not None) == fits


def test_a_budget_counts_copies_where_flash_attention_takes_none(policies, monkeypatch):
    staged = policies[1]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(staged, "device", torch.device("cuda"))
    assert staged.dtype == torch.float32 and not staged._flash()
    monkeypatch.setattr(staged, "dtype", torch.bfloat16)
    assert staged._flash()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not staged._flash()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(staged, "dtype", torch.float32)
    monkeypatch.setenv("FASTFLAG_KERNELS", "triton")
    assert staged._flash()


def test_graphs_are_for_gpus_and_asked_for_by_known_names(monkeypatch):
    cpu = torch.device("cpu")
    for asked in ("auto", "on", "off"):
        monkeypatch.setenv("FASTFLAG_GRAPHS", asked)
        assert graphs.choice(cpu).implementation == "off"
    monkeypatch.setenv("FASTFLAG_GRAPHS", "yes")
    with pytest.raises(InputError, match="not auto, on or off"):
        graphs.choice(cpu)
