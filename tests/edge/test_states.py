"""What agents have written to their disks is read for ever: the golden states, and that new formats get their own."""

from __future__ import annotations

import fnmatch
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from covey_edge.forgetting import FORGOTTEN, KEPT, STAYS

sys.path.insert(0, str(Path(__file__).parent.parent / "golden"))
from generate_states import FILE, READERS, WRITERS, written

VECTORS: dict[str, Any] = json.loads(FILE.read_text())
# patterns of a state_dir that hold no format of this agent's, and why
WITHOUT = {
    "blobs": "as they were fetched, by hash",
    "outbox.damaged": "never read",
    "teaching": "for people",
    "stopped": "for people",
    "data-report*.txt": "for people",
    "records": "captures, which have a format version: docs/captures.md",
    "agent.lock": "a process id, of this boot",
    "*.sock": "no file",
}


def laid_out(files: dict[str, str], folder: Path) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes.fromhex(content))
    return folder


@pytest.mark.parametrize("name", VECTORS)
def test_a_state_that_was_ever_written_is_read_to_the_same_meaning(name: str, tmp_path: Path) -> None:
    assert json.loads(json.dumps(READERS[name](laid_out(VECTORS[name]["files"], tmp_path)))) == VECTORS[name]["means"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_format_does_not_change_without_a_new_golden_state(name: str, tmp_path: Path) -> None:
    assert name in VECTORS, "run tests/golden/generate_states.py"
    assert written(name, tmp_path) == VECTORS[name]["files"], "see tests/golden/generate_states.py for what to do"


def test_every_file_of_a_state_dir_has_a_golden_state() -> None:
    names = {part for vector in VECTORS.values() for file in vector["files"] for part in (file, file.split("/")[0])}
    lacking = [
        pattern
        for pattern in {**FORGOTTEN, **KEPT, **STAYS}
        if pattern not in WITHOUT and not fnmatch.filter(names, pattern)
    ]
    assert lacking == []
