"""Which implementation an op takes, and that what it says is what it does."""

import pytest
import torch

from fastflag.files import InputError
from fastflag.kernels import compiler
from fastflag.model import ops
from fastflag.model.ops import Op
from fastflag.policy import graphs

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def hopper(monkeypatch):
    """As if there were an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("FASTFLAG_KERNELS", raising=False)
    monkeypatch.delenv("FASTFLAG_GRAPHS", raising=False)


def test_a_gpu_takes_kernels_with_evidence_for_its_kind_alone(hopper, monkeypatch):
    choice = ops.swiglu.choice(GPU)
    assert (choice.implementation, choice.evidence) == ("torch", "none")
    assert "sm_90" in choice.reason and "bench.gpu" in choice.reason
    monkeypatch.setitem(ops._PROVEN, "swiglu", {80: "1.2 x, A100"})
    assert ops.swiglu.choice(GPU).implementation == "torch"
    monkeypatch.setitem(ops._PROVEN, "swiglu", {90: "1.4 x, H100"})
    choice = ops.swiglu.choice(GPU)
    assert (choice.implementation, choice.evidence) == ("triton", "1.4 x, H100")
    assert ops.rms_norm.choice(GPU).implementation == "torch"
    assert ops.swiglu.choice(CPU).implementation == "torch"


def test_the_environment_decides_against_the_evidence(hopper, monkeypatch):
    monkeypatch.setitem(ops._PROVEN, "swiglu", {90: "1.4 x, H100"})
    monkeypatch.setenv("FASTFLAG_KERNELS", "torch")
    assert ops.swiglu.choice(GPU).implementation == "torch"
    monkeypatch.setenv("FASTFLAG_KERNELS", "triton")
    assert ops.rms_norm.choice(GPU).implementation == "triton"
    assert ops.rms_norm.choice(GPU).evidence == "none"
    monkeypatch.setenv("FASTFLAG_KERNELS", "fast")
    with pytest.raises(InputError, match="fast is not auto, triton"):
        ops.rms_norm.choice(GPU)


def test_the_environment_names_ops(hopper, monkeypatch):
    monkeypatch.setitem(ops._PROVEN, "rotate", {90: "1.4 x, H100"})
    monkeypatch.setenv("FASTFLAG_KERNELS", "triton:rms_norm,swiglu")
    taken = {op.name for op in ops.OPS if op.choice(GPU).implementation == "triton"}
    assert taken == {"rms_norm", "swiglu"}
    assert ops.rotate.choice(GPU).reason == "FASTFLAG_KERNELS=triton:rms_norm,swiglu"
    for words in ("triton:", "triton:rms_norm,norm", "torch:rms_norm", "auto:rms_norm"):
        monkeypatch.setenv("FASTFLAG_KERNELS", words)
        with pytest.raises(InputError, match="FASTFLAG_KERNELS"):
            ops.rms_norm.choice(GPU)


def test_older_gpus_take_no_kernel_with_a_matrix_product(hopper, monkeypatch):
    monkeypatch.setenv("FASTFLAG_KERNELS", "triton")
    for capability, refused in (
        ((7, 5), {"nf4_linear", "lora_linear", "prefix_attention"}),
        ((8, 0), set()),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        choices = {op.name: op.choice(GPU) for op in ops.OPS if op._triton}
        told = {name: c.reason for name, c in choices.items() if c.implementation != "triton"}
        assert {*told} == refused
        assert all("sm_75, only from sm_80 on" in reason for reason in told.values())


def test_without_triton_there_is_pytorch(hopper, monkeypatch):
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


def test_graphs_want_evidence_too(hopper, monkeypatch):
    assert graphs.choice(GPU).implementation == "off"
    monkeypatch.setitem(graphs._PROVEN, 90, "3 x, H100")
    assert graphs.choice(GPU) == ops.Choice("on", "faster on sm_90", "3 x, H100")
    monkeypatch.setenv("FASTFLAG_GRAPHS", "off")
    assert graphs.choice(GPU).implementation == "off"


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
