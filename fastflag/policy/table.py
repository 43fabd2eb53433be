"""The policy as a table: (moment, account text) -> logits and value, one row a distinct prompt.

Shapes: D prefixes, U prompts, C width, A actions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from fastflag.config import PolicyConfig
from fastflag.files import InputError
from fastflag.model import ops, packed_attention
from fastflag.model.arithmetic import DTYPES, device_of, keep_freed_memory, name_of
from fastflag.model.joined import adapters_cast
from fastflag.model.llama import prefix_pass, suffix_pass
from fastflag.model.proof import choice
from fastflag.model.recompute import Recompute
from fastflag.model.shared_prefix import Prefixes, SuffixLayout, padded, padded_length
from fastflag.model.weights import Weights
from fastflag.policy import graphs, plan
from fastflag.policy.graphs import Graphs, Replay
from fastflag.policy.heads import (
    RunningStatistics,
    Statistics,
    make_action_head,
    make_value_head,
    masked_log_softmax,
)
from fastflag.policy.layers import frozen, trained, with_parameters
from fastflag.policy.scaling import GradientScale, scaled
from fastflag.policy.stage import Stage, centring_of, content_of, side_index
from fastflag.policy.trunk import Trunk, digest_of
from fastflag.prompt.prompts import PromptSet


@dataclass(frozen=True)
class Table:
    """One row a prompt of the PromptSet that it was made from."""

    log_probabilities: Tensor  # [U, A] fp32, -inf where the action is not allowed
    value: Tensor  # [U] fp32
    statistics: Statistics  # those that centred the features
    replay: Replay | None = None  # of a CUDA graph, where one made it

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
    def values(self) -> np.ndarray:
        """The values, [U] float64, without gradient."""
        return self.value.detach().double().cpu().numpy()

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
class ReadPrefixes:
    """What a policy has read: what suffixes attend to in the top layers, with gradient."""

    place: dict[bytes, int]  # of each prefix, by its digest
    layers: list[Prefixes]  # of each top layer


class Policy(nn.Module):
    """A language model with a frozen trunk, a trained top and two heads.

    The configuration names its dtype: "auto" is resolved when a run begins. Raises InputError where
    the configuration does not fit the model.
    """

    def __init__(
        self, weights: Weights, config: PolicyConfig, action_tokens: Sequence[int], seed: int
    ):
        super().__init__()
        self.device = device_of(config.device)
        self.config = config = replace(config, device=name_of(self.device))
        self._implementations = choice.parsed(config.kernels, self.device.type == "cuda")
        ops.settle(self._implementations)  # before anything is named by it
        self.model = weights.config
        split = self.model.trunk_layers(config.top_layers, weights.source)
        self.dtype = DTYPES[config.dtype]
        if self.device.type == "cpu":
            keep_freed_memory()
        generator = torch.Generator().manual_seed(seed)
        embedding = weights.tensor("model.embed_tokens.weight", self.dtype).to(self.device)
        below = frozen(weights, range(split), config, self.device)
        self.trunk = Trunk(weights, config, embedding, below)
        self.top = trained(weights, range(split, self.model.layers), config, self.device, generator)
        # Of type fp32, so that features are not rounded.
        self.final_norm = weights.tensor("model.norm.weight", torch.float32).to(self.device)
        if config.head == "lm":
            unembedding = weights.tensor("lm_head.weight", torch.float32)
            self.word_rows = unembedding[list(action_tokens)].to(self.device)
            self.action_head = None
        else:
            head = make_action_head(config.head, self.model.width, len(action_tokens), generator)
            self.action_head = head.to(self.device)
        self.value_head = make_value_head(self.model.width).to(self.device)
        self.running = RunningStatistics(self.model.width).to(self.device)
        self.scale = GradientScale().to(self.device) if config.dtype == "fp16" else None
        # Of the other heads the initial policy is known to be uniform.
        kept = self.named_parameters() if config.head == "lm" else ()
        self._initial = {name: p.detach().clone() for name, p in kept}
        on_gpu = self.device.type == "cuda"  # elsewhere the cache lies in another memory
        spare = self.trunk.cache.shrink if on_gpu else lambda: 0
        self.recompute = Recompute(config.memory_budget * 2**20, spare)
        for choose in (graphs.choice, *(op.choice for op in ops.OPS)):
            choose(self.device)  # refuses an environment that asks for what there is not
        self.graphs = self._graphs() if on_gpu and config.top_layers else None
        self._staged: tuple[bytes, Stage] | None = None

    def _evaluate_stage(self, stage: Stage) -> tuple[Tensor, ...]:
        """`evaluate` on blocks, for each row of the stage: log-probabilities and value, and the
        statistics' mean and deviation. Never waits for the device."""
        lengths = [stage.prefixes.shape[1]] * len(stage.prefixes)
        # A kernel casts as it reads, and gives the gradient unrounded.
        by_kernel = ops.lora_linear.choice(self.device).implementation == "triton"
        with adapters_cast(self.top, torch.float32 if by_kernel else self.dtype):
            _, prefixes = prefix_pass(self.top, stage.prefixes, lengths, keys_values_only=True)
            last = suffix_pass(self.top, stage.suffixes, prefixes, stage.layout, last_only=True)
        features = self._normed(last).index_select(0, stage.place)
        statistics = Statistics.of(features, stage.centring)
        table = self._read_out(features, stage.side, stage.allowed, statistics)
        return table.log_probabilities, table.value, statistics.mean, statistics.deviation

    def read(self, prefixes: Iterable[np.ndarray]) -> ReadPrefixes:
        """The top layers' pass over prefixes, which `evaluate` then goes on from, prompts by
        prompts; with gradient where enabled. Those of one padded length go together, as texts do
        (`_features`)."""
        tokens = {digest_of(prefix): prefix for prefix in prefixes}
        if not self.config.top_layers:
            return ReadPrefixes({}, [])
        states = dict(zip(tokens, self.trunk.prefix_states(tokens), strict=True))
        by_size: dict[int, list[bytes]] = {}
        for digest, state in states.items():
            by_size.setdefault(padded_length(len(state)), []).append(digest)
        if torch.is_grad_enabled():
            self.recompute.restart()
        parts = [
            part
            for size, alike in by_size.items()
            for part in self._read_alike([states[digest] for digest in alike], size)
        ]
        layers = [Prefixes.joined(layer) for layer in zip(*parts, strict=True)]
        order = [digest for alike in by_size.values() for digest in alike]
        return ReadPrefixes({digest: place for place, digest in enumerate(order)}, layers)

    def _read_alike(self, states: list[Tensor], size: int) -> list[list[Prefixes]]:
        """Of prefixes of one padded length: parts of them, each one `Prefixes` a layer."""

        def some(part: slice) -> list[Prefixes]:
            lengths = [*map(len, states[part])]
            return prefix_pass(self.top, padded(states[part]), lengths, keys_values_only=True)[1]

        def cost(rows: int) -> int:
            return plan.prefix_bytes(self.model, self.config, rows, size, self._flash())

        return self.recompute.run(some, len(states), cost)

    def evaluate(
        self,
        prompts: PromptSet,
        statistics: Statistics | None = None,
        read: ReadPrefixes | None = None,
    ) -> Table:
        """One pass of the top layers over the distinct prompts, with gradient where enabled.

        `statistics` centre the features; None takes those of `prompts.centring`, with gradient.
        `read` holds every prefix, where they have been read. Which other prompts are in the set
        never changes a row, on a CPU not in its last bit. Raises ValueError without statistics and
        centring prompts, InputError for a prompt that the model can't read.
        """
        ops.settle(self._implementations)  # another policy may have had others
        whole = read is None and statistics is None and torch.is_grad_enabled()
        if self.graphs and whole:
            self.recompute.restart()
            if self.recompute.fits(size := self._staged_bytes(prompts)):
                self.recompute.keep(len(prompts.pairs), size)
                return self._staged_table(prompts, self.graphs)
            self._staged = None
            self.graphs.forget()
        features = self._features(prompts, read or self.read(prompts.prefixes))
        if statistics is None:
            statistics = Statistics.of(features, centring_of(prompts, self.device))
        side = torch.from_numpy(side_index(prompts)).to(self.device)
        allowed = torch.from_numpy(prompts.allowed).to(self.device)
        return self._read_out(features, side, allowed, statistics)

    def _normed(self, last: Tensor) -> Tensor:
        """Last-token states [U, C] -> features [U, C] fp32"""
        return scaled(ops.rms_norm(last, self.final_norm, self.model.rms_eps), self.scale)

    def _read_out(
        self, features: Tensor, side: Tensor, allowed: Tensor, statistics: Statistics
    ) -> Table:
        """What the heads make of features [U, C]; side [U], allowed [U, A]."""
        centred = statistics.centre(features, side)
        if self.action_head is None:
            logits = ops.linear(features, self.word_rows, None, torch.float32)
        else:
            logits = self.action_head(centred, side)
        value = self.value_head(centred, side)[:, 0]
        return Table(masked_log_softmax(logits, allowed), value, statistics)

    @torch.no_grad()
    def initial_log_probabilities(self, prompts: PromptSet) -> Tensor:
        """The untrained policy's log-probabilities, [U, A]: uniform over the allowed actions with
        an action head, whose last layer starts at zero; with the language model's, its own."""
        allowed = torch.from_numpy(prompts.allowed).to(self.device)
        if self.action_head is not None:
            return masked_log_softmax(torch.zeros(allowed.shape, device=self.device), allowed)
        with with_parameters(self, self._initial):
            return self.evaluate(prompts).log_probabilities

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(parameters of the trained layers, parameters of the heads)."""
        action = [] if self.action_head is None else self.action_head.parameters()
        return list(self.top.parameters()), [*self.value_head.parameters(), *action]

    def _staged_bytes(self, prompts: PromptSet) -> int:
        """What autograd keeps of an evaluation by blocks of a stage."""
        prefixes, prefix, rows, suffix = Stage.shape_of(prompts)
        shape, flash = (self.model, self.config), self._flash()
        of_prefixes = plan.prefix_bytes(*shape, prefixes, prefix, flash)
        return of_prefixes + plan.suffix_bytes(*shape, rows, suffix, prefixes, prefix, flash)

    def _flash(self) -> bool:
        """Whether a GPU's attention needs no copies of keys."""
        kernel = ops.prefix_attention.choice(self.device).implementation == "triton"
        return kernel or packed_attention.takes(self.device, self.dtype, self.model.head_dim)

    def lies_ready(self, prompts: PromptSet) -> bool:
        """Whether these are the prompts whose blocks are on the device."""
        return self._staged is not None and self._staged[0] == content_of(prompts)

    def _staged_table(self, prompts: PromptSet, evaluate: Graphs) -> Table:
        """`evaluate` by a stage, which is kept until other prompts come."""
        if (staged := self._staged) is None or staged[0] != content_of(prompts):
            self.check_length(prompts.longest)
            # Equal texts have equal states: a stock that stood still.
            tokens = {digest_of(text): text for text in prompts.prefixes}
            states = dict(zip(tokens, self.trunk.prefix_states(tokens), strict=True))
            prefixes = [states[digest_of(text)] for text in prompts.prefixes]
            stage = Stage.of(prompts, prefixes, self.trunk.suffix_states(prompts))
            staged = self._staged = content_of(prompts), stage
        stage, count = staged[1], len(prompts.pairs)
        (log_probabilities, value, mean, deviation), replay = evaluate(stage)
        statistics = Statistics(mean, deviation, stage.centring.known)
        return Table(log_probabilities[:count], value[:count], statistics, replay)

    def _features(self, prompts: PromptSet, read: ReadPrefixes) -> Tensor:
        """Last-token states under the final norm, [U, C] fp32.

        Texts of one padded length go together: a softmax over another number of keys, though the
        others are masked, has other last bits.
        """
        self.check_length(prompts.longest)
        if not self.config.top_layers:
            return self._normed(torch.cat(self.trunk.suffix_states(prompts)))
        of_prefix = np.array([read.place[digest_of(tokens)] for tokens in prompts.prefixes])
        # Attention and its backward pass then cost what these take, not all that were read.
        asked, of_row = np.unique(of_prefix[prompts.pairs[:, 0]], return_inverse=True)
        layers = [layer.select(asked.tolist()) for layer in read.layers]
        lengths = layers[0].lengths
        longest = max(lengths)  # a GPU pads all to it
        states = self.trunk.suffix_states(prompts)
        size = np.array([padded_length(len(state)) for state in states])
        flash = self._flash()

        def some(rows: np.ndarray) -> Tensor:
            """Of rows of one size, sorted by prefix."""
            suffixes = padded([states[row] for row in rows])
            layout = SuffixLayout.build(
                np.bincount(of_row[rows], minlength=len(lengths)).tolist(),
                lengths,
                _lengths([states[row] for row in rows], self.device),
                suffixes.shape[1],
            )
            last = suffix_pass(self.top, suffixes, layers, layout, last_only=True)
            return self._normed(last)

        def alike(rows: np.ndarray) -> list[Tensor]:
            tokens, count_of_prefixes = int(size[rows[0]]), len(np.unique(of_row[rows]))

            def cost(count: int) -> int:
                return plan.suffix_bytes(
                    self.model, self.config, count, tokens, count_of_prefixes, longest, flash
                )

            return self.recompute.run(lambda part: some(rows[part]), len(rows), cost)

        order = np.lexsort((of_row, size))
        of_size = np.split(order, np.flatnonzero(np.diff(size[order])) + 1)
        features = [part for rows in of_size for part in alike(rows)]
        places = torch.from_numpy(np.argsort(order)).to(self.device)
        return torch.cat(features).index_select(0, places)

    def check_length(self, longest: int) -> None:
        """Raises InputError for a prompt of more tokens than the model reads."""
        if longest > self.model.max_positions:
            raise InputError(
                f"a prompt can have {longest} tokens, the model reads {self.model.max_positions}: "
                "lower --news-tokens or --window, prompts"
            )

    def _graphs(self) -> Graphs:
        modules = nn.ModuleList(filter(None, [*self.top, self.action_head, self.value_head]))
        # A budget bounds what is kept, and each graph keeps an evaluation.
        settings = not self.config.memory_budget, self.config.graphs
        return graphs.made_for(self.device, self._evaluate_stage, modules, *settings)


def _lengths(texts: Iterable[np.ndarray | Tensor], device: torch.device) -> Tensor:
    return torch.tensor([len(tokens) for tokens in texts], device=device)
