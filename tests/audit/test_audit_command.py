"""One small audit from bundle to verdict, through the agent's own trainer, and what is refused before one begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from small_disk import SmallDisk

from covey_coordinator.audit.bench import Bench
from covey_coordinator.audit.command import audit_command
from covey_coordinator.audit.data import read_data
from covey_coordinator.audit.folder import AuditFolder
from covey_coordinator.audit.policy import Policy
from covey_coordinator.audit.program import Request, audit
from covey_coordinator.audit.property import PropertyAudit
from covey_coordinator.audit.settings import FleetSettings, PlanSettings, check_bundle_fits, read_plan
from covey_coordinator.audit.suite import Level
from covey_coordinator.audit.updates import Protection, TrainingChild
from covey_coordinator.audit.verdict import Outcome
from covey_coordinator.grid.display import Display
from covey_coordinator.inversion.verdict import read_verdict
from covey_coordinator.simulation.settings import DataSettings, PrivacySettings
from covey_models import build, export
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import ConfigError, DataError, LeakError, StorageError, UsageError

FAST = ("labels", "units", "inverting-gradients")
TINY = Level(
    "tiny", 10.0, 1, iterations=8, restarts=1, unrolled=1, newton=1, curve=8, samples=1, resolved=64, attacks=FAST
)
PLAN = """
[training]
learning_rate = 0.1
[privacy]
clip_norm = 1.0
noise_multiplier = 0.5
[fleet]
devices = 3
examples = 2
rounds = 2
[curves]
noise_multiplier = [0.0]
clip_norm = []
examples = []
epochs = []
rounds = [2]
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "digits.covey"
    path.write_bytes(export(build("mlp", (8, 8, 1), 10), name="digits", batch_size=4, input_range=(0.0, 1.0)))
    return path


def request(bundle: Path, folder: Path, **changes: Any) -> Request:
    plan = folder / "plan.toml"
    plan.write_text(PLAN)
    told = {"policy": Policy(max_psnr_db=15.0), "level": TINY, "minutes": 10.0, "out": folder / "out", **changes}
    return Request(bundle, read_plan(plan, "digits"), **told)


