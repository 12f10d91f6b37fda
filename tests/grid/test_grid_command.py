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
from patience import PATIENCE_S

pytestmark = pytest.mark.fleet

TINY = """
data = "breast-cancer"
model = "softmax"
rules = ["mean", "median", "krum"]
attacks = ["none", "sign-flip", "scaling-backdoor"]
fractions = [0.0, 0.34]
seeds = 2
devices = 6
rounds = 60
steps = 5
"""
CELLS = 2 * (3 + 3 * 3)
REFUSED = 2 * 3  # krum with 2 of 6; these are there before any training


def command(folder: Path, *arguments: str) -> list[str]:
    config = folder / "grid.toml"
    config.write_text(TINY)
    own = ["--config", str(config), "--output", str(folder / "grid"), "--jobs", "1"]
    return [sys.executable, "-m", "covey_edge", "grid", *own, *arguments]


def grid(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *arguments), capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def saved(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "grid" / "cells").glob("*.json")}


def without_times(folder: Path) -> list[dict[str, str]]:
    with (folder / "grid" / "results.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def ended_in_the_middle(folder: Path, number: int, cells: int) -> tuple[int, str]:
    """Start, wait until so many cells are saved, send the signal; returns exit code and what was printed."""
    process = subprocess.Popen(
        command(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    end = time.monotonic() + PATIENCE_S
    while len(list((folder / "grid" / "cells").glob("*.json"))) < cells or not psutil.Process(process.pid).children():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does, to the workers too
    else:
        process.send_signal(number)
    said = process.communicate(timeout=PATIENCE_S)[0]
    _, alive = psutil.wait_procs(workers, timeout=PATIENCE_S)
    assert not alive
    return process.returncode, said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A grid that ran through undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, grid(folder)


def test_a_grid_runs_through_and_is_not_run_again(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    place, done = whole
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = place / "grid"
    assert f"heat map: {folder}/heatmap.png" in done.stdout
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    rows = without_times(place)
    assert len(rows) == CELLS
    refused = [row for row in rows if row["refused"]]
    assert {row["rule"] for row in refused} == {"krum"}
    assert len(refused) == REFUSED
    assert "krum needs n > 2f + 2" in refused[0]["refused"]
    assert all(0.5 < float(row["accuracy"]) <= 1.0 for row in rows if row["attack"] == "none" and not row["refused"])
    assert all(row["backdoor_success"] for row in rows if row["attack"] == "scaling-backdoor" and not row["refused"])
    everything = json.loads((folder / "results.json").read_text())
    assert len(everything["cells"]) == CELLS
    assert everything["summary"]["krum"][1]["worst_accuracy"] is None

    times = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    again = grid(place)
    assert f"going on: {CELLS} cells are there already" in again.stdout
    assert times == {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    other = grid(place, "--rounds", "7")
    assert other.returncode == 2
    assert "rounds: 60 there, 7 now" in other.stderr
    assert "--output" in other.stderr


def test_ctrl_c_ends_a_grid_in_order_also_while_its_workers_start(tmp_path: Path) -> None:
    code, said = ended_in_the_middle(tmp_path, signal.SIGINT, cells=REFUSED)
    assert code == 130
    assert "cells are saved" in said
    assert said.count("covey: interrupted") == 1
    assert "Traceback" not in said


@pytest.mark.slow  # the same pool is killed every day in tests/experiments/test_simulate_command.py
def test_a_killed_grid_leaves_no_worker_and_goes_on_to_the_same_results(
    tmp_path: Path, whole: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    code, _ = ended_in_the_middle(tmp_path, signal.SIGKILL, cells=REFUSED + 1)
    assert code == -signal.SIGKILL
    before = saved(tmp_path)
    assert REFUSED < len(before) < CELLS
    done = grid(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"going on: {len(before)} cells" in done.stdout
    assert before.items() <= saved(tmp_path).items()
    assert without_times(tmp_path) == without_times(whole[0])
