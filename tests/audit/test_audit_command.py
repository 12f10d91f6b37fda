"""One small audit from bundle to verdict, through the agent's own trainer, and what is refused before one begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from covey_coordinator.audit.command import audit_command
from covey_coordinator.audit.folder import AuditFolder
from covey_coordinator.audit.policy import Policy
from covey_coordinator.audit.program import Request, audit
from covey_coordinator.audit.settings import read_plan
from covey_coordinator.audit.suite import Level
from covey_coordinator.audit.verdict import Outcome
from covey_coordinator.grid.display import Display
from covey_coordinator.inversion.verdict import read_verdict
from covey_models import build, export
from covey_protocol.errors import ConfigError, DataError, LeakError

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
    with pytest.raises(ConfigError, match="data and seed differ"):
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


def test_without_time_nothing_is_measured_and_the_verdict_says_no(bundle: Path, tmp_path: Path) -> None:
    told = [str(bundle), "--data", "digits", "--minutes", "0.00001", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(audit_command, told)
    assert isinstance(result.exception, LeakError), result.output
    assert result.exception.exit_code == 9
    assert "not measured" in str(result.exception)
    verdict = read_verdict(tmp_path / "out" / "verdict.json")
    assert not verdict.passed
    assert any("did not fit the time" in reason for reason in verdict.reasons)


def test_data_of_another_shape_are_refused_before_anything_is_made(bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", x=rng.random((40, 7)).astype(np.float32), y=np.arange(40) % 10)
    out = tmp_path / "out"
    result = CliRunner().invoke(audit_command, [str(bundle), "--data", str(tmp_path / "mine.npz"), "--out", str(out)])
    assert isinstance(result.exception, DataError)
    assert "examples of shape (7,)" in str(result.exception)
    assert not out.exists()
