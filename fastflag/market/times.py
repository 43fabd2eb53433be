"""Times of market files: the dates of bars, the moments of news, the hours of an exchange.

Times without a zone are the exchange's local ones. A time that names a zone, or that is a whole
number, is a moment anywhere on earth, and its local time depends on the exchange's zone. Whole
numbers count seconds, milli-, micro- or nanoseconds since 1970 in UTC: in the unit by which the
column's latest lies between 1990 and 2100, so that no date in digits (20240102) is taken for one.
A column's dates are all spelt as its first one: in ISO 8601, in digits, or with slashes or points.
Of 2/1/2024 month and day can be either, and only the whole column tells which.
"""

import dataclasses
import re
from dataclasses import dataclass
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd

from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market.bars import Hours
from fastflag.market.cells import refuse, texts

_MOMENT = (
    r"(?P<date>\d{4}-\d{2}-\d{2})(?:[T ](?P<time>\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?))?"
    r"(?P<zone> ?(?:Z|UTC|GMT|[+-]\d{2}:?\d{2}))?"
)
# (year, month, day), or the two of which either is the month; and a time of day.
_DIGITS = re.compile(
    r"(?P<year>1[789]\d\d|20\d\d)(?P<month>\d\d)(?P<day>\d\d)(?:\.0*)?(?P<rest>[T ].*)?"
)
_YEAR_FIRST = re.compile(
    r"(?P<year>\d{4})([/.])(?P<month>\d{1,2})\2(?P<day>\d{1,2})(?P<rest>[T ].*)?"
)
_YEAR_LAST = re.compile(r"(?P<a>\d{1,2})([/.-])(?P<b>\d{1,2})\2(?P<year>\d{4})(?P<rest>[T ].*)?")
_COUNT = re.compile(r"-?\d{1,19}(?:\.0*)?")
_UNITS = (1, 10**3, 10**6, 10**9)  # a second's
_EARLIEST, _LATEST = 631_152_000, 4_102_444_800  # 1990 and 2100, in seconds
_END_OF_DATE = np.timedelta64(24 * 3600 - 1, "s")
_CLOSE_TIME = re.compile(r"(?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d)?")
_GIVE_ZONE = "give the exchange's, as in --timezone America/New_York"
_LONGER = {
    "weekly ": range(7, 8),
    "monthly ": range(28, 32),
    "quarterly ": range(89, 93),
    "yearly ": range(364, 367),
}


@dataclass(frozen=True)
class _Written:
    """A column's times [T], NaT where a cell is none."""

    wall: np.ndarray  # datetime64[us], in the zone that is named; of whole numbers UTC
    utc: np.ndarray  # datetime64[us]; NaT: no zone is named
    form: str = "YYYY-MM-DD"  # of a date


def hours_of(data: DataConfig) -> Hours:
    """What `data` tells of the exchange's days. Raises InputError for no time of day."""
    calendar = None if data.calendar == "auto" else data.calendar
    if not data.close_time:
        return Hours(calendar)
    if not _CLOSE_TIME.fullmatch(data.close_time):
        raise InputError(f"not a time of day (HH:MM or HH:MM:SS), --close-time {data.close_time!r}")
    parts = [int(part) for part in data.close_time.split(":")]
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    return Hours(calendar, np.timedelta64(seconds, "s"))


def zone_of(data: DataConfig) -> ZoneInfo | None:
    """The exchange's time zone; None where it is not told. Raises InputError for an unknown one."""
    if not data.timezone:
        return None
    try:
        return ZoneInfo(data.timezone)
    except (KeyError, ValueError, OSError):
        raise InputError(
            f"unknown time zone (known are names as America/New_York), --timezone {data.timezone!r}"
        ) from None


