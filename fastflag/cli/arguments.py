"""Words -> the command that they name, its flags read by tyro."""

import dataclasses
import io
import os
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import tyro

from fastflag.cli.commands import COMMANDS, Train
from fastflag.config import base_of, from_dict, from_run
from fastflag.files import InputError, read_json

# tyro indents a flag's help below the flag by 8, and has these headings.
_HELP_INDENT = 8
_NOT_TOLD = ("For full helptext", "Argument helptext")


def command_of(words: Sequence[str]) -> Any:
    """The command that `words` name; None where they ask for help or the version, which are
    printed. Raises InputError for what does not fit."""
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return None
    name, rest = words[0], [*words[1:]]
    if name == "--version":
        import fastflag

        print(fastflag.__version__)
        return None
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}, one of {', '.join(COMMANDS)} is expected")
    command = _parse(COMMANDS[name], f"fastflag {name}", rest)
    return None if command is None else _at_home(command)


def _at_home(command: Any) -> Any:
    """The command with ~ in its paths as the shell writes it; not every shell does after =."""
    paths = {name: value for name, value in vars(command).items() if isinstance(value, Path)}
    expanded = {name: Path(os.path.expanduser(path)) for name, path in paths.items()}
    return dataclasses.replace(command, **expanded)


def _usage() -> str:
    lines = [f"  {name:<10}{command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastflag COMMAND [flags]",
            "",
            *lines,
            "",
            "fastflag COMMAND --help lists its flags.",
        ]
    )


def _parse(command: type, program: str, arguments: list[str]) -> Any:
    """The command with its flags, None where they asked for its help.

    Raises InputError, in one line, for a flag that does not fit.
    """
    default = {"default": _train_default(arguments)} if command is Train else {}
    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            return tyro.cli(command, prog=program, args=arguments, **default)
    except SystemExit as stop:
        if not stop.code:
            return None
        raise InputError(f"{_complaint(shown.getvalue())}, see {program} --help") from None


def _train_default(arguments: list[str]) -> Any:
    """Train's defaults: the preset that the arguments name, the config file's values over it; a run
    that is to go on has its own, where they name neither."""
    preset, config = _value_of("--preset", arguments) or "", _value_of("--config", arguments)
    run = Path(os.path.expanduser(_value_of("--out", arguments) or "."))
    settings = base_of(run, preset, resume="--resume" in arguments and not config)
    if config:
        config = os.path.expanduser(config)
        document = read_json(config)
        of_run = isinstance(document, dict) and "fastflag" in document
        settings = (from_run if of_run else from_dict)(document, config, settings)
    return Train(out=tyro.MISSING, settings=settings)


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """The flag's value; of several the last, as tyro takes it."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        if argument == flag:
            value = following
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
    return value


def _complaint(boxed: str) -> str:
    """What tyro says, in one line: without its box, the flags' help and where to find more."""
    sections: list[list[str]] = [[]]
    for line in boxed.splitlines()[1:]:
        row = line.strip("│╭╮╰╯")
        text = row.strip()
        if not text.strip("─-"):
            sections.append([])
        elif len(row) - len(row.lstrip()) < _HELP_INDENT:
            sections[-1].append(text)
    told = [" ".join(rows).rstrip(".") for rows in sections if rows]
    return "; ".join(text for text in told if not text.startswith(_NOT_TOLD))
