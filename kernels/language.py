"""Triton's language, or a stand-in where there is no Triton (it exists for Linux only).

The stand-in lets a kernel's file be imported for its PyTorch reference; nothing launches it.
"""

from types import SimpleNamespace

try:
    import triton.language as tl
    from triton import cdiv, jit, next_power_of_2

    INSTALLED = True
except ImportError:
    INSTALLED = False
    # A constant keeps its value: references read it.
    tl = SimpleNamespace(constexpr=lambda value: SimpleNamespace(value=value))

    def jit(function=None, **options):
        return jit if function is None else function

    def next_power_of_2(number: int) -> int:
        return 1 << (number - 1).bit_length()

    def cdiv(number: int, divisor: int) -> int:
        return -(-number // divisor)


def check_alike(*tensors) -> None:
    """Raises ValueError where the tensors' shapes or types differ: no kernel broadcasts."""
    alike = {(tensor.shape, tensor.dtype) for tensor in tensors}
    if len(alike) > 1:
        told = ", ".join(f"{dtype} {list(shape)}" for shape, dtype in alike)
        raise ValueError(f"tensors of one shape and type are needed, not {told}")


def check_shapes(*tensors) -> None:
    """Raises ValueError where the tensors' shapes differ: no kernel broadcasts."""
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) > 1:
        told = ", ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"tensors of one shape are needed, not {told}")


__all__ = ["INSTALLED", "cdiv", "check_alike", "check_shapes", "jit", "next_power_of_2", "tl"]
