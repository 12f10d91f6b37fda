"""`covey grid` as a user runs it: the whole way, interrupted and killed, and going on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.fleet

TINY = """
data = "breast-cancer"
model = "softmax"
rules = ["mean", "median", "krum"]
attacks = ["none", "sign-flip", "scaling-backdoor"]
fractions = [0.0, 0.34]
seeds = 2
devices = 6
rounds = 25
steps = 5
"""
CELLS = 2 * (3 + 3 * 3)
TIMEOUT_S = 120


def command(folder: Path, *arguments: str) -> list[str]:
    config = folder / "grid.toml"
    config.write_text(TINY)
    own = ["--config", str(config), "--output", str(folder / "grid"), "--jobs", "1"]
    return [sys.executable, "-m", "covey_edge", "grid", *own, *arguments]


def grid(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *arguments), capture_output=True, text=True, check=False, timeout=TIMEOUT_S)


def saved(folder: Path) -> dict[str, bytes]:
    """Cells that were trained (refusals are there before any training)."""
    found = {path.name: path.read_bytes() for path in sorted((folder / "grid" / "cells").glob("*.json"))}
    return {name: data for name, data in found.items() if not json.loads(data)["refused"]}


def without_times(folder: Path) -> list[dict[str, str]]:
    with (folder / "grid" / "results.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def ended_in_the_middle(folder: Path, number: int, more: int) -> tuple[int, str]:
    """Run until `more` further cells are saved, then send the signal; returns exit code and what was printed."""
    before = len(saved(folder))
    process = subprocess.Popen(
        command(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    end = time.monotonic() + TIMEOUT_S
    while len(saved(folder)) < before + more:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does, to the workers too
    else:
        process.send_signal(number)
    said = process.communicate(timeout=TIMEOUT_S)[0]
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    return process.returncode, said


def test_a_grid_runs_through_and_is_not_run_again(tmp_path: Path) -> None:
    done = grid(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = tmp_path / "grid"
    assert f"heat map: {folder}/heatmap.png" in done.stdout
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    rows = without_times(tmp_path)
    assert len(rows) == CELLS
    refused = [row for row in rows if row["refused"]]
    assert {row["rule"] for row in refused} == {"krum"}
    assert len(refused) == 2 * 3
    assert "krum needs n > 2f + 2" in refused[0]["refused"]
    assert all(0.5 < float(row["accuracy"]) <= 1.0 for row in rows if row["attack"] == "none" and not row["refused"])
    assert all(row["backdoor_success"] for row in rows if row["attack"] == "scaling-backdoor" and not row["refused"])
    whole = json.loads((folder / "results.json").read_text())
    assert len(whole["cells"]) == CELLS
    assert whole["summary"]["krum"][1]["worst_accuracy"] is None

    times = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    again = grid(tmp_path)
    assert f"going on: {CELLS} cells are there already" in again.stdout
    assert times == {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    other = grid(tmp_path, "--rounds", "7")
    assert other.returncode == 2
    assert "rounds: 25 there, 7 now" in other.stderr
    assert "--output" in other.stderr


def test_what_was_interrupted_or_killed_goes_on_to_the_same_results(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    code, said = ended_in_the_middle(tmp_path / "broken", signal.SIGINT, more=1)
    assert code == 130
    assert "cells are saved" in said
    assert said.count("covey: interrupted") == 1
    assert "Traceback" not in said
    first = saved(tmp_path / "broken")
    code, _ = ended_in_the_middle(tmp_path / "broken", signal.SIGKILL, more=1)
    assert code == -signal.SIGKILL
    second = saved(tmp_path / "broken")
    assert first.items() <= second.items()
    assert len(second) < CELLS - 6
    done = grid(tmp_path / "broken")
    assert done.returncode == 0, done.stderr
    assert second.items() <= saved(tmp_path / "broken").items()
    assert grid(tmp_path / "whole").returncode == 0
    assert without_times(tmp_path / "broken") == without_times(tmp_path / "whole")
