"""Cells of a frame: as texts, and refused in one line with the line or row that they stand in.

A frame's index numbers the file's lines or rows and is named "line" or "row".
"""

import numpy as np
import pandas as pd

from fastflag.files import InputError


def texts(column: pd.Series, where: str) -> np.ndarray:
    """A column as stripped texts, missing ones empty; object dtype."""
    cells = column.astype(object).where(column.notna(), "")
    try:
        return cells.astype(str).str.strip().to_numpy(object)
    except UnicodeDecodeError as error:  # Parquet's cells of bytes
        raise InputError(f"{column.name} is not text ({error}), {where}") from None


def require(frame: pd.DataFrame, names: tuple[str, ...], where: str) -> None:
    """Raises InputError for the names that the frame has no column of."""
    missing = [name for name in names if name not in frame]
    if missing:
        raise InputError(f"no column {', '.join(missing)}, {where}")


def refuse(frame: pd.DataFrame, wrong: np.ndarray, what: str, name: str, where: str) -> None:
    """Raises InputError with the first cell of column `name` that is `wrong` ([T] bool)."""
    if wrong.any():
        row = int(np.argmax(wrong))
        value = one_line(frame[name].iloc[row])[:60]
        raise InputError(f"{name} {value!r} {what}, {where} {frame.index.name} {frame.index[row]}")


def one_line(value: object) -> str:
    """At most 200 characters."""
    return " ".join(str(value).split())[:200]
