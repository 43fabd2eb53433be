"""flash-attn's forms of attention, by stand-ins for its functions, beside the formula."""

import sys
from types import ModuleType

import pytest
import torch

from fastflag.config import PlanConfig
from fastflag.model import flash, ops
from fastflag.model.proof import exact, maker
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


def causal(gives):
    """What flash_attn_func is documented to do, [N, T, H, E]; versions 3 and 4 give more."""

    def flash_attn_func(q, k, v, causal, deterministic):
        assert causal and deterministic
        share = q.shape[2] // k.shape[2]
        keys, values = (side.repeat_interleave(share, 2) for side in (k, v))
        scores = torch.einsum("nqhe,nkhe->nhqk", q, keys) * q.shape[-1] ** -0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return gives(torch.einsum("nhqk,nkhe->nqhe", probabilities, values))

    return flash_attn_func


@pytest.fixture
def installed(monkeypatch):
    package, third, fourth = map(ModuleType, ("flash_attn", "flash_attn_interface", "cute"))
    package.flash_attn_varlen_func = varlen
    package.flash_attn_func = third.flash_attn_func = causal(lambda made: made)
    package.cute, fourth.flash_attn_func = fourth, causal(lambda made: (made, None))
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", third)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", fourth)
    flash.symbol.cache_clear()
    yield package
    flash.symbol.cache_clear()


BATCH = PlanConfig(days=3, texts=2, prefix_tokens=24, suffix_tokens=16)


def judged(op, wanted=lambda case: True, memory=0):
    """The packages' forms, each judged on the cases wanted, which are named."""
    forms, told = op.implementations, []
    torchs = forms.pop("torch")
    forms.pop("triton", None)
    for case in filter(wanted, cases(op.name, SUBJECT, BATCH, torch.device("cpu"), memory)):
        trial = Trial(case, torchs, Cpu())
        for name, form in forms.items():
            assert trial.judged(form, replays=1).why == "", (name, case.what)
        told.append((case.what, case.timed))
    return list(forms), told


def test_prefix_attention_is_right(installed):
    assert judged(ops.prefix_attention)[0] == ["flash-attn"]


def test_causal_attention_is_right(installed):
    forms, told = judged(ops.causal_attention)
    assert forms == ["flash-attn", "flash-attn-3", "flash-attn-4"]
    assert ("24 tokens, 96 rows", True) in told and ("63 tokens, 63 rows", False) in told


@pytest.mark.parametrize("op", [ops.causal_attention, ops.prefix_attention])
def test_long_prefixes_are_tried_where_there_is_room_and_are_not_timed(op, monkeypatch):
    monkeypatch.setattr(maker, "_LONG", (40, 600))
    of_token = 12 * 16 * 8 * 12  # bytes of a token's exact results: heads, numbers, fp64, tensors
    for most, there in ((39, ""), (40, "40"), (599, "40"), (600, "40 600")):
        memory = 2 * most * of_token
        made = [*cases(op.name, SUBJECT, BATCH, torch.device("cpu"), memory)]
        long = {n for n in ("40", "600") for one in made if n in one.what.split(",")[0].split()}
        assert long == {*there.split()}
        assert not any(one.timed for one in made if long & {*one.what.replace(",", "").split()})


def test_a_long_prefix_is_judged_part_by_part(installed, monkeypatch):
    """Of more queries than the exact form takes at once."""
    monkeypatch.setattr(maker, "_LONG", (40,))
    monkeypatch.setattr(exact, "_QUERIES", 16)
    forms, told = judged(ops.causal_attention, lambda case: "40 tokens" in case.what, 2**30)
    assert len(forms) == 3 and told == [("40 tokens, 96 rows", False)]


def test_what_the_proof_must_find(installed, monkeypatch):
    """A mask that lets a token see the next one."""
    triu = torch.Tensor.triu
    monkeypatch.setattr(torch.Tensor, "triu", lambda mask, _: triu(mask, 2))
    made = [*cases("causal_attention", SUBJECT, BATCH, torch.device("cpu"))][-1]
    trial = Trial(made, ops.causal_attention.implementations["torch"], Cpu())
    assert trial.judged(ops.causal_attention.implementations["flash-attn"], 1).why


def test_a_choice_of_it_is_taken_on_a_gpu_alone(installed, monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    op = ops.causal_attention
    assert "not proved" in op.choice(cuda).reason
    monkeypatch.setitem(ops._settled, op.name, ops.Choice("flash-attn-4", "faster"))
    assert op.choice(cuda).implementation == "flash-attn-4"
    assert op.choice(cpu).implementation.startswith("torch")
    monkeypatch.setenv("FASTFLAG_KERNELS", "triton")  # of which it has none
    assert op.choice(cuda).implementation == "flash-attn-4"
    monkeypatch.setenv("FASTFLAG_KERNELS", "torch")
    assert op.choice(cuda).implementation.startswith("torch")


def test_a_package_without_the_function_is_none(installed, monkeypatch):
    monkeypatch.delattr(installed, "flash_attn_varlen_func")
    monkeypatch.delattr(installed, "flash_attn_func")
    flash.symbol.cache_clear()
    assert "flash-attn" not in ops.prefix_attention.implementations
    assert [*ops.causal_attention.implementations] == ["torch", "flash-attn-3", "flash-attn-4"]


def test_without_the_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # an import of it fails
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    flash.symbol.cache_clear()
    try:
        assert [*ops.causal_attention.implementations] == ["torch"]
        assert "flash-attn" not in ops.prefix_attention.implementations
        assert "the one there is" in ops.causal_attention.choice(torch.device("cuda")).reason
    finally:
        flash.symbol.cache_clear()
