"""Tables, claims and verdicts on made-up numbers, and the program from the first run to the report."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from covey_coordinator.grid.display import Display
from covey_coordinator.reproduce.command import listed, reproduce_command
from covey_coordinator.reproduce.contract import Case, Claim, Measured, Reproduction
from covey_coordinator.reproduce.fedavg import rounds_to
from covey_coordinator.reproduce.fsvrg import FSVRG
from covey_coordinator.reproduce.program import Request, reproduce
from covey_coordinator.reproduce.registry import NAMES, reproduction_of
from covey_coordinator.reproduce.text import table_lines
from covey_protocol.errors import ConfigError, DataError

ALL = [reproduction_of(name) for name in NAMES]
# no numbers to be had, or no paper
WITHOUT_NUMBERS = ("super-teaching", "draco", "incomplete-data", "teaching-regimes")


def measured(**values: Sequence[float | None]) -> Measured:
    outcomes = {label: [{"value": value} for value in found] for label, found in values.items()}
    return Measured(outcomes, lambda outcome: float("inf") if outcome["value"] is None else outcome["value"])


ABOVE = Claim("a is above b", lambda values: values["a"] > values["b"])


def test_a_claim_is_judged_on_the_means_and_counted_in_every_seed() -> None:
    verdict = measured(a=(0.9, 0.4, 0.9), b=(0.5, 0.5, 0.5)).judged(ABOVE)
    assert (verdict.holds, verdict.in_seeds, verdict.seeds) == (True, 2, 3)
    assert verdict.text == "holds (mean of 3 seeds; alone in 2 of 3)"


def test_a_claim_that_fails_says_so() -> None:
    verdict = measured(a=(0.1,), b=(0.5,)).judged(ABOVE)
    assert verdict.holds is False
    assert verdict.text == "does not hold (one seed)"


def test_a_claim_about_cases_that_did_not_run_is_not_tested() -> None:
    verdict = measured(a=(0.1,)).judged(ABOVE)
    assert verdict.holds is None
    assert verdict.text == "not tested in this form"


def test_the_table_has_published_and_measured_side_by_side_with_the_spread() -> None:
    cases = [Case("a", {}, 0.911), Case("b", {})]
    percent = dataclasses.replace(FSVRG, in_percent=True)
    lines = table_lines(percent, cases, measured(a=(0.9, 0.91, 0.92), b=(0.5, 0.5, 0.5)))
    assert [line.split() for line in lines] == [
        ["published", "measured", "over", "seeds"],
        ["a", "91.1%", "91.0%", "90.0%", "to", "92.0%"],
        ["b", "-", "50.0%", "50.0%", "to", "50.0%"],
    ]


def test_a_goal_that_was_not_reached_is_never_and_not_a_number() -> None:
    lines = table_lines(FSVRG, [Case("a", {}, 30.0)], measured(a=(12.0, None)))
    assert lines[1].split() == ["a", "30", "never", "12", "to", "never"]


def test_rounds_are_counted_on_the_best_so_far_between_rounds() -> None:
    curve = [[1, 0.5], [2, 0.8], [3, 0.7], [4, 1.0]]
    assert rounds_to(curve, 0.9) == 3.5  # from 0.8, the best so far, in round 3 to 1.0 in round 4
    assert rounds_to(curve, 0.25) == 0.5
    assert rounds_to(curve[:3], 0.9) is None


@pytest.mark.parametrize("reproduction", ALL, ids=NAMES)
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_every_case_has_a_name_of_its_own_and_plain_settings(reproduction: Reproduction, quick: bool) -> None:
    cases = reproduction.cases(quick)
    assert len({case.label for case in cases}) == len(cases) > 0
    for case in cases:
        assert json.loads(json.dumps(case.settings)) == case.settings
    told = any(case.published is not None for case in reproduction.cases(False))
    assert told != (reproduction.name in WITHOUT_NUMBERS)


@pytest.mark.parametrize("reproduction", ALL, ids=NAMES)
def test_every_claim_is_tested_in_the_full_form_and_some_in_the_quick(reproduction: Reproduction) -> None:
    def tested(quick: bool) -> list[bool]:
        values = {case.label: case.published or 0.5 for case in reproduction.cases(quick)}
        numbers = measured(**{label: [value] for label, value in values.items()})
        return [numbers.judged(claim).holds is not None for claim in reproduction.claims]

    assert all(tested(quick=False))
    assert any(tested(quick=True))


PUBLISHED_BREAK = {
    "krum-spambase": ("krum, 30% Gaussian", 0.99),
    "krum-batch-size": ("krum, f = 8, batch 160", 0.99),
    "alie-mnist": ("mean, attacked", 0.1),
    "shejwalkar-mnist": ("trimmed-mean, min-max", 0.999),
    "fltrust": ("krum, fang-krum", 0.01),
    "draco": ("repetition, reversed", 0.1),
    "fedavg-2nn": ("two shards each, 10 of 100 devices a round", 1.0),
    "fsvrg": ("FSVRG", 40.0),
    "super-teaching": ("ridge: together", 99.0),
    "byzfl-heatmap": ("trimmed-mean, similarity 0, f = 4", 0.99),
    "tff-image-classification": ("round 10", 99.0),
    "comt": ("abalone, features, 1%: CoMT", 0.0),
    "incomplete-data": ("abalone, mean, 70% hide: weighted", 0.0),
    "teaching-regimes": ("abalone, 10 trusted: CoMT", 0.9),
    "model-inversion": ("softmax: white box", 0.1),
    "tree-inversion": ("survey: white box", 0.1),
    "gradient-inversion": ("L-BFGS, every number, untrained", 0.1),
}


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_contradict_the_paper_break_a_claim(name: str) -> None:
    """Each claim list must be able to fail: one number of the paper's is made nonsense."""
    reproduction = reproduction_of(name)
    values = {case.label: 0.5 if case.published is None else case.published for case in reproduction.cases(False)}
    before = measured(**{label: [value] for label, value in values.items()})
    label, nonsense = PUBLISHED_BREAK[name]
    after = measured(**{key: [nonsense if key == label else value] for key, value in values.items()})
    changed = [claim for claim in reproduction.claims if before.judged(claim).holds and not after.judged(claim).holds]
    assert changed


