"""The action head's terms in Triton against each one's formula in fp64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton exists for Linux only")

from precision import DEVICE, DTYPES, assert_no_worse, poisoned

from fastflag.kernels.action_head import (
    action_terms,
    action_terms_backward,
    action_terms_reference,
)
from fastflag.policy.heads import masked_log_softmax

TERMS = ("log_probability", "entropy", "ratio", "surrogate", "divergence")


def problem(count, actions, dtype=torch.float32, spread=1.0):
    """logits, allowed, action, old log-probability, advantage, initial; many ratios leave 0.2."""
    generator = torch.Generator().manual_seed(count + actions)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    action = torch.randint(actions, (count,), generator=generator)
    allowed = torch.rand(count, actions, generator=generator) < 0.7
    allowed[torch.arange(count), action] = True
    logits = spread * normal(count, actions)
    old = masked_log_softmax(logits + 0.3 * normal(count, actions), allowed)
    old = old.gather(1, action[:, None])[:, 0]
    initial = masked_log_softmax(normal(count, actions), allowed)
    numbers = (tensor.to(DEVICE, dtype) for tensor in (logits, old, normal(count), initial))
    logits, old, advantage, initial = numbers
    return logits, allowed.to(DEVICE), action.to(DEVICE), old, advantage, initial


def clipped_surrogate(log_ratio, advantage, clip):
    """PPO's loss (arXiv 1707.06347, eq. 7), to be minimised."""
    ratio = log_ratio.exp()
    return torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def entropies(log_p):
    finite = log_p.masked_fill(log_p.isinf(), 0.0)
    return -(log_p.exp() * finite).sum(-1)


def kl_divergences(log_p, initial):
    difference = (log_p - initial).masked_fill(initial.isinf(), 0.0)
    return (log_p.exp() * difference).sum(-1)


def exact(logits, allowed, action, old, advantage, initial, clip):
    """The terms in fp64."""
    old, advantage, initial = old.double(), advantage.double(), initial.double()
    log_p = logits if allowed is None else masked_log_softmax(logits, allowed)
    chosen = log_p.gather(1, action[:, None])[:, 0]
    ppo = clip is not None
    surrogate = clipped_surrogate(chosen - old, advantage, clip) if ppo else -advantage * chosen
    ratio, divergence = (chosen - old).exp(), kl_divergences(log_p, initial)
    return chosen, entropies(log_p), ratio, surrogate, divergence


def check(inputs, clip, terms=range(5)):
    """Terms and the logits' gradient, upstream of `terms` alone, against the truth."""
    logits, *rest = inputs
    ours, torchs = (logits.detach().clone().requires_grad_() for _ in range(2))
    truth = logits.detach().double().requires_grad_()
    with poisoned():
        found = action_terms(ours, *rest, clip)
    expected = exact(truth, *rest, clip)
    reference = action_terms_reference(torchs, *rest, clip)
    for our, their, true in zip(found, reference, expected, strict=True):
        assert_no_worse(our, their, true)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(len(logits), generator=generator).to(DEVICE) for _ in terms]
    (true,) = torch.autograd.grad(
        [expected[i] for i in terms], truth, [u.double() for u in upstream]
    )
    (their,) = torch.autograd.grad([reference[i] for i in terms], torchs, upstream)
    with poisoned():
        (our,) = torch.autograd.grad([found[i] for i in terms], ours, upstream)
    assert_no_worse(our, their, true)
    return our


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("actions", [3, 4, 7, 16])
@pytest.mark.parametrize("count", [1, 63, 123])
def test_terms_and_gradient(count, actions, dtype, clip):
    inputs = problem(count, actions, dtype)
    gradient = check(inputs, clip)
    assert (gradient[~inputs[1]] == 0).all()


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("actions", [3, 16])
def test_terms_and_gradient_of_log_probabilities(actions, clip):
    logits, allowed, *rest = problem(123, actions)
    check((masked_log_softmax(logits, allowed), None, *rest), clip)


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("masked", [True, False])
def test_the_reference_is_the_loss(masked, clip):
    logits, allowed, *rest = problem(123, 5, torch.float64)
    if not masked:
        logits, allowed = masked_log_softmax(logits, allowed), None
    logits.requires_grad_()
    gradients = []
    for terms in (of(logits, allowed, *rest, clip) for of in (action_terms_reference, exact)):
        coefficients = torch.arange(1.0, 6.0, dtype=torch.float64, device=DEVICE)
        (gradient,) = torch.autograd.grad(coefficients @ torch.stack(terms).sum(1), logits)
        gradients.append((*terms, gradient))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("term", range(5), ids=TERMS)
