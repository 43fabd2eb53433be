"""NF4 (QLoRA, arXiv 2305.14314, appendix E) as bitsandbytes stores it: four bits a number.

Over the flattened weight, two numbers to a byte, the earlier one in the high nibble, and one
absmax for every 64:

    weight[i] = round_to_dtype(level[nibble[i]] * absmax[i // 64]), a product in fp32
"""

from fastflag.kernels.language import jit, tl

BLOCKSIZE = 64


@jit
def _level(nibble):
    """The fp32 level of each number of 0..15; selects, for a table in memory costs a load each."""
    one, two, four, eight = nibble & 1 != 0, nibble & 2 != 0, nibble & 4 != 0, nibble & 8 != 0
    level_0 = tl.where(one, -0.6961928009986877, -1.0)
    level_2 = tl.where(one, -0.39491748809814453, -0.5250730514526367)
    level_4 = tl.where(one, -0.18477343022823334, -0.28444138169288635)
    level_6 = tl.where(one, 0.0, -0.09105003625154495)
    level_8 = tl.where(one, 0.16093020141124725, 0.07958029955625534)
    level_10 = tl.where(one, 0.33791524171829224, 0.24611230194568634)
    level_12 = tl.where(one, 0.5626170039176941, 0.44070982933044434)
    level_14 = tl.where(one, 1.0, 0.7229568362236023)
    level_0 = tl.where(two, level_2, level_0)
    level_4 = tl.where(two, level_6, level_4)
    level_8 = tl.where(two, level_10, level_8)
    level_12 = tl.where(two, level_14, level_12)
    return tl.where(eight, tl.where(four, level_12, level_8), tl.where(four, level_4, level_0))


@jit
def decode(packed, absmax, dtype: tl.constexpr):
    """packed u8 [R, C/2], absmax fp32 [R, C/64] -> [R, C] of `dtype`; C a multiple of 64."""
    rows: tl.constexpr = packed.shape[0]
    blocks: tl.constexpr = absmax.shape[1]
    byte = packed.to(tl.int32)
    level = tl.join(_level(byte >> 4), _level(byte & 15)).reshape(rows, blocks, 64)
    return (level * absmax[:, :, None]).reshape(rows, 64 * blocks).to(dtype)
