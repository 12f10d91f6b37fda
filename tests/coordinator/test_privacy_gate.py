"""Plans that are refused before the first invitation, verdicts of audits, and what is measured of every round."""

from __future__ import annotations

import hashlib
import json
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace
from scripted import manifest_of

from covey_coordinator.inversion.plan_gate import PrivacyPolicy, refuse_leaks
from covey_coordinator.inversion.round_checks import RoundChecks
from covey_coordinator.inversion.verdict import (
    Assumed,
    AuditVerdict,
    Limits,
    differences,
    digest,
    plan_facts,
    read_verdict,
    write_verdict,
)
from covey_coordinator.records import ACCEPTED, DeviceVerdict
from covey_coordinator.store import RunStore
from covey_coordinator.watching import events
from covey_coordinator.watching.board import Board
from covey_coordinator.watching.cli import leakage_command, runs_command, status_command
from covey_coordinator.watching.metrics import Traffic, exposition
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import Manifest, TensorSpec
from covey_protocol.errors import ConfigError
from covey_protocol.messages import Invitation, TrainingPlan
from covey_protocol.parameters import ParameterSpec
from covey_protocol.round import Phase, RoundSettings

INPUTS, CLASSES = 12, 4
PLAN = TrainingPlan(1, 0.1)
BUNDLE = b"the bundle's file"


def manifest(bias: bool = True) -> Manifest:
    specs = [ParameterSpec("logits/kernel", (INPUTS, CLASSES))]
    specs += [ParameterSpec("logits/bias", (CLASSES,))] if bias else []
    made = replace(manifest_of(*specs), loss="sparse_categorical_crossentropy", num_classes=CLASSES, batch_size=4)
    return replace(made, input=TensorSpec((INPUTS,), "float32"))


D = INPUTS * CLASSES + CLASSES


def refused(policy: PrivacyPolicy, folder: Path = Path("."), plan: TrainingPlan = PLAN, **more: Any) -> str:
    """Why, "" where it is not."""
    try:
        refuse_leaks(folder / "coordinator.toml", policy, BUNDLE, more.get("manifest", manifest()), [plan])
    except ConfigError as exc:
        return str(exc)
    return ""


# --- by rule


def test_one_example_on_a_dense_layer_is_refused_and_more_are_not() -> None:
    assert "layer 'logits/kernel'" in refused(PrivacyPolicy(max_psnr_db=30.0))
    assert "tells its label" in refused(PrivacyPolicy(max_label_recovery=0.9))
    for enough in ({"min_examples": 2}, {"clip_norm": 1.0, "noise_multiplier": 1.0}):
        assert refused(PrivacyPolicy(max_psnr_db=30.0, max_label_recovery=0.9, **enough)) == ""


def test_what_is_not_certain_is_not_refused_by_rule() -> None:
    assert refused(PrivacyPolicy(max_psnr_db=30.0), manifest=manifest(bias=False)) == ""
    assert refused(PrivacyPolicy(max_psnr_db=150.0, max_label_recovery=1.0)) == ""
    assert refused(PrivacyPolicy(max_linkability_auc=0.6)) == ""
    assert refused(PrivacyPolicy(max_psnr_db=30.0), plan=replace(PLAN, evaluate=("loss",))) == ""


def test_features_behind_other_layers_are_certain_in_one_step_alone() -> None:
    specs = (ParameterSpec("conv/kernel", (3, 3, 1, 4)), *manifest().parameters)
    behind = replace(manifest(), parameters=specs)
    policy = PrivacyPolicy(max_psnr_db=30.0)
    assert "layer 'logits/kernel'" in refused(policy, manifest=behind)
    assert refused(policy, manifest=behind, plan=TrainingPlan(2, 0.1)) == ""
    assert "layer 'logits/kernel'" in refused(policy, plan=TrainingPlan(2, 0.1))


