import dataclasses

import numpy as np
import pytest
import torch
from precision import compute_as_on_a_gpu, never_waiting
from small import make_opinionated, small_config, small_market, small_world

from fastflag.files import InputError
from fastflag.learn.advantage import generalised_advantage
from fastflag.learn.batch import start_accounts
from fastflag.learn.lesson import advantages, estimate
from fastflag.learn.objective import loss_of
from fastflag.learn.progress import PhaseTimer
from fastflag.learn.rollout import rollout
from fastflag.learn.step import gather
from fastflag.learn.update import (
    STATISTICS,
    _minibatches,
    _steps,
    make_optimizer,
    set_learning_rates,
    update,
)
from fastflag.policy import graphs
from fastflag.policy.heads import Centring, Statistics
from fastflag.policy.table import Table
from fastflag.prompt.prompts import PromptSet

pytestmark = pytest.mark.usefixtures("one_thread")


class Run:
    """A policy with a batch of its own making, ready to be updated."""

    def __init__(self, model, opinionated=True, batches=1, **changes):
        self.config = small_config(model, **changes)
        self.algorithm = self.config.algorithm
        self.world, self.policy, self.days = small_world(self.config, small_market())
        if opinionated:
            make_opinionated(self.policy)
        self.optimizer = make_optimizer(self.policy, self.algorithm)
        self.accounts = start_accounts(self.config.rollout, self.config.simulator.cash)
        for step in range(batches):
            self.collect(step)

    def collect(self, step):
        policy, world = self.policy, self.world
        self.table, batches = rollout(
            policy, world, [self.days], self.accounts, self.config, step, PhaseTimer()
        )
        (self.batch,) = batches
        self.lesson = self.learn(self.algorithm)

    def learn(self, algorithm):
        return estimate(self.table, [self.batch], algorithm, PhaseTimer())

    def every_step(self):
        """The samples with nothing added up, as minibatches need them."""
        lesson = self.learn(dataclasses.replace(self.algorithm, minibatch_size=10**9))
        return lesson.samples

    def update(self, seed=1):
        return update(self.policy, self.optimizer, self.table, self.lesson, self.algorithm, seed)

    def loss(self):
        """The loss of the whole batch at the policy's present weights."""
        current = self.policy.evaluate(self.batch.prompts)
        samples = self.lesson.samples
        return loss_of(*gather(current, samples.row), samples, self.algorithm)


