"""`covey record`: real SQLite files, real processes that are killed, and a reader beside the recorder."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from click.testing import CliRunner
from patience import PATIENCE_S
from small_disk import SmallDisk

from covey_edge.cli_record import record
from covey_edge.data_sources import read_source
from covey_edge.record_lines import LineParser
from covey_edge.recorder import BadReading, Recorder, Retention, moment_of
from covey_edge.recording_loop import Waiting
from covey_protocol.errors import ConfigError, DataError, StorageError

DAY_S = 86400.0


def rows(path: Path, columns: str = "*") -> list[tuple[Any, ...]]:
    made = sqlite3.connect(path)
    found = made.execute(f"SELECT {columns} FROM readings ORDER BY id").fetchall()  # noqa: S608  # ours
    assert made.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    made.close()
    return found


class Clock:
    def __init__(self, now: float = 1e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


# --- lines

LINES = {
    "JSON": ('{"t": 1.5, "where": "hall", "on": true, "h": null}', {"t": 1.5, "where": "hall", "on": 1.0, "h": None}),
    "pairs": ("t=1.5 where=hall h=", {"t": 1.5, "where": "hall", "h": None}),
    "CSV under given names": ("1.5, hall ,nan", {"t": 1.5, "where": "hall", "h": None}),
    "a blank line": ("  ", None),
    "the names again": ("t,where,h", None),
}


@pytest.mark.parametrize("what", LINES)
def test_a_line_is_a_reading(what: str) -> None:
    line, expected = LINES[what]
    assert LineParser(("t", "where", "h")).parse(line) == expected


BAD_LINES = {
    "too few cells": ("1,2", "2 values came for 3 columns"),
    "half a JSON object": ('{"t": 1', "no JSON object"),
    "a list in it": ('{"t": [1]}', "neither a number nor a text"),
    "a name twice": ("t=1 t=2", "each name once"),
    "a quote that does not end": ('"1,2,3', "no line of CSV"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_line_is_left_out_for(what: str) -> None:
    line, message = BAD_LINES[what]
    with pytest.raises(BadReading, match=message):
        LineParser(("t", "where", "h")).parse(line)


def test_names_come_before_values() -> None:
    parser = LineParser()
    with pytest.raises(BadReading, match="before a line with the names"):
        parser.parse("1,2")
    assert parser.parse("a,b") is None
    assert parser.parse("1,2") == {"a": 1.0, "b": 2.0}
    parser.begin()
    assert parser.parse("b,a") is None
    assert parser.parse("1,2") == {"b": 1.0, "a": 2.0}


# --- the table


def test_a_table_is_made_at_first_use_and_other_columns_are_refused_by_name(tmp_path: Path) -> None:
    path, clock = tmp_path / "r.sqlite", Clock()
    recorder = Recorder(path, clock=clock)
    recorder.add([{"t": 20.5, "where": "hall"}, {"t": None, "where": 7.0, "time": 5.0}])
    with pytest.raises(DataError, match="no column 'h'; it has t, where"):
        recorder.add([{"t": 1.0, "where": "x", "h": 1.0}])
    with pytest.raises(DataError, match="a column 'where' that the reading lacks"):
        recorder.add([{"t": 1.0}])
    with pytest.raises(BadReading, match="t holds numbers, and 'warm' came"):
        recorder.add([{"t": 1.0, "where": "x"}, {"t": "warm", "where": "x"}])
    recorder.close()
    assert rows(path) == [(1, 1e9, 20.5, "hall"), (2, 5.0, None, "7")]  # of a bad transaction nothing
    assert path.stat().st_mode & 0o777 == 0o600
    again = Recorder(path, clock=clock)
    again.add([{"t": "21", "where": "x"}])
    again.close()
    assert rows(path)[-1] == (3, 1e9, 21.0, "x")


def test_a_table_of_somebody_else_and_a_file_that_is_no_database_are_refused(tmp_path: Path) -> None:
    made = sqlite3.connect(tmp_path / "r.sqlite")
    made.execute("CREATE TABLE readings (a REAL)")
    made.close()
    with pytest.raises(DataError, match="not made by `covey record`"):
        Recorder(tmp_path / "r.sqlite")
    (tmp_path / "text").write_text("no database, and longer than nothing" * 99)
    with pytest.raises(StorageError, match="no usable database"):
        Recorder(tmp_path / "text")
    with pytest.raises(StorageError, match="cannot write"):
        Recorder(tmp_path / "none" / "r.sqlite")


def test_labels_come_later_and_only_once(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    recorder = Recorder(path)
    recorder.add([{"t": float(second), "time": float(second)} for second in range(10)])
    assert recorder.label("open", 2, 5) == 3
    assert recorder.label("shut", 0, 9) == 6
    assert recorder.label("open", 8, 9, again=True) == 1
    recorder.add([{"t": 10.0, "time": 10.0}, {"t": 11.0, "time": 11.0, "label": "open"}])
    recorder.close()
    labels = [label for *_, label in rows(path)]
    assert labels == ["shut"] * 2 + ["open"] * 3 + ["shut"] * 3 + ["open", None, None, "open"]
    options = {"table": "readings", "codes": {"label": ["shut", "open"]}}
    table = read_source("sqlite", path, options)
    assert table.y.tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 1, 1]
    assert table.notes == ("2 rows have no label yet",)


def test_moments() -> None:
    assert moment_of("1970-01-02T00:00Z") == moment_of("1970-01-02") == moment_of("86400") == DAY_S
    assert moment_of("1970-01-02T01:00+01:00") == DAY_S
    with pytest.raises(ConfigError, match="is no time"):
        moment_of("yesterday")


# --- retention


def test_the_newest_rows_are_kept(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r.sqlite", retention=Retention(rows=5))
    for start in range(0, 30, 3):
        recorder.add([{"t": float(start + place)} for place in range(3)])
    recorder.close()
    assert [t for _, _, t in rows(tmp_path / "r.sqlite")] == [25, 26, 27, 28, 29]


def test_rows_of_so_many_days_are_kept_and_a_clock_that_jumps_does_not_cost_all(tmp_path: Path) -> None:
    clock = Clock()
    recorder = Recorder(tmp_path / "r.sqlite", retention=Retention(days=2), clock=clock)
    for day in range(5):
        clock.now = 1e9 + day * DAY_S
        recorder.add([{"t": float(day)}])
    assert [t for _, _, t in rows(tmp_path / "r.sqlite")] == [2, 3, 4]
    recorder.add([{"t": 9.0}] * 5000)
    clock.now += 1000 * DAY_S
    recorder.add([{"t": 10.0}])
    assert 4880 < len(rows(tmp_path / "r.sqlite")) < 4900
    for _ in range(50):
        recorder.add([{"t": 10.0}])
    recorder.close()
    assert [t for _, _, t in rows(tmp_path / "r.sqlite")] == [10.0] * 51


def test_a_file_stays_as_large_as_it_may_be(tmp_path: Path) -> None:
    path, limit = tmp_path / "r.sqlite", 64 * 1024
    recorder = Recorder(path, retention=Retention(bytes=limit))
    most, reading = 0, {"text": "x" * 200}
    for number in range(60):
        recorder.add([{**reading, "number": float(number)}] * 20)
        recorder._database.execute("PRAGMA wal_checkpoint(PASSIVE)")
        most = max(most, path.stat().st_size)
    assert most <= limit + 64 * 4096  # what waits to be used again
    kept = [number for *_, number in rows(path)]
    assert kept[-20:] == [59.0] * 20
    assert 100 < len(kept) < 64 * 1024 / 200
    recorder.close()
    smaller = Recorder(path, retention=Retention(rows=10))
    smaller.add([{**reading, "number": 60.0}])
    smaller.close()
    assert path.stat().st_size < limit + 64 * 4096


# --- a full disk


def test_readings_wait_for_space_and_then_go_in_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """SQLite's own limit of pages gives the error of a full disk."""
    path = tmp_path / "r.sqlite"
    recorder = Recorder(path)
    recorder.add([{"text": "x" * 3000, "number": 0.0}])
    recorder._database.execute("PRAGMA max_page_count = 10")
    waiting = Waiting(recorder)
    for number in range(1, 21):
        waiting.take({"text": "x" * 3000, "number": float(number)})
    with pytest.raises(StorageError, match=r"\d+ readings are lost: there is no space"):
        waiting.end()
    stored = len(rows(path))
    assert 1 < stored < 21
    recorder._database.execute("PRAGMA max_page_count = 1000")
    waiting.end()
    recorder.close()
    assert [number for *_, number in rows(path)] == list(range(21))
    told = capfd.readouterr().err
    assert told.count("database or disk is full") == 1
    assert told.count("there is space again") == 1


