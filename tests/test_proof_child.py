"""Planted faults are found, and the prover's own code runs on small cases with the wall clock."""

import dataclasses
import time

import pytest
import torch
from torch.nn import functional

from fastflag.config import PlanConfig
from fastflag.model import ops
from fastflag.model.proof import cases as cases_module
from fastflag.model.proof import child
from fastflag.model.proof.cases import OPS, cases, fitting
from fastflag.model.proof.child import Request, prove_op
from fastflag.model.proof.devices import Cpu
from fastflag.model.proof.key import Subject
from fastflag.model.proof.layer import CHOSEN, LAYER
from fastflag.model.proof.verdicts import GRAPHS, Found

pytestmark = pytest.mark.usefixtures("one_thread")

SUBJECT = Subject(64, 96, 4, 2, 16, True, False, 3, "fp32", "nf4", "qlora", 4, 1)
BATCH = PlanConfig(days=3, texts=2, prefix_tokens=24, suffix_tokens=16)
ROWS = 3 * 2 * 16


def proved(op="swiglu", told=None, **changes):
    request = Request(SUBJECT, (op,), BATCH, "cpu", **{"replays": 3, "seconds": 0.1} | changes)
    return prove_op(op, request, Cpu(), told.append if told is not None else lambda _: None)


def right(gate, up):
    return functional.silu(gate) * up


def planted(monkeypatch, function, op="swiglu"):
    monkeypatch.setattr(getattr(ops, op), "_triton", function)


def test_there_are_cases_of_every_op_that_has_a_kernel():
    """Or may have one, by a package that is not here."""
    assert {*OPS} == {op.name for op in ops.OPS if op._triton or op._others is not dict}
    assert {*OPS} >= {op.name for op in ops.OPS if len(op.implementations) > 1}


def one_wrong_row(gate, up):
    """At an update's size alone."""
    kept = torch.ones(len(gate), 1)
    kept[7 if len(gate) == ROWS else len(gate) :] = 1
    if len(gate) == ROWS:
        kept[7] = 0
    return right(gate, up) * kept


def a_wrong_gradient(gate, up):
    return right(gate, up.detach()) + 1.01 * (up - up.detach()) * functional.silu(gate).detach()


class _Written(torch.autograd.Function):
    """SwiGLU as a kernel computes it: into memory that is handed out without values."""

    @staticmethod
    def forward(ctx, gate, up, store):
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        store(y, right(gate, up))
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        s = gate.sigmoid()
        return dy * up * s * (1 + gate * (1 - s)), dy * gate * s, None


def stored(store):
    return lambda gate, up: _Written.apply(gate, up, store)


def beyond(places):
    """All of it, and one number that many places beyond the end, or before the beginning."""

    def store(y, values):
        y.copy_(values)
        size = y.numel() * y.element_size()
        if y.untyped_storage().nbytes() > size:  # PyTorch's own memory ends there
            first = y.storage_offset() + (y.numel() - 1 if places > 0 else 0)
            torch.as_strided(y, (1,), (1,), first + places).zero_()

    return stored(store)


def without_the_last(y, values):
    y.flatten()[:-1] = values.flatten()[:-1]


def reads_beyond(gate, up):
    beyond = torch.as_strided(gate.detach(), (1,), (1,), gate.storage_offset() + gate.numel())
    return right(gate, up) + 0 * beyond


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (one_wrong_row, f"{ROWS} rows: output 0 is off by"),
        (a_wrong_gradient, "gradient of up"),
        (lambda gate, up: right(gate, up)[..., :-1], "[1, 95]"),
        (lambda gate, up: right(gate, up).half(), "float16"),
        (lambda gate, up: (right(gate, up), gate), "zip()"),
        (beyond(1), "stored outside"),
        (beyond(-1), "stored outside"),
        (beyond(3000), "stored outside"),
        (stored(without_the_last), "off by nan"),
        (reads_beyond, "off by nan"),
    ],
    ids=[
        *("one row", "gradient", "shape", "dtype", "another output", "past a mask", "before"),
        *("far past", "unwritten", "reads past"),
    ],
)
def test_what_is_wrong_is_found(monkeypatch, function, told):
    planted(monkeypatch, function)
    verdict = proved()
    found = verdict.found["triton"]
    assert found.outcome in ("wrong", "failed") and told in found.why
    assert verdict.launched == verdict.replayed == "torch"
    assert verdict.reason == f"triton {found.outcome}"
    assert verdict.found["torch"].outcome == "right"


def test_what_stores_where_it_should_is_right(monkeypatch):
    planted(monkeypatch, stored(lambda y, values: y.copy_(values)))
    assert proved().found["triton"].outcome == "right"


def test_a_bit_that_flips_at_replay_150_is_found(monkeypatch):
    passes = []

    def flips(gate, up):
        passes.append(len(gate))
        y = right(gate, up)
        if passes.count(ROWS) == 151:  # the first pass, then replays
            y[5, 5] += torch.finfo(torch.float32).eps * y[5, 5].detach()
        return y

    planted(monkeypatch, flips)
    found = proved(replays=200).found["triton"]
    assert found.outcome == "wrong"
    assert "1 of 200 replays have other bits, the first is 150" in found.why


