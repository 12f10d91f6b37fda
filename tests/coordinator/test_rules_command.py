"""`covey rules`: complete, true to the registry, quick, and without TensorFlow."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
from click.testing import CliRunner

from covey_coordinator.aggregation.registry import PRE_STEPS, RULES, rule_from_table
from covey_coordinator.aggregation.rules import least_devices
from covey_coordinator.rules_cli import catalogue, markdown, rules_command
from covey_edge.cli import main
from covey_protocol import errors
from covey_protocol.errors import ConfigError

RULES_PAGE = Path(__file__).parents[2] / "docs" / "rules.md"
ALL_NAMES = [*RULES, *PRE_STEPS]


def told(*arguments: str) -> str:
    done = CliRunner().invoke(rules_command, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_the_list_names_every_rule_and_pre_step_with_its_needs_and_cost() -> None:
    output = told()
    for name in ALL_NAMES:
        assert re.search(rf"^. {re.escape(name)} ", output, re.MULTILINE), name
    assert "n > 2f + 2" in output
    assert "n^2 d" in output


@pytest.mark.parametrize("name", ALL_NAMES)
def test_each_is_shown_in_full_with_its_source_and_an_example(name: str) -> None:
    output, facts = told(name), {**RULES, **PRE_STEPS}[name].facts
    for text in (facts.summary, facts.needs, facts.breakdown, facts.cost, facts.source, "[aggregation]"):
        assert text in output


def test_json_has_all_that_the_table_has_and_the_defaults_as_values() -> None:
    found = json.loads(told("--json"))
    assert [entry["name"] for entry in found] == ALL_NAMES
    multi_krum = next(entry for entry in found if entry["name"] == "multi-krum")
    assert multi_krum["kind"] == "rule"
    assert multi_krum["settings"] == {"num_selected": None, "neighbours": "n-f-2"}
    assert multi_krum["sums_only"] is False
    assert json.loads(told("zeroing", "--json"))[0]["settings"]["target_quantile"] == 0.98


@pytest.mark.parametrize("entry", catalogue(), ids=ALL_NAMES)
def test_every_example_is_toml_that_makes_the_rule(entry: dict[str, Any]) -> None:
    table = tomllib.loads(entry["example"])["aggregation"]
    rule = rule_from_table(table)
    assert least_devices(rule) >= 1
    assert entry["name"] in rule.name
    for setting in entry["settings"]:
        assert setting in entry["example"] or entry["settings"][setting] is None


def test_the_page_of_rules_holds_the_table_of_the_registry() -> None:
    page = RULES_PAGE.read_text()
    held = re.search(r"<!-- begin covey rules --markdown -->\n(.*)\n<!-- end covey", page, re.DOTALL)
    assert held is not None
    assert held[1] == markdown(catalogue()), "paste the output of `covey rules --markdown` between the marks"


def test_an_unknown_name_is_one_line_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["rules", "multikrum"])
    assert ended.value.code == errors.EXIT_CONFIG
    assert "did you mean 'multi-krum'" in capsys.readouterr().err


def test_the_command_loads_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from covey_edge.cli import main\n"
        "try: main(['rules', 'krum'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'tensorflow', 'tensorflow_federated', 'scipy', 'sklearn', 'grpc', 'jax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("krum: ")


# ---- the one way to write a rule

WRONG = {
    "no rule": ({}, "has no key 'rule'"),
    "a rule that is no name": ({"rule": 3}, "says rule = 3"),
    "a misspelt rule": ({"rule": "medain"}, "did you mean 'median'"),
    "a misspelt key": ({"rule": "median", "num_byzantin": 1}, "did you mean 'num_byzantine'"),
    "another rule's key": ({"rule": "median", "cap_ratio": 2.0}, "no setting 'cap_ratio'"),
    "a misspelt pre-step": ({"rule": "median", "before": ["nnn"]}, "did you mean 'nnm'"),
    "a pre-step outside a list": ({"rule": "median", "before": "nnm"}, "before = 'nnm'"),
    "a string for num_byzantine": ({"rule": "median", "num_byzantine": "1"}, "num_byzantine = '1'"),
    "a truth value for num_byzantine": ({"rule": "median", "num_byzantine": True}, "num_byzantine = True"),
    "a negative num_byzantine": ({"rule": "median", "num_byzantine": -1}, "num_byzantine = -1"),
    "a string for a real number": ({"rule": "mean", "cap_ratio": "3"}, "cap_ratio = '3', expected `float`"),
    "a truth value for a real number": ({"rule": "mean", "cap_ratio": True}, "cap_ratio = True, expected `float`"),
    "a real number for a whole one": ({"rule": "krum", "num_selected": 1.5}, "num_selected = 1.5, expected `int"),
    "a number for a word": ({"rule": "krum", "neighbours": 2}, "neighbours = 2, expected `str`"),
}


@pytest.mark.parametrize(("table", "hint"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_table_is_refused_naming_the_key(table: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        rule_from_table(table)
    assert hint in str(refused.value)


def test_a_table_makes_the_rule_it_says_and_stays_as_it_is() -> None:
    table = {"rule": "multi-krum", "num_byzantine": 3, "num_selected": 4, "before": ["nnm", {"step": "bucketing"}]}
    copy = json.loads(json.dumps(table))
    rule = rule_from_table(table)
    assert table == copy
    assert rule.name == "nnm + bucketing + multi-krum"
    assert rule.num_byzantine == 3


def test_a_whole_number_may_stand_for_a_real_one() -> None:
    rule = rule_from_table({"rule": "mean", "cap_ratio": 3})
    assert rule.cap_ratio == 3.0  # type: ignore[attr-defined]
    assert isinstance(rule.cap_ratio, float)  # type: ignore[attr-defined]
