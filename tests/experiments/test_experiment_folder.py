"""What an experiment keeps and shows: its folder after every kind of interruption, its progress, its table."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from covey_coordinator.grid.display import Display
from covey_coordinator.simulation.display import Rounds, shown
from covey_coordinator.simulation.folder import (
    CellFolder,
    ExperimentFolder,
    RunNotes,
    SavedState,
    file_sha256,
    new_path,
)
from covey_coordinator.simulation.memory import bounded_jobs, free_bytes, job_bytes, require_for_updates
from covey_coordinator.simulation.results import Judged, RoundRecord, RunResult
from covey_coordinator.simulation.running import Progress
from covey_coordinator.simulation.sweep import Cell, cells_of
from covey_coordinator.simulation.table import table_lines
from covey_coordinator.simulation.world import world_of
from covey_protocol.errors import ConfigError, MachineError

TABLE = {"name": "e", "rounds": 4, "seeds": 2, "sweep": {"aggregation.rule": ["mean", "krum"]}}


def record(number: int, accuracy: float = 0.5) -> RoundRecord:
    verdicts = {"device-000": Judged(False, 1.5)}
    return RoundRecord(number, 0.25, {"accuracy": accuracy, "loss": 1.0}, {}, verdicts, {"epsilon": 2.0}, 0.1)


def cell_folder(folder: Path, rounds: int, state: int | None) -> CellFolder:
    """A cell after so many rounds with the state of one of them."""
    place = CellFolder(folder)
    place.taken_up()
    for number in range(rounds + 1):
        place.append(record(number))
        if number == state:
            place.save(SavedState(number, b"state", ("a note",)))
    return place


# ---- the folder


def test_a_cell_goes_on_after_its_newest_state_and_drops_what_came_later(tmp_path: Path) -> None:
    place = cell_folder(tmp_path / "c", rounds=5, state=3)
    state, records = place.taken_up()
    assert state == SavedState(3, b"state", ("a note",))
    assert records == [record(number) for number in range(4)]
    place.append(record(4, accuracy=0.75))
    assert place.taken_up()[1] == records  # still of the state, whatever was appended since


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    place = cell_folder(tmp_path / "c", rounds=4, state=3)
    with (place.path / "rounds.jsonl").open("ab") as file:
        file.write(b'{"number":5,"lo')
    assert [one.number for one in place.taken_up()[1]] == [0, 1, 2, 3]


def test_a_cell_without_a_state_or_with_lost_lines_begins_again(tmp_path: Path) -> None:
    assert cell_folder(tmp_path / "none", rounds=3, state=None).taken_up() == (None, [])
    place = cell_folder(tmp_path / "lost", rounds=3, state=3)
    lines = (place.path / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    (place.path / "rounds.jsonl").write_bytes(b"".join([lines[0], *lines[2:]]))
    assert place.taken_up() == (None, [])


def test_a_finished_cell_keeps_its_result_and_no_state(tmp_path: Path) -> None:
    place = cell_folder(tmp_path / "c", rounds=3, state=2)
    place.fail("it broke")
    assert place.result() is None
    result = RunResult(
        "c", 0, {"attack": {"attack": "alie"}}, [record(0)], {"device-000": ("alie",)}, {"device-000": (1,)}
    )
    place.finish(result)
    assert place.result() == result
    assert sorted(path.name for path in place.path.iterdir()) == ["result.json", "rounds.jsonl"]
    (place.path / "result.json").write_text("{")
    with pytest.raises(ConfigError, match="delete that file"):
        place.result()


def test_an_experiment_is_read_back_and_another_is_refused_in_its_folder(tmp_path: Path) -> None:
    notes = RunNotes(beside=str(tmp_path), data_dir="/data", as_fleet=True)
    folder = ExperimentFolder.new(tmp_path / "e", TABLE, notes)
    assert (folder.table, folder.notes) == (TABLE, notes)
    assert ExperimentFolder.new_or_same(tmp_path / "e", TABLE, notes).path == folder.path
    for other in ((TABLE, RunNotes()), ({**TABLE, "rounds": 5}, notes)):
        with pytest.raises(ConfigError, match="another experiment"):
            ExperimentFolder.new_or_same(tmp_path / "e", *other)
    with pytest.raises(ConfigError, match="--resume"):
        ExperimentFolder.new(tmp_path / "e", TABLE, notes)
    with pytest.raises(ConfigError, match="holds no experiment"):
        ExperimentFolder.old(tmp_path)


def test_a_folder_serves_one_process_at_a_time(tmp_path: Path) -> None:
    folder = ExperimentFolder.new(tmp_path / "e", TABLE, RunNotes())
    with (
        folder.held(),
        pytest.raises(ConfigError, match="another covey simulate"),
        ExperimentFolder(folder.path).held(),
    ):
        pass
    with folder.held():
        pass


def test_an_experiment_whose_code_has_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    code = tmp_path / "model.py"
    code.write_text("def build(): ...")
    ExperimentFolder.new(tmp_path / "e", TABLE, RunNotes(files={str(code): file_sha256(str(code))}))
    ExperimentFolder.old(tmp_path / "e")
    code.write_text("def build(): return 1")
    with pytest.raises(ConfigError, match=r"model.py is not what it was"):
        ExperimentFolder.old(tmp_path / "e")


def test_two_experiments_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    found = set()
    for _ in range(3):
        path = new_path(tmp_path, "e")
        path.mkdir()
        found.add(path)
    assert len(found) == 3


# ---- progress


def cells() -> list[Cell]:
    return cells_of(TABLE)


def test_rounds_are_counted_over_all_cells_and_a_resumed_one_counts_from_where_it_was() -> None:
    first, resumed, failing, _ = cells()
    rounds = Rounds(4, 16)
    assert rounds.left() == "starting"
    rounds.advanced(first, Progress(0, 4, record(0)))
    for number in range(1, 5):
        rounds.advanced(first, Progress(number, 4, record(number)))
    assert (rounds.finished, rounds.total) == (4, 16)
    rounds.advanced(resumed, Progress(4, 4, record(4)))  # three of its rounds lie behind it
    assert (rounds.finished, rounds.total) == (5, 13)
    rounds.advanced(failing, Progress(0, 4, record(0)))
    for cell in (first, resumed, failing):
        rounds.ended(cell)
    assert (rounds.finished, rounds.total, rounds.finished_cells) == (5, 9, 3)
    assert "left" in rounds.left()


def shown_text(terminal: bool) -> str:
    file = io.StringIO()
    display = Display(file)
    display.console = Console(file=file, force_terminal=terminal, width=120, highlight=False)
    first, other, *_ = cells()
    with shown(display, 2, 8, every_s=0.0) as show:
        for cell in (first, other):
            for number in range(5):
                show.advanced(cell, Progress(number, 4, record(number, accuracy=0.625)))
                time.sleep(0.001)
            show.line("a note")
            show.ended(cell)
    return file.getvalue()


def test_without_a_terminal_progress_is_plain_lines_with_the_time_left() -> None:
    text = shown_text(terminal=False)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[1].startswith("  0/2 runs, 1/8 rounds, about 0:0")
    assert lines[1].endswith("aggregation.rule=mean, seed 0: round 1 of 4, accuracy 62.5%")
    assert lines[-2].startswith("  1/2 runs, 8/8 rounds, finishing")
    assert lines.count("a note") == 2


def test_on_a_terminal_progress_is_bars_for_all_rounds_and_for_each_run() -> None:
    text = shown_text(terminal=True)
    for part in ("\x1b[", "━", "all rounds", "aggregation.rule=krum, seed 0", "4/4", "62.5%", "8/8", "done; 2/2 runs"):
        assert part in text


# ---- the table


def result_of(cell: Cell, accuracy: float | None, notes: tuple[str, ...] = ()) -> RunResult:
    rounds = [] if accuracy is None else [record(0, 0.1), record(1, accuracy)]
    return RunResult(cell.key, cell.seed, cell.varied, rounds, notes=notes)


def test_the_table_has_a_line_per_point_with_mean_and_spread_over_seeds() -> None:
    mean_0, krum_0, mean_1, krum_1 = cells()
    results = [result_of(mean_0, 0.75), result_of(mean_1, 0.5, ("1 of 4 rounds refused",)), result_of(krum_0, None)]
    assert table_lines(cells(), results, {krum_1.key}) == [
        "test accuracy after the last round, mean of 2 seeds",
        "aggregation  accuracy  lowest  highest    loss",
        "mean            62.5%   50.0%    75.0%  1.0000  1 with refused rounds",
        "krum                -       -        -       -  1 refused, 1 failed",
    ]


def test_one_run_is_a_table_of_one_line() -> None:
    (only,) = cells_of({"name": "e", "rounds": 1})
    assert table_lines([only], [result_of(only, 0.5)], set())[1:] == ["accuracy    loss", "   50.0%  1.0000"]


# ---- memory


def test_jobs_are_as_many_as_memory_bears_and_none_is_refused() -> None:
    free = free_bytes()
    assert bounded_jobs(8, free // 3) in (2, 3)  # what is free changes while we look
    assert bounded_jobs(2, 1) == 2
    with pytest.raises(MachineError, match="MB are free"):
        bounded_jobs(1, 2 * free)


def test_a_model_whose_updates_do_not_fit_is_refused_with_its_size() -> None:
    world = world_of(cells()[0])
    assert job_bytes(world) > 3 * world.train.x.nbytes
    require_for_updates(world, 10_000)
    with pytest.raises(MachineError, match="10 devices with 1000000000000 parameters"):
        require_for_updates(world, 10**12)


def test_what_a_run_leaves_out_is_not_hidden(tmp_path: Path) -> None:
    """Every file of the layout that the module's text promises."""
    place: Any = ExperimentFolder.new(tmp_path / "e", TABLE, RunNotes())
    assert place.cell("k").path == tmp_path / "e" / "cells" / "k"
    assert place.board("k") == tmp_path / "e" / "tensorboard" / "k"
    assert {path.name for path in place.path.iterdir()} == {"experiment.toml", "run.json"}
