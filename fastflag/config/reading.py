"""JSON -> settings that are checked, and back."""

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fastflag.config.presets import PRESETS
from fastflag.config.settings import TrainConfig
from fastflag.files import InputError, read_json


def to_dict(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(
    values: dict[str, Any], where: str, base: TrainConfig = PRESETS["default"]
) -> TrainConfig:
    """`base` with `values` (nested like `to_dict`) put over it.

    Raises InputError for an unknown key and a value of the wrong type or out of its range; `where`
    names the source.
    """
    return _merge(base, values, where, "")


def from_run(
    document: dict[str, Any], where: str, base: TrainConfig = PRESETS["default"]
) -> TrainConfig:
    """The settings in a run's config.json, as `from_dict` reads them, without what else it says.

    A run writes all its settings. One that is not there came after the run, which behaved as with
    dividends=cash.
    """
    values = {key: value for key, value in document.items() if key not in ("fastflag", "market")}
    simulator = dataclasses.replace(base.simulator, dividends="cash")
    return from_dict(values, where, dataclasses.replace(base, simulator=simulator))


def with_settings(base: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """`base` with settings by their flags' names (num_envs), wherever they are nested. Raises
    InputError as `from_dict` does."""
    sections = {
        each.name: section
        for section, part in vars(base).items()
        if dataclasses.is_dataclass(part)
        for each in dataclasses.fields(part)
    }
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        place = nested.setdefault(sections[name], {}) if name in sections else nested
        place[name] = _plain(value)
    return from_dict(nested, "settings", base)


def _plain(value: Any) -> Any:
    """NumPy's numbers and words, and paths, as JSON has them."""
    if isinstance(value, Path):
        return str(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value


def base_of(run: Path, preset: str, resume: bool) -> TrainConfig:
    """What a training's settings are put over: the preset, or the run's own where it goes on
    without one. Raises InputError for an unknown preset and a damaged run."""
    if preset not in ("", *PRESETS):
        raise InputError(f"unknown preset {preset!r}, one of {', '.join(PRESETS)} is expected")
    settings, own = PRESETS[preset or "default"], run / "config.json"
    document = read_json(own) if resume and not preset and own.exists() else None
    if isinstance(document, dict) and "fastflag" in document:
        return from_run(document, str(own), settings)
    return settings


def _merge(base: Any, values: Any, where: str, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{prefix.rstrip('.') or 'config'} must be a JSON object, {where}")
    hints = get_type_hints(type(base))
    changes = {}
    for key, value in values.items():
        if key not in hints:
            raise InputError(f"unknown config key {prefix + key!r}, {where}")
        current = getattr(base, key)
        if dataclasses.is_dataclass(current):
            changes[key] = _merge(current, value, where, f"{prefix}{key}.")
        else:
            changes[key] = _checked(value, hints[key], f"{prefix}{key}", where)
    try:
        return dataclasses.replace(base, **changes)
    except InputError as error:
        raise InputError(f"{error} in {where}") from None


def _checked(value: Any, hint: Any, key: str, where: str) -> Any:
    choices = get_args(hint)
    if choices:
        valid = value in choices
        expected = f"one of {', '.join(choices)}"
    elif hint is float:
        # A whole number may be too large for a float.
        valid = type(value) is float or (type(value) is int and abs(value) < 10**300)
        value = float(value) if valid else value
        expected = "a number"
    else:
        valid = type(value) is hint and (hint is not str or _is_text(value))
        expected = {int: "a whole number", bool: "true or false", str: "text"}[hint]
    if not valid:
        raise InputError(f"config key {key!r} must be {expected}, not {value!r}, {where}")
    return value


def _is_text(value: str) -> bool:
    """Half of a surrogate pair, which JSON can write, and NUL are in no file's name; a byte that is
    not UTF-8 can be, and Python escapes it as half a pair of its own."""
    try:
        return b"\0" not in value.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
