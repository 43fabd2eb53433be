import math

import pytest
import torch

from fastflag.policy.heads import (
    RunningStatistics,
    Statistics,
    make_action_head,
    make_value_head,
    masked_log_softmax,
)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_centring_is_the_formula():
    reference, features = random(5, 3) * 2 + 10, random(4, 3, seed=1)
    centred = Statistics.of(reference).centre(features)
    for row in range(4):
        for column in range(3):
            values = reference[:, column].tolist()
            mean = sum(values) / 5
            variance = sum((value - mean) ** 2 for value in values) / 5
            expected = (features[row, column].item() - mean) / math.sqrt(variance + 1e-6)
            assert centred[row, column].item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_goes_through_the_statistics():
    reference, weight = random(5, 3), random(5, 3, seed=1)

    def loss(values):
        return (weight * Statistics.of(values).centre(values).tanh()).sum()

    reference.requires_grad_()
    loss(reference).backward()
    step = 1e-6
    for place in range(15):
        nudge = torch.zeros(15, dtype=torch.float64)
        nudge[place] = step
        nudge = nudge.view(5, 3)
        with torch.no_grad():
            slope = (loss(reference + nudge) - loss(reference - nudge)) / (2 * step)
        assert reference.grad.view(-1)[place].item() == pytest.approx(slope.item(), abs=1e-8)
    # What all rows share is taken away, so that no gradient can move it.
    assert reference.grad.sum(0).abs().max() < 1e-12 < 0.01 < reference.grad.abs().max()


def test_a_reference_of_one_row_has_finite_gradients():
    reference = random(1, 3).requires_grad_()
    centred = Statistics.of(reference).centre(reference)
    assert torch.equal(centred, torch.zeros_like(centred))
    centred.sum().backward()
    assert torch.isfinite(reference.grad).all()


def test_running_statistics_are_a_mean_that_becomes_an_exponential_average():
    running = RunningStatistics(2)
    batches = [
        Statistics(torch.tensor([1.0, n]), torch.tensor([n + 2.0, 3.0]).requires_grad_())
        for n in range(14)
    ]
    mean, deviation = torch.zeros(2), torch.zeros(2)
    for count, batch in enumerate(batches, 1):
        running.track(batch)
        weight = max(1 / count, 0.1)
        mean = (1 - weight) * mean + weight * batch.mean
        deviation = (1 - weight) * deviation + weight * batch.deviation.detach()
        torch.testing.assert_close(running.current().mean, mean)
        torch.testing.assert_close(running.current().deviation, deviation)
        if count == 8:
            assert mean[1].item() == pytest.approx(3.5), "a plain mean so far"
    assert not running.current().deviation.requires_grad
    assert int(running.count) == 14
    assert set(running.state_dict()) == {"mean", "deviation", "count"}, "kept in checkpoints"


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_heads_start_at_zero_but_can_learn(kind):
    generator = torch.Generator().manual_seed(0)
    head = make_action_head(kind, 8, 3, generator)
    features = random(6, 8).float()
    assert torch.equal(head(features), torch.zeros(6, 3))
    assert torch.equal(make_value_head(8)(features), torch.zeros(6, 1))
    weight = random(6, 3, seed=2).float()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (head(features) * weight).sum().backward()
        optimizer.step()
    assert all(parameter.grad.norm() > 0 for parameter in head.parameters())
    assert (head(features) * weight).sum() < 0


def test_the_mlp_is_drawn_from_the_given_generator():
    torch.manual_seed(1)
    one = make_action_head("mlp", 8, 3, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    same = make_action_head("mlp", 8, 3, torch.Generator().manual_seed(5))
    other = make_action_head("mlp", 8, 3, torch.Generator().manual_seed(6))
    first = [next(head.parameters()) for head in (one, same, other)]
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
