import math

import numpy as np
import pytest
import torch

from fastflag.policy.heads import (
    Centring,
    RunningStatistics,
    Statistics,
    make_action_head,
    make_value_head,
    masked_log_softmax,
)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Of ten rows three are short, two flat, five long.
SIDE = torch.tensor([2, 0, 2, 1, 0, 2, 1, 2, 0, 2])


def statistics_of(centring, side):
    """Where every row centres."""
    rows = Centring.of(np.arange(len(side)), side.numpy(), centring.device)
    return Statistics.of(centring, rows)


def test_centring_is_the_formula_a_mean_for_each_side_and_a_deviation_over_all():
    centring, features = random(10, 3) * 2 + 10 * SIDE[:, None], random(4, 3, seed=1)
    of = torch.tensor([1, 2, 0, 1])
    centred = statistics_of(centring, SIDE).centre(features, of)
    for column in range(3):
        values = {
            side: [centring[at, column].item() for at in range(10) if SIDE[at] == side]
            for side in range(3)
        }
        mean = {side: sum(some) / len(some) for side, some in values.items()}
        squares = [(x - mean[side]) ** 2 for side, some in values.items() for x in some]
        deviation = math.sqrt(sum(squares) / 10 + 1e-6)
        for row, side in enumerate(of.tolist()):
            expected = (features[row, column].item() - mean[side]) / deviation
            assert centred[row, column].item() == pytest.approx(expected, rel=1e-12)


def test_a_side_without_reference_takes_the_mean_of_all():
    centring = random(5, 3)
    side = torch.tensor([1, 1, 0, 1, 1])
    statistics = statistics_of(centring, side)
    torch.testing.assert_close(statistics.mean[2], centring.mean(0))
    torch.testing.assert_close(statistics.mean[0], centring[2])
    assert statistics.known.tolist() == [True, True, False]


def test_decisions_on_a_side_never_met_are_centred_as_flat_ones():
    running = RunningStatistics(2)
    mean = torch.tensor([[9.0, 9.0], [1.0, 2.0], [5.0, 6.0]])
    for known in ([False, True, False], [False, True, True]):
        running.track(Statistics(mean, torch.ones(2), torch.tensor(known)))
        expected = mean[2] if known[2] else mean[1]
        torch.testing.assert_close(
            running.current().mean, torch.stack([mean[1], mean[1], expected])
        )
    assert running.count.tolist() == [0, 2, 1]


def test_the_gradient_goes_through_the_statistics():
    centring, weight = random(10, 3), random(10, 3, seed=1)

    def loss(values):
        return (weight * statistics_of(values, SIDE).centre(values, SIDE).tanh()).sum()

    centring.requires_grad_()
    loss(centring).backward()
    step = 1e-6
    for place in range(30):
        nudge = torch.zeros(30, dtype=torch.float64)
        nudge[place] = step
        nudge = nudge.view(10, 3)
        with torch.no_grad():
            slope = (loss(centring + nudge) - loss(centring - nudge)) / (2 * step)
        assert centring.grad.view(-1)[place].item() == pytest.approx(slope.item(), abs=1e-8)
    # What all rows of a side share is taken away, so that no gradient can move it.
    for side in range(3):
        shared = centring.grad[side == SIDE].sum(0)
        assert shared.abs().max() < 1e-12 < 0.01 < centring.grad[SIDE == 2].abs().max()


def test_a_reference_of_one_row_has_finite_gradients():
    centring = random(1, 3).requires_grad_()
    side = torch.zeros(1, dtype=torch.int64)
    centred = statistics_of(centring, side).centre(centring, side)
    assert torch.equal(centred, torch.zeros_like(centred))
    centred.sum().backward()
    assert torch.isfinite(centring.grad).all()


def test_running_statistics_are_a_mean_that_becomes_an_exponential_average():
    running = RunningStatistics(2)
    batches = [
        Statistics(
            torch.tensor([[1.0, n], [n, 0.0], [2.0, 2.0]]),
            torch.tensor([n + 2.0, 3.0]).requires_grad_(),
            torch.ones(3, dtype=torch.bool),
        )
        for n in range(14)
    ]
    mean, deviation = torch.zeros(3, 2), torch.zeros(2)
    for count, batch in enumerate(batches, 1):
        running.track(batch)
        weight = max(1 / count, 0.1)
        mean = (1 - weight) * mean + weight * batch.mean
        deviation = (1 - weight) * deviation + weight * batch.deviation.detach()
        torch.testing.assert_close(running.current().mean, mean)
        torch.testing.assert_close(running.current().deviation, deviation)
        if count == 8:
            assert mean[0, 1].item() == pytest.approx(3.5), "a plain mean so far"
    assert not running.current().deviation.requires_grad
    assert running.count.tolist() == [14, 14, 14]
    assert set(running.state_dict()) == {"mean", "deviation", "count"}, "kept in checkpoints"


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_heads_start_at_zero_but_can_learn(kind):
    generator = torch.Generator().manual_seed(0)
    head = make_action_head(kind, 8, 3, generator)
    features, side = random(6, 8).float(), torch.tensor([0, 1, 2, 1, 0, 1])
    assert torch.equal(head(features, side), torch.zeros(6, 3))
    assert torch.equal(make_value_head(8)(features, side), torch.zeros(6, 1))
    weight = random(6, 3, seed=2).float()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (head(features, side) * weight).sum().backward()
        optimizer.step()
    assert all(parameter.grad.norm() > 0 for parameter in head.parameters())
    assert (head(features, side) * weight).sum() < 0
    # Rows of one side share its bias, and no other's.
    expected = [-0.3 * weight[side == one].sum(0) for one in range(3)]
    torch.testing.assert_close(head.bias.detach(), torch.stack(expected))


def test_the_mlp_is_drawn_from_the_given_generator():
    torch.manual_seed(1)
    one = make_action_head("mlp", 8, 3, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    same = make_action_head("mlp", 8, 3, torch.Generator().manual_seed(5))
    other = make_action_head("mlp", 8, 3, torch.Generator().manual_seed(6))
    first = [next(head.body.parameters()) for head in (one, same, other)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_masked_actions_have_probability_zero_and_finite_gradients():
    logits = torch.tensor([[500.0, -500.0, 1.0], [0.3, 0.2, 0.1], [5.0, 6.0, 7.0]])
    logits.requires_grad_()
    allowed = torch.tensor([[False, True, True], [True, True, True], [False, True, False]])
    log_probabilities = masked_log_softmax(logits, allowed)
    probabilities = log_probabilities.exp()
    assert torch.equal(probabilities == 0, torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool())
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    total = sum(math.exp(value) for value in (0.3, 0.2, 0.1))
    torch.testing.assert_close(probabilities[1], logits[1].exp() / total)
    assert log_probabilities[2, 1] == 0
    log_probabilities[allowed].sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.equal(logits.grad[~allowed], torch.zeros(3))
    assert logits.grad[0].abs().max() > 0.5
