"""Settings, policy and budget of an audit, without a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace as changed

from covey_coordinator.audit import curves, suite
from covey_coordinator.audit.bench import Bench
from covey_coordinator.audit.budget import Budget
from covey_coordinator.audit.data import AuditData, Part
from covey_coordinator.audit.folder import Asked, AuditFolder
from covey_coordinator.audit.policy import Policy, as_limits, judged, measured, read_policy
from covey_coordinator.audit.program import _done
from covey_coordinator.audit.property import PropertyAudit, check_property
from covey_coordinator.audit.results import BARE, PLAN, Result
from covey_coordinator.audit.settings import PlanSettings, PropertySettings, read_plan
from covey_coordinator.audit.suite import Piece
from covey_coordinator.grid.display import Display
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import ConfigError

ASKED = Asked("b" * 64, "d" * 64, {"training.epochs": 1, "privacy.clip_norm": 0.5}, 0, "quick", "1.0")


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
        "property_auc": (0.6, "p"),
    }
    policy = Policy(max_property_auc=0.7)
    assert all(one.kept for one in judged(policy, found, 8.0))
    half = {one.name: one for one in judged(policy, found, 8.0, attacked=False)}
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
    "a property of more than all examples": ("plan", "[property]\nshare = 1.5", "property.share"),
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


OTHERS = {
    "another bundle and other data": (
        changed(ASKED, bundle="c" * 64, data="e" * 64),
        "the bundle (sha256 bbbbbbbbbbbb, now cccccccccccc); the data (sha256 dddddddddddd, now eeeeeeeeeeee)",
    ),
    "another plan": (
        changed(ASKED, plan={"training.epochs": 2, "fleet.devices": 3, "privacy.clip_norm": 0.5}),
        "plan.fleet.devices (not set, now 3); plan.training.epochs (1, now 2)",
    ),
    "another seed and level": (
        changed(ASKED, seed=1, level="full"),
        "the seed (0, now 1); the level (quick, now full)",
    ),
    "another covey": (changed(ASKED, covey="1.1"), "the version of covey (1.0, now 1.1)"),
}


@pytest.mark.parametrize("other", list(OTHERS))
def test_a_folder_of_another_audit_is_refused_and_what_differs_is_named(other: str, tmp_path: Path) -> None:
    with AuditFolder(tmp_path).held(ASKED):
        pass
    asked, said = OTHERS[other]
    with pytest.raises(ConfigError) as raised, AuditFolder(tmp_path).held(asked):
        pass
    assert f"holds another audit: {said}; choose" in str(raised.value)
    with AuditFolder(tmp_path).held(ASKED):
        pass  # still that of the first


def test_a_folder_of_another_format_is_refused_by_it(tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text('{"bundle": "b", "plan": "a hash", "seed": 0, "format": 1}')
    with pytest.raises(ConfigError, match="has format 1, this covey writes 2"), AuditFolder(tmp_path).held(ASKED):
        pass


def bench(**tables: Any) -> Bench:
    """Of settings alone."""
    return Bench(None, msgspec.convert(tables, PlanSettings), None, None, 0)  # type: ignore[arg-type]


def test_curves_hold_the_plans_own_values_and_begin_with_their_ends() -> None:
    plain = bench(training={"epochs": 3}, fleet={"rounds": 5})
    assert curves.values(plain, "epochs") == [1, 5, 2, 3]
    assert curves.values(plain, "noise_multiplier") == [0.0, 1.0, 0.01, 0.03, 0.1, 0.3]
    assert curves.values(plain, "rounds") == []  # without noise the first round tells the example
    noised = bench(privacy={"clip_norm": 1.0, "noise_multiplier": 0.2}, fleet={"rounds": 5})
    assert curves.values(noised, "rounds") == [1, 5, 3]
    assert 0.2 in curves.values(noised, "noise_multiplier")
    central = bench(privacy={"clip_norm": 1.0, "noise_multiplier": 0.2, "by": "coordinator"})
    assert curves.values(central, "rounds") == []
    assert curves.values(bench(curves={"epochs": ()}), "epochs") == []


def data(x: np.ndarray, names: tuple[str, ...] = ()) -> AuditData:
    part = Part(x, np.zeros(len(x), np.int32), np.arange(len(x)) % 2)
    return AuditData("mine", ("no", "yes"), (0.0, 1.0), (part,), part, x.mean(0), names)


def test_a_property_of_no_feature_is_refused() -> None:
    table = data(np.zeros((4, 2)), ("age", "size"))
    for of in ("", "age", 1):
        check_property(PropertySettings(of), table)
    with pytest.raises(ConfigError, match=r"'weight' is no feature of mine; choose from age, size"):
        check_property(PropertySettings("weight"), table)
    with pytest.raises(ConfigError, match=r"property\.of = 2: an example has 2 numbers; choose 0 to 1"):
        check_property(PropertySettings(2), table)


def test_a_property_divides_the_examples_of_every_class() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3)) * [1.0, 5.0, 1.0]
    x[1::2, 1] += 30.0  # the classes differ in what differs most within them
    held = replace(bench(), data=data(x))
    has, has_not = PropertyAudit(held, 4, 4)._divided(held.data.test)
    assert (has == ~has_not).all()
    for one in (0, 1):
        within = x[one::2, 1]
        assert np.mean(has[one::2] == (within > within.mean())) > 0.95  # the direction is found, not told
    first = replace(bench(property={"of": 0}), data=data(x))
    of_first = PropertyAudit(first, 4, 4)._divided(first.data.test)[0]
    assert abs(np.corrcoef(of_first, x[:, 0])[0, 1]) > 0.7 > 0.1 > abs(np.corrcoef(of_first, x[:, 1])[0, 1])


def test_rounds_are_joined_as_they_are_only_while_that_can_be_computed(dense_bundle: bytes) -> None:
    """3 examples are one step of this bundle: 200 rounds can be, 201 not. Their mean can always be attacked."""
    part = Part(np.zeros((3, 8, 8, 1), np.float32), np.zeros(3, np.int32), np.zeros(3, np.int64))
    held = AuditData("mine", ("0",), (0.0, 1.0), (part, part), part, part.x[0])
    for rounds, joined in ((200, True), (201, False)):
        plain = bench(fleet={"rounds": rounds}, curves={"noise_multiplier": (), "clip_norm": ()})
        told = replace(plain, bundle=read_bundle(dense_bundle), data=held)
        keys = {piece.key for piece in suite.pieces(told, suite.QUICK)}
        assert ("rounds-0-tarantola" in keys, "rounds-0-resolution" in keys) == (joined, joined)
        assert {"rounds-0-labels", "rounds-0-inverting-gradients", "plan-0-tarantola", "plan-0-resolution"} <= keys


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"), AuditFolder(tmp_path).held(ASKED):
        pass