@pytest.mark.parametrize("account", ["stepped", "exact"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("minibatch", [0, 5])
@pytest.mark.parametrize("head", ["linear", "lm"])
def test_the_first_ratio_is_exactly_one(tiny_model, account, dtype, minibatch, head):
    run = Run(
        tiny_model,
        prompt__account=account,
        policy__dtype=dtype,
        policy__head=head,
        algorithm__minibatch_size=minibatch,
        batches=2,
    )
    assert run.update()["first_ratio_error"] == 0.0
    run.collect(2)
    assert run.update()["first_ratio_error"] == 0.0


def test_the_ratio_is_not_one_once_the_policy_has_moved(tiny_model):
    run = Run(tiny_model, algorithm__update_epochs=2)
    statistics = run.update()
    assert statistics["first_ratio_error"] == 0.0
    assert statistics["kl"] > 1e-6
    assert statistics["ratio_max"] > 1.001 and statistics["ratio_min"] < 0.999


def test_minibatches_hold_every_sample_once():
    for count, size in ((10, 3), (10, 5), (7, 1), (12, 11)):
        parts = list(_minibatches(count, size, torch.Generator().manual_seed(0)))
        assert [len(part) for part in parts] == [
            min(size, count - start) for start in range(0, count, size)
        ]
        assert sorted(torch.cat(parts).tolist()) == list(range(count))
        assert torch.cat(parts).tolist() != list(range(count))
    for size in (10, 99):
        assert [p.tolist() for p in _minibatches(10, size, torch.Generator())] == [list(range(10))]


def test_each_epoch_shuffles_anew_by_the_seed():
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.cat(list(_minibatches(20, 6, generator))) for _ in range(2))
    again = torch.cat(list(_minibatches(20, 6, torch.Generator().manual_seed(3))))
    assert first.tolist() == again.tolist() != second.tolist()


def test_the_samples_are_the_valid_steps(tiny_model):
    run = Run(tiny_model)
    run.accounts[0].alive[1] = False
    run.collect(1)
    valid = run.batch.steps.valid
    assert valid[1].tolist() == [False] * 3 + [True] * 3  # the next episode starts at step 9
    assert not valid.all()
    samples = run.every_step()
    assert samples.row.tolist() == run.batch.steps.row.T[valid.T].tolist()
    assert samples.action.tolist() == run.batch.steps.action.T[valid.T].tolist()
    assert set(samples.weight.tolist()) == {1.0} and not samples.advantage_spread.any()
    log_probabilities = run.table.log_probabilities.detach().numpy()
    value = run.table.value.detach().numpy()
    advantage = advantages(run.table, run.batch, run.algorithm)
    for i, (h, b) in enumerate(np.argwhere(valid.T)):
        row, action = run.batch.steps.row[b, h], run.batch.steps.action[b, h]
        assert samples.old_log_probability[i] == log_probabilities[row, action]
        assert samples.old_value[i] == value[row]
        assert samples.advantage[i] == np.float32(advantage[b, h])
        assert samples.target[i] == pytest.approx(advantage[b, h] + value[row], rel=1e-6)


def test_advantages_come_from_the_tables_values(tiny_model):
    run = Run(tiny_model, batches=3)
    value = run.table.value.detach().numpy().astype(np.float64)
    batch, algorithm = run.batch, run.algorithm
    expected = generalised_advantage(
        batch.steps.reward,
        value[batch.steps.row],
        value[batch.steps.next_row],
        batch.steps.terminated,
        batch.truncated,
        algorithm.gamma,
        algorithm.gae_lambda,
    )
    assert batch.truncated.any() and (value != 0).all()
    np.testing.assert_array_equal(advantages(run.table, batch, algorithm), expected)


def one_prompt(prompts: PromptSet, row: int) -> PromptSet:
    """A prompt alone, as a trainer without a table would see it."""
    prefix, suffix = prompts.pairs[row]
    return PromptSet(
        (prompts.prefixes[prefix],),
        (prompts.suffixes[suffix],),
        np.zeros((1, 2), np.int32),
        prompts.side[[row]],
        prompts.allowed[[row]],
        np.zeros(0, np.int32),
    )


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_the_gradient_is_that_of_one_forward_per_environment_step(
    tiny_model, algorithm, adaptation
):
    """Every step's prompt through the whole model by itself, in a batch of one."""
    run = Run(
        tiny_model,
        policy__adaptation=adaptation,
        policy__top_layers=2,
        # Ten days: the deviation of a side's seven rows can be small, and multiplies rounding.
        rollout__num_steps=9,
        algorithm__algorithm=algorithm,
        algorithm__kl_coef=0.1,
    )
    lesson = run.lesson
    loss, _ = loss_of(*gather(run.table, lesson.samples.row), lesson.samples, run.algorithm)
    loss.backward()
    gradients = [p.grad.clone() for p in run.policy.parameters()]
    run.policy.zero_grad()

    prompts = run.batch.prompts
    alone = [one_prompt(prompts, row) for row in prompts.centring]
    centring = [run.policy._features(one, run.policy.read(one.prefixes)) for one in alone]
    side = prompts.side[prompts.centring].astype(np.int64) + 1
    rows = Centring.of(np.arange(len(side)), side, torch.device("cpu"))
    statistics = Statistics.of(torch.cat(centring), rows)
    samples = run.every_step()
    assert len(samples) > len(lesson.samples)
    alone = [one_prompt(prompts, row) for row in samples.row.tolist()]
    tables = [run.policy.evaluate(one, statistics) for one in alone]
    naive, _ = loss_of(
        torch.cat([table.log_probabilities for table in tables]),
        torch.cat([table.value for table in tables]),
        samples,
        run.algorithm,
    )
    naive.backward()
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    for ours, parameter in zip(gradients, run.policy.parameters(), strict=True):
        scale = parameter.grad.norm()
        assert scale > 0
        assert (ours - parameter.grad).norm() <= 1e-5 * scale


@pytest.fixture
def many_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


def test_gathering_gives_the_same_gradient_bits_every_time(many_threads):
    """tensor[rows] does not: from 32,768 numbers on, several threads add at once."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 500, (400_000,), generator=generator)
    weight = torch.randn(400_000, 3, generator=generator)
    logits, value = torch.randn(500, 3, generator=generator), torch.randn(500, generator=generator)
    seen = set()
    for _ in range(6):
        one, two = logits.clone().requires_grad_(), value.clone().requires_grad_()
        table = Table(one, two, None)
        gathered, values = gather(table, rows)
        assert torch.equal(gathered, logits[rows]) and torch.equal(values, value[rows])
        ((gathered * weight).sum() + (values * weight[:, 0]).sum()).backward()
        seen.add(one.grad.numpy().tobytes() + two.grad.numpy().tobytes())
    assert len(seen) == 1


def test_the_whole_gradient_has_the_same_bits_every_time(tiny_model, many_threads):
    """Many prompts of a day share its keys and values: their gradients are added up too."""
    run = Run(
        tiny_model,
        policy__adaptation="full",
        policy__top_layers=2,
        simulator__positions="long_short",
        rollout__num_steps=20,
    )
    seen = set()
    for _ in range(8):
        run.policy.zero_grad()
        run.loss()[0].backward()
        seen.add(b"".join(p.grad.numpy().tobytes() for p in run.policy.parameters()))
    assert len(seen) == 1


def test_the_gradient_of_a_whole_epoch_of_minibatches_moves_the_policy_once_each(tiny_model):
    run = Run(tiny_model, algorithm__minibatch_size=5, algorithm__update_epochs=2)
    evaluate, calls = run.policy.evaluate, []
    run.policy.evaluate = lambda prompts: calls.append(1) or evaluate(prompts)
    run.update()
    steps = {int(state["step"]) for state in run.optimizer.state.values()}
    assert steps == {2 * 5}  # 24 samples: 5, 5, 5, 5, 4
    assert len(calls) == 9  # the first reads the rollout's table


def test_the_updates_step_is_adamw_on_the_clipped_gradient(tiny_model):
    """Against the optimiser's formula, first step: p -= lr * g / (|g| + eps)."""
    limit = 0.01
    run = Run(tiny_model, algorithm__max_grad_norm=limit)
    before = [p.detach().clone() for p in run.policy.parameters()]
    run.loss()[0].backward()
    gradients = [p.grad.clone() for p in run.policy.parameters()]
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert norm > 10 * limit
    statistics = run.update()
    assert statistics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    for old, parameter, gradient in zip(before, run.policy.parameters(), gradients, strict=True):
        clipped = gradient * limit / norm
        expected = old - rates[id(parameter)] * clipped / (clipped.abs() + 1e-5)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-3, atol=2e-6)


