"""A random model that is small enough to train in a test."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


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
