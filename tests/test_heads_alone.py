"""--top-layers 0: the heads alone learn, on features of the frozen model."""

import dataclasses

import numpy as np
import pytest
import torch
from small import make_opinionated, small_config, small_market, small_world

from fastflag.learn.train import train
from fastflag.market.tasks.single import CODES
from fastflag.model.weights import open_weights
from fastflag.policy.trunk import Trunk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def alone(tiny_model):
    """(world, policy, the prompts of some days)"""
    config = small_config(tiny_model, policy__top_layers=0)
    world, policy, days = small_world(config, small_market())
    make_opinionated(policy)
    codes = np.zeros((len(days), CODES), bool)
    codes[:, :5] = True
    prompts, _ = world.stepped(days, codes, codes)
    return config, world, policy, prompts


def test_the_model_is_run_once_for_a_prompt(alone, monkeypatch):
    _, _, policy, prompts = alone
    first = policy.evaluate(prompts)
    monkeypatch.setattr(Trunk, "_run", None)
    again = policy.evaluate(prompts)
    assert torch.equal(first.log_probabilities, again.log_probabilities)
    assert {len(state) for state in policy.trunk.suffix_states(prompts)} == {1}


def test_the_heads_read_what_they_read_of_a_whole_model(alone, tiny_model):
    """The heads of an untrained policy whose top is trained give the same answers."""
    config, _, policy, prompts = alone
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, top_layers=1))
    _, whole, _ = small_world(config, small_market())
    for name in ("action_head", "value_head"):
        getattr(whole, name).load_state_dict(getattr(policy, name).state_dict())
    with torch.no_grad():
        ours, theirs = policy.evaluate(prompts), whole.evaluate(prompts)
    allowed = torch.isfinite(ours.log_probabilities)
    torch.testing.assert_close(
        ours.log_probabilities[allowed], theirs.log_probabilities[allowed], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(ours.value, theirs.value, rtol=1e-4, atol=1e-4)


def test_only_heads_have_a_gradient(alone):
    _, _, policy, prompts = alone
    layers, heads = policy.parameter_groups()
    assert layers == [] and len(heads) == len([*policy.parameters()])
    table = policy.evaluate(prompts)
    (table.log_probabilities[:, 1].sum() + table.value.sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in heads)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_run_goes_on_to_the_bit(tiny_model, tmp_path, optimizer):
    config = small_config(
        tiny_model, policy__top_layers=0, policy__head="mlp", algorithm__optimizer=optimizer
    )
    weights = open_weights(config.policy.model)
    half = dataclasses.replace(
        config,
        total_timesteps=config.total_timesteps // 2,
        algorithm=dataclasses.replace(config.algorithm, anneal_lr=False),
    )
    whole = dataclasses.replace(config, algorithm=half.algorithm)
    _, policy = train(whole, small_market(), weights, tmp_path / "whole", resume=False)
    train(half, small_market(), weights, tmp_path / "parts", resume=False)
    _, resumed = train(whole, small_market(), weights, tmp_path / "parts", resume=True)
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