def test_what_waits_is_bounded_and_what_is_lost_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("covey_edge.recording_loop.MOST_WAITING", 5)
    recorder = Recorder(tmp_path / "r.sqlite")
    recorder.add([{"text": "", "number": 0.0}])
    recorder._database.execute("PRAGMA max_page_count = 4")
    waiting = Waiting(recorder, quiet=True)
    for number in range(1, 31):
        waiting.take({"text": "x" * 3000, "number": float(number)})
    recorder._database.execute("PRAGMA max_page_count = 1000")
    waiting.end()
    recorder.close()
    assert [number for *_, number in rows(tmp_path / "r.sqlite")][-5:] == [26, 27, 28, 29, 30]
    assert f"{waiting.lost} readings are lost" in capfd.readouterr().err
    assert waiting.lost + waiting.recorded == 30


@pytest.mark.slow
@pytest.mark.fleet
def test_a_disk_that_is_really_full_costs_no_reading(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path / "small", 4 * 2**20)
    process = started("lines", str(tmp_path / "small" / "r.sqlite"), before=disk.before)
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        process.stdin.write(text_lines(range(3)))
        process.stdin.flush()
        read_until(process.stderr, b"readings recorded")
        disk.fill()
        process.stdin.write(text_lines(range(3, 60)))
        process.stdin.flush()
        read_until(process.stderr, b"readings wait in memory")
        disk.free()
        read_until(process.stderr, b"there is space again")
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 0
        shutil.copy(disk.seen / "r.sqlite", tmp_path / "r.sqlite")  # SQLite cannot open it through /proc
        assert [number for (number,) in rows(tmp_path / "r.sqlite", "number")] == list(range(60))
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stderr.close()
        disk.close()


