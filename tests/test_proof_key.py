"""A verdict holds for one model, one GPU, one set of libraries and sources: all of it names it."""

import dataclasses
import os
import shutil
from importlib import metadata

import pytest
import torch

from fastflag.config import PolicyConfig
from fastflag.model import ops
from fastflag.model.proof import key as key_module
from fastflag.model.proof.gpu import Gpu, first
from fastflag.model.proof.key import Subject, Surroundings, key
from fastflag.model.weights import open_config

GPU = Gpu("NVIDIA H100", "00ff", "9.0", 132, 85_000_000_000, "580.65.06")
SUBJECT = Subject(576, 1536, 9, 3, 64, False, False, 3, "bf16", "nf4", "lora", 8, 2)


@pytest.fixture(autouse=True)
def versions_are_read_anew():
    key_module._version.cache_clear()
    yield
    key_module._version.cache_clear()


def other(value):
    return not value if isinstance(value, bool) else value + (1 if isinstance(value, int) else "x")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Subject)])
def test_another_model_is_another_key(name):
    changed = dataclasses.replace(SUBJECT, **{name: other(getattr(SUBJECT, name))})
    surroundings = Surroundings.of(GPU)
    assert key("swiglu", changed, surroundings) != key("swiglu", SUBJECT, surroundings)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Surroundings)])
def test_other_surroundings_are_another_key(name):
    surroundings = Surroundings.of(GPU)
    changed = dataclasses.replace(surroundings, **{name: other(getattr(surroundings, name))})
    assert key("swiglu", SUBJECT, changed) != key("swiglu", SUBJECT, surroundings)


def test_each_op_has_its_own():
    surroundings = Surroundings.of(GPU)
    assert len({key(op.name, SUBJECT, surroundings) for op in ops.OPS}) == len(ops.OPS)


def _set_flag(name):
    """PyTorch's flags are no attributes that a patch could put back."""
    products = torch.backends.cuda.matmul
    flags = {flag: getattr(products, flag) for flag in dir(_Products) if flag.startswith("allow")}
    flags[name] = not flags[name]
    return lambda patch, folder: patch.setattr(torch.backends.cuda, "matmul", _Products(flags))


class _Products:
    allow_tf32 = allow_fp16_reduced_precision_reduction = False
    allow_bf16_reduced_precision_reduction = False

    def __init__(self, flags):
        vars(self).update(flags)


def _set_version(package):
    def act(patch, folder):
        real = metadata.version

        def version(name):
            return "99.0" if name == package else real(name)

        patch.setattr(key_module, "version", version)

    return act


def _other_kernels(patch, folder):
    copied = folder / "kernels"
    shutil.copytree(ops.KERNELS, copied, ignore=shutil.ignore_patterns("__pycache__"))
    with (copied / "swiglu.py").open("a") as file:
        file.write("\n")
    patch.setattr(ops, "KERNELS", copied)


def _other_model_sources(patch, folder):
    copied = folder / "model"
    shutil.copytree(os.path.dirname(ops.__file__), copied)
    with (copied / "attention.py").open("a") as file:
        file.write("\n")
    patch.setattr(ops, "__file__", str(copied / "ops.py"))


def _other_update_sources(patch, folder):
    for room in ("policy", "learn"):
        shutil.copytree(key_module._PACKAGE / room, folder / room)
    with (folder / "learn" / "step.py").open("a") as file:
        file.write("\n")
    patch.setattr(key_module, "_PACKAGE", folder)


def _other_ptxas(patch, folder):
    patch.setattr(ops, "assembler", lambda architecture: ops.Assembler("/bin/ptxas", "13.1.80"))


