"""Kinds of settings: which values of a number make sense, and a class that checks them."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_type_hints

from fastflag.files import InputError


@dataclass(frozen=True)
class Range:
    """Which values of a number make sense; NaN and the infinities never do."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = dataclasses.asdict(self).items()
        told = [f"{name.replace('_', ' ')} {end:,}" for name, end in bounds if math.isfinite(end)]
        return " and ".join(told) or "finite"


Device = Literal["auto", "cpu", "cuda"]
Optimizer = Literal["adamw", "adamw8bit"]
Calendar = Literal["stock", "crypto"]
Convention = Literal["standard", "flag", "investorbench", "paper-bh"]
"""How metrics are defined: see the README."""
Position = Literal["flat", "long", "short"]

# Above it NumPy and PyTorch fail in many ways, none of which is a sentence.
Count = Annotated[int, Range(at_least=1, at_most=10**12)]
Megabytes = Annotated[int, Range(at_least=0, at_most=10**12)]
NotNegative = Annotated[float, Range(at_least=0)]
Fraction = Annotated[float, Range(at_least=0, at_most=1)]
BasisPoints = Annotated[float, Range(at_least=0, below=10_000)]


class Checked:
    """Raises InputError for a field outside the Range that its type is annotated with."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for allowed in getattr(hint, "__metadata__", ()):
                if value not in allowed:
                    raise InputError(f"{name} must be {allowed}, not {value}, {flag(name)}")


def flag(name: str) -> str:
    """The command line's flag of a field."""
    return f"--{name.replace('_', '-')}"