def text_lines(numbers: range) -> bytes:
    return "".join(f'{{"number": {number}, "text": "{"x" * 3000}"}}\n' for number in numbers).encode()


def read_until(stream: IO[bytes], what: bytes) -> None:
    for line in stream:
        if what in line:
            return
    pytest.fail(f"it ended without {what!r}")


# --- the command


def test_one_reading_by_hand_and_a_label(tmp_path: Path) -> None:
    path = str(tmp_path / "r.sqlite")
    assert CliRunner().invoke(record, ["add", path, "t=21.5", "where=hall"]).exit_code == 0
    assert CliRunner().invoke(record, ["label", path, "1", "--from", "2020-01-01"]).output == "1 rows labelled 1\n"
    assert rows(tmp_path / "r.sqlite", 't, "where", label') == [(21.5, "hall", 1.0)]


def started(*arguments: str, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    command = [*before, sys.executable, "-m", "covey_edge", "record", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def count(path: Path) -> int:
    if not path.exists():
        return 0
    made = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)
    try:
        return int(made.execute("SELECT count(*) FROM readings").fetchone()[0])
    except sqlite3.OperationalError:  # no table yet
        return 0
    finally:
        made.close()


@pytest.mark.fleet
def test_lines_with_another_tables_columns_end_it_and_keep_what_came_before(tmp_path: Path) -> None:
    process = started("lines", str(tmp_path / "r.sqlite"), "--batch", "100")
    lines = b'a,b\n1,2\n3\n3,x\n{"a": 5, "b": 6}\n{"a": 1, "c": 2}\n7,8\n'
    _, told = process.communicate(lines, timeout=PATIENCE_S)
    assert process.returncode == 4
    assert rows(tmp_path / "r.sqlite", "a, b") == [(1, 2), (5, 6)]
    assert b"1 values came for 2 columns" in told
    assert b"b holds numbers, and 'x' came" in told
    assert b"has no column 'c'" in told


@pytest.mark.fleet
def test_sigterm_adds_what_waits_for_its_batch(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    process = started("lines", str(path), "--columns", "a,b", "--batch", "3")
    assert process.stdin is not None
    process.stdin.write(b"1,1\n2,2\n3,3\n4,4\n")
    process.stdin.flush()
    wait_for(lambda: count(path) == 3 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0
    process.stdin.close()
    assert process.stderr is not None
    assert b"4 readings recorded" in process.stderr.read()
    process.stderr.close()
    assert rows(path, "a") == [(1,), (2,), (3,), (4,)]


@pytest.mark.fleet
def test_a_command_is_run_every_so_often_and_may_fail(tmp_path: Path) -> None:
    script = "import os, sys; n = len(os.listdir(sys.argv[1])); open(f'{sys.argv[1]}/{n}', 'w').close(); "
    script += "print('a,b'); print(f'{n},{n}'); sys.exit(n == 1)"
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-c", script, str(tmp_path / "runs")]
    process = started("every", "0.1", str(tmp_path / "r.sqlite"), "--times", "3", "--", *command)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert rows(tmp_path / "r.sqlite", "a, b") == [(0, 0), (2, 2)]
    assert b"returned non-zero exit status 1" in told


@pytest.mark.fleet
def test_a_recorder_that_is_killed_loses_no_row_that_was_seen_while_another_reads_on(tmp_path: Path) -> None:
    """Whole rows, in order, none missing: at each look of a reader, after each kill, and after the next start."""
    path, fed = tmp_path / "r.sqlite", 0
    for _ in range(2):
        process = started("lines", str(path), "--columns", "a,b", "--quiet")
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        seen, before = 0, count(path)
        until = time.monotonic() + PATIENCE_S
        fed = before  # what was on its way to a killed recorder is said again
        while seen < before + 30:
            assert time.monotonic() < until
            assert process.poll() is None
            try:
                os.write(process.stdin.fileno(), f"{fed},{2 * fed}\n".encode())
                fed += 1
            except BlockingIOError:
                pass
            if path.exists() and count(path):
                table = read_source("sqlite", path, {"table": "readings", "columns": ["a"], "label": "b"})
                assert table.x[:, 0].tolist() == list(range(len(table.x)))
                assert (table.y == 2 * table.x[:, 0]).all()
                assert len(table.x) >= seen
                seen = len(table.x)
        process.kill()
        process.wait()
        process.stdin.close()
        assert process.stderr is not None
        process.stderr.close()
        stored = [a for (a,) in rows(path, "a")]
        assert stored == list(range(len(stored)))
        assert len(stored) >= seen
