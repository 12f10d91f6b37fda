"""What a grid can be asked to do, and what is refused with a remedy before anything starts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from covey_coordinator.aggregation.registry import RULES
from covey_coordinator.attacks.registry import GENERAL_NAMES
from covey_coordinator.grid.command import grid_command, settings_from, usable_jobs
from covey_coordinator.grid.folder import Folder
from covey_coordinator.grid.picture import heat_map
from covey_coordinator.grid.settings import Cell, GridSettings, canonical, parse_spec, plan_of
from covey_coordinator.grid.summary import panels_of, summary_of, table_lines
from covey_protocol.errors import ConfigError, CoveyError

NO_OPTIONS: dict[str, Any] = {"rules": (), "attacks": (), "fractions": ()}


def settings_of_toml(folder: Path, text: str, quick: bool = False, **options: Any) -> GridSettings:
    path = folder / "grid.toml"
    path.write_text(text)
    return settings_from(path, {**NO_OPTIONS, **options}, quick)


def test_by_default_every_rule_meets_every_attack() -> None:
    plan = plan_of(GridSettings())
    assert set(plan.rules) | {note.split()[0] for note in plan.notes} == set(RULES)
    assert list(plan.attacks) == list(GENERAL_NAMES)
    cells = plan.cells()
    assert len(cells) == len(plan.rules) * 3 * (1 + 4 * len(GENERAL_NAMES))
    assert {cell.num_hostile for cell in cells} == {0, 2, 4, 6, 8}
    assert len({cell.key for cell in cells}) == len(cells)


def test_a_rule_that_bears_nobody_is_told_that_nobody_is_corrupted() -> None:
    plan = plan_of(GridSettings(rules=("mean", "median", {"rule": "median", "num_byzantine": 3})))
    told = {label: spec.made(8).num_byzantine for label, spec in plan.rules.items()}
    assert told == {"mean": 0, "median": 8, "median f=3": 3}


def test_the_file_gives_settings_and_options_win_over_it(tmp_path: Path) -> None:
    text = """
