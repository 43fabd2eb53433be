"""What the tests of kernels share: where they run, poisoned memory, and how exact is exact enough.

Without a GPU the kernels run in Triton's interpreter (conftest.py asks for it), whose bf16
arithmetic is silently wrong: bf16 is tested on a GPU only.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fastflag.model import attention, joined, llama, products
from fastflag.model.ops import OPS, frozen_linear, prefix_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

# Of the largest exact number: 16 roundings in fp32, a quarter of one in 16 bits.
_EPSILON = {torch.float32: 2e-6, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}


_WAITING = {
    getattr(torch.ops.aten, name)
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2")
}


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that PyTorch hands out without values holds NaN: what a kernel leaves
    unwritten, or reads beyond, shows."""

    def poison(make):
        def made(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, poison(getattr(owner, name)))
        yield


class _NoReading(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        counted = func._overloadpacket is torch.ops.aten.index and any(
            some is not None and some.dtype == torch.bool for some in args[1]
        )
        if counted or func._overloadpacket in _WAITING:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def never_waiting() -> Iterator[None]:
    """Inside, nothing may be asked of a tensor that a GPU would have to be waited for: numbers,
    whether a condition holds, how many elements fulfil one."""
    refused = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")

    def refuse(name):
        def refused(*_, **__):
            raise AssertionError(f"{name} waits for the device")

        return refused

    with pytest.MonkeyPatch.context() as patch, _NoReading():
        for name in refused:
            patch.setattr(torch.Tensor, name, refuse(name))
        yield


def compute_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on PyTorch's operators are those of a GPU, projections of one input are joined, and
    activations are in the dtype of the configuration."""

    def linear(x, weight, bias, dtype):
        return functional.linear(x, weight.to(x.dtype), bias)

    def multiply(weight, bias, dtype):
        return lambda x: functional.linear(x, weight, bias)

    monkeypatch.setattr(llama, "activations_dtype", lambda device, dtype: dtype)
    monkeypatch.setattr(products, "product", linear)
    monkeypatch.setattr(joined, "taken", lambda device: True)
    for op, form in ((prefix_attention, attention.on_cuda), (frozen_linear, multiply)):
        monkeypatch.setattr(op, "_torchs", form)
        monkeypatch.setattr(op, "_chosen", {})


def take_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every op takes its Triton kernel, in the interpreter where there is no GPU."""
    monkeypatch.setenv("FASTFLAG_KERNELS", "triton")
    for op in OPS:
        monkeypatch.setattr(op, "_chosen", {})


def assert_no_worse(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """That `ours` is as near to `exact` (fp64, of the same rounded inputs) as PyTorch's own result
    in that dtype, in the largest error, up to a fraction of a rounding."""
    assert ours.shape == exact.shape and ours.dtype == torchs.dtype
    exact = exact.detach()
    slack = _EPSILON[ours.dtype] * float(exact.abs().max())
    error, allowed = (
        float((tensor.detach().double() - exact).abs().max()) for tensor in (ours, torchs)
    )
    assert error <= allowed + slack, f"off by {error:.3g}, PyTorch by {allowed:.3g}"
