"""The policy as a table: (day, account text) -> logits and value, one row a distinct prompt.

Shapes: D prefixes (days), S distinct suffixes, U prompts, C width, A actions.
"""

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastflag import caches
from fastflag.config import PolicyConfig
from fastflag.files import InputError
from fastflag.policy import graphs, memory, ops
from fastflag.policy.activations import Activations
from fastflag.policy.arithmetic import DTYPES, device_of, keep_freed_memory
from fastflag.policy.graphs import Graphs
from fastflag.policy.heads import (
    RunningStatistics,
    Statistics,
    make_action_head,
    make_value_head,
    masked_log_softmax,
)
from fastflag.policy.llama import (
    Block,
    LinearFactory,
    prefix_pass,
    suffix_pass,
)
from fastflag.policy.lora import (
    FrozenLinear,
    LoRALinear,
    TrainedLinear,
    matrix_numbers,
    unpacked,
)
from fastflag.policy.quant import NF4Weight
from fastflag.policy.shared_prefix import (
    ROW_MULTIPLE,
    KeysValues,
    Prefixes,
    SuffixLayout,
    padded_up,
    round_up,
)
from fastflag.policy.stage import Stage, content_of, reference_of, side_index
from fastflag.policy.trunk_cache import TrunkCache, TrunkFiles
from fastflag.policy.weights import Weights
from fastflag.prompt.tokens import PromptSet

T = TypeVar("T")

# Counted up when the trunk's arithmetic changes in any bit: activations kept on disk are then new.
_ARITHMETIC = 4
# Prompts of one pass through the trunk. 256 of 14 tokens over prefixes of 150 keep the attention's
# keys and values near 100 MB a layer on SmolLM2-135M.
_TRUNK_CHUNK = 256
# Days that go through the trunk together. Keys and values of 64 days of 150 tokens take 205 MB on
# SmolLM2-135M, and unpacking the matrices is a sixtieth of the work.
_TRUNK_DAYS = 64
# Prefixes of one pass: as many tokens as 256 suffixes of 16 have, or fewer.
_TRUNK_PREFIXES = 16


@dataclass(frozen=True)
class Table:
    """One row a prompt of the PromptSet that it was made from."""

    log_probabilities: Tensor  # [U, A] fp32, -inf where the action is not allowed
    value: Tensor  # [U] fp32
    statistics: Statistics  # those that centred the features

    @staticmethod
    def joined(tables: Sequence["Table"]) -> "Table":
        """The rows of tables that the same statistics centre, one after another."""
        return Table(
            torch.cat([table.log_probabilities for table in tables]),
            torch.cat([table.value for table in tables]),
            tables[0].statistics,
        )

    @cached_property
    def detached(self) -> np.ndarray:
        """The log-probabilities, [U, A] fp32, without gradient."""
        return self.log_probabilities.detach().cpu().numpy()

    @cached_property
    def probabilities(self) -> np.ndarray:
        """[U, A] float64, without gradient, each row's sum 1. Raises InputError for NaN."""
        wide = self.log_probabilities.detach().double().exp().cpu().numpy()
        if np.isnan(wide).any():
            raise InputError(
                "the policy is not finite: lower the learning rates, its probabilities"
            )
        return wide / wide.sum(1, keepdims=True)


@dataclass(frozen=True)
class Days:
    """Prefixes that a policy has read: what suffixes attend to in the top layers, with gradient."""

    place: dict[bytes, int]  # of each prefix, by its digest
    layers: list[Prefixes]  # of each top layer


@dataclass
class _Day:
    """A prefix that goes through the trunk, or has gone."""

    tokens: np.ndarray
    layers: list[KeysValues]  # of each layer passed
    hidden: Tensor | None = None  # [P, C] after the last, where it has gone through now


@dataclass
class _PrefixWork:
    """Days of one padded length on their way through the trunk."""

    days: list[_Day]
    hidden: Tensor  # [days, P, C]


@dataclass
class _SuffixWork:
    """Suffixes of one padded length on their way through the trunk, those of a day together."""

    rows: list[int]
    days: list[_Day]
    hidden: Tensor  # [rows, S, C]
    layout: SuffixLayout


