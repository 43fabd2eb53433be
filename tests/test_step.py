"""A gradient step as a graph: what replays give is what launching gives. Captures, which want a
GPU, are a tape's: it records what is computed, and computes it again on the same memory."""

import pytest
import torch
from precision import compute_as_on_a_gpu
from tape import Tape
from test_update import Run

from fastflag.learn import step
from fastflag.learn.update import make_optimizer, set_learning_rates
from fastflag.policy import graphs

pytestmark = pytest.mark.usefixtures("one_thread")

UPDATES = 8


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    compute_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr("fastflag.learn.rollout._speculates", lambda *_: False)


def ready(model, capture, optimizer="fused", **changes):
    """A run whose evaluations are staged, with an optimiser like a GPU's."""
    run = Run(model, batches=0, **changes)
    run.policy.graphs = graphs.made_for(
        run.policy.device, run.policy._evaluate_stage, trained(run.policy), False
    )
    run.policy.graphs._capture = capture
    if optimizer == "adamw8bit":
        assert run.algorithm.optimizer == optimizer
    else:
        groups = [
            group | {"fused": True, "lr": torch.tensor(group["lr"])}
            for group in make_optimizer(run.policy, run.algorithm).param_groups
        ]
        run.optimizer = torch.optim.AdamW(groups, eps=1e-5, fused=True)
    return run


def trained(policy):
    heads = filter(None, [policy.action_head, policy.value_head])
    return torch.nn.ModuleList([*policy.top, *heads])


def learn(run, updates=UPDATES):
    """The statistics of so many updates, with rates that fall."""
    told = []
    for number in range(updates):
        set_learning_rates(run.optimizer, run.algorithm, number, updates)
        run.collect(number % 2)  # days come back
        told.append(run.update(number))
    return told


def numbers(run):
    """All that an update changes."""
    moments = [
        value
        for state in run.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    gradients = [parameter.grad for parameter in run.policy.parameters()]
    return [tensor.clone() for tensor in (*run.policy.state_dict().values(), *moments, *gradients)]


def same(ours, theirs):
    return all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


WAYS = [
    {},
    {"algorithm__algorithm": "reinforce", "algorithm__max_grad_norm": 0.0},
    {"policy__head": "lm", "algorithm__kl_coef": 0.1},
    {"policy__head": "mlp", "algorithm__estimator": "all-actions"},
    {"policy__adaptation": "full", "policy__top_layers": 2},
    {"algorithm__update_epochs": 3, "algorithm__minibatch_size": 8},
    {"algorithm__update_epochs": 2, "algorithm__target_kl": 1e9},
    {"algorithm__optimizer": "adamw8bit"},
]


@pytest.mark.parametrize("changes", WAYS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_a_replayed_step_is_the_launched_one_to_the_bit(tiny_model, monkeypatch, changes):
    """Where the samples fill the graph's room; of more room only sums' order is another."""
    monkeypatch.setattr(step, "_room", lambda count, condensed: count)
    tape = Tape()
    optimizer = changes.get("algorithm__optimizer", "fused")
    launched, replayed = (
        ready(tiny_model, capture, optimizer, **changes) for capture in (None, tape)
    )
    assert learn(launched) == learn(replayed)
    assert same(numbers(launched), numbers(replayed))
    assert tape.captured >= 2 and not replayed.policy.graphs.problem
    assert len(tape.replays) > tape.captured
