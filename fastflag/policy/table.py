"""The policy as a table: (day, account text) -> logits and value, one row a distinct prompt.

Shapes: D prefixes (days), S distinct suffixes, U prompts, C width, A actions.
"""

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastflag.config import PolicyConfig
from fastflag.files import InputError
from fastflag.policy import ops
from fastflag.policy.heads import (
    RunningStatistics,
    Statistics,
    make_action_head,
    make_value_head,
    masked_log_softmax,
)
from fastflag.policy.llama import (
    Block,
    KeysValues,
    LinearFactory,
    SuffixLayout,
    prefix_pass,
    suffix_pass,
)
from fastflag.policy.lora import FrozenLinear, LoRALinear, TrainedLinear, unpacked
from fastflag.policy.quant import NF4Weight
from fastflag.policy.trunk_cache import TrunkCache
from fastflag.policy.weights import Weights
from fastflag.prompt.tokens import PromptSet

ACTIONS = 3
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Prompts of one pass through the trunk. 256 of 14 tokens over prefixes of 150 keep the attention's
# keys and values near 100 MB a layer on SmolLM2-135M.
_TRUNK_CHUNK = 256
# Days that go through the trunk together. Keys and values of 64 days of 150 tokens take 205 MB on
# SmolLM2-135M, and unpacking the matrices is a sixtieth of the work.
_TRUNK_DAYS = 64
# Suffixes are padded to 8 tokens: products of 8 rows or more have the same bits in every batch
# (measured, CPU fp32 and bf16), products of fewer do not.
_SUFFIX_MULTIPLE = 8


@dataclass(frozen=True)
class Table:
    """One row a prompt of the PromptSet that it was made from."""

    log_probabilities: Tensor  # [U, A] fp32, -inf where the action is not allowed
    value: Tensor  # [U] fp32
    statistics: Statistics  # those that centred the features

    @property
    def probabilities(self) -> np.ndarray:
        """[U, A] float64, without gradient, each row's sum 1."""
        wide = self.log_probabilities.detach().double().exp().cpu().numpy()
        return wide / wide.sum(1, keepdims=True)


@dataclass
class _SuffixWork:
    """Suffixes of one day and one padded length on their way through the trunk."""

    rows: list[int]
    hidden: Tensor  # [rows, S, C]
    layout: SuffixLayout


@dataclass
class _DayWork:
    """One day's texts on their way through the trunk."""

    prefix: Tensor | None  # [1, P, C]
    keys_values: list[KeysValues]  # of each layer passed
    suffixes: list[_SuffixWork]


