"""A market whose news tells the next day's direction, and a small random model to learn it."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from fastflag.market.bars import Market, News

RISES = (
    "Profit beats every forecast",
    "Orders jump to a record",
    "Regulator clears the merger",
    "Guidance raised for the year",
    "Analysts upgrade the shares",
    "Dividend doubled after strong sales",
    "Rival withdraws from the market",
    "New plant opens ahead of plan",
)
FALLS = (
    "Loss widens on weak demand",
    "Factory fire halts output",
    "Regulator opens a fraud inquiry",
    "Guidance cut for the year",
    "Analysts downgrade the shares",
    "Chief executive quits suddenly",
    "Largest customer cancels contract",
    "Recall ordered after defects",
)
NEUTRAL = (
    "Annual meeting set for spring",
    "Office moves to a new address",
    "Sponsor of the city marathon",
    "Company marks its anniversary",
)


def planted_market(days: int, seed: int, shuffled: bool = False, drift: float = 0.001) -> Market:
    """Every close brings one telling headline and one neutral one; the next day goes that way by
    1% to 2%. With `shuffled` the headlines are dealt to days at random and tell nothing."""
    random = np.random.default_rng(seed)
    up = random.random(days) < 0.5
    size = random.uniform(0.01, 0.02, days)
    returns = np.concatenate([[0.0], (np.where(up, size, -size) + drift)[:-1]])
    close = 100 * np.exp(np.cumsum(returns))
    opened = np.concatenate([[100.0], close[:-1]])
    dates = np.busday_offset("2001-01-01", np.arange(days)).astype("datetime64[D]")
    telling = random.permutation(up) if shuffled else up
    news = []
    for day, rises in zip(dates, telling, strict=True):
        told = random.choice(RISES if rises else FALLS)
        moment = day.astype("datetime64[s]") + np.timedelta64(15 * 3600, "s")
        for text in random.permutation([told, random.choice(NEUTRAL)]):
            news.append(News(published=moment, available=moment, symbol="", text=str(text)))
    column = lambda values: np.asarray(values, float)[:, None]  # noqa: E731
    return Market(
        dates=dates,
        symbols=("PLANTED",),
        open=column(opened),
        high=column(np.maximum(opened, close)),
        low=column(np.minimum(opened, close)),
        close=column(close),
        volume=np.full((days, 1), 1e6),
        split=np.ones((days, 1)),
        dividend=np.zeros((days, 1)),
        news=tuple(news),
    )


def write_tiny_model(folder: Path, tokenizer_json: str, seed: int = 0, width: int = 64) -> Path:
    """A random Llama of 2 layers in Hugging Face's layout, with the given tokenizer."""
    heads, kv_heads, mlp, vocabulary = 4, 2, 128, 49152
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for layer in range(2):
        stem = f"model.layers.{layer}."
        shapes |= {
            stem + "input_layernorm.weight": (width,),
            stem + "post_attention_layernorm.weight": (width,),
            stem + "self_attn.q_proj.weight": (width, width),
            stem + "self_attn.k_proj.weight": (width // heads * kv_heads, width),
            stem + "self_attn.v_proj.weight": (width // heads * kv_heads, width),
            stem + "self_attn.o_proj.weight": (width, width),
            stem + "mlp.gate_proj.weight": (mlp, width),
            stem + "mlp.up_proj.weight": (mlp, width),
            stem + "mlp.down_proj.weight": (width, mlp),
        }

    def initial(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape)
        scale = 1.0 if "embed" in name else shape[1] ** -0.5
        return torch.randn(shape, generator=generator) * scale

    tensors = {name: initial(name, shape) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer_json)
    return folder
