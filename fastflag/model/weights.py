"""Model weights as named tensors: a folder or hub repository of safetensors, or a GGUF file.

Both formats are data only. Pickled weights (.bin, .pt) are refused and no code of a model is run.
"""

import hashlib
import importlib.util
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch

from fastflag.files import InputError, one_line, read_json, reading
from fastflag.model.gguf_file import GGUFFile
from fastflag.model.model_config import ModelConfig, Settings, json_config
from fastflag.model.safetensors_file import EMBEDDING, HEAD, Safetensors

HUB_SECONDS = 4  # for each of connecting and answering, before the hub counts as out of reach
HUB_LIMIT = 9  # in all: name look-up, which no HTTP timeout covers, can hang for longer
PIECE = 16 << 20  # bytes hashed at a time, by each of up to 8 threads


class Weights:
    """Named tensors of one model, read from disk one at a time; names as in Hugging Face's Llama.

    tokenizer_path: the folder that holds tokenizer.json, or the GGUF file.
    source: what the user asked for, for messages.
    """

    def __init__(
        self,
        config: ModelConfig,
        storage: Safetensors | GGUFFile,
        tokenizer_path: Path,
        source: str,
    ):
        self.config = config
        self.tokenizer_path = tokenizer_path
        self.source = source
        self._storage = storage
        _check_shapes(config, storage.shapes, source)
        self._names = dict.fromkeys(expected_shapes(config))

    def names(self) -> list[str]:
        """Every parameter; `lm_head.weight` is none where the embedding stands in for it."""
        return list(self._names)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Parameter `name` on the CPU, the caller's own copy, in `dtype` or as stored (GGUF: fp32).

        Linear weights are [out, in]. Raises InputError for an unreadable tensor or one that holds
        NaN or infinity in `dtype`, and KeyError for a name that `names` lacks.
        """
        if name == HEAD and self.config.tied_embeddings:
            name = EMBEDDING
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
        Raises InputError for a file that can't be read any more.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        with reading(self.source), ThreadPoolExecutor(max_workers=8) as pool:
            pieces = [
                (path, start)
                for path in self._storage.files
                for start in range(0, path.stat().st_size, PIECE)
            ]
            for part in pool.map(_piece_digest, pieces):
                digest.update(part)
        return digest.hexdigest()


def open_weights(model: str) -> Weights:
    """Opens `model` and checks it: config, names and shapes of all tensors, lengths of the files.

    `model` is a folder (config.json, *.safetensors), a .gguf file, `package:NAME` (the one GGUF
    file inside an installed Python package, which is not imported) or `owner/name` on the Hugging
    Face hub. Raises InputError for anything missing, broken or unsupported.
    """
    path = _located(model, ["*.safetensors", "*.json", "tokenizer*"])
    if path.is_dir():
        config = _folder_config(path)
        return Weights(config, Safetensors(path, config.tied_embeddings), path, model)
    file = GGUFFile(path)
    return Weights(file.config, file, path, model)


def open_config(model: str) -> ModelConfig:
    """The config of `model`, named as in `open_weights`; a folder, or the hub, need hold no more
    than config.json. Raises InputError likewise."""
    path = _located(model, ["config.json"])
    return _folder_config(path) if path.is_dir() else GGUFFile(path).config


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of a layer, by its name in it."""
    width, mlp = config.width, config.mlp_width
    rows = {
        "q": config.heads * config.head_dim,
        "k": config.kv_heads * config.head_dim,
        "v": config.kv_heads * config.head_dim,
    }
    layer: dict[str, tuple[int, ...]] = {
        f"self_attn.{part}_proj.weight": (size, width) for part, size in rows.items()
    }
    if config.attention_bias:
        layer |= {f"self_attn.{part}_proj.bias": (size,) for part, size in rows.items()}
    if config.qk_norm:
        layer |= {f"self_attn.{part}_norm.weight": (config.head_dim,) for part in "qk"}
    return layer | {
        "self_attn.o_proj.weight": (width, rows["q"]),
        "mlp.gate_proj.weight": (mlp, width),
        "mlp.up_proj.weight": (mlp, width),
        "mlp.down_proj.weight": (width, mlp),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }


def _located(model: str, hub_files: list[str]) -> Path:
    """The folder or GGUF file that `model` names, with `hub_files` of it fetched from the hub."""
    if model.startswith("package:"):
        return _packaged(model)
    path = Path(os.path.expanduser(model))
    with reading(model):  # a name too long, or in a folder that is not ours to look into
        is_folder, is_file = path.is_dir(), path.is_file()
    if is_folder:
        return path
    if is_file:
        if path.suffix == ".safetensors":
            raise InputError(f"name the folder that holds it and its config.json, {model}")
        return path
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        return _snapshot(model, hub_files)
    raise InputError(f"no such folder or file, {model}")


def _piece_digest(piece: tuple[Path, int]) -> bytes:
    path, start = piece
    with open(path, "rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(PIECE)).digest()


def _check_shapes(config: ModelConfig, shapes: dict[str, tuple[int, ...]], source: str) -> None:
    if config.layers > len(shapes):  # before a broken config makes a list of a billion names
        raise InputError(f"{len(shapes)} tensors are too few for {config.layers} layers, {source}")
    expected = expected_shapes(config)
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


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocabulary, config.width),
        "model.norm.weight": (config.width,),
    }
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocabulary, config.width)
    layer = layer_shapes(config)
    for index in range(config.layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _folder_config(folder: Path) -> ModelConfig:
    if (folder / "adapter_config.json").exists():
        document = read_json(folder / "adapter_config.json")
        base = document.get("base_model_name_or_path") if isinstance(document, dict) else None
        raise InputError(
            f"an adapter of {base or 'another model'}, not a model: give that one, or save the two "
            f"merged (PEFT's merge_and_unload), {folder}"
        )
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise InputError(f"must be a JSON object, {folder / 'config.json'}")
    return json_config(Settings(values, str(folder / "config.json")))


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


def _snapshot(model: str, files: list[str]) -> Path:
    """Folder of the hub's newest version of `model`, with its `files`; of the local cache's if the
    hub is away."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    problem = _hub_problem(model)
    try:
        folder = snapshot_download(
            model,
            allow_patterns=files,
            etag_timeout=HUB_SECONDS,
            local_files_only=problem is not None,
        )
    except Exception as error:  # the hub's HTTP client, and its errors, vary by version
        cause = problem or error
        if isinstance(cause, GatedRepoError):
            what = "the hub wants its licence accepted and a login (hf auth login)"
        elif isinstance(cause, RepositoryNotFoundError):
            what = "no such folder or file, and no such public model on the hub"
        elif problem is None:
            what = f"download failed ({one_line(error)})"
        else:
            what = (
                "no such folder or file, and the hub can't be reached: give a folder or a GGUF file"
            )
        raise InputError(f"{what}, {model}") from None
    return Path(folder)


def _hub_problem(model: str) -> Exception | None:
    """None where the hub answers for `model` within HUB_LIMIT seconds, or what went wrong."""
    from huggingface_hub import HfApi

    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(model, timeout=HUB_SECONDS)
            answer.append(None)
        except Exception as error:  # as above
            answer.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_LIMIT)
    return answer[0] if answer else TimeoutError()
