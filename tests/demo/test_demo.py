"""`covey demo` as a user runs it: real processes, one report, the same table for the same seed, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from patience import PATIENCE_S

from covey_protocol import errors

pytestmark = pytest.mark.fleet

SMALL = ["--devices", "5", "--corrupted", "1", "--rounds", "2"]


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "covey_edge", "demo", "--runs-dir", str(folder), "--name", "test", *arguments]


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *arguments), capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def leftovers(folder: Path) -> list[str]:
    """Command lines of processes that this demo started: agents and trainers by folder, worker and broker by parent."""
    found = []
    for process in psutil.process_iter(["cmdline", "status", "environ"]):
        line = " ".join(process.info["cmdline"] or [])
        marked = (process.info["environ"] or {}).get("COVEY_TEST_MARK") == str(folder)
        if process.info["status"] != psutil.STATUS_ZOMBIE and (marked or str(folder) in line):
            found.append(line)
    return found


def wait_until_gone(folder: Path) -> list[str]:
    end = time.monotonic() + PATIENCE_S
    while (found := leftovers(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def table(output: str) -> list[str]:
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("run "))
    return lines[start : start + 4]


def test_both_engines_give_the_same_table_and_a_report_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COVEY_TEST_MARK", str(tmp_path))
    tff = demo(tmp_path / "tff", *SMALL, "--engine", "tff", "--seed", "3")
    assert tff.returncode == 0, tff.stderr
    assert tff.stderr == ""
    direct = demo(tmp_path / "direct", *SMALL, "--engine", "direct", "--seed", "3")
    assert direct.returncode == 0, direct.stderr
    assert table(tff.stdout) == table(direct.stdout)
    assert len(table(tff.stdout)) == 4
    report = (tmp_path / "tff" / "test" / "report.html").read_text()
    assert f"report: {tmp_path}/tff/test/report.html" in tff.stdout
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", report)
    for run in ("clean reference", "mean, 1 corrupted", "multi-krum, 1 corrupted"):
        assert run in report
    checkpoints = [sorted((tmp_path / e / "test" / "checkpoints").rglob("*.f32")) for e in ("tff", "direct")]
    assert [p.read_bytes() for p in checkpoints[0]] == [p.read_bytes() for p in checkpoints[1]]
    assert len(checkpoints[0]) == 6
    assert wait_until_gone(tmp_path) == []


@pytest.mark.slow
def test_a_table_of_numbers_works_the_same_way(tmp_path: Path) -> None:
    ended = demo(tmp_path, *SMALL, "--engine", "direct", "--data", "breast-cancer", "--rule", "median")
    assert ended.returncode == 0, ended.stderr
    assert "median, 1 corrupted" in ended.stdout
    assert "mean radius" in (tmp_path / "test" / "report.html").read_text()


@pytest.mark.broker
def test_a_file_and_a_broker_of_the_users_own_work_the_same_way_also_over_tls(
    tmp_path: Path, tls_broker: tuple[str, dict[str, Path]]
) -> None:
    url, files = tls_broker
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 60)
    np.savez(tmp_path / "own.npz", x=rng.normal(y[:, None], 0.5, (180, 4)), y=y)
    own = ["--data", tmp_path / "own.npz", "--broker", url]
    own += ["--ca-file", files["ca.crt"], "--cert-file", files["client.crt"], "--key-file", files["client.key"]]
    ended = demo(tmp_path / "runs", *SMALL, "--engine", "direct", "--rule", "trimmed-mean", *map(str, own))
    assert ended.returncode == 0, ended.stderr
    assert "covey demo: own, 5 devices" in ended.stdout
    assert f"broker     {url}" in ended.stdout


# --- ends


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "COVEY_TEST_MARK": str(folder), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command(folder, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def read_until(process: subprocess.Popen[str], wanted: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if wanted in line:
            return seen
    raise AssertionError(f"{wanted!r} never came: {seen}{process.stderr.read() if process.stderr else ''}")


MOMENTS = {
    "while it reads the data": ("covey demo", signal.SIGINT),
    "while the fleet starts": ("broker", signal.SIGINT),
    "in the middle of a round": ("round 1/", signal.SIGINT),
    "by a service manager": ("round 1/", signal.SIGTERM),
}


@pytest.mark.parametrize("moment", [
    pytest.param(moment, marks=pytest.mark.slow) if moment == "by a service manager" else moment for moment in MOMENTS
])  # fmt: skip
def test_an_interrupt_at_any_moment_leaves_no_process_behind(moment: str, tmp_path: Path) -> None:
    wanted, number = MOMENTS[moment]
    process = start(tmp_path, *SMALL[:4], "--rounds", "50", "--engine", "tff")
    read_until(process, wanted)
    process.send_signal(number)
    _, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == errors.EXIT_INTERRUPTED
    assert "Traceback" not in error
    assert wait_until_gone(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("tenths", range(2, 140, 9))
def test_an_interrupt_after_any_time_leaves_no_process_behind(tenths: int, tmp_path: Path) -> None:
    process = start(tmp_path, *SMALL[:4], "--rounds", "50", "--engine", "tff")
    time.sleep(tenths / 10)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode in (errors.EXIT_INTERRUPTED, -signal.SIGINT)  # the latter while Python itself starts
    assert "Traceback" not in error or tenths < 5, error
    assert wait_until_gone(tmp_path) == []


def test_even_a_killed_demo_leaves_no_process_behind(tmp_path: Path) -> None:
    process = start(tmp_path, *SMALL[:4], "--rounds", "50", "--engine", "tff")
    read_until(process, "round 1/")
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    assert wait_until_gone(tmp_path) == []


def child_with(process: subprocess.Popen[str], *words: str) -> psutil.Process:
    for child in psutil.Process(process.pid).children():
        if all(word in child.cmdline() for word in words):
            return child
    raise AssertionError(words)


def test_an_agent_that_is_killed_is_named_and_the_demo_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, *SMALL[:4], "--rounds", "3", "--engine", "direct", "--rule", "median")
    read_until(process, "round 1/")
    agent = next(
        child
        for child in psutil.Process(process.pid).children()
        if str(tmp_path / "test" / "devices" / "device-02" / "agent.toml") in child.cmdline()
    )
    agent.kill()
    output, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, error
    assert "the agent of device-02 ended (SIGKILL); the round goes on without it" in output
    assert len(table(output)) == 4


def test_a_broker_that_dies_is_named_with_the_documented_code(tmp_path: Path) -> None:
    process = start(tmp_path, *SMALL[:4], "--rounds", "50", "--engine", "direct")
    read_until(process, "round 1/")
    child_with(process, "broker", "run").kill()
    _, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == errors.EXIT_TRANSPORT
    assert re.search(r"^covey: error: the embedded broker at mqtt://127\.0\.0\.1:\d+ ended \(SIGKILL\)", error)
    assert wait_until_gone(tmp_path) == []


# --- bad input


def npz(folder: Path, **arrays: np.ndarray) -> str:
    np.savez(folder / "bad.npz", **arrays)
    return str(folder / "bad.npz")


X = np.zeros((60, 3), np.float32)
Y = np.arange(60) % 3
BAD: dict[str, tuple[Callable[[Path], list[str]], int, str]] = {
    "a file that is not there": (lambda f: ["--data", str(f / "no.npz")], errors.EXIT_DATA, "no.npz"),
    "a file that is no npz": (lambda f: ["--data", __file__ + ".npz"], errors.EXIT_DATA, "npz"),
    "a data set nobody knows": (lambda f: ["--data", "digit"], errors.EXIT_DATA, "digits"),
    "NaN in the data": (
        lambda f: ["--data", npz(f, x=np.where(np.arange(180).reshape(60, 3) == 7, np.nan, X), y=Y)],
        errors.EXIT_DATA,
        "NaN",
    ),
    "negative labels": (lambda f: ["--data", npz(f, x=X, y=Y - 1)], errors.EXIT_DATA, "label"),
    "a mistyped rule": (lambda f: ["--rule", "multi-crum"], errors.EXIT_CONFIG, "multi-krum"),
    "more corrupted devices than the rule can bear": (lambda f: ["--corrupted", "4"], errors.EXIT_RULE, "n > 2f"),
    "more corrupted devices than devices": (lambda f: ["--corrupted", "10"], errors.EXIT_CONFIG, "--corrupted"),
    "no rounds": (lambda f: ["--rounds", "0"], errors.EXIT_CONFIG, "rounds"),
    "a broker that is not there": (
        lambda f: ["--broker", "mqtt://127.0.0.1:1"],
        errors.EXIT_TRANSPORT,
        "mqtt://127.0.0.1:1 cannot be reached",
    ),
    "an address that is none": (lambda f: ["--broker", "localhost"], errors.EXIT_CONFIG, "mqtt://host:1883"),
    "certificates without TLS": (
        lambda f: ["--broker", "mqtt://127.0.0.1:1", "--ca-file", "ca.crt"],
        errors.EXIT_CONFIG,
        "mqtts://",
    ),
    "a folder that cannot be written": (
        lambda f: ["--runs-dir", "/proc/nowhere"],
        errors.EXIT_STORAGE,
        "/proc/nowhere",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_with_the_documented_code(what: str, tmp_path: Path) -> None:
    arguments, code, words = BAD[what]
    ended = demo(tmp_path, *arguments(tmp_path))
    assert (ended.returncode, ended.stderr.count("\n")) == (code, 1), ended.stderr
    assert ended.stderr.startswith("covey: error: ")
    assert words in ended.stderr
    assert wait_until_gone(tmp_path) == []


@pytest.mark.parametrize(
    ("system", "machine", "version"), [("Darwin", "arm64", (3, 11)), ("Linux", "aarch64", (3, 11))]
)
def test_a_machine_without_tff_is_told_what_still_works(system: str, machine: str, version: tuple[int, int]) -> None:
    from covey_coordinator.machine import check_machine

    with pytest.raises(errors.MachineError, match=r"x86-64 .*`covey agent` works here"):
        check_machine(system, machine, version)


def test_a_python_without_tff_is_told_which_one_to_use() -> None:
    from covey_coordinator.machine import check_machine

    with pytest.raises(errors.MachineError, match=r"Python 3\.13.*use Python 3\.11"):
        check_machine("Linux", "x86_64", (3, 13))