def bar_dates(column: pd.Series, where: str, zone: ZoneInfo | None) -> np.ndarray:
    """[T] datetime64[D] of a column of daily bars.

    A midnight is that date, in whichever zone: where all are, none is converted. Other times in a
    zone of their own are midnights in the exchange's. Raises InputError, with the line, for what is
    no date, and for a time of day.
    """
    written = _read(column, where)
    wall, zoned = written.wall, ~np.isnat(written.utc)
    what = "has a time of day: daily bars only"
    if (wall != wall.astype("datetime64[D]")).any() and zoned.any():
        if zone is None:
            what = f"has a time of day, in a time zone: for daily bars {_GIVE_ZONE}"
        else:
            wall = np.where(zoned, _local(written.utc, zone), wall)
            what = f"has a time of day in {zone.key}: daily bars only"
    dates = wall.astype("datetime64[D]")
    refuse(column.to_frame(), wall != dates, what, column.name, where)
    return dates


def moments(column: pd.Series, where: str, zone: ZoneInfo | None, ends: bool = False) -> np.ndarray:
    """[T] datetime64[s] of a column, in the exchange's local time, parts of a second rounded up.

    With `ends`, exactly midnight, there or in the zone that is named, is a bare date and counts as
    its END. Raises InputError, with the line, for what is no time, and without `zone` for a time
    that needs it.
    """
    written = _read(column, where)
    zoned = ~np.isnat(written.utc)
    if zone is None:
        refuse(column.to_frame(), zoned, f"has a time zone: {_GIVE_ZONE}", column.name, where)
    late = np.where(ends & _is_midnight(written.wall), _END_OF_DATE, np.timedelta64(0, "s"))
    local = written.wall + late
    if zone is not None and zoned.any():
        local = np.where(zoned, _local(written.utc + late, zone), local)
        local = local + np.where(ends & _is_midnight(local), _END_OF_DATE, np.timedelta64(0, "s"))
    seconds = local.astype("datetime64[s]")
    return seconds + (seconds < local).astype("timedelta64[s]")


def refuse_longer_than_days(dates: np.ndarray, where: str) -> None:
    """Raises InputError where most of `dates` ([T] datetime64[D]), those with bars, are five days
    apart or more."""
    gaps = np.diff(dates).astype(int)
    if len(gaps) < 3 or np.median(gaps) < 5:
        return
    gap = int(np.median(gaps))
    kind = next((kind for kind, days in _LONGER.items() if gap in days), "")
    raise InputError(f"{kind}bars (a bar every {gap} days): FastFLAG trades daily bars, {where}")


def _read(column: pd.Series, where: str) -> _Written:
    """Raises InputError, with the line, for what is no time."""
    if isinstance(column.dtype, pd.DatetimeTZDtype):
        written = _Written(_array(column.dt.tz_localize(None)), _array(column.dt.tz_convert(None)))
    elif pd.api.types.is_datetime64_dtype(column.dtype):
        written = _Written(_array(column), np.full(len(column), "NaT", "datetime64[us]"))
    else:
        cells = texts(column, where)
        written = _counted(cells) or _spelt(column, cells, where)
    wrong = np.isnat(written.wall)
    refuse(column.to_frame(), wrong, f"is not a date ({written.form})", column.name, where)
    return written


