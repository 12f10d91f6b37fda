"""The numbers of a report: who was rejected, how far from the clean reference, and the terminal's table."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from patience import PATIENCE_S
from report_helpers import CORRUPTED, demo, inversion_of_a_picture, run

from covey_coordinator.records import ACCEPTED, MISSING, REJECTED, DeviceVerdict, RoundRecord, RunRecord
from covey_coordinator.report import summary


def of(*statuses: tuple[str, str], corrupted: tuple[str, ...] = ("bad",), accuracy: float = 0.5) -> RunRecord:
    verdicts = [DeviceVerdict(device, status) for device, status in statuses]
    return RunRecord("title", "krum", "tff", corrupted, [RoundRecord(1, accuracy, 1.0, verdicts, 1.0)])


def test_precision_and_recall_count_judged_updates_only():
    counted = summary.detection(
        of(("bad", REJECTED), ("bad", ACCEPTED), ("bad", MISSING), ("good", REJECTED), ("good", ACCEPTED))
    )
    assert counted.precision == pytest.approx(1 / 2)
    assert counted.recall == pytest.approx(1 / 2)
    assert counted.missing == 1


def test_a_run_without_rejections_has_no_precision_and_one_without_corrupted_devices_no_recall():
    assert math.isnan(summary.detection(of(("good", ACCEPTED))).precision)
    assert math.isnan(summary.detection(of(("good", REJECTED), corrupted=())).recall)


def test_the_clean_reference_is_the_first_run_without_corrupted_devices():
    rows = summary.run_rows(demo())
    assert [row.is_reference for row in rows] == [True, False, False]
    assert rows[1].difference == pytest.approx(-54.9)
    assert rows[2].num_corrupted == 3


def test_without_a_clean_run_the_difference_is_unknown_and_not_zero():
    attacked = demo(runs=[run("mean, 3 corrupted", "mean", CORRUPTED, 0.4, rejects=False)])
    assert math.isnan(summary.run_rows(attacked)[0].difference)
    assert summary.table_lines(attacked)[1].endswith("–")


def test_the_terminal_table_is_a_header_and_one_aligned_line_per_run():
    lines = summary.table_lines(demo())
    assert lines[0].split() == ["run", "accuracy", "to", "clean"]
    assert lines[1].split()[-2:] == ["96.1%", "reference"]
    assert lines[2].split()[-2:] == ["41.2%", "-54.9"]
    assert lines[3].split()[-2:] == ["94.9%", "-1.2"]
    assert len({len(line) for line in lines}) == 1


def test_a_difference_too_small_to_print_has_no_sign():
    assert summary.points(-0.01) == "0.0"
    assert summary.points(0.3) == "+0.3"


def test_text_from_devices_cannot_move_a_terminals_cursor_or_turn_the_reading_direction():
    hostile = "pi\x1b[2J\n-1\u202egnp\ud800"
    shown = summary.printable(hostile)
    assert "\x1b" not in shown
    assert "\n" not in shown
    assert "\u202e" not in shown
    shown.encode("utf-8")
    assert len(summary.printable("x" * 10_000)) <= summary.MAX_TEXT
    assert "\x1b" not in "".join(summary.table_lines(demo(runs=[replace(of(), title=hostile)])))


def test_devices_are_sorted_as_people_count_and_marked_ones_are_never_forgotten():
    record = demo(shard_counts={"pi-11": [1]}, runs=[of(("pi-2", ACCEPTED), corrupted=("pi-10",))])
    assert summary.device_ids(record) == ["pi-2", "pi-10", "pi-11"]


def test_a_device_that_was_not_invited_has_an_empty_cell():
    assert summary.statuses(of(("a", REJECTED)), ["a", "b"]) == {"a": [REJECTED], "b": [""]}


def test_the_summary_names_the_fall_the_rescue_and_the_leak():
    told = summary.sentences(demo())
    assert len(told) == 5
    assert "96.1%" in told[1]
    assert "3 of 10 devices corrupted" in told[2]
    assert "41.2%" in told[2]
    assert "94.9%" in told[3]
    assert "almost exactly" in told[4]


def test_with_one_attacked_run_the_sentence_before_last_says_who_was_turned_away():
    told = summary.sentences(demo(runs=[run("clean", "mean", [], 0.9, False), run("k", "krum", CORRUPTED, 0.8, True)]))
    assert told[3].startswith("It turned away ")


def test_a_reconstruction_no_better_than_a_blind_guess_is_called_hidden():
    inversion = inversion_of_a_picture()
    assert [summary.exposure(inversion, attempt) for attempt in inversion.reconstructions][::3] == [
        summary.EXPOSED,
        summary.HIDDEN,
    ]
    blind = np.full_like(inversion.truth, 0.5)
    assert summary.blind_psnr(inversion) == pytest.approx(
        10 * math.log10(1 / np.mean((inversion.truth - blind) ** 2)), rel=1e-5
    )


def test_the_terminal_table_needs_neither_tensorflow_nor_matplotlib():
    code = (
        "import sys, covey_coordinator.report.summary\n"
        "heavy = {'tensorflow', 'matplotlib', 'scipy', 'tensorflow_federated'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
