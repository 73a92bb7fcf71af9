"""Command-line flags made from the fields of the configuration: their names, types, defaults and explanations."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import Field, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

Config = TypeVar("Config")
Command = Callable[..., None]

_WIDEST_METAVAR = 10
_WIDEST_SWITCH = 16


def with_flags(*configs: type) -> Callable[[Command], Command]:
    """Give a command, which takes ``**values``, one flag for each field of the configuration classes."""

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True)
        kept = [parameter for parameter in own.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
        made = [flag for config in configs for flag in _flags(config)]
        # typer reads the signature; without the annotations of the code it has only that to go by.
        command.__signature__ = own.replace(parameters=[*kept, *made])  # type: ignore[attr-defined]
        command.__annotations__ = {}
        return command

    return decorate


def said(context: typer.Context) -> set[str]:
    """The names of the flags that are on the command line, or in the environment."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


def from_flags(config: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration from the values of its flags; others are ignored.

    Raises:
        ConfigError: a value is not one that its field takes.
    """
    given = {field.name: values[field.name] for field in fields(config)}  # type: ignore[arg-type]
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _flags(config: Any) -> list[inspect.Parameter]:
    hints, help_of, panel = (
        get_type_hints(config),
        _explanations(config),
        re.sub("(Config|Params)$", "", config.__name__),
    )
    return [_flag(field, hints[field.name], help_of.get(field.name, ""), panel) for field in fields(config)]


def _flag(field: Field[Any], hint: Any, explanation: str, panel: str) -> inspect.Parameter:
    options: dict[str, Any] = {"help": explanation, "rich_help_panel": panel}
    kind, default = hint, field.default
    if hint == tuple[tuple[int, ...], ...]:
        kind, default = list[str], list(default)  # type: ignore[arg-type]
        options |= {"parser": _ids, "metavar": "<id,id,..>"}
    elif get_origin(hint) is tuple and get_origin(get_args(hint)[0]) is tuple:
        kind, default = list[str], [f"{key}={value}" for key, value in default]  # type: ignore[union-attr]
        options |= {"parser": _pair, "metavar": "<id=number>"}
    elif get_origin(hint) is tuple:
        kind, default = list[get_args(hint)[0]], list(default)  # type: ignore[misc,arg-type]
    elif hint is bool and default and len(field.name) > _WIDEST_SWITCH:
        kind = str  # beside --name there is no room for --no-name
        options |= {"parser": _truth, "metavar": "<bool>"}
    elif get_origin(hint) in (Union, UnionType) and NoneType not in get_args(hint):
        kind = str
        options |= {"parser": _number_or_word, "metavar": _metavar(hint)}
    elif get_origin(hint) is Literal and len("|".join(get_args(hint))) > _WIDEST_METAVAR:
        options["metavar"] = "<choice>"  # the explanation names them; a wide column would crowd the flags out
    # What is off anyway needs no flag that turns it off, and the column of flags no width for it.
    names = [f"--{field.name.replace('_', '-')}"] if default is False else []
    option = typer.Option(*names, **options)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _metavar(hint: Any) -> str:
    words = [get_args(kind) if get_origin(kind) is Literal else (kind.__name__,) for kind in get_args(hint)]
    return "<" + "|".join(word for group in words for word in group) + ">"


def _number_or_word(text: str | float) -> str | float:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _pair(text: str) -> tuple[int, float]:
    key, _, value = text.partition("=")
    try:
        return int(key), float(value)
    except ValueError:
        raise typer.BadParameter(f"expected an id and a number as in 42=-1.5, got {text!r}") from None


def _truth(text: str | bool) -> bool:
    words = {"true": True, "false": False}
    if (word := str(text).lower()) not in words:
        raise typer.BadParameter(f"expected true or false, got {text!r}")
    return words[word]


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise typer.BadParameter(f"expected ids as in 17,42, got {text!r}") from None


def _explanations(config: type) -> dict[str, str]:
    """The entries of the "Attributes:" section of a class's docstring."""
    section = inspect.cleandoc(config.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
