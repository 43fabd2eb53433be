"""Triton's language, or a stand-in where there is no Triton (it exists for Linux only).

The stand-in lets a kernel's file be imported for its PyTorch reference; nothing launches it.
"""

from types import SimpleNamespace

try:
    import triton.language as tl
    from triton import jit, next_power_of_2
except ImportError:
    tl = SimpleNamespace(constexpr=None)

    def jit(function):
        return function

    def next_power_of_2(number: int) -> int:
        return 1 << (number - 1).bit_length()


__all__ = ["jit", "next_power_of_2", "tl"]
