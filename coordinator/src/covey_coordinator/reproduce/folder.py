"""The folder of a reproduction: finished runs, so that the same command goes on where it stopped, and the report.

NAME/runs/CASE--seed-N--HASH.json   one run each, whole or not at all; HASH is of all settings
NAME/full or NAME/quick             report.md, figure.png, results.json, made anew at the end
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from covey_coordinator.reproduce.contract import Case, Outcome
from covey_edge.files import write_atomic
from covey_protocol.errors import ConfigError

FORMAT = 1  # grows when runs of an older version would not mean the same


class Task(NamedTuple):
    """One run of one case."""

    label: str
    settings: dict[str, Any]
    seed: int

    @property
    def key(self) -> str:
        """A file name."""
        text = json.dumps([FORMAT, self.settings, self.seed], sort_keys=True)
        words = re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-")[:60]
        return f"{words}--seed-{self.seed}--{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Folder:
    """Of one reproduction, quick and full form. path: where all reproductions lie."""

    def __init__(self, path: Path, name: str, form: str) -> None:
        self._runs, self.results = path / name / "runs", path / name / form

    def finished(self, task: Task) -> Outcome | None:
        place = self._place(task)
        if not place.exists():
            return None
        try:
            outcome = json.loads(place.read_bytes())
        except (OSError, ValueError) as exc:
            raise ConfigError(f"{place} cannot be read ({exc})", "delete that file and run again") from exc
        if not isinstance(outcome, dict):
            raise ConfigError(f"{place} holds no table", "delete that file and run again")
        return outcome

    def save(self, task: Task, outcome: Outcome) -> None:
        write_atomic(self._place(task), json.dumps(outcome).encode())

    def write_report(self, text: str, figure: bytes, results: dict[str, Any]) -> None:
        write_atomic(self.results / "figure.png", figure)
        write_atomic(self.results / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        write_atomic(self.results / "report.md", text.encode())

    def _place(self, task: Task) -> Path:
        return self._runs / f"{task.key}.json"


def tasks_of(cases: list[Case], seeds: int) -> list[Task]:
    """Every run, seed by seed."""
    return [Task(case.label, case.settings, seed) for seed in range(seeds) for case in cases]
