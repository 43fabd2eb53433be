"""Random numbers that are counted, not drawn in turn: each is a function of a seed, an environment
and a step, so neither threads nor batch sizes change one."""

import numpy as np

from fastflag.market.compiled.random import uniforms_nb


def uniform(seed: int, env: np.ndarray | int, step: int) -> np.ndarray:
    """Random numbers in [0, 1) that depend on (seed + env, step) and nothing else: float64 [B]."""
    envs = np.ascontiguousarray(np.atleast_1d(env), dtype=np.int64)
    values = np.empty(envs.size)
    uniforms_nb(seed_bits(seed), envs, step, values)
    return values


def seed_bits(seed: int) -> np.uint64:
    """`seed` as the kernels take it: modulo 2^64."""
    return np.uint64(int(seed) % 2**64)
