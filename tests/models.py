"""Small models and prompts, and what transformers makes of them, prompt by prompt."""

import uuid

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastflag.config import PolicyConfig
from fastflag.model.model_config import ModelConfig
from fastflag.prompt.prompts import PromptSet

VOCABULARY = 50
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
EXACT = PolicyConfig(dtype="fp32", trunk_weights="fp32", top_layers=1, device="cpu")


def tiny(architecture, **changes):
    """A random transformers model: every bias and norm weight of its own, unlike a fresh one's."""
    config, model = MODELS[architecture]
    made = model(config(**{**TINY, **changes})).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            parameter.data = noise if "embed" in name else noise * parameter.shape[1] ** -0.5
        else:
            parameter.data = (0.0 if name.endswith("bias") else 1.0) + 0.3 * noise
    return made


class Given:
    """Weights from a dict, in the place of those of a file."""

    source = "memory"

    def __init__(self, config: ModelConfig, tensors):
        self.config = config
        self.tensors = tensors
        self.fingerprint = uuid.uuid4().hex

    def names(self):
        return list(self.tensors)

    def tensor(self, name, dtype=None):
        if name == "lm_head.weight" and self.config.tied_embeddings:
            name = "model.embed_tokens.weight"
        return self.tensors[name].to(dtype or self.tensors[name].dtype)


def texts(lengths, seed, first=1):
    """Random token ids, none below `first`: token 0 is what padding is made of."""
    random = np.random.default_rng(seed)
    return tuple(random.integers(first, VOCABULARY, n).astype(np.int32) for n in lengths)


def prompt_set(prefixes, suffixes, pairs=None, seed=0):
    """Every suffix after every prefix, or `pairs`. Sides go round with the suffixes; the
    first prompt of each day and side centres."""
    if pairs is None:
        pairs = [(d, s) for d in range(len(prefixes)) for s in range(len(suffixes))]
    pairs = np.array(pairs, dtype=np.int32)
    allowed = np.random.default_rng(seed).random((len(pairs), 3)) < 0.6
    allowed[:, 1] = True
    side = np.array([0, 1, -1], dtype=np.int8)[pairs[:, 1] % 3]
    keys = np.stack([pairs[:, 0], side], axis=1)
    centring = np.unique(keys, axis=0, return_index=True)[1].astype(np.int32)
    return PromptSet(prefixes, suffixes, pairs, side, allowed, np.sort(centring))


def last_states(model, prompts):
    """Last-token states under the final norm [U, C]: one full forward of transformers a prompt."""
    rows = []
    for row in range(len(prompts.pairs)):
        ids = torch.from_numpy(prompts.tokens(row)).long()[None]
        rows.append(model(input_ids=ids).last_hidden_state[0, -1])
    return torch.stack(rows)


def relative(ours, theirs):
    """The largest difference, relative to the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
