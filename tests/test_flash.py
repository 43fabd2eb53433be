"""flash-attn's form of prefix attention, by a stand-in for its function, beside the formula."""

import sys
from types import ModuleType

import pytest
import torch

from fastflag.config import PlanConfig
from fastflag.model import flash, ops
from fastflag.model.proof.cases import cases
from fastflag.model.proof.devices import Cpu
from fastflag.model.proof.key import Subject
from fastflag.model.proof.trial import Trial

SUBJECT = Subject(64, 96, 4, 2, 16, True, False, 3, "fp32", "nf4", "qlora", 4, 1)


def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, causal, deterministic):
    """What flash_attn_varlen_func is documented to do, sequence by sequence: with a causal mask the
    last query sees the last key."""
    assert causal and deterministic and starts_q.dtype == starts_k.dtype == torch.int32
    made = []
    for (a, b), (c, d) in zip(
        zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True),
        zip(starts_k[:-1].tolist(), starts_k[1:].tolist(), strict=True),
        strict=True,
    ):
        assert b - a <= longest_q and d - c <= longest_k
        share = q.shape[1] // k.shape[1]
        keys, values = (side[c:d].repeat_interleave(share, 1) for side in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q[a:b], keys) * q.shape[-1] ** -0.5
        hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(1 + (d - c) - (b - a))
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        made.append(torch.einsum("hqk,khe->qhe", probabilities, values))
    return torch.cat(made)


@pytest.fixture
def installed(monkeypatch):
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    flash.varlen.cache_clear()
    yield package
    flash.varlen.cache_clear()


def test_it_is_right(installed):
    batch = PlanConfig(days=3, texts=2, prefix_tokens=24, suffix_tokens=16)
    assert list(ops.prefix_attention.implementations)[-1] == "flash-attn"
    form = ops.prefix_attention.implementations["flash-attn"]
    for case in cases("prefix_attention", SUBJECT, batch, torch.device("cpu")):
        trial = Trial(case, ops.prefix_attention.implementations["torch"], Cpu())
        assert trial.judged(form, replays=1).why == ""


def test_the_package_without_the_function_is_none(installed, monkeypatch):
    monkeypatch.delattr(installed, "flash_attn_varlen_func")
    flash.varlen.cache_clear()
    assert "flash-attn" not in ops.prefix_attention.implementations


def test_without_the_package():
    flash.varlen.cache_clear()
    assert flash.varlen() is None or callable(flash.varlen())
    if flash.varlen() is None:
        assert "flash-attn" not in ops.prefix_attention.implementations
