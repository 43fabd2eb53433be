"""The least that an op has to do, and how fast this device could do it.

An op's floor is the larger of two times: its floating-point operations at the rate of a large
matrix product, and its bytes at the bandwidth of a large copy, both measured on the device at hand.
Bytes are the fewest: each input read once, each output written once; in the backward pass inputs
and the outputs' gradients are read once and the gradients asked for written once. Operations are
those of matrix products, done once: what a kernel recomputes to save memory is its own loss. Ops
without a product count none, for bytes bind them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.measure.cases import Case, Inputs
from fastflag.model.proof.clock import Clock, interleaved

_ROUNDS, _SECONDS = 20, 5.0


@dataclass(frozen=True)
class Cost:
    operations: float
    bytes: float


@dataclass(frozen=True)
class Roof:
    bandwidth: float  # bytes a second, read and written
    rate: float  # floating-point operations a second

    def share(self, cost: Cost, seconds: float) -> float:
        """Of what the device could do, 1 at most but for measuring errors."""
        return max(cost.operations / self.rate, cost.bytes / self.bandwidth) / seconds


def measured(timer: Clock) -> Roof:
    """A copy of a gigabyte and an 8192^3 bf16 product on a GPU; 64 MB and a 1024^3 fp32 one on a
    CPU. Random numbers: a product of zeros takes less power and runs faster."""
    on_gpu = timer.device == "cuda"
    size, side = (2**30, 8192) if on_gpu else (2**26, 1024)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    source = torch.randint(256, (size,), dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=timer.device).to(dtype) for _ in range(2))
    works = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    times = interleaved(
        {name: lambda work=work: work for name, work in works.items()}, timer, _ROUNDS, _SECONDS
    )
    return Roof(
        bandwidth=2 * size / times["copy"].percentile(50),
        rate=2 * side**3 / times["product"].percentile(50),
    )


def cost_of(case: Case, inputs: Inputs, outputs: list[Tensor], backward: bool) -> Cost:
    """Of the forward pass or, with `backward`, of both passes."""
    forward, back = _OPERATIONS.get(case.name, _none)(inputs, case.trained)
    read = _read(inputs)
    total = _bytes(read.values()) + _bytes(outputs)
    if not backward:
        return Cost(forward, total)
    again = [tensor for name, tensor in read.items() if name not in _ONCE.get(case.name, ())]
    trained = [inputs[name] for name in case.trained]
    return Cost(forward + back, total + _bytes(again) + _bytes(outputs) + _bytes(trained))


def _read(inputs: Inputs) -> dict[str, Tensor]:
    """What has to be read: of a vocabulary's weight, the allowed tokens' rows."""
    read = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if read.get("allowed") is not None and "weight" in read:
        read["weight"] = read["weight"][: len(read["allowed"])]
    return read


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# Inputs that the backward pass does without.
_ONCE = {"rotate_": ("query", "key")}


def _none(inputs: Inputs, trained: tuple[str, ...]) -> tuple[float, float]:
    return 0.0, 0.0


def _nf4_linear(inputs: Inputs, trained: tuple[str, ...]) -> tuple[float, float]:
    product = 2.0 * inputs["x"].numel() * inputs["outputs"]
    return product, product if trained else 0.0


def _lora_linear(inputs: Inputs, trained: tuple[str, ...]) -> tuple[float, float]:
    """M rows, K to N by rank R. Backward: dX = dY W + dS A, dS = dY B, dA = dS^T X, dB = dY^T S."""
    columns, rank = inputs["x"].shape[-1], inputs["a"].shape[0]
    rows, outputs = inputs["x"].numel() / columns, inputs["b"].shape[0]
    whole, low = 2.0 * rows * columns * outputs, 2.0 * rows * rank * (columns + outputs)
    return whole + low, whole + 2 * low


def _token_log_probability(inputs: Inputs, trained: tuple[str, ...]) -> tuple[float, float]:
    """One product forward, and backward one for each of hidden and weight that is trained."""
    product = 2.0 * inputs["hidden"].numel() * len(_read(inputs)["weight"])
    return product, product * len({"hidden", "weight"} & set(trained))


def _prefix_attention(inputs: Inputs, trained: tuple[str, ...]) -> tuple[float, float]:
    """Two products a visible pair of query and key, and four backward: dV, dP, dQ and dK."""
    heads, queries, size = inputs["query"].shape[1:]
    shared = (inputs["lengths"].long() * inputs["starts"].diff()).sum().item() * queries
    own = (inputs["first"].long() * queries).sum().item()
    own += len(inputs["query"]) * queries * (queries + 1) / 2
    product = 2.0 * heads * size * (shared + own)
    return 2 * product, 4 * product


_OPERATIONS: dict[str, Callable[[Inputs, tuple[str, ...]], tuple[float, float]]] = {
    "nf4_linear": _nf4_linear,
    "lora_linear": _lora_linear,
    "token_log_probability": _token_log_probability,
    "prefix_attention": _prefix_attention,
}
