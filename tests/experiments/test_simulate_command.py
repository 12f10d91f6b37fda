"""`covey simulate` as a user runs it: killed, interrupted, in several processes, and going on."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from click.testing import CliRunner
from patience import PATIENCE_S

import covey_coordinator as cc
from covey_coordinator.grid.display import Display
from covey_coordinator.simulation.command import simulate_command
from covey_coordinator.simulation.folder import ExperimentFolder
from covey_coordinator.simulation.program import HERE, run_experiment
from covey_coordinator.simulation.reading import read_experiment, resumed_experiment
from covey_coordinator.simulation.results import RunResult
from covey_protocol.errors import CoveyError

ROUNDS = 12
EXPERIMENT = f"""
name = "tiny"
rounds = {ROUNDS}
devices = 6
sample = 5
save_every = 2

[data]
set = "breast-cancer"

[model]
name = "softmax"

[aggregation]
rule = "centred-clipping"

[server]
optimizer = "adam"
learning_rate = 0.05

[privacy]
clip_norm = 0.5
noise_multiplier = 0.02
"""


def command(folder: Path, *arguments: str) -> list[str]:
    file = folder / "tiny.toml"
    file.write_text(EXPERIMENT)
    return [sys.executable, "-m", "covey_edge", "simulate", *arguments]


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_rounds(process: subprocess.Popen[str], folder: Path, rounds: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while sum(len(path.read_bytes().splitlines()) for path in folder.glob("cells/*/rounds.jsonl")) < rounds:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.005)


def timeless(results: list[RunResult]) -> list[RunResult]:
    return [
        msgspec.structs.replace(
            result, seconds=0.0, rounds=[msgspec.structs.replace(record, seconds=0.0) for record in result.rounds]
        )
        for result in results
    ]


def results_in(folder: Path) -> list[RunResult]:
    cells = read_experiment(ExperimentFolder(folder).table).cells
    return timeless(ExperimentFolder(folder).results([cell.key for cell in cells]))


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """The command takes them over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    hook = sys.unraisablehook
    yield
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[RunResult]:
    """The experiment undisturbed, in this process."""
    folder = tmp_path_factory.mktemp("whole")
    command(folder)
    return timeless(cc.simulate(folder / "tiny.toml", out=folder / "run", quiet=True))


@pytest.mark.fleet
def test_a_killed_experiment_leaves_no_process_and_goes_on_to_the_same_result(
    tmp_path: Path, whole: list[RunResult]
) -> None:
    folder = tmp_path / "run"
    process = started(tmp_path, str(tmp_path / "tiny.toml"), "--jobs", "1", "--out", str(folder))
    wait_for_rounds(process, folder, rounds=6)
    others = psutil.Process(process.pid).children(recursive=True)
    assert len(others) >= 2  # the process that trains, and its TFF worker
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    assert not psutil.wait_procs(others, timeout=PATIENCE_S)[1]
    (cell,) = (folder / "cells").iterdir()
    assert not (cell / "result.json").exists()
    before = (cell / "rounds.jsonl").read_bytes().splitlines()
    assert 5 <= len(before) <= ROUNDS
    said = io.StringIO()
    again = ExperimentFolder.old(folder)
    run_experiment(resumed_experiment(again), again, HERE, Display(said))
    assert f"report: {folder / 'report.html'}" in said.getvalue()
    assert (folder / "report.html").stat().st_size > 10_000
    assert results_in(folder) == whole
    kept = (cell / "rounds.jsonl").read_bytes().splitlines()
    assert kept[:4] == before[:4]  # also its times: rounds before the saved state were not made again


@pytest.mark.fleet
@pytest.mark.slow
def test_ctrl_c_ends_an_experiment_in_order_and_it_can_be_resumed(
    tmp_path: Path, whole: list[RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    process = started(tmp_path, str(tmp_path / "tiny.toml"), "--out", str(folder), "--jobs", "2", "--seeds", "2")
    wait_for_rounds(process, folder, rounds=5)
    others = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    said = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 130
    assert f"covey simulate --resume {folder} goes on" in said
    assert said.count("covey: interrupted") == 1
    assert "Traceback" not in said
    assert not psutil.wait_procs(others, timeout=PATIENCE_S)[1]
    assert not list(scratch.iterdir())
    done = subprocess.run(command(tmp_path, "--resume", str(folder)), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert results_in(folder)[:1] == whole


@pytest.mark.fleet
@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_a_failed_run_has_its_exit_code(tmp_path: Path) -> None:
    folder, file = tmp_path / "run", tmp_path / "tiny.toml"
    bad = ["--set", 'sweep.model.name=["softmax", "small-cnn", "mlp"]', "--set", 'sweep.server.optimizer=["sgd"]']
    arguments = [str(file), "--out", str(folder), "--jobs", "2", "--rounds", "2", *bad]
    done = subprocess.run(command(tmp_path, *arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 8, done.stdout + done.stderr
    assert "1 of 3 runs failed; 1--small-cnn--sgd--seed-0" in done.stderr
    assert f"covey simulate --resume {folder} tries them again" in done.stderr
    assert "1 failed" in done.stdout
    table = {**ExperimentFolder(folder).table, "sweep": {"model.name": ["softmax", "mlp"], "server.optimizer": ["sgd"]}}
    alone = timeless(cc.simulate(table, quiet=True, out=tmp_path / "alone"))
    assert [one.rounds for one in results_in(folder)] == [one.rounds for one in alone]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "--resume and a folder"),
        (["a.toml", "--resume", "b"], "--resume and a folder"),
        (["--resume", "nowhere"], "nowhere holds no experiment"),
        (["--resume", "nowhere", "--rounds", "3"], "leave all other options"),
        (["nowhere.toml"], "nowhere.toml"),
        (["{file}", "--set", "rounds"], "KEY=VALUE"),
        (["{file}", "--set", "aggregation.rule=medain"], "did you mean 'median'"),
        (["{file}", "--set", "data.set=no-such"], "no data set 'no-such'"),
        (["{file}", "--set", 'aggregation={rule="krum", num_byzantine=4}'], "krum needs"),
        (["{file}", "--jobs", "100000"], "cores"),
        (["{file}", "--out", "{file}"], "is there already"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_sentence(arguments: list[str], what: str, tmp_path: Path) -> None:
    command(tmp_path)
    told = [part.format(file=tmp_path / "tiny.toml") if "{file}" in part else part for part in arguments]
    out = [] if "--out" in told or "--resume" in told else ["--out", str(tmp_path / "run")]
    result = CliRunner().invoke(simulate_command, [*told, *out])
    assert isinstance(result.exception, CoveyError), result.exception
    assert what in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_the_command_is_one_of_coveys() -> None:
    done = subprocess.run([sys.executable, "-m", "covey_edge", "simulate", "--help"], capture_output=True, check=True)
    assert b"--as-fleet" in done.stdout