class Policy(nn.Module):
    """A language model with a frozen trunk, a trained top and two heads.

    Raises InputError where the configuration does not fit the model.
    """

    def __init__(
        self,
        weights: Weights,
        config: PolicyConfig,
        action_tokens: Sequence[int],
        seed: int,
    ):
        super().__init__()
        layers = weights.config.layers
        if not 1 <= config.top_layers <= layers:
            raise InputError(
                f"top_layers must be 1 to {layers}, not {config.top_layers}, {weights.source}"
            )
        self.config = config
        self.model = weights.config
        self.dtype = _DTYPES[config.dtype]
        self.device = _device(config.device)
        generator = torch.Generator().manual_seed(seed)
        self.embedding = weights.tensor("model.embed_tokens.weight", self.dtype).to(self.device)
        split = layers - config.top_layers
        self.trunk = [self._block(weights, index, self._frozen) for index in range(split)]
        self.top = nn.ModuleList(
            self._block(weights, index, self._trained(generator)) for index in range(split, layers)
        )
        self.final_norm = weights.tensor("model.norm.weight", self.dtype).to(self.device)
        width = self.model.width
        if config.head == "lm":
            unembedding = weights.tensor("lm_head.weight", torch.float32)
            self.action_words = unembedding[list(action_tokens)].to(self.device)
            self.action_head = None
        else:
            self.action_head = make_action_head(config.head, width, ACTIONS, generator).to(
                self.device
            )
        self.value_head = make_value_head(width).to(self.device)
        self.running = RunningStatistics(width).to(self.device)
        self.cache = TrunkCache(config.trunk_cache_mb * 2**20)
        # Of the other heads the initial policy is known to be uniform.
        kept = self.named_parameters() if config.head == "lm" else ()
        self._initial = {name: p.detach().clone() for name, p in kept}
        self._initial_rows: dict[Hashable, Tensor] = {}

    def evaluate(self, prompts: PromptSet, statistics: Statistics | None = None) -> Table:
        """One pass of the top layers over the distinct prompts, with gradient where enabled.

        `statistics` centre the features; None takes those of `prompts.reference`, with gradient.
        Which other prompts are in the set never changes a row. Raises ValueError where there are
        neither statistics nor a reference, InputError for a prompt that the model can't read.
        """
        features = self._features(prompts)
        side = torch.from_numpy(prompts.side).long().to(self.device) + 1
        if statistics is None:
            if not len(prompts.reference):
                raise ValueError("a prompt set without a reference needs statistics")
            reference = torch.from_numpy(prompts.reference).to(self.device)
            statistics = Statistics.of(
                features.index_select(0, reference), side.index_select(0, reference)
            )
        centred = statistics.centre(features, side)
        if self.action_head is None:
            logits = features @ self.action_words.T
        else:
            logits = self.action_head(centred, side)
        allowed = torch.from_numpy(prompts.allowed).to(self.device)
        return Table(
            masked_log_softmax(logits, allowed), self.value_head(centred, side)[:, 0], statistics
        )

    @torch.no_grad()
    def initial_log_probabilities(self, prompts: PromptSet) -> Tensor:
        """The untrained policy's log-probabilities, [U, A]; kept by content.

        With an action head they are uniform over the allowed actions, because its last layer
        starts at zero; with the language-model head they are the model's own.
        """
        allowed = torch.from_numpy(prompts.allowed).to(self.device)
        if self.action_head is not None:
            return masked_log_softmax(torch.zeros(allowed.shape, device=self.device), allowed)
        keys = list(zip(_keys(prompts), map(bytes, prompts.allowed), strict=True))
        if any(key not in self._initial_rows for key in keys):
            with self._as_initialised():
                rows = self.evaluate(prompts).log_probabilities
            self._initial_rows.update(zip(keys, rows, strict=True))
        return torch.stack([self._initial_rows[key] for key in keys])

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(parameters of the trained layers, parameters of the heads)."""
        heads = [*self.value_head.parameters()]
        if self.action_head is not None:
            heads += self.action_head.parameters()
        return list(self.top.parameters()), heads

    def _features(self, prompts: PromptSet) -> Tensor:
        """Last-token states under the final norm, [U, C] fp32."""
        self._check_lengths(prompts)
        prefix_hidden, suffix_hidden = self._trunk_states(prompts)
        prefixes = pad_sequence(prefix_hidden, batch_first=True)
        suffixes = pad_sequence(suffix_hidden, batch_first=True)
        layout = SuffixLayout.build(
            torch.from_numpy(prompts.pairs[:, 0]).long().to(self.device),
            _lengths(prefix_hidden, self.device),
            _lengths(suffix_hidden, self.device),
            suffixes.shape[1],
        )
        _, keys_values = prefix_pass(self.top, prefixes, keys_values_only=True)
        last = suffix_pass(self.top, suffixes, keys_values, layout, last_only=True)
        return ops.rms_norm(last, self.final_norm, self.model.rms_eps).float()

    def _check_lengths(self, prompts: PromptSet) -> None:
        sizes = [np.array([*map(len, texts)]) for texts in (prompts.prefixes, prompts.suffixes)]
        longest = int((sizes[0][prompts.pairs[:, 0]] + sizes[1][prompts.pairs[:, 1]]).max())
        if longest > self.model.max_positions:
            raise InputError(
                f"a prompt has {longest} tokens, the model reads {self.model.max_positions}: lower "
                "--news-tokens or --window, prompts"
            )

    @torch.no_grad()
    def _trunk_states(self, prompts: PromptSet) -> tuple[list[Tensor], list[Tensor]]:
        """What the frozen layers make of each prefix [P, C] and of each prompt's suffix [S, C].

        Days go one by one and suffixes by padded length, so that a text's activations have the same
        bits whatever it is batched with: a resumed run, whose cache is cold, repeats the
        uninterrupted one exactly.
        """
        keys = _keys(prompts)
        suffixes = [self.cache.get(key) for key in keys]
        missing: dict[int, dict[int, list[int]]] = {}
        for row, (day, text) in enumerate(prompts.pairs.tolist()):
            if suffixes[row] is None:
                size = _round_up(len(prompts.suffixes[text]), _SUFFIX_MULTIPLE)
                missing.setdefault(day, {}).setdefault(size, []).append(row)
        digests = [_digest(tokens) for tokens in prompts.prefixes]
        prefixes = [self.cache.get(("hidden", digest)) for digest in digests]
        days = [day for day in range(len(prefixes)) if prefixes[day] is None or day in missing]
        for some in _chunks(days, _TRUNK_DAYS):
            work = [
                self._day_work(prompts, day, digests[day], missing.get(day, {})) for day in some
            ]
            self._run_trunk(work)
            for day, done in zip(some, work, strict=True):
                if done.prefix is not None:
                    prefixes[day] = (done.prefix[0],)
                    self.cache.put(("hidden", digests[day]), done.prefix[0])
                    flat = [tensor for pair in done.keys_values for tensor in pair]
                    self.cache.put(("keys_values", digests[day]), *flat)
                for texts in done.suffixes:
                    lasts = texts.layout.last.tolist()
                    for row, states, last in zip(texts.rows, texts.hidden, lasts, strict=True):
                        suffixes[row] = (states[: last + 1].clone(),)
                        self.cache.put(keys[row], *suffixes[row])
        return [state for (state,) in prefixes], [state for (state,) in suffixes]

    def _day_work(
        self, prompts: PromptSet, day: int, digest: bytes, missing: dict[int, list[int]]
    ) -> "_DayWork":
        """A day's embedded texts; its prefix is left out where its keys and values are kept."""
        tokens, kept = prompts.prefixes[day], self.cache.get(("keys_values", digest))
        if kept is None or self.cache.get(("hidden", digest)) is None:
            work = _DayWork(self._embed([tokens]), [], [])
        else:
            work = _DayWork(None, list(zip(kept[0::2], kept[1::2], strict=True)), [])
        for size, rows in missing.items():
            for some in _chunks(rows, _TRUNK_CHUNK):
                texts = [prompts.suffixes[prompts.pairs[row, 1]] for row in some]
                lengths = _lengths(texts, self.device)
                layout = SuffixLayout.build(
                    torch.zeros_like(lengths), lengths.new_tensor([len(tokens)]), lengths, size
                )
                hidden = self._embed(texts, _SUFFIX_MULTIPLE)
                work.suffixes.append(_SuffixWork(some, hidden, layout))
        return work

    def _run_trunk(self, work: list["_DayWork"]) -> None:
        """Layer by layer over all days, so that each matrix is unpacked from NF4 once: day by day,
        unpacking took as long as the arithmetic."""
        for number, block in enumerate(self.trunk):
            with unpacked(block, self.dtype):
                for day in work:
                    if day.prefix is not None:
                        day.prefix, keys_values = prefix_pass([block], day.prefix)
                        day.keys_values += keys_values
                    for texts in day.suffixes:
                        texts.hidden = suffix_pass(
                            [block], texts.hidden, [day.keys_values[number]], texts.layout
                        )

    def _embed(self, texts: list[np.ndarray], multiple: int = 1) -> Tensor:
        """Token ids, padded on the right to a multiple, -> [N, T, C]."""
        size = _round_up(max(map(len, texts)), multiple)
        ids = torch.zeros(len(texts), size, dtype=torch.int64)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = torch.from_numpy(tokens)
        return self.embedding[ids.to(self.device)]

    def _block(self, weights: Weights, index: int, make_linear: LinearFactory) -> Block:
        return Block(weights, index, self.dtype, self.device, make_linear)

    def _frozen(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        bias = None if bias is None else bias.to(self.device)
        if self.config.trunk_weights == "nf4":
            return FrozenLinear(NF4Weight.quantise(weight.to(self.device)), bias)
        return FrozenLinear(weight.to(self.device, _DTYPES[self.config.trunk_weights]), bias)

    def _trained(self, generator: torch.Generator) -> LinearFactory:
        def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
            if self.config.adaptation == "full":
                return TrainedLinear(weight, bias).to(self.device)
            base = FrozenLinear(
                weight.to(self.device), None if bias is None else bias.to(self.device)
            )
            adapter = LoRALinear(base, self.config.lora_rank, self.config.lora_alpha, generator)
            return adapter.to(self.device)

        return make

    @contextmanager
    def _as_initialised(self) -> Iterator[None]:
        """Inside, the parameters are those before training.

        Their storage is swapped, not written to: a forward that waits for its backward pass
        keeps the values that it saved.
        """
        trained = {name: p.data for name, p in self.named_parameters()}
        self._point_to(self._initial)
        try:
            yield
        finally:
            self._point_to(trained)

    def _point_to(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.named_parameters():
            parameter.data = values[name]


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("no CUDA GPU is available, --device cuda")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def _keys(prompts: PromptSet) -> list[tuple[bytes, bytes]]:
    """Each prompt by content: (digest of its prefix, its suffix' tokens)."""
    prefixes = [_digest(tokens) for tokens in prompts.prefixes]
    suffixes = [tokens.tobytes() for tokens in prompts.suffixes]
    return [(prefixes[day], suffixes[suffix]) for day, suffix in prompts.pairs]


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _lengths(texts: Iterable[np.ndarray | Tensor], device: torch.device) -> Tensor:
    return torch.tensor([len(tokens) for tokens in texts], device=device)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