class Policy(nn.Module):
    """A language model with a frozen trunk, a trained top and two heads.

    The configuration names its dtype: "auto" is resolved when a run begins. Raises InputError where
    the configuration does not fit the model.
    """

    def __init__(
        self,
        weights: Weights,
        config: PolicyConfig,
        action_tokens: Sequence[int],
        seed: int,
    ):
        super().__init__()
        self.config = config
        self.model = weights.config
        layers = self.model.layers
        split = self.model.trunk_layers(config.top_layers, weights.source)
        self.dtype = DTYPES[config.dtype]
        self.device = device_of(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = weights.tensor("model.embed_tokens.weight", self.dtype).to(self.device)
        self.trunk = [self._block(weights, index, self._frozen) for index in range(split)]
        self.top = nn.ModuleList(
            self._block(weights, index, self._trained(generator)) for index in range(split, layers)
        )
        # Of type fp32, so that features are not rounded.
        self.final_norm = weights.tensor("model.norm.weight", torch.float32).to(self.device)
        width = self.model.width
        if config.head == "lm":
            unembedding = weights.tensor("lm_head.weight", torch.float32)
            self.action_words = unembedding[list(action_tokens)].to(self.device)
            self.action_head = None
        else:
            self.action_head = make_action_head(config.head, width, generator).to(self.device)
        self.value_head = make_value_head(width).to(self.device)
        self.running = RunningStatistics(width).to(self.device)
        self.cache = TrunkCache(config.trunk_cache_mb * 2**20, self._trunk_files(weights, split))
        # Of the other heads the initial policy is known to be uniform.
        kept = self.named_parameters() if config.head == "lm" else ()
        self._initial = {name: p.detach().clone() for name, p in kept}
        self.activations = Activations(config.memory_budget * 2**20)
        for choose in (graphs.choice, *(op.choice for op in ops.OPS)):
            choose(self.device)  # refuses an environment that asks for what there is not
        self.graphs = self._graphs() if self.device.type == "cuda" else None
        self._staged: tuple[bytes, Stage] | None = None
        self._resident: ExitStack | None = None

    def _evaluate_stage(self, stage: Stage) -> tuple[Tensor, ...]:
        """`evaluate` on blocks, for each row of the stage: log-probabilities and value, and the
        statistics' mean and deviation. Never waits for the device."""
        days, tokens, _ = stage.prefixes.shape
        _, prefixes = prefix_pass(self.top, stage.prefixes, [tokens] * days, keys_values_only=True)
        last = suffix_pass(self.top, stage.suffixes, prefixes, stage.layout, last_only=True)
        features = self._normed(last).index_select(0, stage.place)
        statistics = Statistics.of(features, stage.reference)
        table = self._read_out(features, stage.side, stage.allowed, statistics)
        return table.log_probabilities, table.value, statistics.mean, statistics.deviation

    def read(self, prefixes: Iterable[np.ndarray]) -> Days:
        """The top layers' pass over prefixes, which `evaluate` then goes on from, prompts by
        prompts; with gradient where enabled."""
        tokens = {_digest(prefix): prefix for prefix in prefixes}
        hidden = self._prefix_states(tokens)
        longest, fused = max(map(len, hidden)), self.device.type == "cuda"

        def some(part: slice) -> list[Prefixes]:
            lengths = [*map(len, hidden[part])]
            return prefix_pass(self.top, _padded(hidden[part]), lengths, keys_values_only=True)[1]

        def cost(rows: int) -> int:
            return memory.prefix_bytes(self.model, self.config, rows, longest, fused)

        if torch.is_grad_enabled():
            self.activations.restart()
        parts = self.activations.run(some, len(hidden), cost)
        layers = [Prefixes.joined(layer) for layer in zip(*parts, strict=True)]
        return Days({digest: place for place, digest in enumerate(tokens)}, layers)

    def evaluate(
        self, prompts: PromptSet, statistics: Statistics | None = None, days: Days | None = None
    ) -> Table:
        """One pass of the top layers over the distinct prompts, with gradient where enabled.

        `statistics` centre the features; None takes those of `prompts.reference`, with gradient.
        `days` holds every prefix, where they have been read. Which other prompts are in the set
        never changes a row, on a CPU not in its last bit. Raises ValueError where there are neither
        statistics nor a reference, InputError for a prompt that the model can't read.
        """
        whole = days is None and statistics is None and torch.is_grad_enabled()
        if self.graphs and whole:
            if self._keeps(prompts):
                return self._staged_table(prompts)
            self._staged = None
            self.graphs.forget()
        features = self._features(prompts, days or self.read(prompts.prefixes))
        if statistics is None:
            statistics = Statistics.of(features, reference_of(prompts, self.device))
        count = len(features)
        rows = _eights(np.arange(count))
        side = torch.from_numpy(side_index(prompts)[rows]).to(self.device)
        allowed = torch.from_numpy(prompts.allowed[rows]).to(self.device)
        features = torch.cat((features, features[-1:].expand(len(rows) - count, -1)))
        table = self._read_out(features, side, allowed, statistics)
        return Table(table.log_probabilities[:count], table.value[:count], statistics)

    def _normed(self, last: Tensor) -> Tensor:
        """Last-token states [U, C] -> features [U, C] fp32"""
        return ops.rms_norm(last, self.final_norm, self.model.rms_eps)

    def _read_out(
        self, features: Tensor, side: Tensor, allowed: Tensor, statistics: Statistics
    ) -> Table:
        """What the heads make of features [U, C]; side [U], allowed [U, A]."""
        centred = statistics.centre(features, side)
        if self.action_head is None:
            logits = features @ self.action_words.T
        else:
            logits = self.action_head(centred, side)
        value = self.value_head(centred, side)[:, 0]
        return Table(masked_log_softmax(logits, allowed), value, statistics)

    @torch.no_grad()
    def initial_log_probabilities(self, prompts: PromptSet) -> Tensor:
        """The untrained policy's log-probabilities, [U, A].

        With an action head they are uniform over the allowed actions, because its last layer
        starts at zero; with the language-model head they are the model's own. Those are not kept
        by content: a row's last bits depend on what it was evaluated with, and a resumed run would
        evaluate it with other prompts.
        """
        allowed = torch.from_numpy(prompts.allowed).to(self.device)
        if self.action_head is not None:
            return masked_log_softmax(torch.zeros(allowed.shape, device=self.device), allowed)
        with self._as_initialised():
            return self.evaluate(prompts).log_probabilities

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(parameters of the trained layers, parameters of the heads)."""
        heads = [*self.value_head.parameters()]
        if self.action_head is not None:
            heads += self.action_head.parameters()
        return list(self.top.parameters()), heads

    def _keeps(self, prompts: PromptSet) -> bool:
        """Whether autograd may keep all of an evaluation's work."""
        days, rows = len(prompts.prefixes), len(prompts.pairs)
        prefix, suffix = (max(map(len, texts)) for texts in (prompts.prefixes, prompts.suffixes))
        self.activations.restart()
        of_prefixes = memory.prefix_bytes(self.model, self.config, days, prefix, True)
        fused = self._fused_suffixes()
        of_suffixes = memory.suffix_bytes(self.model, self.config, rows, suffix, prefix, fused)
        return self.activations.keeps(rows, of_prefixes + of_suffixes)

    def _fused_suffixes(self) -> bool:
        """Whether one kernel computes the suffixes' attention. PyTorch has none with a mask for
        query heads that share keys."""
        kernel = ops.prefix_attention.choice(self.device).implementation == "triton"
        alike = self.model.heads == self.model.kv_heads
        return self.device.type == "cuda" and (kernel or alike)

    def lies_ready(self, prompts: PromptSet) -> bool:
        """Whether these are the prompts whose blocks are on the device."""
        return self._staged is not None and self._staged[0] == content_of(prompts)

    def _staged_table(self, prompts: PromptSet) -> Table:
        """`evaluate` by a stage, which is kept until other prompts come."""
        if not self.lies_ready(prompts):
            self._check_lengths(prompts)
            # Days of equal texts have equal states: a stock that stood still.
            tokens = {_digest(text): text for text in prompts.prefixes}
            states = dict(zip(tokens, self._prefix_states(tokens), strict=True))
            prefixes = [states[_digest(text)] for text in prompts.prefixes]
            stage = Stage.of(prompts, prefixes, self._suffix_states(prompts))
            self._staged = content_of(prompts), stage
        stage, count = self._staged[1], len(prompts.pairs)
        log_probabilities, value, mean, deviation = self.graphs(stage)
        statistics = Statistics(mean, deviation, stage.reference.known)
        return Table(log_probabilities[:count], value[:count], statistics)

    def _features(self, prompts: PromptSet, days: Days) -> Tensor:
        """Last-token states under the final norm, [U, C] fp32.

        Texts of one padded length go together: a softmax over another number of keys, though the
        others are masked, has other last bits.
        """
        longest = int(self._check_lengths(prompts)[0].max())
        places = np.array([days.place[_digest(tokens)] for tokens in prompts.prefixes])
        of_row = places[prompts.pairs[:, 0]]
        states = self._suffix_states(prompts)
        size = np.array([round_up(len(state), ROW_MULTIPLE) for state in states])
        fused = self._fused_suffixes()

        def some(chosen: np.ndarray) -> Tensor:
            """Of rows of one size, sorted by day."""
            rows = _eights(chosen)
            present, counts = np.unique(of_row[rows], return_counts=True)
            prefixes = [layer.select(present.tolist()) for layer in days.layers]
            suffixes = _padded([states[row] for row in rows])
            layout = SuffixLayout.build(
                counts.tolist(),
                prefixes[0].lengths,
                _lengths([states[row] for row in rows], self.device),
                suffixes.shape[1],
            )
            last = suffix_pass(self.top, suffixes, prefixes, layout, last_only=True)
            return self._normed(last)[: len(chosen)]

        def alike(rows: np.ndarray) -> list[Tensor]:
            def cost(count: int) -> int:
                tokens = int(size[rows[0]])
                return memory.suffix_bytes(self.model, self.config, count, tokens, longest, fused)

            return self.activations.run(lambda part: some(rows[part]), len(rows), cost)

        order = np.lexsort((of_row, size))
        of_size = np.split(order, np.flatnonzero(np.diff(size[order])) + 1)
        features = [part for rows in of_size for part in alike(rows)]
        places = torch.from_numpy(np.argsort(order)).to(self.device)
        return torch.cat(features).index_select(0, places)

    def _check_lengths(self, prompts: PromptSet) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of each prefix and each suffix."""
        prefixes, suffixes = (
            np.array([*map(len, texts)]) for texts in (prompts.prefixes, prompts.suffixes)
        )
        self.check_length(
            int((prefixes[prompts.pairs[:, 0]] + suffixes[prompts.pairs[:, 1]]).max())
        )
        return prefixes, suffixes

    def check_length(self, longest: int) -> None:
        """Raises InputError for a prompt of more tokens than the model reads."""
        if longest > self.model.max_positions:
            raise InputError(
                f"a prompt can have {longest} tokens, the model reads {self.model.max_positions}: "
                "lower --news-tokens or --window, prompts"
            )

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Inside, a trunk's layer once unpacked stays so, where all fit into the cache's budget:
        a pass over a few prompts takes less time than unpacking the matrices for it."""
        numbers = sum(matrix_numbers(block) for block in self.trunk)
        if numbers * self.dtype.itemsize > self.cache.budget_bytes:
            yield
            return
        try:
            with ExitStack() as self._resident:
                yield
        finally:
            self._resident = None

    @torch.no_grad()
    def _prefix_states(self, prefixes: dict[bytes, np.ndarray]) -> list[Tensor]:
        """What the frozen layers make of each prefix, [P, C]."""
        states = {digest: self.cache.get(b"hidden" + digest) for digest in prefixes}
        missing = [digest for digest, kept in states.items() if kept is None]
        for some in _chunks(missing, _TRUNK_DAYS):
            work = [_Day(prefixes[digest], []) for digest in some]
            self._run_trunk(work, [])
            for digest, done in zip(some, work, strict=True):
                states[digest] = self._keep(done)
        return [state for (state,) in states.values()]

    @torch.no_grad()
    def _suffix_states(self, prompts: PromptSet) -> list[Tensor]:
        """What the frozen layers make of each prompt's suffix, [S, C].

        Suffixes of a padded length go through the trunk together, whatever their days, in products
        of 8 rows or more: so a text's activations have the same bits whatever it is batched with,
        and a resumed run, whose cache is cold, repeats the uninterrupted one exactly.
        """
        keys = _keys(prompts)
        states = [self.cache.get(key) for key in keys]
        missing: dict[int, list[int]] = {}
        for row, day in enumerate(prompts.pairs[:, 0].tolist()):
            if states[row] is None:
                missing.setdefault(day, []).append(row)
        for some in _chunks(list(missing), _TRUNK_DAYS):
            days = {day: self._day_work(prompts.prefixes[day]) for day in some}
            texts = self._suffix_work(prompts, [row for day in some for row in missing[day]], days)
            self._run_trunk(list(days.values()), texts)
            for done in days.values():
                if done.hidden is not None:
                    self._keep(done)
            for done in texts:
                lasts = done.layout.last.tolist()
                for row, hidden, last in zip(done.rows, done.hidden, lasts, strict=True):
                    states[row] = (hidden[: last + 1].clone(),)
                    self.cache.put(keys[row], *states[row])
        return [state for (state,) in states]

    def _day_work(self, tokens: np.ndarray) -> _Day:
        """A day with its keys and values, where they are kept."""
        kept = self.cache.get(b"keys_values" + _digest(tokens)) or ()
        return _Day(tokens, [*zip(kept[0::2], kept[1::2], strict=True)])

    def _prefix_work(self, days: list[_Day]) -> list[_PrefixWork]:
        """The days of `days` that are yet to go through the trunk, in parts of one padded length:
        each by itself, products of 110 tokens took a third longer (2 cores, AVX2)."""
        by_size: dict[int, list[_Day]] = {}
        for day in days:
            if not day.layers:
                by_size.setdefault(round_up(len(day.tokens), ROW_MULTIPLE), []).append(day)
        parts = (some for alike in by_size.values() for some in _chunks(alike, _TRUNK_PREFIXES))
        return [_PrefixWork(some, self._embed([day.tokens for day in some])) for some in parts]

    def _suffix_work(
        self, prompts: PromptSet, rows: list[int], days: dict[int, _Day]
    ) -> list[_SuffixWork]:
        """The suffixes of `rows`, sorted by day, in parts of one padded length each."""
        by_size: dict[int, list[int]] = {}
        for row in rows:
            size = round_up(len(prompts.suffixes[prompts.pairs[row, 1]]), ROW_MULTIPLE)
            by_size.setdefault(size, []).append(row)
        work = []
        for size, alike in by_size.items():
            for some in _chunks(alike, _TRUNK_CHUNK):
                texts = [prompts.suffixes[prompts.pairs[row, 1]] for row in some]
                counts = Counter(prompts.pairs[some, 0].tolist())
                of_days = [days[day] for day in counts]
                layout = SuffixLayout.build(
                    list(counts.values()),
                    [len(day.tokens) for day in of_days],
                    _lengths(texts, self.device),
                    size,
                )
                hidden = self._embed(texts)
                work.append(_SuffixWork(some, of_days, hidden, layout))
        return work

    def _keep(self, done: _Day) -> tuple[Tensor]:
        """Puts what became of a day's prefix into the cache; returns its states, ([P, C],)."""
        digest, states = _digest(done.tokens), (done.hidden,)
        self.cache.put(b"hidden" + digest, *states)
        self.cache.put(b"keys_values" + digest, *(side for layer in done.layers for side in layer))
        return states

    def _run_trunk(self, days: list[_Day], texts: list[_SuffixWork]) -> None:
        """Layer by layer over all days, so that each matrix is unpacked from NF4 once: day by day,
        unpacking took as long as the arithmetic."""
        unread = self._prefix_work(days)
        for number, block in enumerate(self.trunk):
            with self._ready(block):
                for some in unread:
                    lengths = [len(day.tokens) for day in some.days]
                    some.hidden, [layer] = prefix_pass([block], some.hidden, lengths)
                    for day, (key, value) in zip(some.days, layer.days, strict=True):
                        day.layers.append((key.clone(), value.clone()))
                for some in texts:
                    prefixes = [Prefixes.of_days([day.layers[number] for day in some.days])]
                    some.hidden = suffix_pass([block], some.hidden, prefixes, some.layout)
        for some in unread:
            for day, hidden in zip(some.days, some.hidden, strict=True):
                day.hidden = hidden[: len(day.tokens)].clone()

    def _ready(self, block: Block) -> AbstractContextManager:
        """Inside, the layer's matrices lie unpacked; after it too, within `unpacked`."""
        if self._resident is None:
            return unpacked(block, self.dtype)
        self._resident.enter_context(unpacked(block, self.dtype))
        return nullcontext()

    def _embed(self, texts: list[np.ndarray]) -> Tensor:
        """Token ids, padded on the right to a multiple of 8, -> [N, T, C] fp32."""
        size = round_up(max(map(len, texts)), ROW_MULTIPLE)
        ids = torch.zeros(len(texts), size, dtype=torch.int64)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = torch.from_numpy(tokens)
        return self.embedding[ids.to(self.device)].float()

    def _trunk_files(self, weights: Weights, layers: int) -> TrunkFiles | None:
        """Where the trunk's activations outlive the process, under a name that says what made them:
        to the bit, for a resumed run repeats the uninterrupted one."""
        if not self.config.trunk_disk_mb:
            return None
        on = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor()
        made_by = (
            _ARITHMETIC,
            weights.fingerprint,
            layers,
            self.config.trunk_weights,
            self.config.dtype,
            torch.__version__,
            on,
        )
        name = hashlib.blake2b(repr(made_by).encode(), digest_size=8).hexdigest()
        budget = self.config.trunk_disk_mb * 2**20
        return TrunkFiles(caches.own("trunk").folder, name, budget, self.device)

    def _block(self, weights: Weights, index: int, make_linear: LinearFactory) -> Block:
        return Block(weights, index, self.dtype, self.device, make_linear)

    def _frozen(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        return self._stored(weight, bias, self.config.trunk_weights)

    def _stored(self, weight: Tensor, bias: Tensor | None, as_: str) -> FrozenLinear:
        bias, weight = (x if x is None else x.to(self.device) for x in (bias, weight))
        if as_ == "nf4":
            return FrozenLinear(NF4Weight.quantise(weight), bias)
        return FrozenLinear(weight.to(DTYPES[as_]), bias)

    def _trained(self, generator: torch.Generator) -> LinearFactory:
        def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
            if self.config.adaptation == "full":
                return TrainedLinear(weight, bias).to(self.device)
            qlora = self.config.adaptation == "qlora"
            base = self._stored(weight, bias, "nf4" if qlora else self.config.dtype)
            adapter = LoRALinear(base, self.config.lora_rank, self.config.lora_alpha, generator)
            return adapter.to(self.device)

        return make

    def _graphs(self) -> Graphs:
        heads = [head for head in (self.action_head, self.value_head) if head is not None]
        # A budget bounds what is kept, and each graph keeps an evaluation.
        wanted = graphs.choice(self.device).implementation == "on"
        replayed = wanted and not self.config.memory_budget
        if replayed:
            # Capturing is refused while a graph of autograd's from the default stream is alive, as
            # the first table's is when the next gradient step evaluates anew.
            torch.cuda.synchronize(self.device)
            torch.cuda.set_stream(torch.cuda.Stream(self.device))
        capture = torch.cuda.make_graphed_callables if replayed else None
        return Graphs(self._evaluate_stage, nn.ModuleList([*self.top, *heads]), capture)

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


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def _keys(prompts: PromptSet) -> list[bytes]:
    """Each prompt by content: the digests of its prefix and of its suffix."""
    prefixes = [_digest(tokens) for tokens in prompts.prefixes]
    suffixes = [_digest(tokens) for tokens in prompts.suffixes]
    return [b"suffix" + prefixes[day] + suffixes[text] for day, text in prompts.pairs.tolist()]


def _eights(rows: np.ndarray) -> np.ndarray:
    """`rows`, the last of them repeated up to a multiple of 8."""
    return np.append(rows, np.repeat(rows[-1:], -len(rows) % ROW_MULTIPLE))


def _padded(states: list[Tensor]) -> Tensor:
    """N texts' states [T, C] -> [N, T, C], T the longest's up to a multiple of 8."""
    return padded_up(pad_sequence(states, batch_first=True), 1, ROW_MULTIPLE)


def _chunks(rows: list[T], size: int) -> Iterator[list[T]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _lengths(texts: Iterable[np.ndarray | Tensor], device: torch.device) -> Tensor:
    return torch.tensor([len(tokens) for tokens in texts], device=device)
