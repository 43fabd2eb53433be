"""The plain way: transformers + PEFT, one full prompt for every environment step.

The same weights (the trunk's NF4 matrices unpacked), adapters, heads, centring and loss as the
policy it is made from, so that its gradient is the one FastFLAG's is compared with.
"""

import copy
from functools import partial

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastflag.config import AlgorithmConfig
from fastflag.learn.objective import loss_of
from fastflag.learn.samples import Samples
from fastflag.model.linear import FrozenLinear
from fastflag.model.llama import LINEARS
from fastflag.model.weights import Weights
from fastflag.policy.heads import Centring, Statistics, masked_log_softmax
from fastflag.policy.table import Policy
from fastflag.prompt.prompts import PromptSet


class PlainPolicy:
    """N prompts, C width, A actions."""

    def __init__(self, policy: Policy, weights: Weights, dtype: torch.dtype | None = None):
        """`dtype` is that of the arithmetic, the policy's own by default; weights are rounded to
        the policy's in any case."""
        config = policy.config
        split = weights.config.layers - config.top_layers
        self.device = policy.device
        model = _llama(weights).to(policy.dtype)
        for number, block in enumerate(policy.trunk.blocks):
            for short, name in LINEARS.items():
                frozen: FrozenLinear = getattr(block, short)
                with torch.no_grad():
                    matrix = frozen.matrix(policy.dtype)
                    model.layers[number].get_submodule(name).weight.copy_(matrix)
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=0.0,
            target_modules=[
                f"layers.{number}.{name}"
                for number in range(split, weights.config.layers)
                for name in LINEARS.values()
            ],
        )
        model = model.to(self.device, dtype or policy.dtype)
        if dtype is torch.float64:
            _normalise_in_fp64(model)
        self.model = get_peft_model(model, lora)
        self.adapters: dict[str, Tensor] = {}
        layers = self.model.base_model.model.layers
        for index, block in enumerate(policy.top):
            for short, name in LINEARS.items():
                theirs = layers[split + index].get_submodule(name)
                for letter in "ab":
                    weight = getattr(theirs, f"lora_{letter.upper()}")["default"].weight
                    ours = getattr(getattr(block, short), f"lora_{letter}").data
                    weight.data = ours.to(dtype if dtype is torch.float64 else ours.dtype).clone()
                    self.adapters[f"top.{index}.{short}.lora_{letter}"] = weight
        self.head_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        self.action_head = copy.deepcopy(policy.action_head).to(self.head_dtype)
        self.value_head = copy.deepcopy(policy.value_head).to(self.head_dtype)

    def features(self, prompts: list[np.ndarray]) -> Tensor:
        """Last-token states [N, C] of whole prompts, in one batch padded on the right: as
        attention is causal no mask is needed, which is the fastest way."""
        states = self.model(input_ids=_padded(prompts, self.device), use_cache=False)
        return _last(states.last_hidden_state, prompts).to(self.head_dtype)

    def prefix_cache(self, prefix: np.ndarray, copies: int) -> object:
        """transformers' own cache of a prefix, for so many suffixes."""
        cache = self.model(input_ids=_padded([prefix], self.device), use_cache=True).past_key_values
        cache.batch_repeat_interleave(copies)
        return cache

    def suffix_features(self, cache: object, prefix: int, suffixes: list[np.ndarray]) -> Tensor:
        """Last-token states [N, C] of suffixes that go on from a cache of `prefix` tokens."""
        ids = _padded(suffixes, self.device)
        places = torch.arange(prefix, prefix + ids.shape[1], device=self.device)[None]
        states = self.model(input_ids=ids, past_key_values=cache, position_ids=places)
        return _last(states.last_hidden_state, suffixes).to(self.head_dtype)

    def heads(
        self, features: Tensor, prompts: PromptSet, rows: np.ndarray, statistics: Statistics
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N, A] and values [N] of `rows` [N] of `prompts`."""
        side = torch.from_numpy(prompts.side[rows]).long().to(self.device) + 1
        centred = statistics.centre(features, side)
        allowed = torch.from_numpy(prompts.allowed[rows]).to(self.device)
        logits = self.action_head(centred, side)
        return masked_log_softmax(logits, allowed), self.value_head(centred, side)[:, 0]

    def gradient(
        self, prompts: PromptSet, rows: np.ndarray, samples: Samples, config: AlgorithmConfig
    ) -> dict[str, Tensor]:
        """The loss' gradient by parameter: every sample, and every centring prompt, whole."""
        side = prompts.side[prompts.centring].astype(np.int64) + 1
        centre = Centring.of(np.arange(len(side)), side, self.device)
        centring = self.features([prompts.tokens(row) for row in prompts.centring])
        features = self.features([prompts.tokens(row) for row in rows])
        made = self.heads(features, prompts, rows, Statistics.of(centring, centre))
        loss_of(*made, samples, config)[0].backward()
        named = self.adapters | {
            f"{head}.{name}": parameter
            for head in ("action_head", "value_head")
            for name, parameter in getattr(self, head).named_parameters()
        }
        return {name: parameter.grad for name, parameter in named.items()}


def _llama(weights: Weights) -> LlamaModel:
    config = weights.config
    model = LlamaModel(
        LlamaConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            vocab_size=config.vocabulary,
            rms_norm_eps=config.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            max_position_embeddings=config.max_positions,
        )
    )
    tensors = {
        name.removeprefix("model."): weights.tensor(name)
        for name in weights.names()
        if name.startswith("model.")
    }
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def _normalise_in_fp64(model: LlamaModel) -> None:
    """transformers' RMSNorm rounds to fp32, whatever the model's dtype."""
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            shape, epsilon = module.weight.shape, module.variance_epsilon
            module.forward = partial(
                rms_norm, normalized_shape=shape, weight=module.weight, eps=epsilon
            )


def _padded(texts: list[np.ndarray], device: torch.device) -> Tensor:
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, tokens in enumerate(texts):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
    return ids.to(device)


def _last(states: Tensor, texts: list[np.ndarray]) -> Tensor:
    return states[torch.arange(len(texts)), torch.tensor([len(tokens) - 1 for tokens in texts])]
