"""A gradient step as a graph: what replays give is what launching gives. Captures, which want a
GPU, are a tape's: it records what is computed, and computes it again on the same memory."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from precision import compute_as_on_a_gpu
from tape import Tape
from test_update import Run

from fastflag.config import AlgorithmConfig
from fastflag.files import InputError
from fastflag.learn import step
from fastflag.learn.objective import loss_of
from fastflag.learn.samples import Before, Samples
from fastflag.learn.step import _room, _Static, gather
from fastflag.learn.update import make_optimizer, set_learning_rates
from fastflag.policy import graphs
from fastflag.policy.table import Table

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
    if optimizer == "fused":
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
    {"policy__dtype": "fp16", "algorithm__update_epochs": 2},
]


@pytest.mark.parametrize("changes", WAYS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_a_replayed_step_is_the_launched_one_to_the_bit(tiny_model, monkeypatch, changes):
    """Where the samples fill the graph's room; of more room only sums' order is another."""
    monkeypatch.setattr(step, "_room", lambda count, condensed: count)
    monkeypatch.setattr(step.GraphedStep, "takes", lambda own, *asked: own.room == asked[-1])
    tape = Tape()
    optimizer = changes.get("algorithm__optimizer", "fused")
    launched, replayed = (
        ready(tiny_model, capture, optimizer, **changes) for capture in (None, tape)
    )
    assert learn(launched) == learn(replayed)
    assert same(numbers(launched), numbers(replayed))
    assert tape.captured >= 2 and not replayed.policy.graphs.problem
    assert len(tape.replays) > tape.captured


def test_room_that_is_left_weighs_nothing(tiny_model):
    """In the graph's room, of one sample for each row and action, sums are in another order."""
    launched, replayed = (ready(tiny_model, capture) for capture in (None, Tape()))
    for ours, theirs in zip(learn(replayed), learn(launched), strict=True):
        assert ours["first_ratio_error"] == 0.0
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for ours, theirs in zip(numbers(replayed), numbers(launched), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 12), st.booleans(), st.integers(0, 2**31))
def test_a_loss_and_its_gradient_are_those_of_the_samples_alone(count, spare, reinforce, seed):
    """Whatever was there before, of any of eleven samples, with weights and spreads of any size."""
    random = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.rand(shape, generator=random, dtype=torch.float64)

    def of(number):
        before = Before(drawn(5), drawn(5, 3).log_softmax(-1))
        integers = [(top * drawn(number)).long() for top in (5, 3)]
        spread = [drawn(number) for _ in range(6)]
        return Samples(*integers, *spread, before, mean_weight=float(spread[0].mean()))

    samples, index = of(11), torch.randperm(11, generator=random)[:count]
    static = _Static(samples, count + spare, 5, 3)
    widen(static)
    for stale in (of(11), samples):
        static.fill(stale, index)
    config = AlgorithmConfig(algorithm="reinforce" if reinforce else "ppo", kl_coef=0.2)
    logits, value = drawn(5, 3).requires_grad_(), drawn(5).requires_grad_()
    found = []
    for some in (samples.take(index), static.samples):
        table = Table(logits.log_softmax(-1), value, None)
        loss, statistics = loss_of(*gather(table, some.row), some, config)
        found.append((loss, *statistics.values(), *torch.autograd.grad(loss, (logits, value))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def widen(static):
    """To fp64, where a formula can be told from rounding."""
    static._numbers = static._numbers.double()
    before = Before(*(tensor.double() for tensor in static.samples.before))
    static.samples = Samples(*static._indices, *static._numbers, before, static._mean_weight)


@pytest.mark.parametrize("count", [1, 2, 31, 63, 64, 1000, 5000, 5185, 10**6, 4_128_768])
def test_room_is_for_all_of_a_condensed_lesson_or_up_to_an_eighth_more(count):
    room = _room(count, 5184)
    assert room == 5184 if count <= 5184 else count <= room <= 1.125 * count
    assert _room(room, 5184) == room


def test_a_rate_that_the_host_holds_is_not_captured(tiny_model):
    """The optimiser's step is launched then, with the rate of each update."""
    launched, replayed = (ready(tiny_model, capture) for capture in (None, Tape()))
    for run in (launched, replayed):
        for group in run.optimizer.param_groups:
            group["lr"] = float(group["lr"])
    steps = stepping(replayed.optimizer)
    learn(launched), learn(replayed)
    assert len(steps) == UPDATES
    for ours, theirs in zip(numbers(replayed), numbers(launched), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def stepping(optimizer):
    """Python's steps of an optimiser, as they are taken."""
    step, taken = optimizer.step, []
    optimizer.step = lambda: taken.append(1) or step()
    return taken


@pytest.mark.parametrize("of", ["evaluation", "step"])
def test_a_capture_that_fails_is_launched_and_told_once(tiny_model, caplog, of):
    """To the bit: what a failed capture has recorded was not done."""
    tape = Tape(fails=lambda number: number == ("evaluation", "step").index(of) + 1)
    launched, failing = (ready(tiny_model, capture) for capture in (None, tape))
    assert learn(launched) == learn(failing)
    assert same(numbers(launched), numbers(failing))
    (told,) = (record.message for record in caplog.records)
    assert told.startswith("CUDA graphs are off, every kernel is launched: CUDA out of memory")
    assert tape.captured == (1 if of == "evaluation" else 2)
    assert not failing.policy.graphs._captured


def test_a_gradient_that_is_not_finite_steps_nothing(tiny_model):
    run = ready(tiny_model, tape := Tape())
    learn(run)
    run.collect(0)
    before, replays = numbers(run), len(tape.replays)
    run.lesson.samples.advantage[0] = torch.inf
    with pytest.raises(InputError, match="not finite"):
        run.update()
    assert len(tape.replays) == replays + 1
    gradients = len([*run.policy.parameters()])
    assert same(numbers(run)[:-gradients], before[:-gradients])


def test_there_is_no_forward_more_than_without_graphs(tiny_model, monkeypatch):
    """One for a table, one for each later step; each is a replay, and each step another."""
    changes = {"algorithm__update_epochs": 2, "algorithm__minibatch_size": 8}
    run = ready(tiny_model, tape := Tape(), **changes)
    learn(run, 2)
    evaluate, calls = run.policy.evaluate, []
    monkeypatch.setattr(run.policy, "evaluate", lambda *a: calls.append(1) or evaluate(*a))
    del tape.replays[:]
    captured = tape.captured
    run.collect(0)
    steps = 2 * -(-len(run.lesson.samples) // 8)
    statistics = run.update()
    assert statistics["first_ratio_error"] == 0.0 and statistics["kl"] > 0
    assert len(calls) == steps == len(tape.replays) / 2 and tape.captured == captured


def test_other_numbers_of_samples_are_captured_where_they_do_not_fit(tiny_model, monkeypatch):
    """Over what the evaluation keeps, though parameters have changed since it was captured, which
    autograd knows of an optimiser that is not fused."""
    monkeypatch.setattr(step, "_room", lambda count, condensed: count)
    launched, replayed = (ready(tiny_model, capture, "adamw") for capture in (None, Tape()))
    told = []
    for run in (launched, replayed):
        learn(run, 2)
        for count in (3, 5, 7, 4):
            run.collect(0)
            samples = run.lesson.samples.take(torch.arange(count))
            run.lesson = dataclasses.replace(run.lesson, samples=samples)
            told.append(run.update())
    for ours, theirs in zip(told[4:], told[:4], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    (evaluation,) = replayed.policy.graphs._captured.values()
    assert [one.room for one in evaluation.steps] == [3, 5, 7]  # 4 have room in the second


def test_an_optimiser_that_has_not_stepped_is_launched(tiny_model):
    """Its moments would begin at zero in each replay."""
    run = ready(tiny_model, tape := Tape())
    learn(run, 4)
    run.optimizer = ready(tiny_model, None).optimizer
    groups = run.optimizer.param_groups
    for group, parameters in zip(groups, run.policy.parameter_groups(), strict=True):
        group["params"] = parameters
    captured, replays = tape.captured, len(tape.replays)
    run.collect(0)
    run.update()
    assert tape.captured == captured and len(tape.replays) == replays + 1
    run.collect(0)
    run.update()
    assert tape.captured == captured + 1 and len(tape.replays) == replays + 3


@pytest.mark.parametrize(
    "work",
    [
        lambda x: torch.tensor([1.0]) * x,
        lambda x: x.item(),
        lambda x: x if x > 0 else -x,
    ],
)
def test_what_no_capture_allows_is_told(work):
    with pytest.raises(AssertionError, match=r"host|waits"):
        Tape()(lambda: work(torch.ones(1)))


def test_a_tape_computes_on_the_memory_that_it_recorded():
    given, kept = torch.ones(2), torch.zeros(2)
    made, replay = Tape()(lambda: kept.add_(2 * given))
    assert made is kept and kept.tolist() == [0.0, 0.0]
    for number in (3.0, 5.0):
        given.fill_(number)
        replay()
    assert kept.tolist() == [16.0, 16.0]