@pytest.mark.parametrize("masked", [True, False])
def test_the_gradient_of_each_term_alone(term, masked):
    logits, allowed, *rest = problem(63, 5)
    if not masked:
        logits, allowed = masked_log_softmax(logits, allowed), None
    check((logits, allowed, *rest), 0.2, [term])


@given(st.data(), st.integers(3, 5), st.sampled_from([0.1, 0.2, None]))
def test_terms_are_the_formulas(data, actions, clip):
    def draw(low, high, count):
        numbers = st.floats(low, high, width=32)
        return data.draw(st.lists(numbers, min_size=count, max_size=count))

    allowed = data.draw(st.sets(st.integers(0, actions - 1), min_size=1))
    action = data.draw(st.sampled_from(sorted(allowed)))
    logits, prior = draw(-8, 8, actions), draw(-8, 8, actions)
    old, advantage = draw(-3, 0, 1)[0], draw(-4, 4, 1)[0]

    def log_softmax(numbers):
        total = sum(math.exp(numbers[a]) for a in allowed)
        return {a: numbers[a] - math.log(total) for a in allowed}

    log_p, log_q = log_softmax(logits), log_softmax(prior)
    ratio = math.exp(log_p[action] - old)
    if clip is None:
        surrogate = -advantage * log_p[action]
    else:
        surrogate = -min(advantage * ratio, advantage * min(max(ratio, 1 - clip), 1 + clip))
    expected = (
        log_p[action],
        -sum(math.exp(log_p[a]) * log_p[a] for a in allowed),
        ratio,
        surrogate,
        sum(math.exp(log_p[a]) * (log_p[a] - log_q[a]) for a in allowed),
    )
    row = [a in allowed for a in range(actions)]
    initial = [log_q.get(a, -math.inf) for a in range(actions)]
    columns = ([logits], [row], [action], [old], [advantage], [initial])
    found = action_terms(*(torch.tensor(column, device=DEVICE) for column in columns), clip)
    assert [term.item() for term in found] == pytest.approx(expected, rel=2e-5, abs=2e-5)


def test_the_gradient_at_ties_is_torchs():
    """Ratios a few roundings about both bounds, where torch.max's arguments may round to one."""
    bound = torch.tensor([0.8, 1.2]).log().view(torch.int32)
    near = (bound[:, None] + torch.arange(-32, 33, dtype=torch.int32)).view(torch.float32)
    advantage = torch.linspace(-2, 2, 61)
    log_ratio, advantage = torch.cartesian_prod(near.flatten(), advantage).to(DEVICE).unbind(1)
    action = torch.zeros(len(log_ratio), dtype=torch.int64, device=DEVICE)
    logits = log_ratio[:, None] * torch.tensor([1.0, -1.0, -1.0], device=DEVICE)
    logits.requires_grad_()
    zero = torch.zeros_like(log_ratio)
    _, _, found, surrogate, _ = action_terms(
        logits, None, action, zero, advantage, torch.zeros_like(logits), 0.2
    )
    (ours,) = torch.autograd.grad(surrogate.sum(), logits)
    ratio = found.detach().requires_grad_()
    expected = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    (slope,) = torch.autograd.grad(expected.sum(), ratio)
    assert torch.equal(surrogate, expected)
    torch.testing.assert_close(ours[:, 0], slope * ratio.detach(), rtol=1e-6, atol=0)
    moved = advantage != 0
    parts = -slope[moved] / advantage[moved]
    assert sorted(set(parts.tolist())) == [0.0, 0.5, 1.0]
    assert ((ratio[moved] == 0.8) | (ratio[moved] == 1.2)).any()


@pytest.mark.parametrize("masked", [True, False])
def test_the_first_ratio_is_exactly_one_whatever_the_batch(masked):
    logits, allowed, action, _, advantage, initial = problem(507, 3)
    if masked:
        old = action_terms(logits, allowed, action, advantage, advantage, initial, 0.2)[0]
    else:
        logits, allowed = masked_log_softmax(logits, allowed), None
        old = logits.gather(1, action[:, None])[:, 0]
    some = torch.randperm(507, generator=torch.Generator().manual_seed(0))[:123].to(DEVICE)
    few = None if allowed is None else allowed[some]
    gradients = []
    for clip in (0.2, None):
        trained = logits[some].requires_grad_()
        inputs = (trained, few, action[some], old[some], advantage[some], initial[some])
        _, _, ratio, surrogate, _ = action_terms(*inputs, clip)
        assert (ratio == 1).all()
        gradients += torch.autograd.grad(surrogate.sum(), trained)
    # Where the ratio is 1, PPO's gradient is REINFORCE's, and the tie of both arguments is no loss.
    assert torch.equal(*gradients) and (gradients[0] != 0).any()