def test_steps_that_are_no_sums_of_gradients_are_not_certain() -> None:
    policy = PrivacyPolicy(max_psnr_db=30.0, max_label_recovery=0.5)
    assert refused(policy, manifest=replace(manifest(), optimizer="adam")) == ""
    assert refused(policy, plan=replace(PLAN, work="scaffold", steps=1)) == ""
    assert refused(policy, plan=replace(PLAN, compression="rotated-8bit")) == ""


def test_limits_without_an_audit_are_said_to_be_unaudited() -> None:
    policy = PrivacyPolicy(max_linkability_auc=0.6, min_examples=8)
    (told,) = refuse_leaks(Path("coordinator.toml"), policy, BUNDLE, manifest(), [PLAN])
    assert "max_linkability_auc with no audit" in told


# --- by an audit


def verdict(**changes: Any) -> AuditVerdict:
    facts = plan_facts(changes.pop("plan", PLAN))
    values: dict[str, Any] = {
        "bundle": hashlib.sha256(BUNDLE).hexdigest(),
        "plan": facts,
        "plan_digest": digest(facts),
        "assumed": Assumed(8),
        "limits": Limits(30.0),
        "measured": {"psnr_db": 12.0, "label_recovery": 0.7},
        "passed": True,
    }
    return AuditVerdict(**{**values, **changes})


AUDITED = PrivacyPolicy(max_psnr_db=30.0, min_examples=8, audit="verdict.json")


def test_a_verdict_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    write_verdict(path, verdict(reasons=("slow",), seed=3))
    assert read_verdict(path) == verdict(reasons=("slow",), seed=3)


def test_a_good_verdict_lets_the_plan_through_in_every_round(tmp_path: Path) -> None:
    write_verdict(tmp_path / "verdict.json", verdict())
    assert refused(AUDITED, tmp_path) == ""
    assert refused(AUDITED, tmp_path, replace(PLAN, shuffle_seed=7, task="bell")) == ""


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "another bundle": ({"bundle": "0" * 64}, "the bundle (000000000000, now"),
    "another plan": ({"plan": TrainingPlan(2, 0.1)}, "plan.epochs (2, now 1)"),
    "another rate": ({"plan": TrainingPlan(1, 0.2)}, "plan.learning_rate (0.2, now 0.1)"),
    "devices with more examples": ({"assumed": Assumed(20)}, "min_examples (20, now 8)"),
    "devices with noise": ({"assumed": Assumed(8, 1.0, 2.0)}, "noise_multiplier (2, now 0), clip_norm (1, now 0)"),
    "too much": ({"measured": {"psnr_db": 31.0}}, "psnr_db is 31, above max_psnr_db = 30"),
    "nothing": ({"measured": {}}, "psnr_db was not measured"),
    "what is no number": ({"measured": {"psnr_db": float("nan")}}, "cannot be read|no verdict"),
    "a failure by its own limits": ({"passed": False, "reasons": ("labels leak",)}, "labels leak"),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_verdict_that_found_or_was_of_something_else_refuses_the_plan(what: str, tmp_path: Path) -> None:
    changes, words = OTHER[what]
    write_verdict(tmp_path / "verdict.json", verdict(**changes))
    said = refused(AUDITED, tmp_path)
    assert any(word in said for word in words.split("|")), said


def test_a_verdict_that_was_edited_or_is_missing_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refused(AUDITED, tmp_path)
    path = tmp_path / "verdict.json"
    write_verdict(path, verdict(plan=TrainingPlan(2, 0.1)))
    path.write_text(path.read_text().replace('"epochs": 2', '"epochs": 1'))
    assert "plan_digest is not that of its plan" in refused(AUDITED, tmp_path)


def test_noise_of_another_clip_norm_is_another_noise() -> None:
    audited, bundle = verdict(assumed=Assumed(8, 1.0, 2.0)), hashlib.sha256(BUNDLE).digest()
    assert differences(audited, bundle, PLAN, Assumed(9, 1.0, 3.0)) == []
    assert differences(audited, bundle, PLAN, Assumed(9, 0.5, 3.0)) == ["clip_norm (1, now 0.5)"]


