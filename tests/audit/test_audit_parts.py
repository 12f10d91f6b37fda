"""Settings, policy and budget of an audit, without a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from covey_coordinator.audit.budget import Budget
from covey_coordinator.audit.folder import Asked, AuditFolder
from covey_coordinator.audit.policy import Policy, as_limits, judged, measured, read_policy
from covey_coordinator.audit.program import _done
from covey_coordinator.audit.results import BARE, PLAN, Result
from covey_coordinator.audit.settings import read_plan
from covey_coordinator.audit.suite import Piece
from covey_coordinator.grid.display import Display
from covey_protocol.errors import ConfigError

ASKED = Asked("b" * 64, "d" * 64, "p" * 64, 0, "quick")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_kind_that_never_ran_fits_and_afterwards_only_where_there_is_time_for_what_it_took() -> None:
    clock = Clock()
    budget = Budget(10.0, clock)
    assert budget.fits("attack")
    budget.spent("attack", 6.0)
    budget.spent("attack", 2.0)  # the longest counts
    assert budget.fits("attack")
    clock.now += 4.0
    assert not budget.fits("attack")
    assert budget.fits("another")
    clock.now += 6.0
    assert budget.over()
    assert not budget.fits("another")


def pieces(clock: Clock, costs: dict[str, float], ran: list[str]) -> list[Piece]:
    """key -> seconds; the kind is the first letter."""

    def work(key: str, seconds: float, stop) -> tuple[Result, None]:
        ran.append(key)
        clock.now += seconds
        return Result(key, PLAN, key, metrics={"psnr_db": 1.0}, cut=stop()), None

    return [
        Piece(key, key[0], key, lambda stop, key=key, seconds=seconds: work(key, seconds, stop))
        for key, seconds in costs.items()
    ]


def test_what_does_not_fit_is_passed_over_and_cheaper_work_still_done(tmp_path: Path) -> None:
    clock, ran = Clock(), []
    budget = Budget(20.0, clock)
    planned = pieces(clock, {"a1": 8.0, "b1": 1.0, "a2": 8.0, "a3": 8.0, "b2": 1.0}, ran)
    with (folder := AuditFolder(tmp_path)).held(ASKED):
        results = _done(folder, planned, budget, Display(), lambda: None)
    assert ran == ["a1", "b1", "a2", "b2"]
    assert list(results) == ran
    assert results["a1"].seconds == 8.0


def test_a_second_start_takes_up_what_is_there_knows_its_costs_and_repeats_what_was_cut(tmp_path: Path) -> None:
    clock, ran = Clock(), []
    planned = pieces(clock, {"a1": 8.0, "b1": 8.0, "c1": 8.0}, ran)
    with (folder := AuditFolder(tmp_path)).held(ASKED):
        first = _done(folder, planned, Budget(15.0, clock), Display(), lambda: None)
    assert ran == ["a1", "b1"]
    assert first["b1"].cut
    ran.clear()
    with folder.held(ASKED):
        second = _done(folder, planned, Budget(60.0, clock), Display(), lambda: None)
    assert ran == ["b1", "c1"]
    assert not any(one.cut for one in second.values())


def result(name: str, case: str = PLAN, refused: str = "", **metrics: float) -> Result:
    return Result(f"{name}-{case}-{len(metrics)}-{sum(metrics.values())}", case, name, metrics=metrics, refused=refused)


def test_psnr_is_the_closest_of_all_and_labels_the_best_attacks_mean() -> None:
    found = measured(
        [
            result("a", psnr_db=12.0, label_recovery=1.0),
            result("a", psnr_db=19.0, label_recovery=0.2),
            result("b", psnr_db=11.0, label_recovery=0.7),
            result("c", case=BARE, psnr_db=99.0, label_recovery=1.0),  # is shown, not judged
            result("d", refused="no such layer", psnr_db=99.0),
        ]
    )
    assert found["psnr_db"] == (19.0, "a")
    assert found["label_recovery"] == (0.7, "b")
    assert set(found) == {"psnr_db", "label_recovery"}


def test_a_limit_on_what_was_not_measured_is_not_kept() -> None:
    limits = judged(Policy(max_linkability_auc=0.7), {"psnr_db": (9.0, "a")}, 8.0)
    kept = {one.name: one.kept for one in limits}
    assert kept["psnr_db"]
    assert not kept["linkability_auc"]
    assert not kept["label_recovery"]


def test_limits_on_what_attacks_find_are_not_kept_before_all_attacks_ran() -> None:
    found = {
        "psnr_db": (9.0, "a"),
        "label_recovery": (0.1, "b"),
        "identified": (0.0, "a"),
        "membership_auc": (0.5, "m"),
    }
    assert all(one.kept for one in judged(Policy(), found, 8.0))
    half = {one.name: one for one in judged(Policy(), found, 8.0, attacked=False)}
    assert [name for name, one in half.items() if one.kept] == ["membership_auc"]
    assert half["psnr_db"].said.startswith("not measured to the end")
    beyond = judged(Policy(), {**found, "psnr_db": (30.0, "a")}, 8.0, attacked=False)[0]
    assert "30, above the limit of 14" in beyond.said  # a lower bound above the limit says enough


def test_the_limit_of_psnr_lies_above_what_a_guess_reaches_unless_it_is_given() -> None:
    assert Policy().limits(12.3)["psnr_db"] == pytest.approx(18.3)
    assert Policy(max_psnr_db=25.0).limits(12.3)["psnr_db"] == 25.0
    assert "psnr_db" not in Policy(max_psnr_above_guess_db=False).limits(12.3)
    assert as_limits(Policy().limits(12.3)).given() == {"psnr_db": 18.3, "label_recovery": 0.9}


WRONG = {
    "a mistyped key of the policy": ("policy", "max_psnr = 3", "max_psnr_db"),
    "true for a limit": ("policy", "max_label_recovery = true", "give a number, or false"),
    "a share above 1": ("policy", "max_label_recovery = 1.5", "max_label_recovery"),
    "a mistyped key of the plan": ("plan", "[training]\nepoch = 2", "did you mean `epochs`"),
    "noise without a norm": ("plan", "[privacy]\nnoise_multiplier = 1.0", "needs privacy.clip_norm"),
    "another algorithm": ("plan", '[training]\nalgorithm = "scaffold"', "only updates of plain training"),
    "top-k": ("plan", '[wire]\ncompression = "top-k"\nkept_fraction = 0.1', "is not audited"),
    "one device": ("plan", "[fleet]\ndevices = 1", "devices"),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_what_is_wrong_in_a_file_is_named(wrong: str, tmp_path: Path) -> None:
    which, text, said = WRONG[wrong]
    path = tmp_path / f"{which}.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_policy(path) if which == "policy" else read_plan(path, "digits")
    assert said in str(raised.value)


def test_a_plan_without_data_is_refused_and_a_path_in_it_lies_beside_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data"):
        read_plan(None, None)
    (tmp_path / "plan.toml").write_text('[data]\npath = "mine.npz"')
    assert read_plan(tmp_path / "plan.toml", None).data.path == str(tmp_path / "mine.npz")
    assert read_plan(tmp_path / "plan.toml", "digits").data.path == "digits"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"), AuditFolder(tmp_path).held(ASKED):
        pass
