"""Generalised advantage estimation (arXiv 1506.02438, eq. 16), a scan from each row's last step:

    delta_t = r_t + gamma V(s_{t+1}) [not terminated] - V(s_t)
    A_t = delta_t + gamma lambda [neither terminated nor truncated] A_{t+1}

A step maps what follows it, x -> delta + decay x, and such maps compose: the steps of a row lie
across lanes, their maps are composed by a scan, and a row longer than a tile carries its advantage
to the next. Nothing is differentiated, advantages are data to the loss.

It moves 18 bytes a step. A warp's access to 32 steps touches 4 sectors of memory, 1 of flags; with
a row to a lane it would touch 32, one for each row, and a row's steps would wait for each other.
Compiled for sm_90, that loop has 48 instructions for 32 steps and the scan 124, but its 6 accesses
are 192 sectors and the scan's 18.
"""

import torch
from torch import Tensor

from fastflag.kernels.language import cdiv, jit, next_power_of_2, tl


@jit
def _compose(later_decay, later_delta, decay, delta):
    """x -> delta + decay (later_delta + later_decay x)"""
    # What lies behind an episode's end may be NaN.
    return decay * later_decay, delta + tl.where(decay == 0.0, 0.0, decay * later_delta)


@jit(do_not_specialize=["rows"])
def _scan_kernel(
    reward_ptr,  # [B, H], as all
    value_ptr,
    next_value_ptr,
    terminated_ptr,  # bool
    truncated_ptr,  # bool
    advantage_ptr,
    rows,
    steps,
    gamma,
    gamma_lambda,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, BLOCK)[None, :]
    following = tl.zeros([ROWS], tl.float32)
    # Steps are read last first and scanned forwards, because Triton's reversed scan is reported to
    # be wrong for such maps (triton-lang/triton#4362, open).
    for last in range(steps - 1, -1, -BLOCK):
        step = last - place
        offsets = row[:, None] * steps + step
        inside = (row < rows)[:, None] & (step >= 0)
        reward = tl.load(reward_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(value_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        next_value = tl.load(next_value_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        terminated = tl.load(terminated_ptr + offsets, mask=inside, other=True)
        truncated = tl.load(truncated_ptr + offsets, mask=inside, other=True)
        delta = reward + tl.where(terminated, 0.0, gamma * next_value) - value
        decay = tl.where(terminated | truncated, 0.0, gamma_lambda)
        decay, delta = tl.associative_scan((decay, delta), 1, _compose)
        advantage = delta + tl.where(decay == 0.0, 0.0, decay * following[:, None])
        tl.store(advantage_ptr + offsets, advantage, mask=inside)
        following = tl.sum(tl.where(place == BLOCK - 1, advantage, 0.0), axis=1)


@torch.library.custom_op("fastflag::generalised_advantage", mutates_args=())
def generalised_advantage(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """All [B, H], the last two bool -> [B, H] fp32.

    `next_value` is the value of the state a step led to, before any restart; that of a terminated
    step counts for nothing.
    """
    rows, steps = reward.shape
    columns = (reward, value, next_value, terminated, truncated)
    advantage = torch.empty(reward.shape, dtype=torch.float32, device=reward.device)
    tile = _tile(steps)
    _scan_kernel[(cdiv(rows, tile["ROWS"]),)](
        *(column.contiguous() for column in columns),
        advantage,
        rows,
        steps,
        gamma,
        gamma * gae_lambda,
        **tile,
    )
    return advantage


@generalised_advantage.register_fake
def _(reward, value, next_value, terminated, truncated, gamma, gae_lambda) -> Tensor:
    return torch.empty(reward.shape, dtype=torch.float32, device=reward.device)


def generalised_advantage_reference(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """The same in PyTorch, step by step; in fp64 where the rewards are."""
    wide = torch.promote_types(reward.dtype, torch.float32)
    reward, value, next_value = (column.to(wide) for column in (reward, value, next_value))
    delta = reward + torch.where(terminated, 0.0, gamma * next_value) - value
    ends = terminated | truncated
    advantage = torch.empty_like(delta)
    following = delta.new_zeros(len(delta))
    for step in reversed(range(delta.shape[1])):
        carried = torch.where(ends[:, step], 0.0, gamma * gae_lambda * following)
        following = delta[:, step] + carried
        advantage[:, step] = following
    return advantage


def _tile(steps: int) -> dict[str, int]:
    """512 steps to a program, of whole rows where they fit; twice as many take 149 registers on
    sm_90 instead of 72."""
    block = min(next_power_of_2(max(steps, 1)), 512)
    return {"ROWS": 512 // block, "BLOCK": block, "num_warps": 4}
