"""Counted random numbers: each a function of a seed, an environment and a step."""

import numpy as np

from fastflag.market.compiled.kernel import kernel

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


@kernel()
def _mix_nb(z):
    """splitmix64's output function (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@kernel()
def stream_nb(seed, env):
    """Key of an environment's random numbers: environment i of seed s is environment 0 of s + i."""
    return _mix_nb(np.uint64(seed) + np.uint64(env) + _GOLDEN)


@kernel()
def uniform_nb(stream, step):
    """The step's number in [0, 1)."""
    return np.float64(_mix_nb(stream + _GOLDEN * np.uint64(step)) >> _S11) * 2.0**-53


@kernel()
def uniforms_nb(seed, envs, step, values):
    for b in range(envs.size):
        values[b] = uniform_nb(stream_nb(seed, envs[b]), step)
