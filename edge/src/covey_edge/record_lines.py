"""Lines of text as readings: JSON objects, `name=value` pairs, or CSV under a line of names."""

from __future__ import annotations

import csv
import json
from typing import Any, Optional

from covey_edge.recorder import BadReading, Value, number_or_text

MOST_SHOWN = 60


class LineParser:
    """Remembers the names of CSV columns. names: given; else the first CSV line has them."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self._given, self._names = names, names

    def begin(self) -> None:
        """Another output of the same command: it may name its columns again."""
        self._names = self._given

    def parse(self, line: str) -> Optional[dict[str, Value]]:
        """None for a line without a reading: blank, or the names. BadReading for what is none."""
        line = line.strip()
        if not line:
            return None
        if line.startswith("{"):
            return from_json(line)
        tokens = line.split()
        if all("=" in token for token in tokens):
            return from_pairs(tokens)
        return self._from_csv(line)

    def _from_csv(self, line: str) -> Optional[dict[str, Value]]:
        try:
            (cells,) = csv.reader([line], strict=True)
        except csv.Error as exc:
            raise BadReading(f"{line[:MOST_SHOWN]!r} is no line of CSV ({exc})") from exc
        cells = [cell.strip() for cell in cells]
        if not self._names:
            if any(isinstance(number_or_text(cell), float) for cell in cells) or len(set(cells)) < len(cells):
                raise BadReading(f"{line[:MOST_SHOWN]!r} comes before a line with the names", "give --columns")
            self._names = tuple(cells)
            return None
        if tuple(cells) == self._names:
            return None
        if len(cells) != len(self._names):
            raise BadReading(f"{len(cells)} values came for {len(self._names)} columns")
        return dict(zip(self._names, map(number_or_text, cells)))


def from_pairs(pairs: list[str]) -> dict[str, Value]:
    """BadReading for a name twice, or a pair that is none."""
    parts = [pair.partition("=") for pair in pairs]
    bad = [pair for pair, (name, sign, _) in zip(pairs, parts) if not name or not sign]
    if bad or len({name for name, *_ in parts}) < len(parts):
        raise BadReading(f"{bad[0] if bad else ' '.join(pairs)!r} is not NAME=VALUE, each name once")
    return {name: number_or_text(value) for name, _, value in parts}


def from_json(line: str) -> dict[str, Value]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise BadReading(f"{line[:MOST_SHOWN]!r} is no JSON object ({exc})") from exc
    return {name: _value(name, value) for name, value in content.items()}


def _value(name: str, value: Any) -> Value:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return number_or_text(repr(float(value)))
    raise BadReading(f"{name} is neither a number nor a text")
