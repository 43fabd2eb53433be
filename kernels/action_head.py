"""The action head's terms: all that a policy-gradient loss asks of a sample's few actions.

Of logits z over the allowed actions, with q the initial policy, b the action that was taken, A its
advantage and o its log-probability then:

    p = softmax(z)                      log_probability = log p_b
    ratio = exp(log p_b - o)            entropy    H = -sum p log p
    surrogate = max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip))      (arXiv 1707.06347, eq. 7)
    divergence = KL(p || q) = sum p (log p - log q)

Backward, with dX for the gradient of X:

    c = dlog_probability + ratio dratio - A ratio dsurrogate [the surrogate moves]
    s = ddivergence (log p - log q) - dentropy log p
    dz = c onehot(b) + p (s - sum(p s) - c)
    dlog p = c onehot(b) + p (s + ddivergence - dentropy)       where log p is given instead of z

PyTorch takes 25 launches forward and 36 backward, on [N, A] numbers with A as small as 3. Here it
is one each. Only the forward's inputs are kept, and the backward pass recomputes the rest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastflag.kernels.compiler import launching
from fastflag.kernels.language import cdiv, jit, next_power_of_2, tl

Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@jit
def _policy(logits_ptr, allowed_ptr, offsets, inside, real):
    """p and log p, 0 and -inf where not allowed. In padding rows every action is allowed."""
    logits = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if allowed_ptr is None:
        log_p = tl.where(real, logits, -float("inf"))
        p = tl.exp(log_p)
    else:
        allowed = real & tl.load(allowed_ptr + offsets, mask=inside, other=True)
        logits = tl.where(allowed, logits, -float("inf"))
        logits -= tl.max(logits, axis=1)[:, None]
        p = tl.exp(logits)
        total = tl.sum(p, axis=1)[:, None]
        log_p = logits - tl.log(total)
        p = p / total
    return p, log_p


@jit
def _taken(log_p, column, action_ptr, old_ptr, row, here):
    """Which action was taken, its log-probability and ratio."""
    chosen = column == tl.load(action_ptr + row, mask=here, other=0)[:, None]
    log_probability = tl.sum(tl.where(chosen, log_p, 0.0), axis=1)
    old = tl.load(old_ptr + row, mask=here, other=0.0).to(tl.float32)
    return chosen, log_probability, tl.exp(log_probability - old)


@jit
def _surrogates(ratio, advantage, lower, upper):
    """PPO's surrogate without and with the clip. Both are rounded as in PyTorch, so that they are
    equal where PyTorch's are."""
    return -advantage * ratio, -advantage * tl.minimum(tl.maximum(ratio, lower), upper)


@jit
def _upstream(gradient_ptr, row, here):
    """An output's gradient; 0 where the loss does not depend on it."""
    gradient = tl.zeros(row.shape, tl.float32)
    if gradient_ptr is not None:
        gradient = tl.load(gradient_ptr + row, mask=here, other=0.0).to(tl.float32)
    return gradient


