"""Which implementation an op takes, and that what it says is what it does."""

from types import SimpleNamespace

import pytest
import torch

from fastflag.files import InputError
from fastflag.model import ops
from fastflag.model.ops import Choice, Op
from fastflag.policy import graphs

GPU, CPU = torch.device("cuda"), torch.device("cpu")


TAKEN = Choice("triton", "1.4 times as fast", "triton 12 us; 2026-11-29")


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one, and nothing settled before or after."""
    monkeypatch.delenv("FASTFLAG_KERNELS", raising=False)
    monkeypatch.delenv("FASTFLAG_GRAPHS", raising=False)
    ops.settle({})
    yield
    ops.settle({})


def test_a_gpu_takes_what_is_settled(gpu):
    choice = ops.swiglu.choice(GPU)
    assert (choice.implementation, choice.evidence) == ("torch", "none")
    assert choice.reason == "not proved: `fastflag doctor --prove` does it"
    ops.settle({"swiglu": TAKEN, "lora_linear": Choice("torch", "none is faster", "figures")})
    assert ops.swiglu.choice(GPU) == TAKEN
    # Its own name for PyTorch's way.
    told = Choice("torch, product by product", "none is faster", "figures")
    assert ops.lora_linear.choice(GPU) == told
    assert ops.rms_norm.choice(GPU).implementation == "torch"
    assert ops.swiglu.choice(CPU).implementation == "torch"
    ops.settle({})
    assert ops.swiglu.choice(GPU).implementation == "torch"


def test_what_is_settled_is_called(gpu, monkeypatch):
    op = Op("added", lambda x: "torch", lambda x: "triton")
    monkeypatch.setattr(ops, "OPS", (*ops.OPS, op))
    x = SimpleNamespace(device=GPU)
    assert op(x) == "torch"
    ops.settle({"added": TAKEN})
    assert op(x) == "triton"
    op.take(GPU, "torch")
    assert op(x) == "torch"
    ops.settle({})
    assert op(x) == "torch"


def test_the_environment_decides_against_what_is_settled(gpu, monkeypatch):
    ops.settle({"swiglu": TAKEN})
    monkeypatch.setenv("FASTFLAG_KERNELS", "torch")
    assert ops.swiglu.choice(GPU).implementation == "torch" and not ops.left_open()
    monkeypatch.setenv("FASTFLAG_KERNELS", "triton")
    assert ops.rms_norm.choice(GPU).implementation == "triton"
    assert ops.rms_norm.choice(GPU).evidence == "none"
    monkeypatch.setenv("FASTFLAG_KERNELS", "fast")
    with pytest.raises(InputError, match="not auto, triton or torch"):
        ops.rms_norm.choice(GPU)
    monkeypatch.setenv("FASTFLAG_KERNELS", "auto")
    assert ops.left_open()


def test_without_triton_there_is_pytorch(gpu, monkeypatch):
    monkeypatch.setattr(ops, "HAS_TRITON", False)
    choice = ops.rms_norm.choice(GPU)
    assert (choice.implementation, choice.reason) == ("torch", "Triton is not installed")
    monkeypatch.setenv("FASTFLAG_KERNELS", "triton")
    with pytest.raises(InputError, match="Triton is not installed"):
        ops.rms_norm.choice(GPU)


def test_kernels_are_not_asked_for_in_vain(monkeypatch):
    monkeypatch.setenv("FASTFLAG_KERNELS", "triton")
    monkeypatch.setattr(ops, "interpreted", lambda: False)
    with pytest.raises(InputError, match="there is no GPU"):
        ops.rms_norm.choice(CPU)
    monkeypatch.setattr(ops, "interpreted", lambda: True)
    assert ops.rms_norm.choice(CPU).implementation == "triton"


def test_graphs_want_evidence_too(gpu, monkeypatch):
    assert graphs.choice(GPU).implementation == "off"
    found = Choice("on", "an update is 3.00 times as fast", "on 2 ms")
    assert graphs.choice(GPU, found) == found
    assert graphs.choice(CPU, found).implementation == "off"
    monkeypatch.setenv("FASTFLAG_GRAPHS", "off")
    assert graphs.choice(GPU, found) == Choice("off", "FASTFLAG_GRAPHS=off", "on 2 ms")


def test_what_is_chosen_is_called(monkeypatch):
    op = Op("added", lambda x, y: ("torch", y), lambda x, y: ("triton", y))
    monkeypatch.setenv("FASTFLAG_KERNELS", "torch")
    assert op(torch.zeros(1), 2) == ("torch", 2)
    monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.setattr(op, "choice", lambda device: ops.Choice("triton", "asked"))
    assert op(torch.zeros(1), 2) == ("triton", 2)


def test_every_op_says_what_it_is():
    names = [op.name for op in ops.OPS]
    assert len(set(names)) == len(names)
    assert all(getattr(ops, op.name) is op for op in ops.OPS)