def _counted(cells: np.ndarray) -> _Written | None:
    """Whole numbers as times since 1970; None where the cells are anything else."""
    if not all(map(_COUNT.fullmatch, cells)):
        return None
    numbers = [int(cell.partition(".")[0]) for cell in cells]
    latest, earliest = max(numbers), min(numbers)
    for unit in _UNITS:
        if _EARLIEST * unit <= latest < _LATEST * unit and earliest > -_LATEST * unit:
            micro = [-(-number * 10**6 // unit) for number in numbers]
            times = np.array(micro, np.int64).astype("datetime64[us]")
            return _Written(times, times)
    return None


def _spelt(column: pd.Series, cells: np.ndarray, where: str) -> _Written:
    """Dates and times as text. What is not spelt as the first one is none."""
    first = next(filter(None, cells), "")
    spelt = pd.Series(cells, dtype=str)
    for pattern, form in ((_DIGITS, "YYYYMMDD"), (_YEAR_FIRST, "YYYY/MM/DD")):
        if pattern.fullmatch(first):
            return _in_parts(spelt.str.extract(f"^{pattern.pattern}$"), "month", "day", form)
    if not (spelling := _YEAR_LAST.fullmatch(first)):
        return _in_iso(spelt)
    # 01.02.2024 after 01/02/2024 is another country's.
    separated = _YEAR_LAST.pattern.replace("([/.-])", f"({re.escape(spelling[2])})")
    parts = spelt.str.extract(f"^{separated}$")
    month_first = _in_parts(parts, "a", "b", "MM/DD/YYYY")
    day_first = _in_parts(parts, "b", "a", "DD/MM/YYYY")
    return _only_reading(column, month_first, day_first, where)


def _only_reading(
    column: pd.Series, month_first: _Written, day_first: _Written, where: str
) -> _Written:
    """Of two readings the one in which every cell is a date, or else more are.

    Raises InputError, with the first cell that differs, where every cell is one in either.
    """
    lost = [np.isnat(reading.wall).sum() for reading in (month_first, day_first)]
    other = month_first.wall != day_first.wall
    if not any(lost) and other.any():
        row = int(np.argmax(other))
        readings = [str(each.wall[row])[:10] for each in (month_first, day_first)]
        what = (
            f"is {readings[0]} (month first) or {readings[1]} (day first), and no row tells which: "
            "write dates as YYYY-MM-DD"
        )
        refuse(column.to_frame(), other, what, column.name, where)
    return month_first if lost[0] <= lost[1] else day_first


def _in_parts(parts: pd.DataFrame, month: str, day: str, form: str) -> _Written:
    """Years, months, days and what follows them (a time of day, of which Excel writes 0:00)."""
    dates = parts["year"] + "-" + parts[month].str.zfill(2) + "-" + parts[day].str.zfill(2)
    times = parts["rest"].fillna("").str.replace(r"^ (\d:)", r" 0\1", regex=True)
    return dataclasses.replace(_in_iso((dates + times).fillna("")), form=form)


def _in_iso(cells: pd.Series) -> _Written:
    """Dates and times in ISO 8601's digits."""
    # In a whole match or in nothing: pandas alone would take "2020" or "20200102" for dates.
    parts = cells.str.extract(f"^{_MOMENT}$")
    iso = parts["date"] + "T" + parts["time"].fillna("00:00")
    wall = _array(pd.to_datetime(iso, format="ISO8601", errors="coerce"))
    zones = parts["zone"].str.strip()
    offsets = {name: _offset(name) for name in zones.dropna().unique()}
    ahead = zones.map(offsets).to_numpy("timedelta64[us]")
    wrong = zones.notna().to_numpy() & np.isnat(ahead)
    wall = np.where(wrong, np.datetime64("NaT", "us"), wall)
    return _Written(wall, wall - ahead)


def _offset(zone: str) -> np.timedelta64:
    """How far the zone is ahead of UTC; NaT where none is."""
    if zone in ("Z", "UTC", "GMT"):
        return np.timedelta64(0, "us")
    digits = zone[1:].replace(":", "")
    minutes = int(digits[:2]) * 60 + int(digits[2:])
    if minutes > 14 * 60 or int(digits[2:]) > 59:
        return np.timedelta64("NaT", "us")
    return np.timedelta64(int(f"{zone[0]}60000000") * minutes, "us")


def _local(utc: np.ndarray, zone: ZoneInfo) -> np.ndarray:
    index = pd.DatetimeIndex(utc).tz_localize("UTC").tz_convert(zone).tz_localize(None)
    return _array(index)


def _is_midnight(wall: np.ndarray) -> np.ndarray:
    return wall == wall.astype("datetime64[D]")


def _array(times: pd.Series | pd.DatetimeIndex) -> np.ndarray:
    return times.to_numpy().astype("datetime64[us]")
