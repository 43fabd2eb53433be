"""What each op is tried on: a model's own shapes, with few rows and with an update's.

Random numbers for the error and the time; and whole numbers, whose sums are exact, where an op only
adds and multiplies: there a single wrong bit of a product shows.

Shapes: M rows, C width, F width of the MLP, H query heads, G key/value heads, E head size, D
prefixes of P tokens, U suffixes of S tokens, A actions.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastflag.config import PlanConfig
from fastflag.model.joined import can_be
from fastflag.model.proof.exact import EXACT
from fastflag.model.proof.key import Subject
from fastflag.model.proof.maker import FEW, FP64, Maker, Tensors
from fastflag.model.shared_prefix import Prefixes, SuffixLayout

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    what: str
    tensors: Tensors
    call: Callable[[Function, Tensors], Any]
    """Gives a function the op's arguments, of tensors such as those above."""
    exact: Function
    """In fp64."""
    trained: tuple[str, ...] = ()
    """Tensors that get a gradient."""
    whole: bool = False
    """Whole numbers in, and out where they are small."""
    timed: bool = True
    """Part of an update; the others are tried alone."""

    def outputs(self, function: Function, tensors: Tensors) -> list[Tensor]:
        """Those that are there."""
        made = self.call(function, tensors)
        made = (made,) if isinstance(made, Tensor) else made
        return [output for output in made if output is not None]


def cases(
    op: str, subject: Subject, batch: PlanConfig, device: torch.device, memory: int = 0
) -> Iterator[Case]:
    """Of an op, one after another, since each may take a part of the memory. Of its bytes a half
    may be held by prefixes longer than the batch's."""
    rows = batch.days * batch.texts * batch.suffix_tokens
    for whole in (False, True) if op in _ADD_AND_MULTIPLY else (False,):
        for count in (*(few for few in FEW if few < rows), rows):
            maker = Maker(subject, device, batch, count, whole, memory)
            for case in _MADE[op](maker):
                timed = case.timed and count == rows and not whole
                told = f"{case.what}, {count} rows" + (", whole numbers" if whole else "")
                yield replace(case, what=told.strip(", "), whole=whole, timed=timed)


