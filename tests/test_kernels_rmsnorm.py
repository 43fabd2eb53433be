"""RMSNorm in Triton against its formula in fp64, beside PyTorch's own rounding."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from precision import DEVICE, DTYPES, assert_no_worse, poisoned

from fastflag.kernels.rmsnorm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5, 123), (7, 507), (4, 576), (2, 2048)])
def test_forward_and_gradient(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator).to(DEVICE, dtype)
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    truth = weight.double() * exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    (truth_dx,) = torch.autograd.grad(truth, exact, dy.double())
    torchs = rms_norm_reference(x, weight, 1e-5)
    (torchs_dx,) = torch.autograd.grad(torchs, x, dy)
    with poisoned():
        ours = rms_norm(x, weight, 1e-5)
        (ours_dx,) = torch.autograd.grad(ours, x, dy)
    assert_no_worse(ours, torchs, truth)
    assert_no_worse(ours_dx, torchs_dx, truth_dx)


def test_it_is_a_well_formed_operator():
    x = torch.randn(3, 65, device=DEVICE, requires_grad=True)
    torch.library.opcheck(rms_norm, (x, torch.ones(65, device=DEVICE), 1e-5))