def test_a_limit_of_0_does_not_clip(tiny_model):
    run = Run(tiny_model, algorithm__max_grad_norm=0.0)
    run.loss()[0].backward()
    expected = [p.grad.clone() for p in run.policy.parameters()]
    run.update()
    for parameter, gradient in zip(run.policy.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=5e-6)


def test_weight_decay_spares_the_heads(tiny_model):
    run = Run(tiny_model, algorithm__weight_decay=0.3)
    layers, heads = run.policy.parameter_groups()
    of = {id(p): g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    assert {of[id(p)] for p in layers} == {0.3} and {of[id(p)] for p in heads} == {0.0}
    assert len(of) == len(list(run.policy.parameters()))
    assert all(g["eps"] == 1e-5 for g in run.optimizer.param_groups)


def test_learning_rates_fall_linearly(tiny_model):
    run = Run(tiny_model)
    base = (run.algorithm.layer_learning_rate, run.algorithm.learning_rate)
    for step, factor in ((0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)):
        assert set_learning_rates(run.optimizer, run.algorithm, step, 4) == factor
        rates = [group["lr"] for group in run.optimizer.param_groups]
        assert rates == [rate * factor for rate in base]
    constant = dataclasses.replace(run.algorithm, anneal_lr=False)
    assert set_learning_rates(run.optimizer, constant, 3, 4) == 1.0
    assert [group["lr"] for group in run.optimizer.param_groups] == list(base)


@pytest.mark.parametrize(("target", "epochs"), [(0.0, 6), (1e9, 6), (1e-7, 2)])
def test_epochs_stop_above_the_target_kl(tiny_model, target, epochs):
    """The first epoch's KL is 0, the second's is not: CleanRL breaks after it."""
    run = Run(tiny_model, algorithm__target_kl=target, algorithm__update_epochs=6)
    run.update()
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {epochs}


@pytest.mark.parametrize("head", ["linear", "mlp", "lm"])
@pytest.mark.parametrize("account", ["stepped", "exact"])
def test_the_divergence_from_the_initial_policy_starts_at_0_and_grows(tiny_model, head, account):
    run = Run(tiny_model, opinionated=False, policy__head=head, prompt__account=account)
    # A row of the language model's differs in its last bits with what it is evaluated with.
    assert run.update()["kl_initial"] == pytest.approx(0.0, abs=1e-7 if head == "lm" else 0.0)
    for step in (1, 2):
        run.collect(step)
        statistics = run.update()
    assert statistics["kl_initial"] > 1e-5


def test_the_divergence_is_to_the_untrained_weights(tiny_model):
    """Against a second policy, never trained, on the same prompts."""
    run = Run(tiny_model, opinionated=False, policy__head="lm")
    fresh = small_world(run.config, small_market())[1]
    for step in (1, 2):
        run.update()
        run.collect(step)
    samples = run.lesson.samples
    initial = fresh.evaluate(run.batch.prompts).log_probabilities.detach()[samples.row]
    torch.testing.assert_close(samples.initial, initial, rtol=1e-4, atol=1e-5)
    moved = run.table.log_probabilities.detach()[samples.row] - initial
    assert moved.abs().nan_to_num(0).max() > 1e-3


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_a_step_lowers_the_loss_and_the_running_statistics_follow(tiny_model, algorithm):
    run = Run(
        tiny_model,
        algorithm__algorithm=algorithm,
        algorithm__learning_rate=1e-3,
        algorithm__layer_learning_rate=1e-4,
    )
    before = run.loss()[0].item()
    expected = run.table.statistics.mean.detach().clone()
    run.update()
    assert run.loss()[0].item() < before
    torch.testing.assert_close(run.policy.running.mean[1:], expected[1:])
    assert run.policy.running.count.tolist() == [0, 1, 1]


def test_a_batch_of_ruined_accounts_alone_teaches_nothing(tiny_model):
    run = Run(tiny_model)
    keys = set(run.update())
    assert keys == set(STATISTICS)
    nobody = np.zeros_like(run.batch.steps.valid)
    steps = dataclasses.replace(run.batch.steps, valid=nobody)
    run.batch = dataclasses.replace(run.batch, steps=steps)
    run.lesson = run.learn(run.algorithm)
    before = {name: tensor.clone() for name, tensor in run.policy.state_dict().items()}
    assert run.update() == dict.fromkeys(STATISTICS, 0.0)
    for name, tensor in run.policy.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_gradient_that_is_not_finite_is_refused_before_the_step(tiny_model):
    run = Run(tiny_model)
    before = [p.detach().clone() for p in run.policy.parameters()]
    run.lesson.samples.advantage[0] = np.inf
    with pytest.raises(InputError, match="not finite"):
        run.update()
    for parameter, old in zip(run.policy.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def fused(optimizer):
    """The optimiser of a GPU in the place of a CPU's."""
    groups = [group | {"fused": True} for group in optimizer.param_groups]
    return torch.optim.AdamW(groups, eps=1e-5, fused=True)


def test_a_fused_step_is_refused_on_the_device(tiny_model):
    """A GPU is told not to step, and the update says so once all is read."""
    run = Run(tiny_model)
    run.optimizer = fused(run.optimizer)
    run.update()
    run.collect(1)
    before = [p.detach().clone() for p in run.policy.parameters()]
    run.lesson.samples.advantage[0] = np.inf
    with pytest.raises(InputError, match="not finite"):
        run.update()
    for parameter, old in zip(run.policy.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


@pytest.mark.parametrize("head", ["linear", "lm"])
@pytest.mark.parametrize("minibatch", [0, 7])
@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_gradient_steps_never_wait_for_the_device(
    tiny_model, monkeypatch, head, minibatch, algorithm
):
    """From the table to the last of several steps, by a GPU's operators and optimiser."""
    compute_as_on_a_gpu(monkeypatch)
    run = Run(
        tiny_model,
        batches=0,
        policy__head=head,
        algorithm__algorithm=algorithm,
        algorithm__minibatch_size=minibatch,
        algorithm__update_epochs=2 if algorithm == "ppo" else 1,
    )
    run.optimizer = fused(run.optimizer)
    run.policy.graphs = graphs.Graphs(run.policy._evaluate_stage, run.policy.top, None)
    monkeypatch.setattr("fastflag.learn.rollout._speculates", lambda *_: False)
    run.collect(0)
    rows = run.lesson.samples.row
    with never_waiting():
        assert run.policy.lies_ready(run.lesson.prompts)
        taken = run.policy, run.optimizer, run.table, run.lesson, rows, run.algorithm, 1
        _, history = _steps(*taken)
    assert len(history) == run.algorithm.update_epochs * (
        -(-len(run.lesson.samples) // minibatch) if minibatch else 1
    )
    assert torch.stack(history).isfinite().all()


def test_gradients_are_never_added_up_over_backward_passes(tiny_model, monkeypatch):
    """A replayed backward pass hands out buffers that the next one writes over."""
    run, backward, passes = Run(tiny_model, algorithm__update_epochs=3), torch.Tensor.backward, []

    def watched(loss):
        assert all(parameter.grad is None for parameter in run.policy.parameters())
        passes.append(backward(loss))

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    run.update()
    assert len(passes) == 3


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: x if x > 0 else -x,
        lambda x: float(x),
        lambda x: x.repeat(2)[x.repeat(2) > 0],
        lambda x: x.cpu(),
        lambda x: torch.full((1,), x),
    ],
)
def test_what_waits_for_the_device_is_told(ask):
    with pytest.raises(AssertionError, match="waits"), never_waiting():
        ask(torch.ones(()))


def quantised(values, codes):
    """Each block of 256 numbers as the nearest codes to them over the block's largest, undone."""
    blocks = values.reshape(-1, 256)
    largest = np.abs(blocks).max(1, keepdims=True)
    places = np.abs((blocks / largest)[..., None] - codes).argmin(2)
    return (codes[places] * largest).reshape(values.shape)


@pytest.mark.parametrize("size", [4096, 4095])
def test_the_8_bit_optimiser_is_adamw_with_moments_of_8_bits(tiny_model, size):
    """By hand, in float64; below 4096 numbers the moments are of 32 bits."""
    policy = small_world(small_config(tiny_model), small_market())[1]
    random = np.random.default_rng(0)
    parameter = torch.nn.Parameter(torch.from_numpy(random.normal(size=size)).float())
    policy.parameter_groups = lambda: ([parameter], [])
    config = small_config(
        tiny_model,
        algorithm__optimizer="adamw8bit",
        algorithm__layer_learning_rate=1e-2,
        algorithm__weight_decay=0.1,
    ).algorithm
    optimizer = make_optimizer(policy, config)
    expected = parameter.detach().numpy().astype(float)
    first, second = np.zeros(size), np.zeros(size)
    for step in range(1, 6):
        parameter.grad = torch.from_numpy(random.normal(size=size)).float()
        optimizer.step()
        gradient = parameter.grad.numpy().astype(float)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, spread = first / (1 - 0.9**step), np.sqrt(second / (1 - 0.999**step))
        expected = expected * (1 - 1e-2 * 0.1) - 1e-2 * mean / (spread + 1e-5)
        if size == 4096:
            state = optimizer.state[parameter]
            assert state["state1"].dtype == state["state2"].dtype == torch.uint8
            first = quantised(first, state["qmap1"].numpy().astype(float))
            second = quantised(second, state["qmap2"].numpy().astype(float))
    # On a CPU bitsandbytes rounds 3% of the second moments, the smallest, to a code beside the
    # nearest one.
    difference = np.abs(parameter.detach().numpy() - expected)
    assert (difference < 1e-5).mean() > (0.97 if size == 4096 else 0.9999)
    assert difference.max() < 1e-2