rounds = 30
seeds = 7
rules = ["median", {rule = "multi-krum", num_selected = 5, label = "five"}]
attacks = [{attack = "ipm", epsilon = 10.0}]
"""
    settings = settings_of_toml(tmp_path, text, quick=True, seeds=2)
    assert (settings.rounds, settings.seeds, settings.fractions) == (30, 2, (0.0, 0.2, 0.4))
    plan = plan_of(settings)
    assert list(plan.rules) == ["median", "five"]
    assert dict(plan.rules["five"].settings) == {"num_selected": 5}
    assert list(plan.attacks) == ["ipm epsilon=10.0"]


def test_rows_behind_pre_steps_are_named_after_them() -> None:
    steps = ({"rule": "median", "before": ["nnm"]}, {"rule": "median", "before": [{"step": "bucketing", "size": 3}]})
    plan = plan_of(GridSettings(rules=steps, attacks=("none",)))
    assert list(plan.rules) == ["nnm+median", "bucketing size=3+median"]
    assert plan.rules["bucketing size=3+median"].made(2).name == "bucketing + median"


def test_specs_on_the_command_line_read_as_in_toml() -> None:
    assert parse_spec("rule", "multi-krum:num_selected=5,neighbours=n-f-1") == {
        "rule": "multi-krum",
        "num_selected": 5,
        "neighbours": "n-f-1",
    }
    assert parse_spec("rule", "nnm+median") == {"rule": "median", "before": ["nnm"]}
    with pytest.raises(ConfigError, match="NAME:KEY=VALUE"):
        parse_spec("attack", "ipm:epsilon")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"rules": ("medain",)}, "did you mean 'median'"),
        ({"rules": ({"rule": "median", "radius": 3},)}, "no setting 'radius'"),
        ({"rules": ({"radius": 3},)}, "table with rule"),
        ({"rules": ("median", "median")}, "two rules are called 'median'"),
        ({"rules": ({"rule": "median", "label": "a/b"},)}, "cannot be a label"),
        ({"rules": ({"rule": "median", "num_byzantine": -1},)}, "num_byzantine = -1"),
        ({"attacks": ("ali",)}, "did you mean 'alie'"),
        ({"attacks": ({"attack": "ipm", "epsilon": "x"},)}, "epsilon"),
        ({"fractions": ()}, "no fractions"),
        ({"fractions": (0.2, 0.1)}, "ascending"),
        ({"fractions": (0.2, 1.0)}, "fraction of 1.0"),
        ({"fractions": (0.2, 0.21)}, "same number"),
        ({"model": "resnet"}, "no model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        plan_of(GridSettings(**settings))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--seeds", "0"], "seeds"),
        (["--momentum", "1"], "momentum"),
        (["--jobs", "100000"], "cores"),
        (["--data", "mnist"], "digits"),
        (["--devices", "1000"], "examples"),
        (["--rule", "medain"], "did you mean"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_command_refuses_bad_input_in_one_sentence(arguments: list[str], what: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(grid_command, [*arguments, "--output", str(tmp_path / "grid")])
    assert isinstance(result.exception, CoveyError)
    assert what in str(result.exception)
    assert not (tmp_path / "grid").exists()


def test_an_unknown_key_in_the_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean `rounds`"):
        settings_of_toml(tmp_path, "roundz = 3")


def test_jobs_are_as_many_as_cores_unless_told() -> None:
    assert usable_jobs(0) >= 1
    assert usable_jobs(1) == 1


# ---- the folder


def result_of(cell: Cell, accuracy: float | None, **others: Any) -> dict[str, Any]:
    blank = {"told": 0, "refused": "", "best_accuracy": accuracy, "backdoor_success": None, "rounds_refused": 0}
    return {**cell._asdict(), **blank, "last_refusal": "", "curve": [], "seconds": 0.1, "accuracy": accuracy, **others}


def test_a_folder_gives_back_what_was_saved_and_refuses_another_grid(tmp_path: Path) -> None:
    plan = plan_of(GridSettings(rules=("median",), attacks=("alie",)))
    cells = plan.cells()
    with Folder(tmp_path / "g", canonical(plan)).opened():
        pass
    folder = Folder(tmp_path / "g", canonical(plan))
    with folder.opened():
        folder.save(cells[1], result_of(cells[1], 0.5))
        assert folder.finished(cells) == {cells[1]: result_of(cells[1], 0.5)}
        with pytest.raises(ConfigError, match="another covey grid"), Folder(tmp_path / "g", canonical(plan)).opened():
            pass
    other = plan_of(GridSettings(rules=("median",), attacks=("alie",), rounds=7))
    with (
        pytest.raises(ConfigError, match=r"rounds: 30 there, 7 now.*--output"),
        Folder(tmp_path / "g", canonical(other)).opened(),
    ):
        pass
    (tmp_path / "g" / "cells" / f"{cells[1].key}.json").write_text("{")
    with pytest.raises(ConfigError, match="delete that file"):
        folder.finished(cells)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="other things"), Folder(tmp_path, {}).opened():
        pass
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name != ".lock") == ["thesis.txt"]


# ---- the summary and the picture


def made_up() -> tuple[Any, list[dict[str, Any]]]:
    plan = plan_of(
        GridSettings(
            rules=("mean", "krum"), attacks=("none", "alie", "scaling-backdoor"), fractions=(0.0, 0.4), seeds=2
        )
    )
    results = []
    for cell in plan.cells():
        accuracy = 0.9 - 0.1 * cell.seed - (0.5 if cell.attack == "alie" else 0.0)
        success = 0.75 if cell.attack == "scaling-backdoor" else None
        refused = "too few" if cell.rule == "krum" and cell.num_hostile else ""
        results.append(result_of(cell, accuracy, backdoor_success=success) if not refused else result_of(cell, None))
        results[-1]["refused"] = refused
    return plan, results


def test_the_summary_takes_means_over_seeds_and_the_worst_over_attacks() -> None:
    plan, results = made_up()
    panels = panels_of(plan, results)
    np.testing.assert_allclose(panels[0].accuracy, [[0.85], [0.85]])
    np.testing.assert_allclose(panels[1].accuracy[0], [0.85, 0.35, 0.85])
    np.testing.assert_allclose(panels[1].spread[0], [0.1, 0.1, 0.1])
    assert panels[1].refused[1].all()
    assert np.isnan(panels[1].worst()[1])
    assert summary_of(plan, panels)["mean"][1] == {
        "fraction": 0.4,
        "worst_accuracy": 0.35,
        "worst_attack": "alie",
        "backdoor_success": 0.75,
    }
    assert summary_of(plan, panels)["krum"][1]["worst_accuracy"] is None
    json.dumps(summary_of(plan, panels), allow_nan=False)


def test_the_terminal_shows_backdoors_beside_the_worst_accuracy() -> None:
    plan, results = made_up()
    lines = table_lines(plan, panels_of(plan, results))
    assert lines[0] == "worst accuracy over all attacks, by share of corrupted devices (mean of 2 seeds)"
    assert lines[2:4] == ["mean   85.0%   35.0%", "krum   85.0% refuses"]
    assert lines[5].startswith("how often a backdoor's trigger works")
    assert lines[6:] == ["rule     40%", "mean   75.0%", "krum refuses"]
    alone = plan_of(GridSettings(rules=("mean",), attacks=("alie",), fractions=(0.4,), seeds=1))
    cell = alone.cells()[0]
    (title, _, row) = table_lines(alone, panels_of(alone, [result_of(cell, 0.5)]))
    assert title.endswith("(mean of 1 seed)")
    assert row == "mean   50.0%"


def test_long_names_of_rules_are_not_cut_off_in_the_picture() -> None:
    from matplotlib.image import imread

    label = "bucketing size=3+geometric-median f=4"
    rules = ({"rule": "mean", "label": label},)
    plan = plan_of(GridSettings(rules=rules, attacks=("alie",), fractions=(0.0, 0.4), seeds=1))
    picture = imread(io.BytesIO(heat_map(plan, panels_of(plan, []))))
    assert (picture[:, :3] == 1.0).all()
    assert not (picture[:, 3:120] == 1.0).all()


def test_the_picture_is_the_same_png_each_time_and_shows_refusals() -> None:
    plan, results = made_up()
    picture = heat_map(plan, panels_of(plan, results))
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture == heat_map(plan, panels_of(plan, results))
    shown = [{**one, "refused": "", "accuracy": one["accuracy"] or 0.5} for one in results]
    assert picture != heat_map(plan, panels_of(plan, shown))
    only_one = plan_of(GridSettings(rules=("mean",), attacks=("alie",), fractions=(0.4,), seeds=1))
    assert heat_map(only_one, panels_of(only_one, [])).startswith(b"\x89PNG")
