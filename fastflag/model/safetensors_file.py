"""A folder of safetensors files as named tensors, each read from disk when it is asked for."""

from pathlib import Path
from typing import Any

import torch

from fastflag.files import InputError, one_line, read_json

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Safetensors:
    """The tensors of a folder's files, under the names of Hugging Face's Llama."""

    def __init__(self, folder: Path, tied: bool):
        """`tied`: the head is the embedding, and either may stand for both."""
        from safetensors import SafetensorError, safe_open

        self._errors = (SafetensorError, OSError, ValueError)
        self._stored: dict[str, tuple[Any, str]] = {}  # file and name in it
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files = _files(folder)
        for path in self.files:
            try:
                handle = safe_open(path, framework="pt")
                names = handle.keys()
                slices = {name: handle.get_slice(name) for name in names}
            except self._errors as error:
                raise InputError(f"broken safetensors file ({one_line(error)}), {path}") from None
            for name, part in slices.items():
                if part.get_dtype() not in ("F32", "F16", "BF16"):
                    raise InputError(
                        f"tensor {name!r} is {part.get_dtype()}, not supported, {path}"
                    )
                # A model saved without its head has names without their beginning.
                bare = name.startswith(("embed_tokens.", "layers.", "norm."))
                known = f"model.{name}" if bare else name
                if known in self.shapes:
                    raise InputError(f"tensor {known!r} is there twice, {path}")
                self._stored[known] = (handle, name)
                self.shapes[known] = tuple(part.get_shape())
        if tied and HEAD in self.shapes:
            self._tie(folder)

    def _tie(self, folder: Path) -> None:
        if EMBEDDING not in self.shapes:
            self._stored[EMBEDDING] = self._stored[HEAD]
            self.shapes[EMBEDDING] = self.shapes[HEAD]
        elif not torch.equal(self.read(HEAD), self.read(EMBEDDING)):
            raise InputError(
                f"tie_word_embeddings is true, but {HEAD} is not {EMBEDDING}: which one is meant "
                f"is not known, {folder / 'config.json'}"
            )

    def read(self, name: str) -> torch.Tensor:
        try:
            handle, stored = self._stored[name]
            # A copy: the handle's tensor is a view of the mapped file.
            return handle.get_tensor(stored).clone()
        except self._errors as error:
            raise InputError(
                f"can't read tensor {name} ({one_line(error)}), {self.files[0].parent}"
            ) from None


def _files(folder: Path) -> list[Path]:
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
