"""NF4 (QLoRA, arXiv 2305.14314, appendix E) as bitsandbytes stores it: four bits a number.

Over the flattened weight, two numbers to a byte, the earlier one in the high nibble, and one
absmax for every 64:

    weight[i] = round_to_dtype(level[nibble[i]] * absmax[i // 64]), a product in fp32
"""

from fastflag.kernels.language import jit, tl

BLOCKSIZE = 64

# Exact in fp32.
LEVELS = tl.constexpr(
    (
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
    )
)


@jit
def decode(packed, absmax, dtype: tl.constexpr):
    """packed u8 [R, C/2], absmax fp32 [R, C/64] -> [R, C] of `dtype`; C a multiple of 64."""
    rows: tl.constexpr = packed.shape[0]
    blocks: tl.constexpr = absmax.shape[1]
    index = tl.arange(0, 16)
    table = tl.zeros((16,), tl.float32)
    for i in tl.static_range(16):
        table = tl.where(index == i, LEVELS[i], table)
    byte = packed.to(tl.int32)
    nibble = tl.join(byte >> 4, byte & 15).reshape(rows, 64 * blocks)
    # One shuffle between lanes a number, where a tree of selects takes ten instructions.
    level = tl.gather(tl.broadcast_to(table[None, :], rows, 16), nibble, 1)
    scaled = level.reshape(rows, blocks, 64) * absmax[:, :, None]
    return scaled.reshape(rows, 64 * blocks).to(dtype)
