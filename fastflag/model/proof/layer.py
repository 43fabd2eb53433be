"""The chosen implementations together, in a whole layer with its backward pass: what is faster by
itself may not be among the others. A layer of random weights takes as long as one of a model's."""

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastflag.model import ops
from fastflag.model.arithmetic import DTYPES
from fastflag.model.linear import FrozenLinear, LoRALinear, TrainedLinear
from fastflag.model.llama import Block, prefix_pass, suffix_pass
from fastflag.model.model_config import ModelConfig
from fastflag.model.proof.child import Request, Tell, added_up, today
from fastflag.model.proof.clock import Times, interleaved
from fastflag.model.proof.devices import Device, Work
from fastflag.model.proof.key import Subject
from fastflag.model.proof.speed import Timed, faster
from fastflag.model.proof.verdicts import Found, Verdict
from fastflag.model.quant import NF4Weight
from fastflag.model.shared_prefix import SuffixLayout
from fastflag.model.weights import Weights, expected_shapes

CHOSEN = "chosen"
LAYER = "layer"


def confirm(request: Request, device: Device, tell: Tell) -> Verdict:
    """Whether the chosen implementations are taken: CHOSEN, or "torch", where ops are launched one
    by one and where graphs replay them."""
    work = _work(request, device)
    taken: dict[str, str] = {}
    found: dict[str, Found] = {}
    told = []
    for way in ("launched", "replayed"):
        chosen = chosen_by(request.verdicts, replayed=way == "replayed")
        taken[way] = "torch"
        if not chosen:
            continue
        tell({"begin": LAYER, "implementation": CHOSEN, "case": way})
        timed = _timed(work, chosen, way == "replayed", request, device)
        gain = faster(timed[CHOSEN], timed["torch"], way == "replayed")
        taken[way] = CHOSEN if gain else "torch"
        told.append(f"{way} it is {gain:.2f} times as fast" if gain else f"{way} it is no faster")
        for name, one in timed.items():
            middle = (float(sorted(side)[len(side) // 2]) for side in (one.device, one.host))
            found[f"{name}, {way}"] = Found("right", "", None, *middle)
    return Verdict(LAYER, **taken, reason=", ".join(told) or "no op", found=found, when=today())


def chosen_by(verdicts: tuple[Verdict, ...], replayed: bool) -> dict[str, str]:
    """{op: implementation} of ops that take another one than PyTorch's."""
    names = {op.name for op in ops.OPS}
    taken = {one.op: one.replayed if replayed else one.launched for one in verdicts}
    return {op: one for op, one in taken.items() if op in names and one != "torch"}


def random_weights(subject: Subject, layers: int, vocabulary: int) -> Weights:
    """Of a model of the subject's shapes."""
    config = ModelConfig(
        architecture="llama",
        layers=layers,
        width=subject.width,
        heads=subject.heads,
        kv_heads=subject.kv_heads,
        head_dim=subject.head_dim,
        mlp_width=subject.mlp_width,
        vocabulary=vocabulary,
        rms_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        tied_embeddings=True,
        attention_bias=subject.attention_bias,
        qk_norm=subject.qk_norm,
        max_positions=2**16,
    )
    storage: Any = _Random(config)
    return Weights(config, storage, Path(), "a random model")


class _Random:
    """Storage of weights that keep activations near 1, the same each time."""

    def __init__(self, config: ModelConfig):
        self.shapes, self.files = expected_shapes(config), []

    def read(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        scale = 1.0 if "embed" in name else shape[1] ** -0.5
        return torch.randn(shape, generator=random).mul_(scale)


def _work(request: Request, device: Device) -> Callable[[], Work]:
    """Makes a pass of suffixes through a layer, and of their prefixes' keys and values, and the
    gradients of its parameters."""
    subject, batch = request.subject, request.batch
    dtype = DTYPES[subject.dtype]
    block = Block(  # not a model's last, which has no one product of queries, keys and values
        random_weights(subject, 2, 64), 0, dtype, device.torch, _factory(subject, device.torch)
    )
    like = {"device": device.torch, "dtype": torch.float32}
    prefixes = torch.randn(batch.days, batch.prefix_tokens, subject.width, **like)
    suffixes = torch.randn(batch.days * batch.texts, batch.suffix_tokens, subject.width, **like)
    tokens = torch.full((len(suffixes),), batch.suffix_tokens, device=device.torch)
    lengths = [batch.prefix_tokens] * batch.days
    layout = SuffixLayout.build([batch.texts] * batch.days, lengths, tokens, batch.suffix_tokens)
    parameters = [*block.parameters()]

    def work() -> list[Tensor]:
        _, shared = prefix_pass([block], prefixes, lengths, keys_values_only=True)
        states = suffix_pass([block], suffixes, shared, layout)
        return [states.detach(), *torch.autograd.grad(states, parameters, suffixes)]

    return lambda: work


def _factory(
    subject: Subject, device: torch.device
) -> Callable[[Tensor, Tensor | None], nn.Module]:
    dtype, random = DTYPES[subject.dtype], torch.Generator().manual_seed(0)

    def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
        if subject.adaptation == "full":
            return TrainedLinear(weight, bias, dtype).to(device)
        weight, bias = weight.to(device), None if bias is None else bias.to(device)
        packed = subject.adaptation == "qlora"
        kept = NF4Weight.quantise(weight) if packed else weight.to(dtype)
        layer = LoRALinear(FrozenLinear(kept, bias, dtype), subject.lora_rank, 16.0, random)
        return layer.to(device)

    return make


def _timed(
    make: Callable[[], Work],
    chosen: Mapping[str, str],
    replayed: bool,
    request: Request,
    device: Device,
) -> dict[str, Timed]:
    """With PyTorch's implementations and with the chosen ones, by turns."""
    ways: dict[str, Mapping[str, str]] = {"torch": {}, CHOSEN: chosen}
    where = torch.empty(0, device=device.torch).device
    works = {}
    try:
        for name, taken in ways.items():
            _take(where, taken)
            works[name] = device.replayed(make()) if replayed else make()

        def prepared(name: str) -> Callable[[], Work]:
            def prepare() -> Work:
                _take(where, ways[name])
                return works[name]

            return prepare

        prepares = {name: prepared(name) for name in ways}
        times: dict[str, Times] = interleaved(
            prepares, device.clock, request.rounds, request.seconds
        )
    finally:
        for op in ops.OPS:
            op.forget()
    return {name: added_up([one]) for name, one in times.items()}


def _take(device: torch.device, chosen: Mapping[str, str]) -> None:
    for op in ops.OPS:
        op.take(device, chosen.get(op.name, "torch"))
