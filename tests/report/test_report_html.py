"""The report is one page that loads nothing, survives hostile names and odd records, and is written whole."""

from __future__ import annotations

import base64
import errno
import math
import os
import re
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from report_helpers import (
    CORRUPTED,
    DEVICES,
    HOSTILE,
    Page,
    demo,
    inversion_of_a_picture,
    inversion_of_a_table,
    run,
)

from covey_coordinator.records import ACCEPTED, MISSING, DemoRecord, DeviceVerdict, RoundRecord, RunRecord
from covey_coordinator.report import plots
from covey_coordinator.report.html import render, write_report
from covey_protocol.errors import StorageError


def hostile_demo() -> DemoRecord:
    verdicts = [DeviceVerdict(HOSTILE, "rejected", HOSTILE), DeviceVerdict("pi-2", ACCEPTED)]
    run_of_it = RunRecord(HOSTILE, HOSTILE, HOSTILE, [HOSTILE], [RoundRecord(1, 0.5, 1.0, verdicts, 1.0, note=HOSTILE)])
    inversion = replace(
        inversion_of_a_table(),
        device_id=HOSTILE,
        attacker_sees=HOSTILE,
        method=HOSTILE,
        feature_names=[HOSTILE] * 30,
        notes=[HOSTILE],
    )
    return demo(
        name=HOSTILE,
        dataset=HOSTILE,
        class_names=[HOSTILE, HOSTILE],
        settings={HOSTILE: HOSTILE},
        runs=[run_of_it],
        shard_counts={HOSTILE: [900, 3]},
        inversion=inversion,
    )


@pytest.fixture(scope="module")
def text() -> str:
    return render(demo())


def test_the_page_is_well_formed_and_shows_every_part(text):
    page = Page(text)
    told = " ".join(page.texts)
    for part in ("Results", "Accuracy round by round", "Whose updates were used", "Which data each device holds"):
        assert part in told
    for value in ("96.1%", "41.2%", "94.9%", "-54.9", "reference", "Dirichlet, alpha 0.5", "53.9 of 64"):
        assert value in told
    assert "One step on one example is the worst case" in told


@pytest.mark.parametrize("record", [demo(), hostile_demo()], ids=["ordinary", "hostile"])
def test_the_page_loads_nothing_and_runs_nothing(record):
    Page(render(record)).loads_and_runs_nothing()


def test_hostile_names_are_shown_as_text():
    text = render(hostile_demo())
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "{{ 7*7 }}" in text
    assert "\u202e" not in text
    assert "\x1b" not in text
    text.encode("utf-8")


def test_headings_are_in_order_and_every_picture_and_drawing_has_words(text):
    page = Page(text)
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert len(page.all("img")) == 5
    assert all(image["alt"] for image in page.all("img"))
    for drawing in page.all("svg"):
        assert drawing.get("aria-label") or drawing.get("aria-hidden") == "true"


def test_a_table_inversion_shows_features_by_name_and_no_picture():
    page = Page(render(demo(inversion=inversion_of_a_table())))
    assert page.all("img") == []
    assert "mean measurement 29" in page.texts


def nan_run() -> RunRecord:
    return RunRecord("never measured", "mean", "", [], [RoundRecord(n, math.nan, math.nan, [], 1.0) for n in (1, 2)])


def all_missing() -> RunRecord:
    absent = [DeviceVerdict(device, MISSING, "no update before the deadline") for device in DEVICES]
    return RunRecord(
        "nobody came", "mean", "", CORRUPTED, [RoundRecord(1, 0.1, 2.3, absent, 9.0, "abandoned", "quorum not met")]
    )


