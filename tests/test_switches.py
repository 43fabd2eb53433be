"""Whatever makes training fast changes no training curve: each of it taken out, in fp32."""

import dataclasses

import numpy as np
import pytest
import torch
from precision import compute_as_on_a_gpu, take_kernels
from small import small_config
from test_train import trained

import fastflag.learn.rollout as rollout_module
import fastflag.policy.table as table_module
from fastflag.config import AlgorithmConfig
from fastflag.model.recompute import Recompute
from fastflag.policy.table import Policy
from fastflag.prompt.prompts import PromptSet

pytestmark = pytest.mark.usefixtures("one_thread")


def unshared(prompts: PromptSet) -> PromptSet:
    """Each prompt a text of its own after the first token, which all have in common."""
    whole = [prompts.tokens(row) for row in range(len(prompts.pairs))]
    return dataclasses.replace(
        prompts,
        prefixes=(whole[0][:1],),
        suffixes=tuple(tokens[1:] for tokens in whole),
        pairs=np.array([[0, row] for row in range(len(whole))], np.int32),
    )


def without_sharing(monkeypatch):
    evaluate = Policy.evaluate

    def evaluate_alone(self, prompts, statistics=None, read=None):
        return evaluate(self, unshared(prompts), statistics)

    monkeypatch.setattr(Policy, "evaluate", evaluate_alone)


def with_every_token(monkeypatch):
    right = table_module.suffix_pass

    def suffix_pass(blocks, x, keys_values, layout, last_only=False):
        states = right(blocks, x, keys_values, layout)
        return states[torch.arange(len(x)), layout.last] if last_only else states

    monkeypatch.setattr(table_module, "suffix_pass", suffix_pass)


def step_by_step(monkeypatch):
    monkeypatch.setattr(AlgorithmConfig, "one_step", False)


def all_at_once(monkeypatch):
    monkeypatch.setattr(rollout_module, "_MANY_STEPS", 1)


def recomputed(monkeypatch):
    monkeypatch.setattr(table_module, "Recompute", lambda *_: Recompute(1))


def by_stages(monkeypatch):
    """As on a GPU, graphs not taken."""
    all_at_once(monkeypatch)
    compute_as_on_a_gpu(monkeypatch)
    start = Policy.__init__

    def with_graphs(self, *arguments):
        start(self, *arguments)
        self.graphs = self._graphs()

    monkeypatch.setattr(Policy, "__init__", with_graphs)


def in_pieces(monkeypatch):
    all_at_once(monkeypatch)
    monkeypatch.setattr(rollout_module, "_PIECE_STEPS", 12)


SWITCHES = {
    "no trunk cache": {"policy__trunk_cache_mb": 0, "policy__trunk_disk_mb": 0},
    "no files": {"policy__trunk_disk_mb": 0},
    "all of it recomputed": recomputed,
    "prefixes not shared": without_sharing,
    "every token of the last layer": with_every_token,
    "samples not added up": step_by_step,
    "all prompts before the rollout": all_at_once,
    "rollout in pieces": in_pieces,
    "padded blocks": by_stages,
}


@pytest.fixture(scope="module")
def curves(tiny_model, tmp_path_factory):
    return {
        top: trained(config_of(tiny_model, top), tmp_path_factory.mktemp("curve") / "run")[1]
        for top in (1, 2)
    }


def config_of(model, top, **changes):
    return small_config(
        model,
        policy__top_layers=top,
        simulator__positions="long_short",
        algorithm__max_grad_norm=0.0,
        algorithm__kl_coef=0.05,
        total_timesteps=5 * 24,
        **changes,
    )


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("name", SWITCHES)
def test_the_curve_is_the_same(tiny_model, curves, tmp_path, monkeypatch, name, top):
    switch = SWITCHES[name]
    changes = switch if isinstance(switch, dict) else {}
    if callable(switch):
        switch(monkeypatch)
    _, curve = trained(config_of(tiny_model, top, **changes), tmp_path / "run")
    assert_same(curve, curves[top])


@pytest.mark.slow  # of all tests the longest: kernels are interpreted
def test_the_curve_is_the_same_by_kernels(tiny_model, tmp_path, monkeypatch):
    """Two updates, which in the interpreter are as long as all of the others."""
    all_at_once(monkeypatch)
    config = dataclasses.replace(config_of(tiny_model, 2), total_timesteps=2 * 24)
    _, right = trained(config, tmp_path / "right")
    take_kernels(monkeypatch)
    _, curve = trained(config, tmp_path / "run")
    assert_same(curve, right)


def assert_same(curve, right):
    assert len(curve) == len(right) > 1
    for one, other in zip(right, curve, strict=True):
        # How many prompts a table holds is not what it says of them.
        del other["distinct_prompts"]
        same = {key: value for key, value in one.items() if key != "distinct_prompts"}
        assert other == pytest.approx(same, rel=1e-3, abs=2e-5)