@pytest.fixture(scope="module")
def done(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    folder = tmp_path_factory.mktemp("audit")
    return audit(request(bundle, folder), Display()), folder


def found(outcome: Outcome, case: str, metric: str) -> float:
    return max(one.metrics[metric] for one in outcome.results if one.case == case and metric in one.metrics)


def test_one_example_without_protection_is_read_exactly_and_noise_hides_it(done: tuple[Outcome, Path]) -> None:
    outcome, _ = done
    assert found(outcome, "one example, bare", "psnr_db") > 60
    assert found(outcome, "one example", "psnr_db") < 20
    assert found(outcome, "one example, bare", "label_recovery") == 1.0
    assert found(outcome, "one example, bare", "resolved_share") > 0.99
    assert found(outcome, "one example", "resolved_share") < 0.5


def test_a_malicious_server_reads_an_example_and_devices_would_refuse_its_parameters(
    done: tuple[Outcome, Path],
) -> None:
    outcome, _ = done
    malicious = [one for one in outcome.results if one.case == "malicious server"]
    assert {one.name for one in malicious} == {"imprint", "trap weights"}
    assert all("refuse these parameters" in one.notes[0] for one in malicious)


def at(outcome: Outcome, curve: str, value: float, metric: str) -> float:
    points = [one for one in outcome.results if (one.curve, one.at) == (curve, value)]
    return max(one.metrics[metric] for one in points if metric in one.metrics)


def test_rounds_joined_tell_more_than_one_through_noise(done: tuple[Outcome, Path]) -> None:
    outcome, _ = done
    one = at(outcome, "noise_multiplier", 0.5, "resolved_share")  # the plan's own noise, of one round
    assert at(outcome, "rounds", 2, "resolved_share") > 1.3 * one
    of_plan = {one.name for one in outcome.results if one.case == "plan" and not one.refused}
    assert {"labels, 2 rounds joined", "inverting-gradients, 2 rounds joined"} <= of_plan
    assert {"labels, 2 rounds joined", "inverting-gradients, 2 rounds joined"} <= set(outcome.verdict.attacks)


def test_a_property_beside_the_task_is_told_without_noise_and_less_through_it(bundle: Path) -> None:
    told = read_bundle(bundle.read_bytes())
    settings = PlanSettings(fleet=FleetSettings(devices=5, examples=30), data=DataSettings(set="digits"))
    with TrainingChild(told) as child:
        bench = Bench(told, settings, read_data(settings, told.manifest, 0), child, 0)
        audit = PropertyAudit(bench, attackers=40, devices=40)
        bare = audit.under(Protection(), 1, lambda: False)
        noise = Protection(PrivacySettings(clip_norm=0.5, noise_multiplier=2.0))
        once, often = (audit.under(noise, rounds, lambda: False).auc for rounds in (1, 900))
    assert bare.auc > 0.9 > 0.75 > once
    assert often > 0.9  # the noise of many rounds averages out
    assert bare.error == pytest.approx((41 / (12 * 20 * 20)) ** 0.5)
    assert bare.examples == 30
    with pytest.raises(UsageError, match="the time was up"):
        PropertyAudit(bench, 40, 40).under(noise, 1, lambda: True)


def test_the_verdict_is_of_this_plan_and_assumes_its_devices_noise(done: tuple[Outcome, Path]) -> None:
    outcome, folder = done
    verdict = read_verdict(folder / "out" / "verdict.json")
    assert verdict == outcome.verdict
    assert (verdict.assumed.examples, verdict.assumed.clip_norm, verdict.assumed.noise_multiplier) == (2, 1.0, 0.5)
    assert verdict.plan["learning_rate"] == pytest.approx(0.1)
    assert verdict.passed == all(one.kept for one in outcome.judged)
    assert set(verdict.measured) >= {"psnr_db", "label_recovery", "membership_auc"}


def test_nothing_is_left_out_and_the_report_shows_every_case(done: tuple[Outcome, Path]) -> None:
    outcome, folder = done
    assert outcome.left_out == ()
    page = (folder / "out" / "report.html").read_text()
    for words in ("The plan as it is", "The worst case without protection", "A malicious server", "noise multiplier"):
        assert words in page
    assert page.count("data:image/png;base64,") >= 6
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert ((folder / "out" / "report.html").stat().st_mode & 0o777) == 0o600  # it shows people's data
    told = json.loads((folder / "out" / "results.json").read_text())
    assert len(told["results"]) == len(outcome.results)


def test_the_same_audit_goes_on_with_what_is_there_and_another_is_refused(
    done: tuple[Outcome, Path], bundle: Path
) -> None:
    outcome, folder = done
    there = AuditFolder(folder / "out").results()
    again = audit(request(bundle, folder), Display())
    assert again.results == outcome.results
    assert AuditFolder(folder / "out").results() == there  # seconds and all: nothing was done again
    with pytest.raises(ConfigError, match=r"the data \(.*; the seed \(0, now 1\)"):
        audit(request(bundle, folder, seed=1), Display())


def test_ctrl_c_keeps_what_is_done(bundle: Path, tmp_path: Path) -> None:
    asked = []

    def check() -> None:
        asked.append(True)
        if len(asked) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(request(bundle, tmp_path), Display(), check)
    assert len(AuditFolder(tmp_path / "out").results()) >= 1
    assert not (tmp_path / "out" / "verdict.json").exists()


def test_a_full_disk_ends_it_with_its_name_and_with_space_it_goes_on(bundle: Path, tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path / "disk", 70 << 20)
    told = request(bundle, tmp_path, out=disk.seen / "out")
    try:
        with pytest.raises(StorageError, match=r"cannot write .*results.*No space left"):
            audit(told, Display(), lambda: disk.fill() if AuditFolder(told.out).results() else None)
        kept = AuditFolder(told.out).results()
        assert len(kept) == 1
        disk.free()
        with pytest.raises(KeyboardInterrupt):
            audit(told, Display(), ended_after(told.out, 2))
        assert len(AuditFolder(told.out).results()) == 2
        assert kept.items() <= AuditFolder(told.out).results().items()
    finally:
        disk.close()


def ended_after(out: Path, results: int) -> Callable[[], None]:
    def check() -> None:
        if len(AuditFolder(out).results()) >= results:
            raise KeyboardInterrupt

    return check


def test_without_time_nothing_is_measured_and_the_verdict_says_no(bundle: Path, tmp_path: Path) -> None:
    told = [str(bundle), "--data", "digits", "--minutes", "0.00001", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(audit_command, told)
    assert isinstance(result.exception, LeakError), result.output
    assert result.exception.exit_code == 9
    assert "not measured" in str(result.exception)
    verdict = read_verdict(tmp_path / "out" / "verdict.json")
    assert not verdict.passed
    assert any("did not fit the time" in reason for reason in verdict.reasons)


def test_a_model_without_classes_is_refused(bundle: Path) -> None:
    manifest = read_bundle(bundle.read_bytes()).manifest
    price = msgspec.structs.replace(manifest, name="price", num_classes=None, loss="mean_squared_error")
    check_bundle_fits(PlanSettings(), manifest)
    with pytest.raises(ConfigError, match=r"price has no classes \(its loss is mean_squared_error\)"):
        check_bundle_fits(PlanSettings(), price)


def test_numbers_where_no_attack_would_search_are_refused(bundle: Path, tmp_path: Path) -> None:
    """On a bundle that declares no range they look near 0: they would miss ages up to 90, and all would seem well."""
    rng = np.random.default_rng(0)
    for name, scale in (("ages", 90.0), ("shares", 1.0)):
        x = scale * rng.random((60, 8, 8, 1)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.arange(60) % 10)
    manifest = read_bundle(bundle.read_bytes()).manifest
    silent = msgspec.structs.replace(
        manifest, input=msgspec.structs.replace(manifest.input, minimum=None, maximum=None)
    )
    read_data(PlanSettings(data=DataSettings(path=str(tmp_path / "shares.npz"))), silent, 0)
    with pytest.raises(DataError, match=r"declares no input range.*standardise"):
        read_data(PlanSettings(data=DataSettings(path=str(tmp_path / "ages.npz"))), silent, 0)


def test_data_of_another_shape_are_refused_before_anything_is_made(bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", x=rng.random((40, 7)).astype(np.float32), y=np.arange(40) % 10)
    out = tmp_path / "out"
    result = CliRunner().invoke(audit_command, [str(bundle), "--data", str(tmp_path / "mine.npz"), "--out", str(out)])
    assert isinstance(result.exception, DataError)
    assert "examples of shape (7,)" in str(result.exception)
    assert not out.exists()
