"""A page of the documentation as a script: its commands in order, its files, and the output that it promises."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Step:
    """stays: it keeps its terminal. promised: lines of its output, in order; `...` is anything."""

    command: str
    stays: bool
    promised: list[str] = field(default_factory=list)

    def missing(self, output: str) -> str:
        """The first promised line that does not come after those before it; "" where all are there."""
        lines = iter(output.splitlines())
        for wanted in self.promised:
            pattern = ".*".join(re.escape(part) for part in wanted.split("..."))
            if not any(re.fullmatch(pattern, line.strip()) for line in lines):
                return wanted
        return ""


@dataclass
class Page:
    steps: list[Step]
    files: dict[str, str]


def read_page(path: Path) -> Page:
    """Every fenced block is a command, a file (```python, its name in the first line) or promised output (```text)."""
    page = Page([], {})
    for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.M | re.S):
        lines = body.splitlines()
        if kind == "sh":
            for line in lines:
                command, _, comment = line.partition("  # ")
                page.steps.append(Step(command, "terminal" in comment))
        elif kind == "python":
            page.files[lines[0].removeprefix("# ")] = body
        elif kind == "text":
            page.steps[-1].promised += lines
        else:
            raise AssertionError(f"{path}: a block of kind {kind!r} is nothing that a reader can do")
    return page
