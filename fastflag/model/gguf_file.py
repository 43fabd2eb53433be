"""A GGUF file as a model: its config, and its tensors under Hugging Face's names."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastflag.files import InputError
from fastflag.model.model_config import ModelConfig, Settings, checked_config
from fastflag.prompt.gguf_header import GGUFHeader, StoredTensor

_HUGGING_FACE_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class GGUFFile:
    """Config and tensors of one GGUF file, every place checked against the file's length.

    files: the one file. shapes: shape of each tensor by Hugging Face's name. Raises InputError for
    anything missing, broken or unsupported.
    """

    def __init__(self, path: Path):
        self.files = [path]
        tensors = _Tensors(GGUFHeader(path))
        self._tensors = tensors
        self.config = _config(tensors)
        self._stored = {
            _hugging_face_name(name): name for name in tensors.places if name != "rope_freqs.weight"
        }
        self.shapes = {name: tensors.places[stored].shape for name, stored in self._stored.items()}
        # llama.cpp rotates neighbouring pairs, and reorders q's and k's rows to suit: llama's only.
        permuted = self.config.architecture == "llama"
        heads = {"q_proj.weight": self.config.heads, "k_proj.weight": self.config.kv_heads}
        self._rotated = heads if permuted else {}

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` as fp32, the caller's own copy."""
        values = self._tensors.dequantised(self._stored[name])
        heads = self._rotated.get(name.partition("self_attn.")[2])
        if heads:
            rows, columns = values.shape
            pairs = values.reshape(heads, rows // heads // 2, 2, columns)
            values = pairs.swapaxes(1, 2).reshape(rows, columns)
        return torch.from_numpy(np.require(values, dtype=np.float32, requirements=["C", "W"]))


class _Tensors:
    """The tensors behind a header, `places` by stored name."""

    def __init__(self, header: GGUFHeader):
        self.header = header
        self.path = header.path
        self.places = header.tensors
        alignment = Settings(header.metadata, str(header.path)).whole("general.alignment", 32)
        self._start = -(-header.end // alignment) * alignment
        for name in self.places:
            self._extent(name)

    def _extent(self, name: str) -> tuple[Any, int, int]:
        """GGML type, first byte and size in bytes."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        place: StoredTensor = self.places[name]
        try:
            kind = GGMLQuantizationType(place.kind)
        except ValueError:
            raise InputError(
                f"tensor {name!r} has unknown type {place.kind}, {self.path}"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        shape = place.shape
        if not shape or 0 in shape or shape[-1] % block:
            raise InputError(f"tensor {name!r} of shape {shape} can't be {kind.name}, {self.path}")
        start, size = self._start + place.offset, math.prod(shape) // block * block_bytes
        if start + size > len(self.header.data):
            raise InputError(f"GGUF file ends early, within tensor {name!r}, {self.path}")
        return kind, start, size

    def dequantised(self, name: str) -> np.ndarray:
        """As fp32, in the stored shape; a read-only view of the file where it is fp32 there."""
        from gguf.quants import dequantize

        kind, start, size = self._extent(name)
        shape = self.places[name].shape
        data = np.frombuffer(self.header.data, dtype=np.uint8, count=size, offset=start)
        try:
            return dequantize(data.reshape(*shape[:-1], -1), kind).reshape(shape)
        except NotImplementedError:
            raise InputError(
                f"tensor {name} of type {kind.name} can't be read, {self.path}"
            ) from None


def _config(tensors: _Tensors) -> ModelConfig:
    metadata, source = tensors.header.metadata, str(tensors.path)
    general = Settings(metadata, source)
    if general.get("split.count", 1) != 1:
        raise InputError(f"one part of a split GGUF: merge the parts first, {source}")
    architecture = general.architecture("general.architecture")
    values = Settings(metadata, source, f"{architecture}.")
    values.refuse_unless("expert_count", 0)
    width, heads = values.whole("embedding_length"), values.whole("attention.head_count")
    head_dim = values.whole("attention.key_length", max(width // heads, 1))
    values.refuse_unless("attention.value_length", head_dim)
    values.refuse_unless("rope.dimension_count", head_dim)
    embedding = tensors.places.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"tensor token_embd.weight is missing, {source}")
    config = ModelConfig(
        architecture=architecture,
        layers=values.whole("block_count"),
        width=width,
        heads=heads,
        kv_heads=values.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=values.whole("feed_forward_length"),
        vocabulary=embedding.shape[0],
        rms_eps=values.number("attention.layer_norm_rms_epsilon"),
        rope_theta=values.number("rope.freq_base", 10_000.0),
        rope_scaling=None,
        tied_embeddings="output.weight" not in tensors.places,
        attention_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        max_positions=values.whole("context_length"),
    )
    config = checked_config(config, source)
    return replace(config, rope_scaling=_rope_scaling(tensors, values, config))


def _rope_scaling(
    tensors: _Tensors, values: Settings, config: ModelConfig
) -> dict[str, Any] | None:
    """GGUF keeps Llama 3's scaling as a tensor of divisors [head_dim / 2], not as its settings.

    They are recovered from it: every published Llama 3 differs in `factor` alone, the largest one.
    """
    values.refuse_unless("rope.scaling.type", "none", "linear")
    if values.get("rope.scaling.type") == "linear":
        return {"rope_type": "linear", "factor": values.number("rope.scaling.factor")}
    if "rope_freqs.weight" not in tensors.places:
        return None
    divisors = tensors.dequantised("rope_freqs.weight")
    scaling = {**_LLAMA3_ROPE, "factor": float(divisors.max())}
    scaled = replace(config, rope_scaling=scaling)
    expected = config.rotary_frequencies() / scaled.rotary_frequencies()
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(f"rope_freqs.weight is not Llama 3's rope scaling, {tensors.path}")
    return scaling


def _hugging_face_name(stored: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    return _HUGGING_FACE_NAMES.get(stored, stored)