def test_what_is_not_allowed_counts_for_nothing():
    logits, allowed, *rest = problem(64, 5)
    junk = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38], device=DEVICE)
    spoilt = torch.where(allowed, logits, junk).requires_grad_()
    plain = action_terms(logits, allowed, *rest, 0.2)
    ours = action_terms(spoilt, allowed, *rest, 0.2)
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()
    (gradient,) = torch.autograd.grad(sum(term.sum() for term in ours), spoilt)
    assert gradient.isfinite().all() and (gradient[~allowed] == 0).all()


def test_an_action_that_is_not_allowed_leaves_its_logit_alone():
    logits, _, action, *rest = problem(63, 4)
    allowed = torch.ones(63, 4, dtype=torch.bool, device=DEVICE).scatter_(1, action[:, None], False)
    logits.requires_grad_()
    found, expected = (
        of(logits, allowed, action, *rest, 0.2) for of in (action_terms, action_terms_reference)
    )
    assert (found[0] == -torch.inf).all() and (found[2] == 0).all()
    (ours,), (torchs,) = (
        torch.autograd.grad(terms[0].sum(), logits) for terms in (found, expected)
    )
    assert (ours[~allowed] == 0).all()
    torch.testing.assert_close(ours, torchs)


def test_one_allowed_action_is_certain_and_learns_nothing():
    logits, allowed, action, *_ = problem(63, 4)
    allowed = torch.zeros_like(allowed).scatter_(1, action[:, None], True)
    certain = torch.zeros(63, device=DEVICE)
    initial = masked_log_softmax(logits, allowed)
    logits.requires_grad_()
    terms = action_terms(logits, allowed, action, certain, certain + 2, initial, 0.2)
    for term, value in zip(terms, (0, 0, 1, -2, 0), strict=True):
        assert (term == value).all()
    (gradient,) = torch.autograd.grad(sum(term.sum() for term in terms), logits)
    assert (gradient == 0).all()


@pytest.mark.parametrize(("shift", "spread"), [(-1e6, 1.0), (1e6, 1.0), (0.0, 1e4)])
def test_extreme_logits(shift, spread):
    logits, allowed, action, _, advantage, initial = problem(63, 3, spread=spread)
    logits = logits + shift
    old = masked_log_softmax(logits.double(), allowed).gather(1, action[:, None])[:, 0] + 0.1
    gradient = check((logits, allowed, action, old.float(), advantage, initial), 0.2)
    assert gradient.isfinite().all()


def test_an_initial_policy_that_forbids_more_is_left_out_as_the_loss_does():
    logits, allowed, action, old, advantage, initial = problem(63, 4)
    initial = initial.masked_fill(torch.arange(4, device=DEVICE) == 2, -torch.inf)
    check((logits, allowed, action, old, advantage, initial), 0.2)


def test_any_leading_shape_and_memory_layout():
    inputs = problem(60, 3)
    plain = action_terms(*inputs, 0.2)
    turned = [x.reshape(4, 15, *x.shape[1:]).transpose(0, 1) for x in inputs]
    assert not any(x.is_contiguous() for x in turned)
    trained = turned[0].requires_grad_()
    ours = action_terms(*turned, 0.2)
    for one, other in zip(ours, plain, strict=True):
        assert one.shape == (15, 4) and torch.equal(one.T.flatten(), other)
    # The gradient of a sum is one number that is expanded.
    (gradient,) = torch.autograd.grad(ours[1].sum(), trained)
    logits = inputs[0].requires_grad_()
    (expected,) = torch.autograd.grad(action_terms(*inputs, 0.2)[1].sum(), logits)
    assert torch.equal(gradient.transpose(0, 1).flatten(0, 1), expected)


def test_no_samples_have_no_terms():
    inputs = [x[:0] for x in problem(3, 3)]
    logits = inputs[0].requires_grad_()
    terms = action_terms(*inputs, 0.2)
    assert all(term.shape == (0,) for term in terms)
    assert torch.autograd.grad(terms[0].sum(), logits)[0].shape == (0, 3)


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("masked", [True, False])
def test_they_are_well_formed_operators(masked, clip):
    logits, allowed, *rest = problem(5, 3)
    inputs = (logits.requires_grad_(), allowed if masked else None, *rest, clip)
    torch.library.opcheck(action_terms, inputs)
    upstream = [None, *rest[1:3], None, None]
    torch.library.opcheck(action_terms_backward, (logits.detach(), *inputs[1:], upstream))
