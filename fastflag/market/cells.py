"""Cells of a frame: as texts, and refused in one line with the line or row that they stand in.

A frame's index numbers the file's lines or rows and is named "line" or "row".
"""

from collections.abc import Hashable

import numpy as np
import pandas as pd

from fastflag.files import InputError, one_line

# How files write that there is nothing, in any case: pandas, R, SQL, Yahoo, Excel, Bloomberg.
MISSING = frozenset(
    [
        *["", "nan", "null", "none", "na", "n/a", "n.a.", "<na>", "nat", "nil", "-", "--", "."],
        *["#n/a", "#na", "#n/a n/a", "#value!", "-nan", "+nan", "1.#qnan", "1.#ind", "-1.#ind"],
    ]
)
_CURRENCY = r"^([$€£¥]|US\$|USD )\s*"


def texts(column: pd.Series, where: str) -> np.ndarray:
    """A column as stripped texts, missing ones empty; object dtype."""
    cells = column.astype(object).where(column.notna(), "")
    try:
        return cells.astype(str).str.strip().to_numpy(object)
    except UnicodeError as error:  # Parquet's cells of bytes, halves of characters
        raise InputError(f"{column.name} is not text ({error}), {where}") from None


def ratios(column: pd.Series, where: str) -> np.ndarray:
    """A column as float64, as `numbers` reads it, "4:1" and "4/1" as 4."""
    if pd.api.types.is_numeric_dtype(column.dtype):
        return numbers(column, where)
    cells = pd.Series(texts(column, where), column.index, dtype=object, name=column.name)
    parts = cells.astype(str).str.extract(r"^(\d+(?:\.\d+)?)\s*[:/]\s*(\d+(?:\.\d+)?)$")
    found = (parts[0].astype(float) / parts[1].astype(float)).where(parts[0].notna())
    return np.where(found.notna(), found, numbers(cells.where(found.isna(), ""), where))


def numbers(column: pd.Series, where: str) -> np.ndarray:
    """A column as float64, `MISSING` cells as NaN. A currency's sign before a number is left out;
    thousands that are separated (1,100) are refused, because elsewhere they are decimals."""
    if pd.api.types.is_bool_dtype(column.dtype):
        column = column.astype(str)
    if pd.api.types.is_numeric_dtype(column.dtype):
        return column.to_numpy(np.float64, na_value=np.nan)
    cells = pd.Series(texts(column, where), column.index, dtype=object)
    found = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64, copy=True)
    odd = np.flatnonzero(np.isnan(found))
    if len(odd):
        rest = cells.iloc[odd]
        bare = rest.str.replace(_CURRENCY, "", regex=True)
        found[odd] = pd.to_numeric(bare, errors="coerce").to_numpy(np.float64)
        wrong = np.zeros(len(found), bool)
        wrong[odd] = np.isnan(found[odd]) & ~rest.str.lower().isin(MISSING).to_numpy()
        refuse(column.to_frame(), wrong, "is not a number", column.name, where)
    return found


def require(frame: pd.DataFrame, names: tuple[str, ...], where: str) -> None:
    """Raises InputError for the names that the frame has no column of."""
    missing = [name for name in names if name not in frame]
    if missing:
        raise InputError(f"no column {', '.join(missing)}, {where}")


def refuse(frame: pd.DataFrame, wrong: np.ndarray, what: str, name: Hashable, where: str) -> None:
    """Raises InputError with the first cell of column `name` that is `wrong` ([T] bool)."""
    if wrong.any():
        row = int(np.argmax(wrong))
        value = one_line(frame[name].iloc[row])[:60]
        raise InputError(f"{name} {value!r} {what}, {where} {frame.index.name} {frame.index[row]}")
