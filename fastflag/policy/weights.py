"""Model weights as named tensors: a folder or hub repository of safetensors, or a GGUF file.

Both formats are data only. Pickled weights (.bin, .pt) are refused and no code of a model is run.
"""

import hashlib
import importlib.util
import math
import mmap
import re
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastflag.files import InputError, read_json

HUB_SECONDS = 4  # for each of connecting and answering, before the hub counts as out of reach
HUB_LIMIT = 9  # in all: name look-up, which no HTTP timeout covers, can hang for longer
PIECE = 16 << 20  # bytes hashed at a time, by each of up to 8 threads

ARCHITECTURES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a decoder: RMSNorm, rotary embedding, grouped-query attention, SwiGLU."""

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
    """None, {"rope_type": "linear", "factor"} or {"rope_type": "llama3", "factor", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings"}."""
    tied_embeddings: bool
    attention_bias: bool
    """q, k and v have biases (o never has one)."""
    qk_norm: bool
    """q and k are normalised per head, before the rotary embedding."""
    max_positions: int


class Weights:
    """Named tensors of one model, read from disk one at a time; names as in Hugging Face's Llama.

    tokenizer_path: the folder that holds tokenizer.json, or the GGUF file.
    source: what the user asked for, for messages.
    """

    def __init__(
        self,
        config: ModelConfig,
        storage: "_Safetensors | _GGUF",
        tokenizer_path: Path,
        source: str,
    ):
        self.config = config
        self.tokenizer_path = tokenizer_path
        self.source = source
        self._storage = storage
        _check_shapes(config, storage.shapes, source)
        self._names = dict.fromkeys(_expected_shapes(config))

    def names(self) -> list[str]:
        """Every parameter; `lm_head.weight` is none where the embedding stands in for it."""
        return list(self._names)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Parameter `name` on the CPU, the caller's own copy, in `dtype` or as stored (GGUF: fp32).

        Linear weights are [out, in]. Raises InputError for an unreadable tensor or one that holds
        NaN or infinity in `dtype`, and KeyError for a name that `names` lacks.
        """
        if name == "lm_head.weight" and self.config.tied_embeddings:
            name = "model.embed_tokens.weight"
        if name not in self._names:
            raise KeyError(name)
        values = self._storage.read(name)
        values = values if dtype is None else values.to(dtype)
        # One pass without a mask in memory: NaN and infinity survive summation.
        if not torch.isfinite(values.sum(dtype=torch.float32)):
            raise InputError(f"tensor {name} holds NaN or infinity, {self.source}")
        return values

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the model's config and the sha256 of each 16 MiB of its weight files, in hex.

        Every byte counts; names and places of the files don't, so a moved copy is the same model.
        """
        pieces = [
            (path, start)
            for path in self._storage.files
            for start in range(0, path.stat().st_size, PIECE)
        ]
        digest = hashlib.sha256(repr(self.config).encode())
        with ThreadPoolExecutor(max_workers=8) as pool:
            for part in pool.map(_piece_digest, pieces):
                digest.update(part)
        return digest.hexdigest()


def open_weights(model: str) -> Weights:
    """Opens `model` and checks it: config, names and shapes of all tensors, lengths of the files.

    `model` is a folder (config.json, *.safetensors), a .gguf file, `package:NAME` (the one GGUF file
    inside an installed Python package, which is not imported) or `owner/name` on the Hugging Face
    hub. Raises InputError for anything missing, broken or unsupported.
    """
    if model.startswith("package:"):
        return _open_gguf(_packaged(model), model)
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_folder(path, model)
    if path.is_file():
        return _open_gguf(path, model)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        return _open_folder(_snapshot(model), model)
    raise InputError(f"no such folder or file, {model}")


def _piece_digest(piece: tuple[Path, int]) -> bytes:
    path, start = piece
    with open(path, "rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(PIECE)).digest()


def _check_shapes(config: ModelConfig, shapes: dict[str, tuple[int, ...]], source: str) -> None:
    if config.layers > len(shapes):  # before a broken config makes a list of a billion names
        raise InputError(f"{len(shapes)} tensors are too few for {config.layers} layers, {source}")
    expected = _expected_shapes(config)
    for name, shape in expected.items():
        if name not in shapes:
            raise InputError(f"tensor {name} is missing, {source}")
        if shapes[name] != shape:
            raise InputError(f"tensor {name} is {shapes[name]}, should be {shape}, {source}")
    # A parameter left out would silently be another model.
    for name in shapes:
        tied_head = name == "lm_head.weight" and config.tied_embeddings
        if name not in expected and not tied_head and not name.endswith("rotary_emb.inv_freq"):
            raise InputError(f"tensor {name!r} belongs to no {config.architecture} model, {source}")


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, mlp = config.width, config.mlp_width
    rows = {
        "q": config.heads * config.head_dim,
        "k": config.kv_heads * config.head_dim,
        "v": config.kv_heads * config.head_dim,
    }
    layer = {f"self_attn.{part}_proj.weight": (size, width) for part, size in rows.items()}
    if config.attention_bias:
        layer |= {f"self_attn.{part}_proj.bias": (size,) for part, size in rows.items()}
    if config.qk_norm:
        layer |= {f"self_attn.{part}_norm.weight": (config.head_dim,) for part in "qk"}
    layer |= {
        "self_attn.o_proj.weight": (width, rows["q"]),
        "mlp.gate_proj.weight": (mlp, width),
        "mlp.up_proj.weight": (mlp, width),
        "mlp.down_proj.weight": (width, mlp),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    shapes = {
        "model.embed_tokens.weight": (config.vocabulary, width),
        "model.norm.weight": (width,),
    }
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocabulary, width)
    for index in range(config.layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


class _Values:
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


def _checked_config(config: ModelConfig, source: str) -> ModelConfig:
    if config.heads % config.kv_heads:
        raise InputError(f"{config.heads} heads can't share {config.kv_heads} kv heads, {source}")
    if config.head_dim % 2:
        raise InputError(f"head dimension {config.head_dim} is odd, {source}")
    return config


# Safetensors


def _open_folder(folder: Path, source: str) -> Weights:
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise InputError(f"must be a JSON object, {folder / 'config.json'}")
    config = _json_config(_Values(values, str(folder / "config.json")))
    return Weights(config, _Safetensors(folder), folder, source)


def _json_config(values: _Values) -> ModelConfig:
    architecture = values.architecture("model_type")
    values.refuse_unless("hidden_act", "silu")
    values.refuse_unless("mlp_bias", False)
    values.refuse_unless("use_sliding_window", False)
    values.refuse_unless("quantization_config", None)
    # Llama's and Qwen3's attention_bias would give o a bias too; no published model sets it.
    values.refuse_unless("attention_bias", False)
    width, heads = values.whole("hidden_size"), values.whole("num_attention_heads")
    head_dim = 128 if architecture == "qwen3" else max(width // heads, 1)
    rope = _Values(values.get("rope_parameters") or values.get("rope_scaling") or {}, values.source)
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
    return _checked_config(config, values.source)


def _rope_scaling(rope: _Values) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))  # "type" before transformers 4.43
    if kind == "default":
        return None
    if kind == "linear":
        return {"rope_type": kind, "factor": rope.number("factor")}
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        scaling = {"rope_type": kind, **{key: rope.number(key) for key in keys}}
        positions = rope.whole("original_max_position_embeddings")
        return {**scaling, "original_max_position_embeddings": positions}
    raise InputError(f"rope type {kind!r} is not supported, {rope.source}")


class _Safetensors:
    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self._errors = (SafetensorError, OSError, ValueError)
        self._handles: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files = _safetensors_files(folder)
        for path in self.files:
            try:
                handle = safe_open(path, framework="pt")
                names = handle.keys()
                slices = {name: handle.get_slice(name) for name in names}
            except self._errors as error:
                raise InputError(f"broken safetensors file ({_line(error)}), {path}") from None
            for name, part in slices.items():
                if part.get_dtype() not in ("F32", "F16", "BF16"):
                    raise InputError(
                        f"tensor {name!r} is {part.get_dtype()}, not supported, {path}"
                    )
                if name in self.shapes:
                    raise InputError(f"tensor {name!r} is there twice, {path}")
                self._handles[name] = handle
                self.shapes[name] = tuple(part.get_shape())

    def read(self, name: str) -> torch.Tensor:
        try:
            # A copy: the handle's tensor is a view of the mapped file.
            return self._handles[name].get_tensor(name).clone()
        except self._errors as error:
            raise InputError(
                f"can't read tensor {name} ({_line(error)}), {self.files[0].parent}"
            ) from None


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        document = read_json(index)
        parts = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(parts, dict) or not parts:
            raise InputError(f"weight_map is missing or empty, {index}")
        names = set(parts.values()) if all(isinstance(p, str) for p in parts.values()) else {""}
        if any(Path(name).name != name or not name for name in names):
            raise InputError(f"weight_map must name files of its own folder, {index}")
        files = [folder / name for name in sorted(names)]
    else:
        files = sorted(folder.glob("*.safetensors"))
        whole = folder / "model.safetensors"
        files = [whole] if whole in files else files
        if not files:
            pickled = [p for end in ("bin", "pt", "pth") for p in folder.glob(f"*.{end}")]
            found = f"only {pickled[0].name}, which can run code" if pickled else "none here"
            raise InputError(
                f"safetensors weights needed, {found}: convert to safetensors, {folder}"
            )
        if len(files) > 1:
            raise InputError(f"{len(files)} safetensors files and no {index.name}, {folder}")
    for path in files:
        if not path.is_file():
            raise InputError(f"no such file, {path}")
    return files


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)

_GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER = {
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
_GGUF_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _open_gguf(path: Path, source: str) -> Weights:
    header = _Header(path)
    config = _gguf_config(header)
    return Weights(config, _GGUF(header, config), path, source)


class _Header:
    """Metadata and the place of each tensor in a GGUF file, everything checked against its length.

    gguf.GGUFReader takes 2 s for the 98,000 strings of SmolLM2's tokenizer, which are skipped here,
    and a wrong count makes it run for ever.

    metadata: scalars and strings by key; None for an array.
    tensors: stored name -> (shape, GGML type, first byte, bytes).
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                if file.read(4) != b"GGUF":
                    raise InputError(f"not a GGUF file, {path}")
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._offset = 4
            self._parse()
        except OSError as error:
            raise InputError(f"{error.strerror or error}, {path}") from None
        except struct.error:
            raise InputError(f"GGUF file ends early, {path}") from None
        except UnicodeDecodeError:
            raise InputError(f"broken GGUF file, {path}") from None

    def _parse(self) -> None:
        (version,) = self._take("I")
        if version not in (2, 3):
            raise InputError(f"GGUF version {version} is not supported, {self.path}")
        tensors, settings = self._take("QQ")
        self.metadata: dict[str, Any] = {}
        for _ in range(settings):
            key = self._string()
            if key in self.metadata:
                raise InputError(f"broken GGUF file: {key!r} is there twice, {self.path}")
            self.metadata[key] = self._value(*self._take("I"))
        places = {}
        for _ in range(tensors):
            name = self._string()
            (dimensions,) = self._take("I")
            if name in places or dimensions > 4:
                raise InputError(f"broken GGUF file: tensor {name!r}, {self.path}")
            shape = self._take(f"{dimensions}Q")[::-1]
            places[name] = (shape, *self._take("IQ"))
        alignment = _Values(self.metadata, str(self.path)).whole("general.alignment", 32)
        start = -(-self._offset // alignment) * alignment
        self.tensors = {
            name: (shape, *self._extent(name, shape, kind, start + offset))
            for name, (shape, kind, offset) in places.items()
        }

    def _extent(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> tuple:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(kind)
        except ValueError:
            raise InputError(f"tensor {name!r} has unknown type {kind}, {self.path}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or 0 in shape or shape[-1] % block:
            raise InputError(f"tensor {name!r} of shape {shape} can't be {kind.name}, {self.path}")
        size = math.prod(shape) // block * block_bytes
        if start + size > len(self.data):
            raise InputError(f"GGUF file ends early, within tensor {name!r}, {self.path}")
        return kind, start, size

    def _take(self, layout: str) -> tuple:
        values = struct.unpack_from(f"<{layout}", self.data, self._offset)
        self._offset += struct.calcsize(f"<{layout}")
        return values

    def _skip(self, size: int) -> None:
        self._offset += size
        if self._offset > len(self.data):
            raise InputError(f"GGUF file ends early, {self.path}")

    def _string(self) -> str:
        (size,) = self._take("Q")
        start = self._offset
        self._skip(size)
        return self.data[start : self._offset].decode()

    def _value(self, kind: int) -> Any:
        if kind in _GGUF_SCALARS:
            return self._take(_GGUF_SCALARS[kind])[0]
        if kind == _GGUF_STRING:
            return self._string()
        if kind != _GGUF_ARRAY:
            raise InputError(f"broken GGUF file: value of type {kind}, {self.path}")
        item, count = self._take("IQ")
        if item in _GGUF_SCALARS:
            self._skip(count * struct.calcsize(f"<{_GGUF_SCALARS[item]}"))
        elif item == _GGUF_STRING:
            for _ in range(count):
                self._skip(*self._take("Q"))
        else:
            raise InputError(f"broken GGUF file: array of type {item}, {self.path}")
        return None


def _gguf_config(header: _Header) -> ModelConfig:
    general = _Values(header.metadata, str(header.path))
    if general.get("split.count", 1) != 1:
        raise InputError(f"one part of a split GGUF: merge the parts first, {header.path}")
    architecture = general.architecture("general.architecture")
    values = _Values(header.metadata, str(header.path), f"{architecture}.")
    values.refuse_unless("expert_count", 0)
    width, heads = values.whole("embedding_length"), values.whole("attention.head_count")
    head_dim = values.whole("attention.key_length", max(width // heads, 1))
    values.refuse_unless("attention.value_length", head_dim)
    values.refuse_unless("rope.dimension_count", head_dim)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"tensor token_embd.weight is missing, {header.path}")
    config = ModelConfig(
        architecture=architecture,
        layers=values.whole("block_count"),
        width=width,
        heads=heads,
        kv_heads=values.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=values.whole("feed_forward_length"),
        vocabulary=embedding[0][0],
        rms_eps=values.number("attention.layer_norm_rms_epsilon"),
        rope_theta=values.number("rope.freq_base", 10_000.0),
        rope_scaling=None,
        tied_embeddings="output.weight" not in header.tensors,
        attention_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        max_positions=values.whole("context_length"),
    )
    config = _checked_config(config, str(header.path))
    return replace(config, rope_scaling=_gguf_rope_scaling(header, values, config))


def _gguf_rope_scaling(
    header: _Header, values: _Values, config: ModelConfig
) -> dict[str, Any] | None:
    """GGUF keeps Llama 3's scaling as a tensor of divisors [head_dim / 2], not as its settings.

    They are recovered from it: every published Llama 3 differs in `factor` alone, the largest one.
    """
    values.refuse_unless("rope.scaling.type", "none", "linear")
    if values.get("rope.scaling.type") == "linear":
        return {"rope_type": "linear", "factor": values.number("rope.scaling.factor")}
    if "rope_freqs.weight" not in header.tensors:
        return None
    divisors = _dequantised(header, "rope_freqs.weight")
    scaling = {**_LLAMA3_ROPE, "factor": float(divisors.max())}
    if divisors.shape != (config.head_dim // 2,) or not np.allclose(
        divisors, _llama3_divisors(config, scaling), rtol=1e-4
    ):
        raise InputError(f"rope_freqs.weight is not Llama 3's rope scaling, {header.path}")
    return scaling


def _llama3_divisors(config: ModelConfig, scaling: dict[str, Any]) -> np.ndarray:
    """What divides each rotary frequency, [head_dim / 2] (Llama 3.1's rope scaling)."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    waves = scaling["original_max_position_embeddings"] / (
        2 * math.pi * config.rope_theta**exponents
    )
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((waves - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)


def _dequantised(header: _Header, name: str) -> np.ndarray:
    """Tensor `name` as fp32, in its stored shape; a read-only view of the file where it is fp32."""
    from gguf.quants import dequantize

    shape, kind, start, size = header.tensors[name]
    data = np.frombuffer(header.data, dtype=np.uint8, count=size, offset=start)
    try:
        return dequantize(data.reshape(*shape[:-1], -1), kind).reshape(shape)
    except NotImplementedError:
        raise InputError(
            f"tensor {name} of type {kind.name} can't be read, {header.path}"
        ) from None


class _GGUF:
    def __init__(self, header: _Header, config: ModelConfig):
        self._header = header
        self.files = [header.path]
        self._stored = {
            _hugging_face_name(name): name for name in header.tensors if name != "rope_freqs.weight"
        }
        self.shapes = {name: header.tensors[stored][0] for name, stored in self._stored.items()}
        # llama.cpp rotates neighbouring pairs, and reorders q's and k's rows to suit, in llama only.
        permuted = config.architecture == "llama"
        self._rotated = (
            {"q_proj.weight": config.heads, "k_proj.weight": config.kv_heads} if permuted else {}
        )

    def read(self, name: str) -> torch.Tensor:
        values = _dequantised(self._header, self._stored[name])
        heads = self._rotated.get(name.partition("self_attn.")[2])
        if heads:
            rows, columns = values.shape
            pairs = values.reshape(heads, rows // heads // 2, 2, columns)
            values = pairs.swapaxes(1, 2).reshape(rows, columns)
        return torch.from_numpy(np.require(values, dtype=np.float32, requirements="CW"))


def _hugging_face_name(stored: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)
    if layer and layer[2] in _GGUF_LAYER:
        return f"model.layers.{layer[1]}.{_GGUF_LAYER[layer[2]]}.{layer[3]}"
    return _GGUF_NAMES.get(stored, stored)


def _packaged(model: str) -> Path:
    name = model.removeprefix("package:")
    # A dotted name would import its parent, and so run it.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise InputError(f"no such Python package is installed, {model}")
    files = [path for folder in folders for path in Path(folder).rglob("*.gguf")]
    if len(files) != 1:
        raise InputError(f"{len(files)} GGUF files in the package, one needed, {model}")
    return files[0]


# Hugging Face hub


def _snapshot(model: str) -> Path:
    """Folder of the hub's newest version of `model`, or of the local cache's where the hub is away."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    problem = _hub_problem(model)
    try:
        folder = snapshot_download(
            model,
            allow_patterns=["*.safetensors", "*.json", "tokenizer*"],
            etag_timeout=HUB_SECONDS,
            local_files_only=problem is not None,
        )
    except Exception as error:  # noqa: BLE001 - the hub's HTTP client, and its errors, vary by version
        cause = problem or error
        if isinstance(cause, GatedRepoError):
            what = "the hub wants its licence accepted and a login (hf auth login)"
        elif isinstance(cause, RepositoryNotFoundError):
            what = "no such folder or file, and no such public model on the hub"
        elif problem is None:
            what = f"download failed ({_line(error)})"
        else:
            what = (
                "no such folder or file, and the hub can't be reached: give a folder or a GGUF file"
            )
        raise InputError(f"{what}, {model}") from None
    return Path(folder)


def _hub_problem(model: str) -> Exception | None:
    """None where the hub answers for `model` within HUB_LIMIT seconds, otherwise what went wrong."""
    from huggingface_hub import HfApi

    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(model, timeout=HUB_SECONDS)
            answer.append(None)
        except Exception as error:  # noqa: BLE001 - as above
            answer.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_LIMIT)
    return answer[0] if answer else TimeoutError()
