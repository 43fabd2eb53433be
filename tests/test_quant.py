import math
import subprocess
import sys

import pytest
import torch

from fastflag.model.quant import NF4Weight

# The 16 levels of NF4 (Dettmers et al. 2023, QLoRA, appendix E).
CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
SHAPES = [(64, 64), (192, 576), (5, 64), (3, 100), (7, 9), (1, 1), (33, 65), (2, 130), (5, 96)]


def plainly(weight):
    """code[nibble] * absmax in fp32: the high nibble is the even element, blocks cross rows."""
    nibbles = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).flatten()
    count = math.prod(weight.shape)
    scales = weight.absmax.repeat_interleave(64)[:count]
    return (CODE[nibbles[:count].long()] * scales).reshape(weight.shape)


def random_weight(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantised_is_the_plain_formula_bit_for_bit(shape, dtype):
    weight = NF4Weight.quantise(random_weight(shape, dtype))
    assert weight.absmax.dtype == torch.float32 and weight.packed.dtype == torch.uint8
    assert weight.absmax.shape == (math.ceil(math.prod(shape) / 64),)
    assert weight.packed.shape == (math.ceil(math.prod(shape) / 2),)
    assert weight.shape == shape
    result = weight.dequantise(dtype)
    assert result.shape == shape and result.dtype == dtype
    assert torch.equal(result, plainly(weight).to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_number_takes_the_nearest_level_of_its_block(shape):
    original = random_weight(shape)
    weight = NF4Weight.quantise(original)
    blocks = torch.nn.functional.pad(original.flatten(), (0, -original.numel() % 64)).reshape(
        -1, 64
    )
    largest = blocks.abs().amax(dim=1)
    assert torch.equal(weight.absmax, largest)
    error = (weight.dequantise(torch.float32) - original).abs().flatten()
    scales = largest.repeat_interleave(64)[: original.numel()]
    nearest = (original.flatten()[:, None] - CODE * scales[:, None]).abs().amin(dim=1)
    torch.testing.assert_close(error, nearest, rtol=0, atol=1e-6)


def test_error_on_normal_weights():
    original = random_weight((512, 512))
    error = NF4Weight.quantise(original).dequantise(torch.float32) - original
    assert (error.norm() / original.norm()).item() == pytest.approx(0.092, abs=0.002)
    assert abs(error.mean().item()) < 1e-3


def test_zeros_and_largest_values_are_kept():
    original = torch.zeros(2, 64)
    original[1, 5] = -3.0
    assert torch.equal(NF4Weight.quantise(original).dequantise(torch.float32), original)


def test_a_transposed_weight_is_stored_as_it_reads():
    original = random_weight((96, 64))
    turned = NF4Weight.quantise(original.T).dequantise(torch.float32)
    assert torch.equal(
        turned, NF4Weight.quantise(original.T.contiguous()).dequantise(torch.float32)
    )


def test_size_and_moving():
    weight = NF4Weight.quantise(random_weight((128, 64)).requires_grad_())
    assert weight.packed.nbytes + weight.absmax.nbytes == 128 * 64 // 2 + 128 * 4
    moved = weight.to("meta")
    assert moved.packed.is_meta and moved.absmax.is_meta and moved.shape == weight.shape
    assert not weight.dequantise(torch.float32).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_dequantises_the_same(shape, dtype):
    weight = NF4Weight.quantise(random_weight(shape, dtype))
    assert torch.equal(weight.to("cuda").dequantise(dtype).cpu(), weight.dequantise(dtype))


def test_import_of_bitsandbytes_is_late_and_silent():
    code = (
        "import sys, torch; from fastflag.model.quant import NF4Weight;"
        "assert 'bitsandbytes' not in sys.modules; NF4Weight.quantise(torch.ones(8, 8))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
