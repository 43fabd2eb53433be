"""What a proof's cases are made of: tensors of random or of whole numbers, of a model's shapes."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastflag.config import PlanConfig
from fastflag.model.arithmetic import DTYPES
from fastflag.model.proof.key import Subject
from fastflag.model.shared_prefix import round_up

Tensors = dict[str, Tensor]

# Around the rows of every tile that kernels/ has: 1, and one less and one more than 64 and 128.
FEW = (1, 63, 65, 129)
# Numbers of a sum that are not 0, so that sums of whole numbers stay below 256, where bf16 ends:
# of -1 and 1 in 64 places no sum exceeds 64.
_TERMS = 64
FP64 = 8 * 12  # bytes of the exact results of one number: a dozen tensors with their gradients
_LONG = (2048, 10_000)  # tokens of a prefix; --news-tokens may be 10,000
_NIBBLES = (0, 7, 15)  # NF4's codes of -1, 0 and 1


@dataclass(frozen=True)
class Maker:
    """Makes tensors: of random numbers, or of whole ones."""

    subject: Subject
    device: torch.device
    batch: PlanConfig
    rows: int
    whole: bool = False
    memory: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator(self.device).manual_seed(self.rows))

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and of products' factors."""
        return DTYPES[self.subject.dtype]

    def numbers(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        if self.whole:
            made = self.below(3, *shape).sub_(1)
        else:
            made = torch.randn(shape, device=self.device, generator=self.generator).mul_(scale)
        return made.to(dtype or self.dtype)

    def factor(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """A matrix of a product, [rows, columns], whose results are near 1, or small."""
        made = self.numbers(rows, columns, dtype=dtype, scale=columns**-0.5)
        return made.mul_(self._kept(rows, columns).to(made)) if self.whole else made

    def nf4(self, rows: int, columns: int) -> Tensors:
        """A matrix in NF4."""
        count = round_up(rows * columns, 64)
        if self.whole:
            codes = torch.tensor(_NIBBLES, dtype=torch.uint8, device=self.device)
            signs = self.below(3, count).sub_(1)
            signs[: rows * columns].mul_(self._kept(rows, columns).flatten().long())
            high, low = codes[signs + 1].view(-1, 2).unbind(-1)
            absmax = torch.ones(count // 64, device=self.device)
            return {"weight": high << 4 | low, "absmax": absmax}
        random = torch.rand(count // 64, device=self.device, generator=self.generator)
        absmax = (random + 0.5) * columns**-0.5
        return {"weight": self.below(256, count // 2).to(torch.uint8), "absmax": absmax}

    def below(self, limit: int, *shape: int) -> Tensor:
        """Whole numbers from 0, int64."""
        return torch.randint(limit, shape, device=self.device, generator=self.generator)

    def heads(self, count: int, number: int, tokens: int) -> Tensor:
        """[count, number, tokens, E] as a linear layer's output is laid out."""
        return self.numbers(count, tokens, number, self.subject.head_dim).transpose(1, 2)

    def long(self) -> Iterator[int]:
        """Tokens of long prefixes, beside an update's rows, that there is room for."""
        subject = self.subject
        token = (2 * subject.heads + 2 * subject.kv_heads) * subject.head_dim * FP64
        for tokens in () if self.rows in FEW or self.whole else _LONG:
            if self.batch.prefix_tokens < tokens <= self.memory // 2 // token:
                yield tokens

    def _kept(self, rows: int, columns: int) -> Tensor:
        """[rows, columns], 1 in 64 places of each row and of each column at most, on average."""
        share = min(_TERMS / max(rows, columns), 1.0)
        return torch.rand(rows, columns, device=self.device, generator=self.generator) < share
