"""Gradients in fp16, scaled by a power of two: exact, and left out where they are not finite."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import EXACT, Given, tiny
from precision import compute_as_on_a_gpu
from small import small_config
from test_graphs import random_prompts
from test_step import numbers, same
from test_update import Run, fused

from fastflag.config import PolicyConfig
from fastflag.files import InputError
from fastflag.learn.checkpoint import read_checkpoint, restore_policy, write_checkpoint
from fastflag.learn.run import with_dtype
from fastflag.learn.update import STATISTICS
from fastflag.model.arithmetic import measured
from fastflag.model.model_config import Settings, json_config
from fastflag.policy.scaling import _LARGEST, _PATIENCE, GradientScale
from fastflag.policy.table import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("head", ["linear", "lm"])
def test_a_power_of_two_changes_no_bit_of_fp32(tiny_model, head):
    plain, scaled = (Run(tiny_model, policy__head=head, policy__top_layers=2) for _ in range(2))
    scaled.policy.scale = GradientScale()
    assert scaled.policy.scale.value == 2.0**16
    told = []
    for run in (plain, scaled):
        for number in range(3):
            run.collect(number)
            told.append(run.update())
    for ours, theirs in zip(told[3:], told[:3], strict=True):
        extra = {name: ours.pop(name) for name in ("skipped_steps", "gradient_scale")}
        assert ours == theirs and extra == {"skipped_steps": 0.0, "gradient_scale": 2.0**16}
        assert {*theirs} == {*STATISTICS}
    scaled.policy.scale = None
    assert same(numbers(scaled), numbers(plain))


def layer_gradients(policy, prompts, size):
    """Of so small a part of a sum over all rows, as large as of the sum, in fp64."""
    table = policy.evaluate(prompts)
    weight = torch.randn(table.value.shape, generator=torch.Generator().manual_seed(2))
    policy.zero_grad()
    finite = table.log_probabilities.masked_fill(table.log_probabilities.isinf(), 0.0)
    (size * (weight * (table.value + finite.sum(1))).sum()).backward()
    layers, _ = policy.parameter_groups()
    if policy.scale is not None:
        policy.scale.undo(layers)
    return torch.cat([each.grad.flatten() for each in layers]).double() / size


def test_small_gradients_vanish_in_fp16_unless_they_are_scaled(monkeypatch):
    """By a GPU's arithmetic. Of 1e-6 at the features, as an update's are, nothing much is left."""
    compute_as_on_a_gpu(monkeypatch)
    model = tiny("llama", num_hidden_layers=3)
    config = json_config(Settings(model.config.to_dict(), "memory"))
    weights = Given(config, {name: t.detach() for name, t in model.state_dict().items()})
    policies = {}
    for dtype in ("fp32", "fp16"):
        settings = dataclasses.replace(EXACT, top_layers=2, dtype=dtype)
        policies[dtype] = policy = Policy(weights, settings, (1, 2, 3), 0)
        random = torch.Generator().manual_seed(1)
        for parameter in policy.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    prompts, size = random_prompts(0), 1e-7
    exact = layer_gradients(policies["fp32"], prompts, 1.0)

    def error():
        found = layer_gradients(policies["fp16"], prompts, size)
        return float((found - exact).norm() / exact.norm())

    with_scale = error()
    policies["fp16"].scale = None
    assert with_scale < 0.01 and error() > 0.2


@pytest.mark.parametrize("optimizer", ["fused", "plain"])
def test_a_step_that_overflows_is_left_out_and_the_next_ones_halve_until_one_fits(
    tiny_model, monkeypatch, optimizer
):
    compute_as_on_a_gpu(monkeypatch)
    run = Run(tiny_model, policy__dtype="fp16")
    if optimizer == "fused":
        run.optimizer = fused(run.optimizer)
    parameters = [*run.policy.parameters()]
    run.policy.scale.value.fill_(2.0**24)
    skipped = 0
    for number in range(24):
        before = [each.detach().clone() for each in parameters]
        run.collect(number)
        told = run.update()
        unmoved = same(before, parameters)
        assert told["skipped_steps"] == float(unmoved)
        skipped += unmoved
        assert told["gradient_scale"] == run.policy.scale.value == 2.0 ** (24 - skipped)
        assert unmoved == (told["grad_norm"] == 0.0)
        if not unmoved:
            break
    assert skipped >= 1 and not unmoved
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {1}


def test_what_no_scale_makes_finite_is_refused(tiny_model):
    run = Run(tiny_model)
    run.policy.scale = GradientScale()
    run.policy.scale.value.fill_(1.0)
    run.lesson.samples.advantage[0] = torch.inf
    before = [each.detach().clone() for each in run.policy.parameters()]
    with pytest.raises(InputError, match="not finite"):
        run.update()
    assert same(before, [*run.policy.parameters()])


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 2 * _PATIENCE)), max_size=8))
def test_the_factor_follows_the_steps(runs):
    """By Python's numbers."""
    scale, value, row = GradientScale(), 2.0**16, 0
    for finite, count in runs:
        for _ in range(count if finite else min(count, 5)):
            scale.track(torch.tensor(finite))
            row = row + 1 if finite else 0
            value *= 1.0 if finite else 0.5
            if row == _PATIENCE:
                row, value = 0, min(2 * value, _LARGEST)
        assert float(scale.value) == value and int(scale.finite) == row


def test_a_run_goes_on_at_its_scale(tiny_model, tmp_path, monkeypatch):
    compute_as_on_a_gpu(monkeypatch)
    run = Run(tiny_model, policy__dtype="fp16")
    run.update()
    run.policy.scale.value.fill_(2.0**11)
    run.policy.scale.finite.fill_(7)
    write_checkpoint(tmp_path, 1, "model", run.policy, run.optimizer, run.accounts)
    other = Run(tiny_model, policy__dtype="fp16").policy
    restore_policy(read_checkpoint(tmp_path), other, "model", tmp_path)
    assert other.scale.value == 2.0**11 and other.scale.finite == 7
    unscaled = Run(tiny_model).policy
    with pytest.raises(InputError, match="does not fit this policy at 'scale"):
        restore_policy(read_checkpoint(tmp_path), unscaled, "model", tmp_path)


def test_fp16_is_trained_in_on_gpus_alone_and_never_taken_by_itself(tiny_model):
    config = small_config(tiny_model, policy__dtype="fp16")
    with pytest.raises(InputError, match="--dtype fp16"):
        with_dtype(config, None)
    assert {*measured(torch.device("cpu"), 64, 64).seconds} == {"bf16", "fp32"}
    assert PolicyConfig().dtype == "auto"
