"""Settings written as tables, `{kind = "dirichlet", alpha = 0.5}`: which kind, and its settings, strictly checked."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union

import msgspec

from covey_models.names import no_such
from covey_protocol.errors import ConfigError

Kind = TypeVar("Kind")


def made(kinds: Mapping[str, type[Kind]], what: str, table: Union[str, Mapping[str, Any]]) -> Kind:
    """What the table, or a bare name for its defaults, says. kinds: dataclasses, whose fields are the settings.

    what: "partition", for messages. Raises ConfigError naming the setting for whatever is unknown, missing or of the
    wrong type. A whole number is taken for a real one.
    """
    settings = {"kind": table} if isinstance(table, str) else dict(table) if isinstance(table, Mapping) else {}
    name = settings.pop("kind", None)
    if not isinstance(name, str):
        raise ConfigError(f"a {what} says {table!r}", f'write a table such as {{ kind = "{next(iter(kinds))}" }}')
    if name not in kinds:
        raise no_such(what, name, kinds)
    kind: Any = kinds[name]
    value: Kind = kind(**checked(kind, f"{what} {name!r}", settings))
    return value


def checked(kind: Any, what: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as the dataclass's fields have them. what: whose they are. Raises ConfigError naming the setting."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in settings:
        if name not in fields:
            raise _no_setting(what, name, tuple(fields))
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in settings:
            raise ConfigError(f"the {what} has no {name}", f"set {name}")
    types = typing.get_type_hints(kind)
    return {name: converted(value, types[name], f"the {what}: {name}") for name, value in settings.items()}


def _no_setting(what: str, name: str, known: tuple[str, ...]) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"the {what} has no setting {name!r}", f"{hint}known: {', '.join(known) or 'none'}")


def converted(value: Any, kind: Any, what: str) -> Any:
    """The value as this type; ConfigError that begins with `what` where it is none."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        told = str(error)[:1].lower() + str(error)[1:]
        raise ConfigError(f"{what} = {value!r}: {told}", "correct it") from error


def require_share(what: str, value: float, *, above_zero: bool = False) -> None:
    """A share is a number from 0 to 1."""
    if not (0.0 <= value <= 1.0) or (above_zero and value == 0.0):
        least = "above 0" if above_zero else "from 0"
        raise ConfigError(f"{what} = {value}", f"give a number {least} to 1")
