"""Our rules beside Flower's and ByzFL's own on the same inputs.

Every day against what tests/golden/peers/record.py recorded; the slow tests run the peers themselves, in the Python
that COVEY_PEERS_PYTHON names (benchmarks/peers.py makes one). docs/rules-compared.md says where we differ and why.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aggregation_references import batch_of, judge, noisy

from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.registry import PRE_STEPS, make_pre_step, make_rule
from covey_coordinator.aggregation.rules import Rule
from covey_protocol.errors import RuleError

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "peers"
PYTHON = os.environ.get("COVEY_PEERS_PYTHON")
TOLERANCE = 1e-6  # of the largest value of the vector

needs_peers = pytest.mark.skipif(
    PYTHON is None, reason="COVEY_PEERS_PYTHON names no Python with flwr and byzfl (benchmarks/peers.py --setup)"
)

# Where the peer is not right, so that agreement would be a fault. See docs/rules-compared.md.
DIFFERENT = {
    "byzfl geometric-median odd as it comes": "three steps from zero",
    "byzfl-torch geometric-median odd as it comes": "three steps from zero",
    "byzfl caf numbers": "a vector that is gone still sets the scale for the others",
    "byzfl caf odd seed 1": "one power iteration from a random vector",
    "byzfl caf odd seed 2": "one power iteration from a random vector",
}


def golden() -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """versions and jobs, results by case, inputs by name."""
    with np.load(GOLDEN / "results.npz") as stored:
        results = {name: stored[name] for name in stored.files if name != "about"}
        about = json.loads(str(stored["about"]))
    with np.load(GOLDEN / "inputs.npz") as stored:
        inputs = {name: stored[name] for name in stored.files}
    return about, results, inputs


ABOUT, RESULTS, INPUTS = golden()


def ours(job: dict[str, Any], updates: np.ndarray) -> np.ndarray:
    """What our rule gives for a peer's job."""
    rule, f, settings = job["rule"], job["f"], job.get("settings", {})
    if rule in PRE_STEPS:
        return ours_before(job, updates)
    own: dict[str, Any] = {}
    if rule in ("krum", "multi-krum") and job["library"].startswith("byzfl"):
        own = {"neighbours": "n-f-1"}
    if rule == "geometric-median":
        own = {"tolerance": 1e-9, "nu": 1e-9, "max_iterations": 3000}
    if rule == "centred-clipping":
        own = {"clip_radius": settings["tau"], "iterations": settings["L"]}
    made = make_rule(rule, f, [step["rule"] for step in job.get("pre", ())], **own)
    return after_rounds(made, updates, settings.get("num_examples"), job.get("calls", 1))


def after_rounds(rule: Rule, updates: np.ndarray, num_examples: Any = None, rounds: int = 1) -> np.ndarray:
    """The aggregate of the last of so many rounds with the same updates."""
    batch, state = batch_of(updates, num_examples), rule.initial_state(updates.shape[1])
    with np.errstate(all="ignore"):
        for _ in range(rounds):
            state, judgement = rule.advance(NumpyKernels(), state, batch)
    aggregate: np.ndarray = judgement.aggregate
    return aggregate


def ours_before(job: dict[str, Any], updates: np.ndarray) -> np.ndarray:
    """The rows that our pre-step makes."""
    if job["rule"] == "clipping":
        return rows_after({"step": "clipping", "clip_norm": job["settings"]["c"]}, updates)
    if job["rule"] != "bucketing":
        return rows_after({"step": job["rule"]}, updates, job["f"])
    step = {"step": "bucketing", "size": job["settings"]["s"]}
    groups = rows_after(step, np.eye(len(updates), dtype=np.float32))
    ours_in_order = [device for group in groups for device in np.flatnonzero(group)]
    arranged = np.empty_like(updates)  # so that our groups hold what the peer's permutation put into its
    arranged[ours_in_order] = updates[job["permutation"]]
    return rows_after(step, arranged)


