"""Which implementation an op takes, and that what it says is what it does."""

from types import SimpleNamespace

import pytest
import torch

from fastflag.files import InputError
from fastflag.kernels import compiler
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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(ops, "unusable", lambda device: "")
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
    with pytest.raises(InputError, match="fast is not auto, triton"):
        ops.rms_norm.choice(GPU)
    monkeypatch.setenv("FASTFLAG_KERNELS", "auto")
    assert ops.left_open()


def test_the_environment_names_ops(gpu, monkeypatch):
    ops.settle({"rotate": TAKEN})
    monkeypatch.setenv("FASTFLAG_KERNELS", "triton:rms_norm,swiglu")
    taken = {op.name for op in ops.OPS if op.choice(GPU).implementation == "triton"}
    assert taken == {"rms_norm", "swiglu"}
    assert ops.rotate.choice(GPU).reason == "FASTFLAG_KERNELS=triton:rms_norm,swiglu"
    for words in ("triton:", "triton:rms_norm,norm", "torch:rms_norm", "auto:rms_norm"):
        monkeypatch.setenv("FASTFLAG_KERNELS", words)
        with pytest.raises(InputError, match="FASTFLAG_KERNELS"):
            ops.rms_norm.choice(GPU)


@pytest.mark.parametrize("asked", ["triton", "auto"])
def test_older_gpus_take_no_kernel_with_a_matrix_product(gpu, monkeypatch, asked):
    """Whatever was settled, as by a run that goes on where it did not begin."""
    monkeypatch.setenv("FASTFLAG_KERNELS", asked)
    ops.settle({op.name: TAKEN for op in ops.OPS})
    for capability, refused in (
        ((7, 5), {"nf4_linear", "lora_linear", "prefix_attention"}),
        ((8, 0), set()),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        choices = {op.name: op.choice(GPU) for op in ops.OPS if op._triton}
        told = {name: c.reason for name, c in choices.items() if c.implementation != "triton"}
        assert {*told} == refused
        assert all("sm_75, only from sm_80 on" in reason for reason in told.values())
        candidates = {op.name for op in ops.OPS if "triton" in op.candidates(GPU)}
        assert candidates == {*choices} - refused


def test_without_triton_there_is_pytorch(gpu, monkeypatch):
    monkeypatch.setattr(ops, "unusable", lambda device: "Triton is not installed")
    choice = ops.rms_norm.choice(GPU)
    assert (choice.implementation, choice.reason) == ("torch", "Triton is not installed")
    monkeypatch.setenv("FASTFLAG_KERNELS", "triton")
    with pytest.raises(InputError, match="Triton is not installed"):
        ops.rms_norm.choice(GPU)


def test_kernels_are_not_asked_for_in_vain(monkeypatch):
    monkeypatch.setenv("FASTFLAG_KERNELS", "triton")
    monkeypatch.setattr(compiler, "interpreted", lambda: False)
    compiler.unusable.cache_clear()
    with pytest.raises(InputError, match=r"there is no GPU.*TRITON_INTERPRET=1"):
        ops.rms_norm.choice(CPU)
    monkeypatch.undo()
    compiler.unusable.cache_clear()
    monkeypatch.setenv("FASTFLAG_KERNELS", "triton")
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