# --- what is measured


def step(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """One device's update: softmax regression from zeros."""
    down = (1 / CLASSES - np.eye(CLASSES)[y]) / len(x)
    return np.concatenate([(-0.1 * x.T @ down).ravel(), -0.1 * down.sum(0)]).astype(np.float32)


def fleet(rounds: int, own: float, devices: int = 8) -> list[np.ndarray]:
    """(n, d) of each round. own: how much of a device's data is the same every time."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(devices, INPUTS))
    return [
        np.stack(
            [
                step(
                    own * centre + rng.normal(size=(6, INPUTS)), rng.integers(0, CLASSES, 6) if own == 0 else LABELS[n]
                )
                for n, centre in enumerate(centres)
            ]
        )
        for _ in range(rounds)
    ]


LABELS = np.random.default_rng(1).integers(0, CLASSES, (8, 6))
NAMES = tuple("abcdefgh")


def measured(checks: RoundChecks, updates: np.ndarray, examples: int = 6) -> Any:
    found = checks.measure(updates, NAMES[: len(updates)], [examples] * len(updates), PLAN)
    assert found is not None
    return checks.with_aggregate(found, updates.mean(0))


def test_an_update_of_one_example_has_rank_one_and_is_told() -> None:
    updates = fleet(1, 1.0)[0]
    updates[2] = step(np.ones((1, INPUTS)), np.array([3]))
    found = measured(RoundChecks(manifest(), PrivacyPolicy(max_psnr_db=30.0)), updates, examples=4)
    assert found.devices["c"]["rank_one"] == pytest.approx(1)
    assert found.devices["c"]["separable"] >= 1
    assert found.devices["c"]["label_share"] == pytest.approx(1)
    assert found.devices["a"]["rank_one"] < 0.95
    assert [line for line in found.told if "update of c" in line]
    assert not [line for line in found.told if "update of a " in line]
    assert found.fleet["aggregate_rank_one"] < 0.95


def test_devices_with_data_of_their_own_are_told_again_and_others_are_not() -> None:
    alike, own = (RoundChecks(manifest(), PrivacyPolicy(max_linkability_auc=0.8)) for _ in range(2))
    first = [measured(alike, updates) for updates in fleet(6, 0.0)]
    second = [measured(own, updates) for updates in fleet(6, 1.0)]
    assert "linkability_auc" not in first[0].fleet  # nobody to compare with
    assert 0.35 < first[-1].fleet["linkability_auc"] < 0.65
    assert second[-1].fleet["linkability_auc"] > 0.9
    assert second[-1].fleet["identified"] > 0.8 > second[-1].fleet["chance"] == 1 / 8
    assert [line for line in second[-1].told if "told again" in line]
    assert not first[-1].told


def test_a_gradient_is_held_against_updates_with_the_other_sign() -> None:
    checks, (first, second) = RoundChecks(manifest()), fleet(2, 1.0)
    checks.measure(first, NAMES, [6] * 8, PLAN)
    found = checks.measure(-second, NAMES, [6] * 8, replace(PLAN, work="gradient"))
    assert found is not None
    assert found.fleet["linkability_auc"] > 0.9


def test_what_a_device_does_not_keep_of_what_the_policy_relies_on_is_told() -> None:
    updates = fleet(1, 1.0)[0]
    few = measured(RoundChecks(manifest(), PrivacyPolicy(min_examples=10)), updates)
    assert sum("fewer than min_examples" in line for line in few.told) == 8
    many = RoundChecks(manifest(), PrivacyPolicy(min_examples=10))
    names = [f"d{number}" for number in range(300)]
    found = many.measure(np.tile(updates, (38, 1))[:300], names, [6] * 300, PLAN)
    assert found is not None
    assert len(found.devices) == 200
    assert list(found.told)[-1] == "and 190 more"
    long = measured(RoundChecks(manifest(), PrivacyPolicy(clip_norm=1e-3)), updates)
    assert sum("does not clip" in line for line in long.told) == 8
    quiet = measured(RoundChecks(manifest(), PrivacyPolicy(clip_norm=1.0, noise_multiplier=1.0)), updates)
    assert sum("with its noise" in line for line in quiet.told) == 8


def test_works_without_gradients_and_models_without_dense_layers_are_borne() -> None:
    checks = RoundChecks(manifest())
    assert checks.measure(fleet(1, 1.0)[0], NAMES, [6] * 8, replace(PLAN, work="features")) is None
    convolution = RoundChecks(manifest_of(ParameterSpec("conv/kernel", (3, 3, 1, 4))))
    found = convolution.measure(np.ones((2, 36), np.float32), NAMES[:2], [6, 6], PLAN)
    assert found is not None
    assert set(found.devices["a"]) == {"norm"}


# --- kept and shown


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """A run of two published rounds, measured."""
    kept = RunStore(tmp_path / "runs" / "bell")
    checks = RoundChecks(manifest())
    blob = blob_ref(bytes(64), 64)
    for number, updates in enumerate(fleet(2, 1.0), 1):
        name = f"bell.{number}.0"
        invitation = Invitation(name, number, 0, 60_000, blob, blob, PLAN, devices=NAMES)
        kept.open_round("bell", invitation, RoundSettings.of(invitation, 2, 1.0, 1.0), 0)
        verdicts = [DeviceVerdict(device, ACCEPTED) for device in NAMES]
        kept.conclude(name, Phase.PUBLISHED, "", verdicts, leakage=measured(checks, updates).rows())
    yield kept
    kept.close()


def told(command: Any, folder: Path, *more: str) -> str:
    ended = CliRunner().invoke(command, ["--runs-dir", str(folder / "runs"), *more], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.output


def test_every_rounds_numbers_are_in_status_runs_and_leakage(store: RunStore, tmp_path: Path) -> None:
    assert "linkable 1.00" in told(status_command, tmp_path) or "linkable 0.9" in told(status_command, tmp_path)
    facts = json.loads(told(status_command, tmp_path, "--json"))
    assert facts["last_rounds"][-1]["leakage"]["checked"] == 8
    assert "rank one 0." in told(runs_command, tmp_path)
    rounds = json.loads(told(leakage_command, tmp_path, "--json"))["bell"]
    assert [facts["number"] for facts in rounds] == [1, 2]
    assert "linkability_auc" in rounds[1]


def test_the_page_draws_every_measure_over_rounds(store: RunStore, tmp_path: Path) -> None:
    out = tmp_path / "leakage.html"
    lines = told(leakage_command, tmp_path, "--out", str(out))
    assert "round 2: max_rank_one" in lines
    page = out.read_text()
    drawing = xml.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])  # noqa: S314 - our own page
    assert len([node for node in drawing if node.tag.endswith("polyline")]) == 5
    assert page.count("<tr>") == 3
    assert "http" not in page


def test_an_older_store_has_nothing_to_tell(store: RunStore, tmp_path: Path) -> None:
    store._database.execute("DROP TABLE leakage")
    store._database.execute("PRAGMA user_version = 5")
    assert "nothing was measured" in told(leakage_command, tmp_path)
    assert json.loads(told(status_command, tmp_path, "--json"))["last_rounds"][-1]["leakage"] == {}


def test_the_newest_rounds_numbers_are_metrics() -> None:
    board = Board([])
    board(events.LeakageMeasured("bell.1.0", {"linkability_auc": 0.75}))
    page = exposition(board.state(), Traffic(0, 0, 0), 0.0)
    assert 'covey_leakage{measure="linkability_auc"} 0.75' in page
