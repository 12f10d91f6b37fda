"""The report of an experiment: its numbers are the runs', its page stays small, loads nothing and hides no failure."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import experiment_helpers
import msgspec
import numpy as np
import pytest
from experiment_helpers import ATTACKS, FRACTIONS, RULES, SETTINGS, Large, experiment
from report_helpers import HOSTILE, Page

from covey_coordinator.report.summary import Detection
from covey_coordinator.simulation.report.axes import Layout, label
from covey_coordinator.simulation.report.html import render, write_experiment_report
from covey_coordinator.simulation.report.points import Suspicion, area_under_roc, gathered, roc, thinned
from covey_coordinator.simulation.report.words import sentences
from covey_coordinator.simulation.results import Judged, RoundRecord, RunResult
from covey_protocol.errors import DataError

MAX_BYTES = 5_000_000


def judged(*accepted: bool, scores: tuple[float, ...] = ()) -> dict[str, Judged]:
    scores = scores or (0.0,) * len(accepted)
    return {f"d{number}": Judged(*pair) for number, pair in enumerate(zip(accepted, scores))}


def plain(seed: int = 0, accuracies: tuple[float, ...] = (0.1, 0.5), **changes: Any) -> RunResult:
    rounds = [RoundRecord(number, 1.0, {"accuracy": value}) for number, value in enumerate(accuracies)]
    return RunResult(**{"key": f"run-{seed}", "seed": seed, "rounds": rounds, **changes})


@pytest.fixture(scope="module")
def text() -> str:
    return render("rules", SETTINGS, experiment(), expected=81)


# --- numbers


def test_a_point_has_the_mean_of_its_seeds_and_their_spread():
    (point,) = gathered([plain(0, (0.1, 0.5)), plain(1, (0.2, 0.7)), plain(2, (0.1, 0.9))]).points
    assert point.accuracy == pytest.approx(0.7)
    assert point.spread == (0.5, 0.9)
    assert point.band("accuracy", 10) == ([0, 1], [pytest.approx(0.4 / 3), pytest.approx(0.7)], [0.1, 0.5], [0.2, 0.9])


def test_rounds_without_a_measurement_are_left_out_of_the_mean_and_not_taken_for_zero():
    short = plain(1, (0.2, 0.6))
    gap = plain(
        2, rounds=[RoundRecord(0, None, {"accuracy": 0.3}), RoundRecord(1), RoundRecord(2, None, {"loss": 1.0})]
    )
    (point,) = gathered([short, gap]).points
    assert point.band("accuracy", 10).mean == [0.25, 0.6]
    assert sorted(point.final()) == [0.3, 0.6]  # the last that was measured
    assert point.band("training loss", 10).rounds == [0, 1]


def test_a_device_is_turned_away_when_more_than_half_of_its_updates_were_left_out():
    accepted = [(True, False, True, False), (True, False, False, False), (True, True, False, True)]
    rounds = [RoundRecord(number, 1.0, verdicts=judged(*one)) for number, one in enumerate(accepted, 1)]
    rounds.append(RoundRecord(4, 1.0, verdicts={"d3": Judged(True, 0.0)}))  # d3: 2 of 4, which is no majority
    faults: dict[str, tuple[str, ...]] = {"d0": ("noise",), "d1": ("noise",), "d2": (), "d3": (), "d4": ("noise",)}
    (point,) = gathered([plain(rounds=rounds, faults=faults)]).points
    assert point.devices == Detection(rejected=2, rejected_corrupted=1, judged_corrupted=2, missing=0)  # d1, d2
    assert point.updates == Detection(rejected=6, rejected_corrupted=2, judged_corrupted=6, missing=0)
    assert (point.num_corrupted, point.num_devices) == (3, 5)


def test_the_worst_served_device_is_a_healthy_one():
    devices = {"d0": {"accuracy": 0.1}, "d1": {"accuracy": 0.8}, "d2": {"accuracy": 0.6}, "d3": {}}
    (point,) = gathered([plain(devices=devices, faults={"d0": ("noise",), "d1": (), "d2": ()})]).points
    assert [sorted(values) for values in point.device_accuracies] == [[0.6, 0.8]]


def test_suspicion_is_the_mean_place_among_the_devices_of_a_round_whatever_the_scores_scale():
    verdicts = [judged(*[True] * 3, scores=scores) for scores in ((1.0, 2.0, 3.0), (100.0, 300.0, 300.0))]
    rounds = [RoundRecord(number, 1.0, verdicts=one) for number, one in enumerate(verdicts, 1)]
    (point,) = gathered([plain(rounds=rounds, faults={"d0": (), "d1": ("x",), "d2": ()})]).points
    assert point.suspicions == [Suspicion(False, 0.0), Suspicion(True, 0.625), Suspicion(False, 0.875)]
    assert point.auc() == 0.5


AREAS = {
    "every corrupted device above every healthy one": ([0.9, 0.8], [0.3, 0.1], 1.0),
    "all alike": ([0.5, 0.5], [0.5], 0.5),
    "corrupted ones look the healthier": ([0.1], [0.8, 0.9], 0.0),
    "one of two pairs right": ([0.5], [0.4, 0.6], 0.5),
    "a tie counts half": ([0.5], [0.5, 0.4], 0.75),
}


@pytest.mark.parametrize("case", AREAS)
def test_auc_is_the_chance_that_a_corrupted_device_looks_worse(case: str):
    corrupted, healthy, expected = AREAS[case]
    suspicions = [Suspicion(True, rank) for rank in corrupted] + [Suspicion(False, rank) for rank in healthy]
    assert area_under_roc(suspicions) == pytest.approx(expected)
    assert roc(suspicions)[-1] == (1.0, 1.0)


def test_auc_of_one_kind_alone_is_unknown():
    assert math.isnan(area_under_roc([Suspicion(True, 0.5)] * 3))
    assert roc([Suspicion(False, 0.5)]) == []


def test_thinning_keeps_the_last_and_no_more_than_asked():
    assert thinned(range(1, 11), 20) == list(range(1, 11))
    kept = thinned(range(1, 1001), 100)
    assert kept[-1] == 1000
    assert len(kept) == 100


# --- layout


def test_rules_make_the_lines_attacks_the_columns_and_numbers_are_in_order():
    layout = Layout(gathered(reversed(experiment(seeds=(0,)))).points)
    line, columns = layout.lines(), layout.columns()
    assert line is not None
    assert columns is not None
    assert (line.name, columns.name) == ("rule", "attack")
    fraction = next(axis for axis in layout.axes if axis.is_numeric)
    assert fraction.values == FRACTIONS
    assert [panel["attack.fraction"] for panel in layout.panels(line, columns)] == list(FRACTIONS)


def test_tables_and_lists_are_values_of_a_sweep_like_others_and_get_short_names():
    values = [[], [{"kind": "label-flip", "fraction": 0.5}], [{"kind": "sensor-noise"}, {"kind": "stuck"}]]
    runs = [plain(number, key=str(number), varied={"corruptions": value}) for number, value in enumerate(values)]
    (axis,) = Layout(gathered(runs).points).axes
    assert axis.labels == ["none", "label-flip fraction=0.5", "sensor-noise + stuck"]
    assert label({"rule": "krum", "num_byzantine": 2}) == "krum num_byzantine=2"


def test_keys_with_the_same_last_part_keep_their_whole_name():
    runs = [plain(n, varied={"rule.name": str(n % 2), "attack.name": str(n // 2)}) for n in range(4)]
    assert {axis.name for axis in Layout(gathered(runs).points).axes} == {"rule.name", "attack.name"}


def test_a_seed_among_the_swept_keys_is_a_seed_and_no_axis():
    points = gathered([plain(n, varied={"seed": n, "run.seed": n}) for n in range(3)]).points
    assert len(points) == 1
    assert Layout(points).axes == []


# --- the page


def test_the_page_is_well_formed_loads_nothing_and_shows_every_part(text: str):
    page = Page(text)
    page.loads_and_runs_nothing()
    told = " ".join(page.texts)
    for part in (
        "Results at a glance",
        "Accuracy round by round",
        "Who was turned away",
        "Does every healthy device profit",
    ):
        assert part in told
    for part in (
        "How accuracy changes with",
        "Which data each device holds",
        "All results",
        "What a simulation does not",
    ):
        assert part in told
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels.count(1) == 1
    for drawing in page.all("svg"):
        assert drawing.get("aria-label") or drawing.get("aria-hidden") == "true"


def test_the_heat_map_writes_the_mean_of_the_seeds_in_its_cells(text: str):
    finals = {}
    for run in experiment():
        finals.setdefault(tuple(run.varied.values()), []).append(run.rounds[-1].evaluation["accuracy"])
    maps = [drawing["aria-label"] or "" for drawing in Page(text).all("svg") if drawing.get("class") == "heat"]
    assert len(maps) == len(FRACTIONS)
    for fraction, told in zip(FRACTIONS, maps):
        for rule in RULES:
            cells = ", ".join(f"{attack} {100 * np.mean(finals[rule, attack, fraction]):.0f}%" for attack in ATTACKS)
            assert f"{rule}: {cells}" in told


def test_more_rules_than_colours_are_all_drawn_in_panels_of_their_own():
    names = [f"rule-{number}" for number in range(9)]
    runs = [
        plain(0, (0.1, 0.5), key=f"{name}{share}", varied={"rule": name, "fraction": share})
        for name in names
        for share in (0.1, 0.2)
    ]
    drawn = [label["aria-label"] or "" for label in Page(render("many", {}, runs)).all("svg") if "aria-label" in label]
    trends = [told for told in drawn if told.startswith("Final accuracy over fraction")]
    curves = [told for told in drawn if told.startswith("accuracy over rounds")]
    assert len(trends) == 2
    assert "1 more curve is left out, to keep this page small." in " ".join(
        Page(render("eight", {}, with_faults(runs[:16]))).texts
    )
    assert len(curves) == 4
    assert all(any(f"{name}: " in told for told in group) for name in names for group in (trends, curves))


def with_faults(runs: list[RunResult]) -> list[RunResult]:
    return [msgspec.structs.replace(run, faults={"d0": ("noise",)}) for run in runs]


def test_a_long_sentence_of_the_summary_is_not_cut():
    names = [f"{letter * 40}" for letter in "abc"]
    keys = [f"a-key-of-some-length-{number}" for number in range(3)]
    runs = [plain(0, (0.1, 0.3 + n / 10), key=str(n), varied=dict.fromkeys(keys, name)) for n, name in enumerate(names)]
    (worst,) = [told for told in Page(render("long", {}, runs)).texts if told.startswith("The best combination")]
    assert len(worst) > 300
    assert worst.endswith(f"{keys[2]} {names[0]}).")


def test_the_summary_names_best_worst_and_who_holds_in_the_worst_case():
    runs = [
        plain(0, (0.1, value), key=f"{rule}{attack}", varied={"rule": rule, "attack": attack})
        for (rule, attack), value in {
            ("mean", "a"): 0.99,
            ("mean", "b"): 0.20,
            ("median", "a"): 0.90,
            ("median", "b"): 0.80,
        }.items()
    ]
    found = gathered(runs)
    said = " ".join(sentences(found, Layout(found.points)))
    assert "4 combinations with 1 random seed each" in said
    assert "The best combination got 99.0% of the test examples right (rule mean, attack a)" in said
    assert "the worst 20.0% (rule mean, attack b)" in said
    assert "rule “median” held best: never below 80.0%, at attack b. “mean” fell to 20.0%, at attack b" in said
    assert "single seed" in said


def test_the_summary_says_which_rule_found_the_corrupted_devices():
    def run(rule: str, *accepted: bool) -> RunResult:
        rounds = [RoundRecord(1, 1.0, {"accuracy": 0.5}, verdicts=judged(*accepted))]
        return plain(rounds=rounds, key=rule, varied={"rule": rule}, faults={"d0": ("x",), "d1": (), "d2": ()})

    found = gathered([run("blind", True, True, True), run("keen", False, False, True), run("good", False, True, True)])
    said = " ".join(sentences(found, Layout(found.points)))
    assert "best by rule “good”: over all its runs it turned away 1 of 1 corrupted device" in said
    assert "and 0 healthy ones" in said


def test_failed_runs_missing_seeds_and_early_ends_are_said():
    runs = [
        plain(0, key="a", varied={"rule": "x"}),
        plain(1, (0.1, 0.2, 0.3), key="b", varied={"rule": "x"}),
        plain(0, key="c", varied={"rule": "y"}),
        plain(0, key="d", varied={"rule": "z"}, rounds=[]),
    ]
    told = " ".join(Page(render("e", {}, runs, failed={"e": "out of memory"}, expected=6)).texts)
    assert "2 runs of 6 left no result" in told
    assert "1 run ended before the first round: d" in told
    assert "1 combination of 2 have fewer seeds than the 2 of the others" in told
    assert "last evaluated in an earlier round" in told
    assert "Run e failed: out of memory" in told


def test_a_thousand_runs_make_a_page_below_five_megabytes_that_says_what_it_leaves_out():
    text = render("large", SETTINGS, Large())
    assert len(text.encode()) < MAX_BYTES
    told = " ".join(" ".join(Page(text).texts).split())
    assert "1,000 runs · 500 combinations" in told
    for left_out in ("84 more panels are left out", "300 more rows are left out", "300 combinations between them"):
        assert left_out in told


def test_ten_thousand_devices_and_rounds_make_no_larger_page():
    devices = {f"device-{number:05d}": (3,) * 10 for number in range(10_000)}
    verdicts = {device_id: Judged(number % 3 > 0, float(number % 7)) for number, device_id in enumerate(devices)}
    rounds = [RoundRecord(number, 1.0, {"accuracy": 0.5 + number / 30_000}) for number in range(10_000)]
    rounds[-1] = RoundRecord(10_000, 1.0, {"accuracy": 0.9}, verdicts=verdicts)
    faults = {device_id: ("noise",) * (number % 5 == 0) for number, device_id in enumerate(devices)}
    text = render("wide", {}, [plain(rounds=rounds, faults=faults, counts=devices)])
    assert len(text.encode()) < 500_000
    assert "9,960 devices not drawn (corrupted ones come first)" in text


ODD = {
    "no run": [],
    "a run without a round": [plain(rounds=[])],
    "one run": [plain()],
    "no accuracy": [plain(rounds=[RoundRecord(1, 2.0)])],
    "losses that are not finite": [
        plain(rounds=[RoundRecord(n, math.inf, {"loss": math.nan, "accuracy": 0.1}) for n in (1, 2)])
    ],
    "losses from tiny to huge": [plain(rounds=[RoundRecord(n, 10.0 ** (9 * n), {"loss": 1e-9}) for n in (-1, 0, 1)])],
    "losses of zero": [plain(rounds=[RoundRecord(n, 0.0, {"loss": 0.0}) for n in (1, 2)])],
    "perfect accuracy": [plain(0, (1.0, 1.0))],
    "one round only": [plain(0, (0.4,))],
    "scores that are not finite": [
        plain(
            rounds=[RoundRecord(1, 1.0, verdicts=judged(True, False, scores=(math.nan, math.inf)))],
            faults={"d1": ("x",)},
        )
    ],
    "only a number varied": [
        plain(n, (0.1, 0.2 * n), key=str(n), varied={"learning_rate": n / 10}) for n in range(1, 5)
    ],
    "twenty rules": [plain(0, (0.1, 0.5), key=str(n), varied={"rule": f"rule-{n}"}) for n in range(20)],
    "values of several kinds": [
        plain(0, key=str(n), varied={"x": x}) for n, x in enumerate((None, 1, "a", True, [1], {}))
    ],
    "a key that some runs lack": [plain(0, key="a"), plain(0, key="b", varied={"rule": "krum"})],
    "devices without classes": [plain(counts={"d0": (), "d1": (0, 0)})],
    "counts of different lengths": [plain(counts={"d0": (3,), "d1": (1, 2)})],
    "devices without an accuracy": [plain(devices={"d0": {"loss": 1.0}})],
    "hostile names": [
        plain(
            n,
            key=HOSTILE + str(n),
            varied={"rule": f"{HOSTILE}{n}", "attack": {"kind": HOSTILE}, HOSTILE: n},
            rounds=[
                RoundRecord(
                    1, 1.0, {"accuracy": 0.5}, verdicts={HOSTILE: Judged(False, 1.0)}, measurements={HOSTILE: 1.0}
                )
            ],
            faults={HOSTILE: (HOSTILE,)},
            counts={HOSTILE: (1, 2)},
            devices={HOSTILE: {"accuracy": 0.5}},
            notes=(HOSTILE,),
        )
        for n in range(2)
    ],
}


@pytest.mark.parametrize("case", ODD)
def test_odd_experiments_render(case: str):
    text = render(HOSTILE, {HOSTILE: HOSTILE}, ODD[case], failed={HOSTILE: HOSTILE}, class_names=(HOSTILE,))
    page = Page(text)
    page.loads_and_runs_nothing()
    assert not re.search(r"\bnan\b|\binf\b", text)
    assert "<script" not in text
    assert "\u202e" not in text
    text.encode("utf-8")


# --- the folder


def folder_of(path: Path, runs: list[RunResult]) -> Path:
    for run in runs:
        cell = path / "cells" / run.key
        cell.mkdir(parents=True)
        (cell / "result.json").write_bytes(msgspec.json.encode(run))
    (path / "experiment.toml").write_text('rounds = 12\n[partition]\nkind = "dirichlet"\n')
    return path


def test_the_report_of_a_folder_is_that_of_its_results_and_replaces_an_older_one(tmp_path: Path):
    runs = experiment(seeds=(0,), rounds=3)
    folder = folder_of(tmp_path / "rules-20260101", runs)
    (folder / "report.html").write_text("older")
    path = write_experiment_report(folder)
    assert path == folder / "report.html"
    settings = {"rounds": "12", "partition.kind": "dirichlet"}
    assert path.read_text() == render(folder.name, settings, sorted(runs, key=lambda run: run.key), expected=27)


def test_cells_that_cannot_be_read_are_named_and_left_out(tmp_path: Path):
    folder = folder_of(tmp_path, experiment(seeds=(0,), rounds=2))
    (folder / "cells" / "mean-alie-0.1-0" / "result.json").write_text('{"key": 3}')
    (folder / "cells" / "mean-alie-0.2-0" / "result.json").unlink()
    failed = folder / "cells" / "mean-alie-0.3-0"
    (failed / "result.json").rename(failed / "rounds.jsonl")
    (failed / "error.json").write_text('{"error": "the disk is full", "traceback": ""}')
    told = " ".join(Page(write_experiment_report(str(folder)).read_text()).texts)
    assert "3 runs of 27 left no result" in told
    assert "Run mean-alie-0.3-0 failed: the disk is full" in told
    assert "4 runs of 28 left no result" in write_experiment_report(folder, 28).read_text()
    assert "Run mean-alie-0.1-0 failed: result.json cannot be read" in told
    assert "Run mean-alie-0.2-0 failed: it left no result" in told


def test_a_folder_without_an_experiment_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="holds no experiment"):
        write_experiment_report(tmp_path)


def test_the_helpers_runs_differ_so_that_the_tests_can_fail():
    finals = [run.rounds[-1].evaluation["accuracy"] for run in experiment_helpers.experiment()]
    assert len(set(finals)) == len(finals) == 81
