"""What a file holds as a strict struct, with the nearest right name for a wrong one.

Apart from `config`, which knows MQTT: the training child needs this alone.
"""

from __future__ import annotations

import difflib
import re
from typing import TypeVar, get_args, get_origin

import msgspec
from msgspec import Struct

from covey_protocol.errors import ConfigError

T = TypeVar("T", bound=Struct)


def as_struct(content: object, kind: type[T], where: str) -> T:
    """What a file holds as a strict struct. where: its name, for the error."""
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{where}: {exc}", _nearest(str(exc), kind)) from exc


def _nearest(error: str, kind: type[Struct]) -> str:
    unknown = re.search(r"unknown field `([^`]*)`(?: - at `\$\.?([^`]*)`)?", error)
    if not unknown:
        return "correct that setting"
    name, known = unknown[1], every_setting(kind)
    here = known.get((unknown[2] or "").replace("[...]", ".NAME"), ())
    close = difflib.get_close_matches(name, here, n=1, cutoff=0.6)
    others = [section or "the file's top" for section, names in known.items() if name in names]
    if others and not close:
        return f"it belongs in {' or '.join(f'[{one}]' if one in known else one for one in others)}"
    close = close or difflib.get_close_matches(name, here, n=1, cutoff=0.0)
    return f"did you mean `{close[0]}`?" if close else "remove it"


def every_setting(kind: type[Struct], section: str = "") -> dict[str, tuple[str, ...]]:
    """Section as TOML writes it ("" for the top, NAME where its owner chooses one) -> names of what may be in it."""
    fields = msgspec.structs.fields(kind)
    found = {section: tuple(field.encode_name for field in fields)}
    for field in fields:
        of_names = get_origin(field.type) is dict
        inner = [field.type, *get_args(field.type)]
        for one in inner:
            if isinstance(one, type) and issubclass(one, Struct):
                path = ".".join(filter(None, (section, field.encode_name, "NAME" if of_names else "")))
                found.update(every_setting(one, path))
    return found