CAUSES = {
    "torch": lambda patch, folder: patch.setattr(torch, "__version__", "9.9"),
    "its commit": lambda patch, folder: patch.setattr(torch.version, "git_version", "abc"),
    "CUDA": lambda patch, folder: patch.setattr(torch.version, "cuda", "99.1"),
    "cuDNN": lambda patch, folder: patch.setattr(torch.backends.cudnn, "version", lambda: 99),
    "Triton": _set_version("triton"),
    "flash-attn": _set_version("flash_attn"),
    "bitsandbytes": _set_version("bitsandbytes"),
    "ptxas": _other_ptxas,
    "a kernel": _other_kernels,
    "PyTorch's side": _other_model_sources,
    "an update": _other_update_sources,
    "tf32": _set_flag("allow_tf32"),
    "cuDNN's tf32": lambda patch, folder: patch.setattr(
        torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32
    ),
    "sums in bf16": _set_flag("allow_bf16_reduced_precision_reduction"),
    "sums in fp16": _set_flag("allow_fp16_reduced_precision_reduction"),
    "deterministic": lambda patch, folder: patch.setattr(
        torch, "are_deterministic_algorithms_enabled", lambda: True
    ),
    "Triton's variables": lambda patch, folder: patch.setenv("TRITON_DEFAULT_FP_FUSION", "0"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_what_changes_here_is_seen(cause, tmp_path, monkeypatch):
    before = key("swiglu", SUBJECT, Surroundings.of(GPU))
    assert key("swiglu", SUBJECT, Surroundings.of(GPU)) == before
    with monkeypatch.context() as patch:
        key_module._version.cache_clear()
        CAUSES[cause](patch, tmp_path)
        assert key("swiglu", SUBJECT, Surroundings.of(GPU)) != before
    key_module._version.cache_clear()
    assert key("swiglu", SUBJECT, Surroundings.of(GPU)) == before


def test_where_triton_keeps_what_it_compiled_changes_nothing(monkeypatch):
    before = key("swiglu", SUBJECT, Surroundings.of(GPU))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert key("swiglu", SUBJECT, Surroundings.of(GPU)) == before


def test_a_subject_is_a_model_and_how_it_is_trained(tiny_model):
    config = open_config(str(tiny_model))
    made = Subject.of(config, PolicyConfig(adaptation="qlora", top_layers=1), "fp32", 3)
    expected = (64, 128, 4, 2, 16, False, False, 3, "fp32", "nf4", "qlora", 8, 1)
    assert dataclasses.astuple(made) == expected


class _Cuda:
    """libcuda of a machine with one H100, or with what `broken` says."""

    broken = ""

    def __getattr__(self, name):
        answers = {
            "cuInit": lambda flags: 0,
            "cuDeviceGet": lambda to, ordinal: self._put(to, 7),
            "cuDeviceGetName": lambda to, size, device: self._text(to, b"NVIDIA H100"),
            "cuDeviceGetUuid_v2": lambda to, device: self._put(to, range(16)),
            "cuDeviceTotalMem_v2": lambda to, device: self._put(to, 85_000_000_000),
            "cuDeviceGetAttribute": lambda to, number, device: self._put(
                to, {16: 132, 75: 9, 76: 0}[number]
            ),
            "cuDriverGetVersion": lambda to: self._put(to, 13000),
            "nvmlInit_v2": lambda: 0,
            "nvmlShutdown": lambda: 0,
            "nvmlSystemGetDriverVersion": lambda to, size: self._text(to, b"580.65.06"),
        }
        return (lambda *_: 100) if name == self.broken else answers[name]

    def _put(self, to, value):
        made = to._obj
        if isinstance(value, int):
            made.value = value
        else:
            made[:] = value
        return 0

    def _text(self, to, text):
        to.value = text
        return 0


def test_the_gpu_is_read_without_a_context():
    files = []

    def load(file):
        files.append(file)
        return _Cuda()

    uuid = "000102030405060708090a0b0c0d0e0f"
    expected = Gpu("NVIDIA H100", uuid, "9.0", 132, 85_000_000_000, "580.65.06")
    assert first(load) == expected
    assert files == ["libcuda.so.1", "libnvidia-ml.so.1"]
    assert expected.bf16 and not dataclasses.replace(expected, capability="7.5").bf16
    assert dataclasses.replace(expected, capability="12.0").bf16


@pytest.mark.parametrize("broken", ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute"])
def test_without_a_gpu_there_is_none(broken, monkeypatch):
    monkeypatch.setattr(_Cuda, "broken", broken)
    assert first(lambda file: _Cuda()) is None


def test_without_the_libraries():
    def nothing(file):
        raise OSError(file)

    def no_nvml(file):
        return _Cuda() if "cuda" in file else nothing(file)

    assert first(nothing) is None
    assert first(no_nvml).driver == "for CUDA 13000"