ODD = {
    "no inversion": {"inversion": None},
    "an inversion without any reconstruction": {"inversion": replace(inversion_of_a_picture(), reconstructions=[])},
    "a reconstruction of nothing but NaN": {
        "inversion": replace(
            inversion_of_a_picture(),
            reconstructions=[
                replace(
                    inversion_of_a_picture().reconstructions[0],
                    image=np.full((8, 8, 1), np.nan, np.float32),
                    mse=math.nan,
                    psnr_db=math.nan,
                    label=None,
                    resolved=None,
                )
            ],
        )
    },
    "a perfect reconstruction": {
        "inversion": replace(
            inversion_of_a_picture(),
            reconstructions=[replace(inversion_of_a_picture().reconstructions[0], mse=0.0, psnr_db=math.inf)],
        )
    },
    "a colour picture": {
        "inversion": replace(inversion_of_a_picture(), truth=np.zeros((5, 7, 3), np.float32), reconstructions=[])
    },
    "no runs": {"runs": []},
    "a run of zero rounds": {"runs": [RunRecord("none", "mean", "", [], [])]},
    "accuracy never measured": {"runs": [nan_run()]},
    "a gap in the curve beside a good run": {"runs": [nan_run(), run("ok", "mean", [], 0.9, rejects=False)]},
    "a run in which every device is missing": {"runs": [all_missing()]},
    "one round": {"runs": [run("one", "mean", [], 0.9, rejects=False, rounds=1)]},
    "five hundred rounds": {"runs": [run("long", "krum", CORRUPTED, 0.9, rejects=True, rounds=500)]},
    "perfect accuracy": {"runs": [RunRecord("all right", "mean", "", [], [RoundRecord(1, 1.0, 0.0, [], 1.0)])]},
    "no shards, classes or settings": {"shard_counts": {}, "class_names": [], "settings": {}},
    "more classes than names and colours": {"shard_counts": {"pi-1": [3] * 40}, "class_names": ["zero"]},
    "shards of nothing": {"shard_counts": {"pi-1": []}},
    "nine runs": {"runs": [run(f"run {n}", "mean", [], 0.9, rejects=False) for n in range(9)]},
}


@pytest.mark.parametrize("case", ODD)
def test_odd_records_render(case):
    text = render(demo(**ODD[case]))
    Page(text)
    assert not re.search(r"\bnan\b|\binf\b", text)


def test_rejected_and_missing_devices_are_listed_with_their_reasons():
    told = " ".join(Page(render(demo(runs=[all_missing()]))).texts)
    assert told.count("no update before the deadline") == len(DEVICES)
    assert "quorum not met" in told


def test_a_verdict_grid_tells_states_apart_without_colour():
    grid = str(plots.verdict_grid(*_grid_of(["accepted", "rejected", "missing", ""])))
    marks = dict(re.findall(r'<path class="(\w+)" d="([^"]+)"', grid))
    assert set(marks) == {"mark", "accepted", "rejected", "missing"}
    assert len({re.sub(r"^M[\d. -]+", "", path) for path in marks.values()}) == 4  # dot, cross, dash, triangle
    assert "a (corrupted): 1 accepted, 1 rejected, 1 missing" in grid


def _grid_of(statuses: list[str]) -> tuple[RunRecord, dict[str, list[str]]]:
    rounds = [RoundRecord(number, 0.5, 1.0, [], 1.0) for number in range(1, len(statuses) + 1)]
    return RunRecord("r", "krum", "", ["a"], rounds), {"a": statuses}


def test_a_picture_is_a_valid_png_enlarged_without_blurring():
    image = np.array([[0.0, 1.0], [0.5, np.nan]])
    address = plots.picture(image, (0.0, 1.0))
    data = base64.b64decode(address.split(",", 1)[1])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (plots.PICTURE_PIXELS, plots.PICTURE_PIXELS)
    length = struct.unpack(">I", data[33:37])[0]
    rows = np.frombuffer(zlib.decompress(data[41 : 41 + length]), np.uint8).reshape(height, width + 1)[:, 1:]
    half = width // 2
    assert set(rows[:half, :half].ravel()) == {0}
    assert set(rows[:half, half:].ravel()) == {255}
    assert set(rows[half:].ravel()) == {128}


def test_the_report_is_written_and_an_older_one_replaced(tmp_path):
    path = tmp_path / "reports" / "report.html"
    write_report(path, demo(name="first"))
    write_report(str(path), demo(name="second"))
    assert "second" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_full_disk_is_an_error_and_leaves_the_older_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("older")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(path, demo())
    assert path.read_text() == "older"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError):
        write_report(tmp_path / "file" / "report.html", demo())
