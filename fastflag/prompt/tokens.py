"""Text to token ids."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from fastflag.files import InputError, one_line, read_json
from fastflag.prompt.gguf_header import read_gguf_metadata

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _PreTokenizer:
    """How text is split before byte-level BPE: by each pattern in turn, every match a piece."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is itself in the vocabulary is taken whole
    normalize: bool = False  # NFC


# GGUF files name the splitting and do not hold it. The patterns are those of the models' own
# tokenizer.json; llama.cpp's src/llama-vocab.cpp has the same under the same names.
_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer((_GPT2,)),
    "smollm": _PreTokenizer((r"\p{N}", _GPT2)),
    "llama-bpe": _PreTokenizer((_LLAMA3,), ignore_merges=True),
    "qwen2": _PreTokenizer((_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),), normalize=True),
}
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types


class Tokenizer:
    """A byte-level BPE tokenizer; `backend` is the `tokenizers.Tokenizer` inside."""

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.no_truncation()
        backend.no_padding()
        # News is untrusted: "<|im_end|>" in a text stays those ten characters.
        backend.encode_special_tokens = True
        self.backend = backend

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a tokenizer.json, a folder that holds one, or a GGUF file.

        Raises InputError for a missing, truncated or foreign file and an unknown kind of tokenizer.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if path.suffix.lower() == ".gguf":
            return cls(_from_gguf(read_gguf_metadata(path, "tokenizer."), path))
        read_json(path)  # its message says where the JSON breaks
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"not a tokenizer ({one_line(error)}), {path}") from None

    @property
    def largest(self) -> int:
        """The largest token id."""
        return max(self.backend.get_vocab().values(), default=-1)

    def encode(self, text: str) -> np.ndarray:
        """Token ids [n] int32. None are added, and control tokens spelled in `text` are text.

        Raises InputError for a text that the tokenizer has no tokens for.
        """
        try:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"the tokenizer can't read {text[:40]!r} ({error})") from None
        if text and not ids:
            raise InputError(f"the tokenizer has no tokens for {text[:40]!r}")
        return np.array(ids, dtype=np.int32)

    def truncate(self, text: str, limit: int) -> str:
        """The longest start of `text` of at most `limit` tokens that ends with a whole word.

        Where the text has no spaces, it is cut between characters.
        """
        offsets = self.backend.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= limit:
            return text
        # The first token left out may begin inside a character: that character goes too.
        start = text[: offsets[limit][0]].rstrip()
        if text[len(start)].isspace():
            return start
        return start.rpartition(" ")[0].rstrip() or start.rstrip("0123456789")

    def decode(self, ids: np.ndarray) -> str:
        """The text of token ids [n], control tokens spelled out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)


def _from_gguf(fields: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    model = fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise InputError(f"tokenizer model {model!r} is not supported (gpt2 is), {path}")
    name = fields.get("tokenizer.ggml.pre")
    pre_tokenizer = _PRE_TOKENIZERS.get(str(name))
    if pre_tokenizer is None:
        known = ", ".join(_PRE_TOKENIZERS)
        raise InputError(f"pre-tokenizer {name!r} is not supported ({known} are), {path}")
    try:
        tokens = fields["tokenizer.ggml.tokens"]
        types = fields["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        if len(vocabulary) != len(tokens) or len(types) != len(tokens):
            raise ValueError("repeated tokens, or not one type for each")
        bpe = models.BPE(vocabulary, merges, ignore_merges=pre_tokenizer.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"broken vocabulary ({one_line(error)}), {path}") from None
    backend = tokenizers.Tokenizer(bpe)
    if pre_tokenizer.normalize:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(p), "isolated") for p in pre_tokenizer.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return backend
