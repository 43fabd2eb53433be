"""Days: how a user writes one, which are traded, and how many of them a year has."""

import re

import numpy as np

from fastflag.config import Calendar
from fastflag.files import InputError

_ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
SATURDAY, SUNDAY = 5, 6
ANNUAL_DAYS: dict[Calendar, int] = {"stock": 252, "crypto": 365}


def date_of(text: str, name: str) -> np.datetime64:
    """The day of YYYY-MM-DD [D]. Raises InputError, with the `name` of what it is, for other
    text."""
    try:
        if not _ISO_DATE.fullmatch(text):
            raise ValueError
        return np.datetime64(text, "D")
    except ValueError:
        raise InputError(f"not a date (YYYY-MM-DD), {name} {text!r}") from None


def calendar_of(dates: np.ndarray) -> Calendar:
    """ "crypto" where Saturdays and Sundays are among `dates` ([T] datetime64[D], increasing), and
    of every day of the week at least half of those between the first date and the last.

    So exchanges that trade from Sunday to Thursday (Tel Aviv) or from Saturday to Wednesday
    (Tehran) are stock ones, and so are those that have held sessions on a Saturday.
    """
    if not len(dates):
        return "stock"
    every_day = np.arange(dates[0], dates[-1] + 1)
    traded, passed = (np.bincount(weekday(days), minlength=7) for days in (dates, every_day))
    on_weekends = traded[SATURDAY] and traded[SUNDAY]
    return "crypto" if on_weekends and (2 * traded >= passed).all() else "stock"


def weekday(dates: np.ndarray) -> np.ndarray:
    """0 (Monday) to 6 (Sunday) of each of `dates`."""
    return (dates.astype("datetime64[D]").astype(int) + 3) % 7  # 1970 began on a Thursday