def tiny(rounds: int = 4) -> Reproduction:
    """Federated SVRG on 8 authors: the whole program in a second. Worker processes find `run` by the name."""

    def cases(quick: bool) -> list[Case]:
        shape = {"authors": 8, "features": 120, "rounds": rounds, "batch": 10}
        return [
            Case("FSVRG", {**shape, "method": "FSVRG", "rates": [3.0, 10.0]}, 30.0),
            Case("gradient descent", {**shape, "method": "gradient descent", "rates": [1.0]}),
        ]

    return dataclasses.replace(FSVRG, cases=cases, seeds=2)


def ran(reproduction: Reproduction, out: Path, quick: bool = False) -> str:
    file = io.StringIO()
    reproduce(Request(reproduction, quick, None, None, out, 1), Display(file))
    return file.getvalue()


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.fleet
def test_the_program_runs_reports_and_goes_on_where_it_was(tmp_path: Path) -> None:
    said = ran(tiny(), tmp_path)
    folder = tmp_path / "fsvrg" / "full"
    assert "full form, 4 runs" in said
    assert "not tested in this form" in said  # the naive form did not run
    assert f"report: {folder / 'report.md'}" in said
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "report.md").read_text()
    assert "| FSVRG | 30 |" in text
    assert "Deviations from the paper" in text
    results = json.loads((folder / "results.json").read_text())
    assert [len(case["measured"]) for case in results["cases"]] == [2, 2]
    assert results["cases"][0]["outcomes"][0]["curve"][-1][1] < results["cases"][1]["outcomes"][0]["curve"][-1][1]

    runs = tmp_path / "fsvrg" / "runs"
    times = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert "going on: 4 runs are there already" in ran(tiny(), tmp_path)
    assert times == {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    quick = ran(tiny(), tmp_path, quick=True)  # one seed of the same settings, in a folder of its own
    assert "going on: 2 runs" in quick
    assert (tmp_path / "fsvrg" / "quick" / "report.md").exists()
    assert "going on" not in ran(tiny(rounds=5), tmp_path)  # other settings are other runs


@pytest.mark.fleet
def test_an_interrupted_program_says_what_is_saved(tmp_path: Path) -> None:
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        reproduce(Request(tiny(), False, None, None, tmp_path, 1), Display(file), interrupted)
    assert f"0 of 4 runs are saved in {tmp_path}; the same command goes on" in file.getvalue()


def test_a_run_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    place = tmp_path / "fsvrg" / "runs"
    place.mkdir(parents=True)
    from covey_coordinator.reproduce.folder import tasks_of

    task = tasks_of(list(tiny().cases(False)), 1)[0]
    (place / f"{task.key}.json").write_text("{")
    with pytest.raises(ConfigError, match="delete that file and run again"):
        ran(tiny(), tmp_path)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    result = CliRunner().invoke(reproduce_command, ["alie-minst"])
    assert isinstance(result.exception, ConfigError)
    assert "did you mean 'alie-mnist'?" in str(result.exception)


def test_the_list_names_every_reproduction_its_paper_and_its_time() -> None:
    text = "\n".join(listed())
    for one in ALL:
        assert f"{one.name}: {one.title}" in text
        assert one.full_time
        assert one.full_time in text


def test_missing_data_are_named_with_what_they_are_and_where_to_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COVEY_DATA", raising=False)
    for folder, said in (([], "no data folder is given"), (["--data", str(tmp_path)], f"no {tmp_path}/mnist.npz")):
        result = CliRunner().invoke(reproduce_command, ["alie-mnist", "--out", str(tmp_path / "out"), *folder])
        assert isinstance(result.exception, DataError)
        assert said in str(result.exception)
        assert "MNIST as Keras has it" in str(result.exception)
        assert "--data DIR or COVEY_DATA" in str(result.exception)


@pytest.mark.slow
@pytest.mark.fleet
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_the_quick_form_shows_the_ordering(name: str, tmp_path: Path) -> None:
    reproduction = reproduction_of(name)
    folder = os.environ.get("COVEY_DATA")
    if reproduction.needs and not folder:
        pytest.skip(f"COVEY_DATA names no folder with {', '.join(reproduction.needs)}")
    request = Request(reproduction, True, Path(folder) if folder else None, None, tmp_path, 2)
    file = io.StringIO()
    verdicts = reproduce(request, Display(file))
    expected = zip(reproduction.claims, verdicts)
    assert [claim.sentence for claim, one in expected if claim.comes_out and one.holds is False] == [], file.getvalue()
