"""The Triton kernel against its reference, in Triton's interpreter where there is no GPU.

The interpreter is chosen when a kernel is defined, so the checks run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

_CHECKS = """
import torch
from fastflag.kernels.rmsnorm import rms_norm, rms_norm_reference

device = "cuda" if torch.cuda.is_available() else "cpu"
dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if device == "cuda" else [])
generator = torch.Generator().manual_seed(0)
empty = torch.empty_like
# Poisoned: what a kernel leaves unwritten shows.
torch.empty_like = lambda *a, **k: empty(*a, **k).fill_(torch.nan)
for dtype in dtypes:
    for shape in [(1, 1), (3, 63), (2, 5, 123), (7, 507), (4, 576), (2, 2048)]:
        x = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        weight = torch.randn(shape[-1], generator=generator).to(device, dtype)
        dy = torch.randn(shape, generator=generator).to(device, dtype)
        exact = x.detach().double().requires_grad_()
        truth = weight.double() * exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        (truth_dx,) = torch.autograd.grad(truth, exact, dy.double())
        y, y_torch = rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5)
        (dx,), (dx_torch,) = (torch.autograd.grad(out, x, dy) for out in (y, y_torch))
        for ours, torchs, right in ((y, y_torch, truth), (dx, dx_torch, truth_dx)):
            error, allowed = (ours - right).abs().max(), (torchs - right).abs().max()
            assert error <= allowed * 1.01 + 2e-6, (dtype, shape, float(error), float(allowed))
torch.empty_like = empty
x = torch.randn(3, 65, device=device, requires_grad=True)
torch.library.opcheck(rms_norm, (x, torch.ones(65, device=device), 1e-5))
"""


def test_forward_and_gradient_are_no_worse_than_pytorchs():
    environment = os.environ | {"TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _CHECKS], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
