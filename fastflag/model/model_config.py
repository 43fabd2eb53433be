"""Shape and constants of a model, and how they are checked as they are read."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastflag.files import InputError

ARCHITECTURES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with RMSNorm, rotary embedding, grouped-query attention and SwiGLU."""

    architecture: str
    """One of ARCHITECTURES."""
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    """Rows of the embedding; a tokenizer may use fewer."""
    rms_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """None, {"rope_type": "linear", "factor"} or {"rope_type": "llama3", "factor",
    "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}."""
    tied_embeddings: bool
    attention_bias: bool
    """q, k and v have biases (o never has one)."""
    qk_norm: bool
    """q and k are normalised per head, before the rotary embedding."""
    max_positions: int

    def trunk_layers(self, top_layers: int, source: str) -> int:
        """How many layers lie below the top ones. Raises InputError where it has not so many."""
        if not 0 <= top_layers <= self.layers:
            raise InputError(f"top_layers must be 0 to {self.layers}, not {top_layers}, {source}")
        return self.layers - top_layers

    def rotary_frequencies(self) -> np.ndarray:
        """Radians a position of each pair of a head's numbers, [head_dim / 2] float64.

        theta^(-2i / head_dim) (RoFormer, section 3.2.2), divided by `factor` under linear scaling.
        Llama 3 divides slow ones by `factor`, keeps fast ones, and goes from one to the other in
        proportion to the turns that a frequency makes within the original positions.
        """
        plain = self.rope_theta ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        scaling = self.rope_scaling
        if scaling is None:
            return plain
        if scaling["rope_type"] == "linear":
            return plain / scaling["factor"]
        turns = scaling["original_max_position_embeddings"] * plain / (2 * np.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return plain * (kept + (1.0 - kept) / scaling["factor"])


class Settings:
    """Settings of a config.json or of GGUF metadata, checked as they are read."""

    def __init__(self, values: dict[str, Any], source: str, prefix: str = ""):
        self.values = values
        self.source = source
        self.prefix = prefix

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(self.prefix + key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value <= 0:
            raise InputError(f"{self.prefix + key} must be a whole number above 0, {self.source}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise InputError(f"{self.prefix + key} must be a number above 0, {self.source}")
        return float(value)

    def architecture(self, key: str) -> str:
        value = self.get(key)
        if value not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise InputError(f"{key} {value!r} is not supported ({known} are), {self.source}")
        return value

    def refuse_unless(self, key: str, *accepted: Any) -> None:
        """`accepted` are the supported values; a missing key counts as the first."""
        value = self.get(key, accepted[0])
        if value not in accepted:
            raise InputError(f"{self.prefix + key} {value!r} is not supported, {self.source}")


def checked_config(config: ModelConfig, source: str) -> ModelConfig:
    if config.heads % config.kv_heads:
        raise InputError(f"{config.heads} heads can't share {config.kv_heads} kv heads, {source}")
    if config.head_dim % 2:
        raise InputError(f"head dimension {config.head_dim} is odd, {source}")
    return config


def json_config(values: Settings) -> ModelConfig:
    """From the settings of a Hugging Face config.json. Raises InputError for unsupported ones."""
    architecture = values.architecture("model_type")
    values.refuse_unless("hidden_act", "silu")
    values.refuse_unless("mlp_bias", False)
    values.refuse_unless("use_sliding_window", False)
    values.refuse_unless("quantization_config", None)
    # Llama's and Qwen3's attention_bias would give o a bias too; no published model sets it.
    values.refuse_unless("attention_bias", False)
    width, heads = values.whole("hidden_size"), values.whole("num_attention_heads")
    head_dim = 128 if architecture == "qwen3" else max(width // heads, 1)
    rope = Settings(
        values.get("rope_parameters") or values.get("rope_scaling") or {}, values.source
    )
    if not isinstance(rope.values, dict):
        raise InputError(f"rope parameters must be a JSON object, {values.source}")
    for holder in (values, rope):
        holder.refuse_unless("partial_rotary_factor", 1.0)
    config = ModelConfig(
        architecture=architecture,
        layers=values.whole("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=values.whole("num_key_value_heads", heads),
        head_dim=values.whole("head_dim", head_dim),
        mlp_width=values.whole("intermediate_size"),
        vocabulary=values.whole("vocab_size"),
        rms_eps=values.number("rms_norm_eps", 1e-6),
        rope_theta=rope.number("rope_theta", values.number("rope_theta", 10_000.0)),
        rope_scaling=_rope_scaling(rope),
        tied_embeddings=values.get("tie_word_embeddings", False) is True,
        attention_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        max_positions=values.whole("max_position_embeddings", 2048),
    )
    return checked_config(config, values.source)


def _rope_scaling(rope: Settings) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))  # "type" before transformers 4.43
    if kind == "default":
        return None
    if kind == "linear":
        return {"rope_type": kind, "factor": rope.number("factor")}
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        factors = {key: rope.number(key) for key in keys}
        if factors["low_freq_factor"] >= factors["high_freq_factor"]:
            raise InputError(f"low_freq_factor must be below high_freq_factor, {rope.source}")
        positions = rope.whole("original_max_position_embeddings")
        return {"rope_type": kind, **factors, "original_max_position_embeddings": positions}
    raise InputError(f"rope type {kind!r} is not supported, {rope.source}")
