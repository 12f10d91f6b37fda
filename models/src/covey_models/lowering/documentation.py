"""The tables of docs/lowering.md, made from the registry: `python -m covey_models.lowering.documentation FILE`.

Everything between the two markers of the file is replaced; what a reader needs beside the tables is written by hand.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from covey_models.lowering import LOOPS, LOWERINGS, RANDOM, REFUSALS
from covey_models.lowering.registry import Lowering

BEGIN = "<!-- made by covey_models.lowering.documentation: begin -->"
END = "<!-- made by covey_models.lowering.documentation: end -->"


def tables() -> str:
    """All tables as Markdown."""
    parts = []
    by_file: dict[str, dict[str, Lowering]] = {}
    for op_type, lowering in LOWERINGS.items():
        by_file.setdefault(_file(lowering), {})[op_type] = lowering
    for file in sorted(by_file):
        parts += [f"### {file}", "", f"{_summary(by_file[file])}", "", *_rows(by_file[file]), ""]
    parts += ["## Control flow", "", "Run while tracing; nothing of it reaches the device.", "", *_rows(LOOPS), ""]
    parts += ["## Random numbers", "", "From the `seed` input.", "", *_rows(RANDOM), ""]
    parts += ["## Refused by name", "", *_refusals()]
    return "\n".join(parts)


def _file(lowering: Lowering) -> str:
    return lowering.__module__.rsplit(".", 1)[1] + ".py"


def _summary(lowerings: Mapping[str, Lowering]) -> str:
    """The first sentence of the file that holds them."""
    module = inspect.getmodule(next(iter(lowerings.values())))
    return _first_paragraph(inspect.getdoc(module) or "")


def _first_paragraph(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _rows(lowerings: Mapping[str, Lowering]) -> list[str]:
    """One row per function, with all op types it lowers."""
    op_types: dict[Lowering, list[str]] = {}
    for op_type, lowering in lowerings.items():
        op_types.setdefault(lowering, []).append(op_type)
    rows = ["| op | function | what it computes |", "|---|---|---|"]
    for lowering, names in sorted(op_types.items(), key=lambda entry: entry[1]):
        formula = _first_paragraph(inspect.getdoc(lowering) or "")
        rows.append(f"| {_codes(names)} | `{lowering.__name__}` | {_cell(formula)} |")
    return rows


def _refusals() -> list[str]:
    op_types: dict[tuple[str, str], list[str]] = {}
    for op_type, reason in REFUSALS.items():
        op_types.setdefault(reason, []).append(op_type)
    rows = ["| op | why | what to do |", "|---|---|---|"]
    for (why, remedy), names in sorted(op_types.items(), key=lambda entry: entry[1]):
        rows.append(f"| {_codes(names)} | {_cell(why)} | {_cell(remedy)} |")
    return rows


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def renewed(text: str) -> str:
    """The text of the file with its tables made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