@jit(do_not_specialize=["rows"])
def _forward_kernel(
    logits_ptr,  # [N, A]
    allowed_ptr,  # [N, A] bool, or None
    action_ptr,  # [N] int64
    old_ptr,  # [N]
    advantage_ptr,  # [N]
    initial_ptr,  # [N, A]
    lower,
    upper,
    log_probability_ptr,  # [N], as the next four
    entropy_ptr,
    ratio_ptr,
    surrogate_ptr,
    divergence_ptr,
    rows,
    ACTIONS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    here, real = row < rows, column < ACTIONS
    offsets, inside = row[:, None] * ACTIONS + column, here[:, None] & real
    p, log_p = _policy(logits_ptr, allowed_ptr, offsets, inside, real)
    _, log_probability, ratio = _taken(log_p, column, action_ptr, old_ptr, row, here)
    tl.store(log_probability_ptr + row, log_probability, mask=here)
    tl.store(ratio_ptr + row, ratio, mask=here)
    advantage = tl.load(advantage_ptr + row, mask=here, other=0.0).to(tl.float32)
    if lower is None:
        surrogate = -advantage * log_probability
    else:
        free, clipped = _surrogates(ratio, advantage, lower, upper)
        surrogate = tl.where(clipped > free, clipped, free)
    tl.store(surrogate_ptr + row, surrogate, mask=here)
    finite = tl.where(log_p > -float("inf"), log_p, 0.0)
    tl.store(entropy_ptr + row, -tl.sum(p * finite, axis=1), mask=here)
    initial = tl.load(initial_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    difference = tl.where(initial > -float("inf"), finite - initial, 0.0)
    tl.store(divergence_ptr + row, tl.sum(p * difference, axis=1), mask=here)


@jit(do_not_specialize=["rows"])
def _backward_kernel(
    logits_ptr,  # [N, A]
    allowed_ptr,  # [N, A] bool, or None
    action_ptr,  # [N] int64
    old_ptr,  # [N]
    advantage_ptr,  # [N]
    initial_ptr,  # [N, A]
    lower,
    upper,
    dlog_probability_ptr,  # [N] or None, as the next four
    dentropy_ptr,
    dratio_ptr,
    dsurrogate_ptr,
    ddivergence_ptr,
    dlogits_ptr,  # [N, A]
    rows,
    ACTIONS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    here, real = row < rows, column < ACTIONS
    offsets, inside = row[:, None] * ACTIONS + column, here[:, None] & real
    p, log_p = _policy(logits_ptr, allowed_ptr, offsets, inside, real)
    chosen, _, ratio = _taken(log_p, column, action_ptr, old_ptr, row, here)
    advantage = tl.load(advantage_ptr + row, mask=here, other=0.0).to(tl.float32)
    if lower is None:
        moving = tl.full(row.shape, 1.0, tl.float32)
    else:
        # As in torch.max, equal arguments get half the gradient each. As in clamp, a ratio on a
        # bound gets all of it.
        free, clipped = _surrogates(ratio, advantage, lower, upper)
        held = (ratio < lower) | (ratio > upper)
        moving = tl.where(held & (free == clipped), 0.5 * ratio, ratio)
        moving = tl.where(free < clipped, 0.0, moving)
    dchosen = _upstream(dlog_probability_ptr, row, here)
    dchosen += _upstream(dratio_ptr, row, here) * ratio
    dchosen -= _upstream(dsurrogate_ptr, row, here) * advantage * moving
    possible = log_p > -float("inf")
    finite = tl.where(possible, log_p, 0.0)
    initial = tl.load(initial_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    # d(p log p) / dlog p = p (log p + 1). The ones cancel over the actions, and actions that the
    # divergence leaves out have none.
    difference = tl.where(initial > -float("inf"), finite - initial, -1.0)
    dentropy = _upstream(dentropy_ptr, row, here)[:, None]
    ddivergence = _upstream(ddivergence_ptr, row, here)[:, None]
    slope = ddivergence * difference - dentropy * finite
    if allowed_ptr is None:
        slope += ddivergence - dentropy
    else:
        slope -= tl.sum(p * slope, axis=1)[:, None] + dchosen[:, None]
    dlogits = tl.where(possible, p * slope + tl.where(chosen, dchosen[:, None], 0.0), 0.0)
    tl.store(dlogits_ptr + offsets, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("fastflag::action_terms", mutates_args=())
def action_terms(
    logits: Tensor,
    allowed: Tensor | None,
    action: Tensor,
    old_log_probability: Tensor,
    advantage: Tensor,
    initial: Tensor,
    clip: float | None,
) -> Terms:
    """(log_probability, entropy, ratio, surrogate, divergence), each [...] fp32; nats.

    logits [..., A] and allowed [..., A] bool. With None for `allowed`, `logits` are
    log-probabilities, -inf where not allowed, and are used unchanged: a ratio to the same numbers
    is exactly 1. action [...] int64; old_log_probability and advantage [...]; initial [..., A]
    log-probabilities of the initial policy, -inf where not allowed. With None for `clip`, the
    surrogate is REINFORCE's, -advantage log_probability. Only `logits` gets a gradient, 0 where not
    allowed.
    """
    terms = _empty_terms(action)
    inputs = (logits, allowed, action, old_log_probability, advantage, initial)
    _launch(_forward_kernel, inputs, clip, *terms)
    return terms


@action_terms.register_fake
def _(logits, allowed, action, old_log_probability, advantage, initial, clip) -> Terms:
    return _empty_terms(action)


@torch.library.custom_op("fastflag::action_terms_backward", mutates_args=())
def action_terms_backward(
    logits: Tensor,
    allowed: Tensor | None,
    action: Tensor,
    old_log_probability: Tensor,
    advantage: Tensor,
    initial: Tensor,
    clip: float | None,
    gradients: Sequence[Tensor | None],
) -> Tensor:
    """The gradient for logits, [..., A], from those of the terms; None is 0."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    inputs = (logits, allowed, action, old_log_probability, advantage, initial)
    upstream = (gradient if gradient is None else gradient.contiguous() for gradient in gradients)
    _launch(_backward_kernel, inputs, clip, *upstream, dlogits)
    return dlogits


@action_terms_backward.register_fake
def _(logits, allowed, action, old_log_probability, advantage, initial, clip, gradients) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.clip = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    dlogits = action_terms_backward(*ctx.saved_tensors, ctx.clip, gradients)
    return dlogits, *[None] * 6


action_terms.register_autograd(_differentiate, setup_context=_save)


def action_terms_reference(
    logits: Tensor,
    allowed: Tensor | None,
    action: Tensor,
    old_log_probability: Tensor,
    advantage: Tensor,
    initial: Tensor,
    clip: float | None,
) -> Terms:
    """The same in PyTorch; in fp64 where the logits are."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if allowed is not None:
        log_p = log_p.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    p, impossible = log_p.exp(), log_p.isinf()
    log_probability = log_p.gather(-1, action[..., None])[..., 0]
    entropy = -(p * log_p.masked_fill(impossible, 0.0)).sum(-1)
    ratio = (log_probability - old_log_probability).exp()
    if clip is None:
        surrogate = -advantage * log_probability
    else:
        clipped = ratio.clamp(1 - clip, 1 + clip)
        surrogate = torch.max(-advantage * ratio, -advantage * clipped)
    difference = (log_p - initial).masked_fill(impossible | initial.isinf(), 0.0)
    return log_probability, entropy, ratio, surrogate, (p * difference).sum(-1)


def _empty_terms(action: Tensor) -> Terms:
    like = {"dtype": torch.float32, "device": action.device}
    return tuple(torch.empty(action.shape, **like) for _ in range(5))


def _launch(kernel, inputs: Sequence[Tensor | None], clip: float | None, *rest) -> None:
    """A program has 256 numbers, a lane two. There are only thousands of samples, so the time is
    that of a launch and of one program. With four numbers a lane, a program has half as many
    instructions again, and barriers."""
    logits, _, action, *_ = inputs
    contiguous = (tensor if tensor is None else tensor.contiguous() for tensor in inputs)
    bounds = (None, None) if clip is None else (1 - clip, 1 + clip)
    count, actions = action.numel(), logits.shape[-1]
    block = next_power_of_2(actions)
    rows = 256 // block
    tile = {"ACTIONS": actions, "ROWS": rows, "BLOCK": block, "num_warps": 4}
    with launching(logits):
        kernel[(cdiv(count, rows),)](*contiguous, *bounds, *rest, count, **tile)