def fitting(batch: PlanConfig, subject: Subject, memory: int) -> PlanConfig:
    """The batch with as many days as the exact results have room for in half of `memory` bytes."""
    wide = max(subject.mlp_width, 2 * subject.width, 2 * subject.heads * subject.head_dim)
    day = batch.texts * batch.suffix_tokens * wide * FP64
    return replace(batch, days=max(1, min(batch.days, memory // 2 // day)))


def _plain(op: str, *names: str, **rest: Any) -> dict[str, Any]:
    """How a function of the tensors of these names, and of `rest` after them, is called."""
    return {
        "call": lambda function, tensors: function(
            *(tensors.get(name) for name in names), *rest.values()
        ),
        "exact": EXACT[op],
    }


def _rms_norm(make: Maker) -> Iterator[Case]:
    """Of the residual stream, which is fp32; of the last one; and of heads, where they are
    normed."""
    width, called = make.subject.width, _plain("rms_norm", "x", "weight", epsilon=1e-5)
    stream = make.numbers(make.rows, width, dtype=torch.float32)
    for what, dtype in (("", make.dtype), ("the last norm", torch.float32)):
        weight = make.numbers(width, dtype=dtype)
        yield Case(what, {"x": stream, "weight": weight}, **called, trained=("x",))
    if make.subject.qk_norm:
        heads = make.heads(make.rows, make.subject.heads, 1).transpose(1, 2)
        tensors = {"x": heads, "weight": make.numbers(make.subject.head_dim)}
        yield Case("heads", tensors, **called, trained=("x",))


def _add_rms_norm(make: Maker) -> Iterator[Case]:
    width = make.subject.width
    tensors = {
        "x": make.numbers(make.rows, width),
        "residual": make.numbers(make.rows, width, dtype=torch.float32),
        "weight": make.numbers(width),
    }
    called = _plain("add_rms_norm", "x", "residual", "weight", epsilon=1e-5)
    yield Case("", tensors, **called, trained=("x", "residual"))


def _rotate(make: Maker) -> Iterator[Case]:
    """Whole numbers are turned by quarters of a circle."""
    tokens = make.batch.suffix_tokens if make.rows > make.batch.suffix_tokens else 1
    count, half = max(make.rows // tokens, 1), make.subject.head_dim // 2
    query, key = (
        make.heads(count, number, tokens) for number in (make.subject.heads, make.subject.kv_heads)
    )
    if make.whole:
        quarter = make.below(4, count, 1, tokens, half)
        cos, sin = (torch.tensor(side, device=make.device)[quarter] for side in _QUARTERS)
    else:
        angles = make.numbers(count, 1, tokens, half, dtype=torch.float32, scale=3.0)
        cos, sin = angles.cos(), angles.sin()
    angles = {"cos": cos.to(make.dtype), "sin": sin.to(make.dtype)}
    called = _plain("rotate", "query", "key", "cos", "sin")
    both = {"query": query, "key": key, **angles}
    yield Case("queries and keys", both, **called, trained=("query", "key"))
    yield Case("keys alone", {"query": key.clone(), **angles}, **called, trained=("query",))


_QUARTERS = (1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 0.0, -1.0)


def _swiglu(make: Maker) -> Iterator[Case]:
    gate, up = (make.numbers(make.rows, make.subject.mlp_width) for _ in range(2))
    called = _plain("swiglu", "gate", "up")
    yield Case("", {"gate": gate, "up": up}, **called, trained=("gate", "up"))


def _matrices(subject: Subject, rank: int, packed: bool) -> dict[str, tuple[int, int, int]]:
    """The kinds of matrices that a GPU multiplies with: outputs, inputs, and the rank of all
    adapters, of `rank` each, of those that are joined (model/joined.py)."""
    queries, keys = (heads * subject.head_dim for heads in (subject.heads, subject.kv_heads))
    width, wide = subject.width, subject.mlp_width
    groups = {"q_k_v": (queries, keys, keys), "k_v": (keys, keys), "gate_up": (wide, wide)}
    found = {"q": (queries, width, rank)}
    for name, outputs in groups.items():
        if can_be(len(outputs), rank, width, packed):
            found[name] = (sum(outputs), width, len(outputs) * rank)
        else:
            found[name[name.rfind("_") + 1 :]] = (outputs[-1], width, rank)
    return found | {"o": (width, queries, rank), "down": (width, wide, rank)}


def _nf4_dequantise(make: Maker) -> Iterator[Case]:
    """There are no rows: once."""
    if make.rows != 1 and make.rows in FEW:
        return
    for name, (*shape, _) in _matrices(make.subject, 0, packed=True).items():
        called = _plain("nf4_dequantise", "weight", "absmax", shape=shape, dtype=make.dtype)
        yield Case(name, make.nf4(*shape), **called)


def _nf4_linear(make: Maker) -> Iterator[Case]:
    for name, (outputs, inputs, _) in _matrices(make.subject, 0, packed=True).items():
        tensors = {"x": make.numbers(make.rows, inputs), **make.nf4(outputs, inputs)}
        called = _plain("nf4_linear", "x", "weight", "absmax", outputs=outputs, dtype=make.dtype)
        yield Case(name, tensors, **called, trained=("x",))


def _lora_linear(make: Maker) -> Iterator[Case]:
    """Over the kind of matrix that the model is trained with."""
    packed, single = make.subject.adaptation == "qlora", {"dtype": torch.float32}
    matrices = _matrices(make.subject, make.subject.lora_rank, packed)
    for name, (outputs, inputs, rank) in matrices.items():
        tensors = {
            "x": make.numbers(make.rows, inputs),
            **(make.nf4(outputs, inputs) if packed else {"weight": make.factor(outputs, inputs)}),
            "a": make.factor(rank, inputs, **single),
            "b": make.factor(outputs, rank, **single),
        }
        names = ("x", "weight", "absmax", "a", "b")
        called = _plain("lora_linear", *names, scale=2.0, dtype=make.dtype)
        yield Case(name, tensors, **called, trained=("x", "a", "b"))


def _causal_attention(make: Maker) -> Iterator[Case]:
    """An update's prefixes; and one of few tokens, and of many."""
    count, tokens = make.batch.days, make.batch.prefix_tokens
    sizes = [(2, make.rows)] if make.rows in FEW else [(count, tokens)]
    for number, (rows, size) in enumerate([*sizes, *((1, long) for long in make.long())]):
        query, key, value = (
            make.heads(rows, heads, size)
            for heads in (make.subject.heads, make.subject.kv_heads, make.subject.kv_heads)
        )
        tensors = {"query": query, "key": key, "value": value}
        called = _plain("causal_attention", *tensors)
        yield Case(f"{size} tokens", tensors, **called, trained=(*tensors,), timed=not number)


def _prefix_attention(make: Maker) -> Iterator[Case]:
    """Prefixes of several lengths, one of them empty; every token of a suffix, and its last one. An
    update's suffixes, and a few after long prefixes."""
    yield from _after_prefixes(make, make.batch.prefix_tokens)
    for tokens in make.long():
        few = replace(make, rows=8 * make.batch.suffix_tokens)
        for case in _after_prefixes(few, tokens):
            yield replace(case, what=f"{case.what} after {tokens}", timed=False)


def _after_prefixes(make: Maker, longest: int) -> Iterator[Case]:
    tokens = make.batch.suffix_tokens
    suffixes = max(make.rows // tokens, 1)
    prefixes = max(min(suffixes // make.batch.texts, make.batch.days), 2)
    lengths = torch.linspace(0, longest, prefixes).long()
    if make.rows not in FEW:  # an update's are all about as long
        lengths = lengths // 8 + longest - longest // 8
    counts = torch.full((prefixes,), suffixes // prefixes)
    counts[-1] += suffixes - int(counts.sum())
    own = torch.full((suffixes,), tokens, device=make.device)
    layout = SuffixLayout.build(counts.tolist(), lengths.tolist(), own, tokens)
    groups = make.subject.kv_heads
    shared, mine = (
        [make.heads(count, groups, size) for _ in range(2)]
        for count, size in ((prefixes, longest), (suffixes, tokens))
    )
    for what, queries in (("all tokens", tokens), ("last tokens", 1)):
        query = make.heads(suffixes, make.subject.heads, queries)
        if make.whole:
            query, shared[0], mine[0] = _pointing(make, query, shared[0], mine[0])
        tensors = dict(zip(("key", "value"), shared, strict=True))
        tensors |= {"query": query, "own_key": mine[0], "own_value": mine[1]}
        tensors["first"] = torch.full_like(own, tokens - queries)
        call = partial(_attend, lengths=lengths.tolist(), layout=layout)
        yield Case(what, tensors, call, EXACT["prefix_attention"], trained=_ATTENDED)


_ATTENDED = ("query", "key", "value", "own_key", "own_value")


def _attend(
    function: Function, tensors: Mapping[str, Tensor], lengths: list[int], layout: SuffixLayout
) -> Tensor:
    prefixes = Prefixes([(tensors["key"], tensors["value"])], lengths)
    own = (tensors[name] for name in ("query", "own_key", "own_value", "first"))
    return function(*own, prefixes, layout)


def _pointing(make: Maker, query: Tensor, key: Tensor, own_key: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys of which each query sees one key alone: its own first one, which every query
    sees. The others' probabilities are 0, and what is attended to is that key's value exactly."""
    key, own_key = torch.zeros_like(key), torch.zeros_like(own_key)
    own_key[:, :, 0, 0] = 64.0
    query = torch.zeros_like(query)
    query[..., 0] = 64.0
    return query, key, own_key


def _action_terms(make: Maker) -> Iterator[Case]:
    """A sample a row, as many as there are prompts in an update."""
    count = max(make.rows // make.batch.suffix_tokens, 1)
    single = {"dtype": torch.float32}
    wide = [make.numbers(count, make.subject.actions, **single) for _ in range(2)]
    tensors = {
        "logits": wide[0].log_softmax(-1),
        "action": make.below(make.subject.actions, count),
        "old": wide[0].log_softmax(-1)[:, 0] + make.numbers(count, **single, scale=0.2),
        "advantage": make.numbers(count, **single),
        "initial": wide[1].log_softmax(-1),
    }
    names = ("logits", "allowed", "action", "old", "advantage", "initial")
    called = _plain("action_terms", *names, clip=0.2)
    yield Case("", tensors, **called, trained=("logits",))


_MADE: dict[str, Callable[[Maker], Iterator[Case]]] = {
    "nf4_dequantise": _nf4_dequantise,
    "nf4_linear": _nf4_linear,
    "lora_linear": _lora_linear,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rotate": _rotate,
    "swiglu": _swiglu,
    "causal_attention": _causal_attention,
    "prefix_attention": _prefix_attention,
    "action_terms": _action_terms,
}
# Ops whose results of whole numbers are whole numbers.
_ADD_AND_MULTIPLY = ("nf4_dequantise", "nf4_linear", "lora_linear", "rotate", "prefix_attention")
OPS = (*_MADE,)