def test_an_error_is_told_and_refuses_it(monkeypatch):
    def fails(gate, up):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    planted(monkeypatch, fails)
    found = proved().found["triton"]
    assert found.outcome == "failed"
    assert found.why == "1 rows: RuntimeError: Failed to find C compiler. Please specify via CC"


def test_a_lost_device_ends_the_child(monkeypatch):
    def faults(gate, up):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    planted(monkeypatch, faults)
    with pytest.raises(RuntimeError, match="illegal"):
        proved()
    assert not child.device_is_lost(RuntimeError("CUDA error: out of memory"))


def slowed(function, seconds=0.004):
    def slow(*arguments):
        time.sleep(seconds)
        return function(*arguments)

    return slow


def test_a_slower_one_is_not_taken(monkeypatch):
    planted(monkeypatch, slowed(right))
    verdict = proved()
    assert verdict.launched == verdict.replayed == "torch" and verdict.reason == "none is faster"
    assert verdict.found["triton"].device > 0.004 > verdict.found["torch"].device


def test_a_faster_one_is_taken(monkeypatch):
    planted(monkeypatch, right)
    monkeypatch.setattr(ops.swiglu, "_torchs", slowed(ops.swiglu._torchs))
    verdict = proved()
    assert verdict.launched == verdict.replayed == "triton"
    assert "times as fast" in verdict.reason
    assert verdict.found["triton"].error <= 2


def test_what_ended_a_child_is_not_tried_again(monkeypatch):
    planted(monkeypatch, lambda gate, up: pytest.fail("tried"))
    fault = Found("faulted", "died by SIGSEGV")
    verdict = proved(failed={"swiglu": {"triton": fault}})
    assert verdict.launched == "torch" and verdict.found["triton"] == fault
    assert verdict.reason == "triton faulted"


def test_what_ended_a_child_by_a_layer_or_graphs_is_not_tried_again():
    fault = Found("silent", "said nothing for 60 s")
    failed = {LAYER: {CHOSEN: fault}, GRAPHS: {"on": fault}}
    request = Request(SUBJECT, (LAYER, GRAPHS), BATCH, "cpu", failed=failed)
    told = []
    others = {op: lambda *_: pytest.fail("tried") for op in (LAYER, GRAPHS)}
    child.serve(request, told.append, others)
    verdicts = [one["verdict"] for one in told if "verdict" in one]
    assert [(one["launched"], one["replayed"]) for one in verdicts] == [
        ("torch", "torch"),
        ("off", "off"),
    ]
    assert [one["reason"] for one in verdicts] == ["chosen silent", "on silent"]


def test_what_it_begins_is_told_first(monkeypatch):
    told = []
    planted(monkeypatch, right)
    proved(told=told)
    assert told[:2] == [
        {"begin": "swiglu", "implementation": "torch", "case": "1 rows"},
        {"begin": "swiglu", "implementation": "triton", "case": "1 rows"},
    ]
    assert told[-1]["case"] == f"{ROWS} rows"


@pytest.fixture
def few_cases(monkeypatch):
    monkeypatch.setattr(cases_module, "FEW", (1, 63))


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("op", OPS)
def test_pytorchs_own_is_right_on_small_cases(op, monkeypatch):
    """Judged as if it were a kernel, with gradients, whole numbers, and beside the wall clock."""
    planted(monkeypatch, getattr(ops, op)._torchs, op)
    verdict = proved(op)
    assert verdict.found["triton"].outcome == "right", verdict.found["triton"].why
    assert verdict.found["triton"].error <= 1.0 + 1e-9 or op == "rotate"
    assert verdict.found["torch"].device > 0


@pytest.mark.parametrize("op", ["add_rms_norm", "action_terms"])
def test_a_kernel_is_right_on_small_cases(op):
    """In Triton's interpreter; tests/test_kernels_*.py have the others."""
    pytest.importorskip("triton")
    verdict = proved(op, replays=1)
    assert verdict.found["triton"].outcome == "right", verdict.found["triton"].why


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("adaptation", ["lora", "qlora"])
def test_every_kernel_is_right_on_small_cases(op, adaptation):
    pytest.importorskip("triton")
    subject = dataclasses.replace(SUBJECT, adaptation=adaptation)
    request = Request(subject, (op,), BATCH, "cpu", replays=1, seconds=0.1)
    assert prove_op(op, request, Cpu(), lambda _: None).found["triton"].outcome == "right"


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("op", ["nf4_linear", "lora_linear", "rotate", "prefix_attention"])
def test_whole_numbers_stay_small(op):
    """So that bf16 holds them: bit for bit means something."""
    wide = Subject(512, 1536, 8, 2, 64, False, False, 3, "fp32", "nf4", "lora", 16, 2)
    for case in cases(op, wide, PlanConfig(2, 2, 40, 16), torch.device("cpu")):
        if case.whole:
            wide_numbers = {
                name: x.double() if x.is_floating_point() else x for name, x in case.tensors.items()
            }
            for output in case.outputs(case.exact, wide_numbers):
                assert 0 < float(output.abs().max()) <= 256
                assert float((output - output.round()).abs().max()) < 2.0**-126


def test_a_batch_fits_the_memory():
    assert fitting(BATCH, SUBJECT, 10**12) == BATCH
    small = fitting(PlanConfig(), SUBJECT, 10**7)
    assert 1 <= small.days < PlanConfig().days
    assert fitting(PlanConfig(), SUBJECT, 1).days == 1