def rows_after(step: dict[str, Any], updates: np.ndarray, f: int = 0) -> np.ndarray:
    made, kernels = make_pre_step(step), NumpyKernels()
    with np.errstate(all="ignore"):
        _, prepared = made.prepare(kernels, made.initial_state(updates.shape[1]), batch_of(updates), f)
        rows = prepared.batch.updates
        return np.stack([kernels.row(rows, index) for index in range(kernels.count(rows))])


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference, in parts of the largest value."""
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("case", RESULTS)
def test_our_rule_agrees_with_the_recorded_peer(case: str) -> None:
    job = ABOUT["jobs"][case]
    found = ours(job, INPUTS[job["input"]])
    if case in DIFFERENT:
        assert distance(found, RESULTS[case]) > 1e-3
    else:
        assert distance(found, RESULTS[case]) <= TOLERANCE


@pytest.mark.parametrize("name", ["odd", "even"])
def test_the_recorded_inputs_tell_the_rules_apart(name: str) -> None:
    of_rule = {
        job["rule"]: RESULTS[case]
        for case, job in ABOUT["jobs"].items()
        if case.startswith("byzfl ") and job["input"] == name and "pre" not in job and case not in DIFFERENT
        if RESULTS[case].ndim == 1
    }
    assert len(of_rule) > 8
    for one, other in itertools.combinations(of_rule, 2):
        assert distance(of_rule[one], of_rule[other]) > 1e-3, (one, other)


@pytest.mark.parametrize(("rule", "name"), [("multi-krum", "odd"), ("multi-krum", "even"), ("krum", "odd")])
def test_the_recorded_inputs_tell_the_two_countings_of_neighbours_apart(rule: str, name: str) -> None:
    assert distance(RESULTS[f"flwr {rule} {name}"], RESULTS[f"byzfl {rule} {name}"]) > 1e-2


@pytest.fixture(scope="module")
def peers() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from peers import Peers
    finally:
        sys.path.pop(0)
    with Peers(Path(str(PYTHON))) as running:
        yield running


@needs_peers
@pytest.mark.slow
def test_the_installed_peers_still_give_what_was_recorded() -> None:
    command = [str(PYTHON), str(GOLDEN / "record.py")]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{len(RESULTS)} cases" in ended.stdout


SIDE_BY_SIDE = [
    ("flwr", "bulyan", {}),
    ("byzfl", "centred-clipping", {"L": 2, "tau": 40.0}),
    ("byzfl-torch", "centred-clipping", {"L": 2, "tau": 40.0}),
    ("byzfl", "geometric-median", {"nu": 1e-9, "T": 200}),
    ("byzfl", "meamed", {}),
    ("byzfl-torch", "meamed", {}),
    ("flwr", "median", {}),
    ("flwr", "trimmed-mean", {}),
    ("flwr", "krum", {}),
    ("flwr", "multi-krum", {}),
    ("byzfl", "median", {}),
    ("byzfl", "trimmed-mean", {}),
    ("byzfl", "krum", {}),
    ("byzfl", "nnm", {}),
    ("byzfl", "arc", {}),
    ("byzfl-torch", "arc", {}),
    ("byzfl", "multi-krum", {}),
    ("byzfl-torch", "median", {}),
    ("byzfl-torch", "trimmed-mean", {}),
]


@needs_peers
@pytest.mark.slow
@pytest.mark.parametrize(("library", "rule", "settings"), SIDE_BY_SIDE)
@pytest.mark.parametrize(("n", "d", "spread"), [(10, 5003, 1.0), (23, 20011, 1e-2), (60, 3001, 1.0)])
def test_our_rule_agrees_with_the_running_peer(
    library: str, rule: str, settings: dict[str, Any], n: int, d: int, spread: float, peers: Any, tmp_path: Path
) -> None:
    f = (n - 3) // 4 if rule == "bulyan" else n // 5
    updates = noisy(seed=n, n=n, d=d, spread=spread, hostile=f, size=2 * spread)
    np.save(tmp_path / "updates.npy", updates)
    peers.load(tmp_path / "updates.npy")
    job = {"library": library, "rule": rule, "f": f, "settings": settings}
    found = ours(job, updates)
    wanted = peers.result(job)
    if rule == "meamed":  # of two values equally far from the median either may be kept
        tied = meamed_ties(updates, f)
        assert tied.sum() < 10
        found, wanted = found[~tied], wanted[~tied]
    assert distance(found, wanted) <= TOLERANCE


def meamed_ties(updates: np.ndarray, f: int) -> np.ndarray:
    """(d,) bool: columns in which the last value kept is as far from the median as the first one left out."""
    away = np.sort(np.abs(updates - np.median(updates.astype(np.float64), axis=0)), axis=0)
    tied: np.ndarray = away[len(updates) - f - 1] == away[len(updates) - f]
    return tied


# ---- where we differ: docs/rules-compared.md


def documented_cases() -> set[str]:
    page = (ROOT / "docs" / "rules-compared.md").read_text().partition("## Where we do not")[2]
    return set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE))


def test_every_case_of_the_script_is_documented_and_no_other() -> None:
    script = (ROOT / "benchmarks" / "peers_defects.py").read_text()
    cases = set(re.findall(r'@case\(\s*"([a-z-]+)"', script))
    assert len(cases) > 20
    assert documented_cases() == cases


@needs_peers
@pytest.mark.slow
def test_the_installed_peers_still_show_every_documented_case() -> None:
    command = [str(PYTHON), str(ROOT / "benchmarks" / "peers_defects.py"), "--json"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    shown = json.loads(ended.stdout)
    assert {case["key"] for case in shown["cases"]} == documented_cases()
    page = (ROOT / "docs" / "rules-compared.md").read_text()
    for library in ("flwr", "byzfl"):
        assert f"`{library}` {shown['versions'][library]}" in page


def test_one_of_forty_nine_is_cut_where_a_share_of_one_forty_ninth_cuts_none() -> None:
    updates = np.zeros((49, 1), np.float32)
    updates[0] = 1e6
    assert judge(make_rule("trimmed-mean", 1), updates).aggregate == 0.0


def test_two_colluding_devices_of_five_are_a_refusal_and_not_a_win() -> None:
    for rule in ("krum", "multi-krum"):
        with pytest.raises(RuleError, match=r"n > 2f \+ 2"):
            make_rule(rule, 2).check(5)


def test_a_selected_device_cannot_claim_the_aggregate() -> None:
    updates = np.arange(7, dtype=np.float32)[:, None] / 10
    claims = [10, 10, 10, 10, 10, 1e9, 10]
    assert judge(make_rule("multi-krum", 1), updates, claims).aggregate == pytest.approx(0.25)


def test_krum_never_takes_a_hostile_model_for_rounding() -> None:
    for seed in range(100):
        generator = np.random.default_rng(seed)
        models = 3 * generator.standard_normal(1000) + 1e-4 * generator.standard_normal((26, 1000))
        models[0] += 3e-4
        assert not judge(make_rule("krum", 5), models).accepted[0]


def test_one_far_device_does_not_keep_the_covariance_filter_busy() -> None:
    updates = np.array([[0], [1], [2], [3], [1e6]], np.float32)
    found = judge(make_rule("caf", 1), updates)
    assert found.measurements["steps"] <= 5
    assert 0 <= found.aggregate <= 3


def test_the_geometric_median_is_found_far_from_the_origin_and_at_any_scale() -> None:
    updates = 1000 + np.random.default_rng(0).standard_normal((10, 50))
    updates[:3] += 1000
    assert np.linalg.norm(judge(make_rule("geometric-median", 3), updates).aggregate - updates[3:].mean(axis=0)) < 3.5
    small = 1e-3 * np.random.default_rng(0).standard_normal((10, 5))
    small[0] = 0.04
    found = judge(make_rule("geometric-median", 1), small).aggregate
    assert np.linalg.norm(found) < 1e-3
    np.testing.assert_allclose(judge(make_rule("geometric-median", 1), 1024 * small).aggregate, 1024 * found, rtol=1e-5)


def test_krum_counts_neighbours_as_the_paper_or_as_byzfl() -> None:
    updates = np.array([[0], [0], [1], [9], [11], [11]], np.float32)
    assert judge(make_rule("krum", 1), updates).aggregate == 1
    assert judge(make_rule("krum", 1, neighbours="n-f-1"), updates).aggregate == 9
