"""What an experiment's file may say, what becomes of its sweep, and what is refused with a remedy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st

from covey_coordinator.simulation.command import overrides_of
from covey_coordinator.simulation.folder import toml_of
from covey_coordinator.simulation.reading import read_experiment
from covey_coordinator.simulation.settings import ExperimentSettings, TrainingSettings
from covey_coordinator.simulation.sweep import Cell, cells_of, label_of, set_key
from covey_coordinator.simulation.world import cohort_of, world_of
from covey_protocol.errors import ConfigError, CoveyError, DataError, RuleError

SMALL: dict[str, Any] = {"name": "small", "rounds": 3, "devices": 10}
CENTRAL = {"clip_norm": 1.0, "noise_multiplier": 1.0, "by": "coordinator"}


def cells(**more: Any) -> list[Cell]:
    return cells_of({**SMALL, **more})


def cell(**more: Any) -> Cell:
    (one,) = cells(**more)
    return one


# ---- sweeps


def test_a_sweep_is_the_product_of_its_lists_seed_by_seed() -> None:
    found = cells(
        seeds=2, sweep={"aggregation.rule": ["mean", "median"], "attack": [{"attack": "alie", "fraction": 0.2}]}
    )
    assert [(one.varied["aggregation.rule"], one.seed) for one in found] == [
        ("mean", 0),
        ("median", 0),
        ("mean", 1),
        ("median", 1),
    ]
    assert [one.key for one in found] == [
        "0--mean--alie_fraction=0.2--seed-0",
        "1--median--alie_fraction=0.2--seed-0",
        "0--mean--alie_fraction=0.2--seed-1",
        "1--median--alie_fraction=0.2--seed-1",
    ]
    assert found[1].settings.aggregation == {"rule": "median"}
    assert found[1].settings.num_hostile == 2
    assert found[1].said == "aggregation.rule=median, attack=alie fraction=0.2, seed 0"
    assert [one.settings.seed_list for one in found] == [(0,), (0,), (1,), (1,)]


def test_dots_without_quotes_mean_the_same_key() -> None:
    """TOML makes tables of them."""
    quoted = tomllib.loads('[sweep]\n"corruption.0.fraction" = [0.0, 1.0]\n"training.epochs" = [1, 2]')
    bare = tomllib.loads("[sweep]\ncorruption.0.fraction = [0.0, 1.0]\ntraining.epochs = [1, 2]")
    noisy = {"corruption": [{"kind": "sensor-noise", "fraction": 0.5}]}
    assert cells(**quoted, **noisy) == cells(**bare, **noisy)
    assert [one.settings.corruption[0]["fraction"] for one in cells(**bare, **noisy)] == [0.0, 0.0, 1.0, 1.0]


def test_keys_that_go_together_take_turns_in_step() -> None:
    found = cells(sweep={"together": [{"devices": [4, 8], "sample": [2, 4]}], "rounds": [1, 2]})
    assert [(one.settings.devices, one.settings.sample, one.settings.rounds) for one in found] == [
        (4, 2, 1),
        (4, 2, 2),
        (8, 4, 1),
        (8, 4, 2),
    ]


def test_every_key_of_a_cell_is_a_folder_of_its_own_whatever_the_values_are() -> None:
    rules = [{"rule": "median", "before": [{"step": "bucketing", "size": size}]} for size in range(2, 8)]
    attacks = [{"attack": "ipm", "epsilon": 1 / n, "fraction": 0.1, "label": f"ipm {n}"} for n in range(1, 10)]
    paths = ["../here/x.npz", f"/{'long' * 40}/x.npz"]
    found = cells(seeds=[3, 5], sweep={"aggregation": rules, "data.path": paths, "attack": attacks})
    keys = {one.key for one in found}
    assert len(keys) == len(found) == 216
    assert not any("/" in key or len(key) > 100 for key in keys)


def test_labels_are_what_people_call_the_values() -> None:
    assert label_of({"rule": "krum", "num_byzantine": 2}) == "krum num_byzantine=2"
    assert label_of({"attack": "ipm", "label": "strong ipm"}) == "strong ipm"
    assert label_of([{"kind": "sensor-noise", "fraction": 0.5}]) == "sensor-noise fraction=0.5"
    steps = {"rule": "median", "before": [{"step": "bucketing", "size": 2}]}
    assert label_of(steps) == "median before=bucketing size=2"
    assert label_of([]) == "none"


# ---- refusals


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"roundz": 3}, "did you mean `rounds`"),
        ({"rounds": 0}, "rounds"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "each once"),
        ({"name": "a/b"}, "letters"),
        ({"sample": 11}, "sample = 11 of 10"),
        ({"data": {"set": "digits", "path": "x.npz"}}, "both a set and a path"),
        ({"data": {"sett": "digits"}}, "did you mean `set`"),
        ({"model": {"name": "some.covey"}}, "carries no Keras model"),
        ({"model": {"loss": "mean_squared_eror"}}, "did you mean 'mean_squared_error'"),
        ({"model": {"optimizer": "adamm"}}, "did you mean 'adam'"),
        ({"training": {"algorithm": "fedavgg"}}, "did you mean 'fedavg'"),
        ({"training": {"algorithm": "fedsgd", "epochs": 2}}, "take fedavg"),
        ({"training": {"algorithm": "scaffold"}}, "local_steps = 0"),
        ({"training": {"algorithm": "fsvrg"}, "server": {"optimizer": "adam"}}, "server optimizer 'adam'"),
        ({"training": {"learning_rte": 1.0}}, "did you mean `learning_rate`"),
        ({"aggregation": {"rule": "medain"}}, r"\[aggregation\]: there is no aggregation rule.*'median'"),
        ({"aggregation": {"rule": "median", "radius": 1}}, "no setting 'radius'"),
        ({"attack": {"attack": "alie"}}, "has no fraction"),
        ({"attack": {"attack": "alie", "fraction": 2}}, "fraction = 2"),
        ({"attack": {"attack": "alie", "fraction": 1.0}}, "10 of 10 devices would attack"),
        ({"attack": {"attack": "nan", "fraction": 0.1}}, "covey grid"),
        ({"attack": {"attack": "ali", "fraction": 0.1}}, "did you mean 'alie'"),
        ({"server": {"optimizer": "sgdd"}}, "did you mean 'sgd'"),
        ({"privacy": {"noise_multiplier": 1.0}}, "needs privacy.clip_norm"),
        ({"privacy": {"clip_norm": 1.0, "by": "nobody"}}, "privacy.by"),
        ({"privacy": CENTRAL, "aggregation": {"rule": "median"}}, "the rule 'median' with privacy.by"),
        ({"privacy": CENTRAL, "attack": {"attack": "alie", "fraction": 0.2}}, "the attack 'alie' with privacy.by"),
        ({"privacy": CENTRAL, "training": {"algorithm": "fsvrg"}}, "the algorithm 'fsvrg' with privacy.by"),
        ({"sweep": {"seeds": [1, 2]}}, "the same for all cells"),
        ({"sweep": {"devices": 3}}, "give a list"),
        ({"sweep": {"devices": []}}, "give a list"),
        ({"sweep": {"devices": [3, 3]}}, "twice"),
        ({"sweep": {"corruption.0.fraction": [0.5]}}, "there is no '0' in a list of 0"),
        ({"sweep": {"aggregation.rule": ["mean", "medain"]}}, "with aggregation.rule=medain"),
        ({"sweep": {"together": [{"devices": [4, 8], "rounds": [1]}]}}, "1 and 2 values"),
        ({"sweep": {"together": [{"devices": [4, 8]}], "devices": [5]}}, "'devices' twice"),
        ({"sweep": {"rounds.x": [1]}}, "rounds is 3, not a table"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(more: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        cells_of({**SMALL, "corruption": [], **more}, "file.toml")


@pytest.mark.parametrize(
    ("more", "error", "what"),
    [
        ({"data": {"set": "no-such"}}, DataError, "seed 0: there is no data set 'no-such'"),
        ({"data": {"path": "/nowhere/x.npz"}}, DataError, "/nowhere/x.npz"),
        ({"partition": {"kind": "dirichlett"}}, ConfigError, "dirichlet"),
        ({"corruption": [{"kind": "sensor-nois", "fraction": 0.1}]}, ConfigError, "sensor-noise"),
        ({"corruption": [{"kind": "sensor-noise"}]}, ConfigError, "whom it befalls"),
        (
            {"aggregation": {"rule": "krum"}, "attack": {"attack": "alie", "fraction": 0.4}},
            RuleError,
            "krum needs n > 2f",
        ),
        (
            {"sample": 1, "rounds": 40, "attack": {"attack": "alie", "fraction": 0.5}},
            RuleError,
            "devices of round .* attack",
        ),
    ],
    ids=str,
)
def test_what_the_data_cannot_bear_is_said_of_the_cell(
    more: dict[str, Any], error: type[CoveyError], what: str
) -> None:
    with pytest.raises(error, match=what):
        world_of(cell(**more))


# ---- what a cell is about


def test_a_rule_is_told_the_true_number_of_corrupted_devices() -> None:
    def told(**more: Any) -> int:
        return world_of(cell(**more)).rule.num_byzantine

    noise = [{"kind": "sensor-noise", "fraction": 0.3}]
    assert told(aggregation={"rule": "median"}) == 0
    assert told(aggregation={"rule": "median"}, attack={"attack": "alie", "fraction": 0.2}) == 2
    assert told(aggregation={"rule": "median"}, corruption=noise) == 3
    assert told(aggregation={"rule": "median", "num_byzantine": 1}, corruption=noise) == 1
    assert told(aggregation={"rule": "mean"}, corruption=noise) == 0  # it bears nobody, and is there for comparison


def test_in_a_sample_a_rule_is_told_the_most_of_any_round() -> None:
    one = cell(rounds=30, sample=5, aggregation={"rule": "median"}, attack={"attack": "alie", "fraction": 0.2})
    world = world_of(one)
    hostile = [len(set(world.hostile) & set(world.cohort(number))) for number in range(1, 31)]
    assert max(hostile) == 2 > min(hostile)
    assert world.rule.num_byzantine == 2


def test_cohorts_are_drawn_anew_each_round_and_alike_in_all_cells_of_a_seed() -> None:
    one, other = cells(sample=4, rounds=20, sweep={"aggregation.rule": ["mean", "median"]})
    drawn = [cohort_of(one.settings, one.seed, number) for number in range(1, 21)]
    assert drawn == [cohort_of(other.settings, other.seed, number) for number in range(1, 21)]
    assert {len(cohort) for cohort in drawn} == {4}
    assert all(cohort == sorted(set(cohort)) for cohort in drawn)
    assert len({tuple(cohort) for cohort in drawn}) > 10
    assert drawn != [cohort_of(one.settings, 1, number) for number in range(1, 21)]


def test_attackers_and_corrupted_devices_are_among_the_faults_and_the_others_are_healthy() -> None:
    world = world_of(
        cell(corruption=[{"kind": "shift-labels", "fraction": 0.5}], attack={"attack": "label-flip", "fraction": 0.2})
    )
    clean = world_of(cell())
    assert sum(bool(faults) for faults in world.faults.values()) == 5
    assert [world.devices[number].faults for number in world.hostile] == [("shift-labels", "label-flip")] * 2
    assert not any(clean.faults.values())
    for device, before in zip(world.devices, clean.devices):
        assert (device.y != before.y).any() == bool(device.faults)
    assert sum(map(sum, world.counts.values())) == len(world.train)


def test_a_cell_of_a_seed_differs_in_nothing_but_what_is_varied() -> None:
    mean, median = cells(sweep={"aggregation.rule": ["mean", "median"]})
    one, other = world_of(mean), world_of(median)
    assert all((a.x == b.x).all() and (a.y == b.y).all() for a, b in zip(one.devices, other.devices))
    again = world_of(cell(seeds=[1]))
    assert any(len(a.y) != len(b.y) or (a.y != b.y).any() for a, b in zip(one.devices, again.devices))


# ---- files and options


def test_relative_paths_lie_beside_the_file(tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text('name = "e"\nrounds = 1\n[data]\npath = "mine.npz"\n[model]\nname = "model.py:build"\n')
    (tmp_path / "model.py").write_text("def build(): ...\n")
    experiment = read_experiment(file)
    settings = experiment.cells[0].settings
    assert settings.data.path == str(tmp_path / "mine.npz")
    assert settings.model.name == str(tmp_path / "model.py:build")
    assert list(experiment.notes.files) == [str(tmp_path / "model.py")]
    assert experiment.table["data"]["path"] == "mine.npz"


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text('name = "e"\nrounds = 10\nseeds = 3\n[[corruption]]\nkind = "sensor-noise"\nfraction = 0.2\n')
    options = ("aggregation.rule=median", "corruption.0.fraction=0.5", "sweep.devices=[4, 6]")
    experiment = read_experiment(file, overrides_of(options, "5,7", 8))
    assert [(one.settings.devices, one.seed) for one in experiment.cells] == [(4, 5), (6, 5), (4, 7), (6, 7)]
    settings = experiment.cells[0].settings
    assert (settings.rounds, settings.aggregation, settings.corruption[0]["fraction"]) == (8, {"rule": "median"}, 0.5)
    quick = read_experiment(file, quick=True)
    assert (quick.cells[0].settings.rounds, len(quick.cells)) == (5, 1)


@pytest.mark.parametrize(("options", "seeds"), [(("rounds",), None), ((), "1,x")])
def test_options_that_say_nothing_are_refused(options: tuple[str, ...], seeds: str | None) -> None:
    with pytest.raises(ConfigError):
        overrides_of(options, seeds, None)


def test_a_table_is_an_experiment_too_and_is_not_changed() -> None:
    table = {**SMALL, "training": {"epochs": 2}, "seeds": (4, 5)}
    before = json.dumps(table)
    experiment = read_experiment(table, {"training.epochs": 3})
    assert [one.settings.training for one in experiment.cells] == [TrainingSettings(epochs=3)] * 2
    assert json.dumps(table) == before
    with pytest.raises(ConfigError, match="no TOML file can"):
        read_experiment({**SMALL, "model": object()})


def test_the_data_folder_is_the_option_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COVEY_DATA", str(tmp_path / "environment"))
    assert read_experiment(SMALL).cells[0].data_dir == str(tmp_path / "environment")
    assert read_experiment(SMALL, data_dir=tmp_path).cells[0].data_dir == str(tmp_path)


def test_infinity_of_a_python_dict_stays_infinite_and_tuples_are_lists() -> None:
    """Not through JSON, in which it is null."""
    told = {**SMALL, "training": {"algorithm": "comt"}, "teaching": {"lambda_z": math.inf}, "trusted": {"size": 20}}
    table = read_experiment({**told, "seeds": (0, 1)}).table
    assert table["teaching"] == {"lambda_z": math.inf}
    assert table["seeds"] == [0, 1]
    assert tomllib.loads(toml_of(table)) == table
    with pytest.raises(ConfigError, match="what no TOML file can"):
        read_experiment({**SMALL, "seeds": object()})


def test_setting_a_key_makes_the_tables_on_its_way() -> None:
    table: dict[str, Any] = {"a": [{"b": 1}]}
    set_key(table, "a.0.b", 2)
    set_key(table, "x.y.z", 3)
    assert table == {"a": [{"b": 2}], "x": {"y": {"z": 3}}}


KEYS = st.text(min_size=1, max_size=8)
SCALARS = st.one_of(
    st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), st.text(st.characters(codec="utf-8"))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_a_written_toml_file_reads_back_as_the_same_table(table: dict[str, Any]) -> None:
    assert tomllib.loads(toml_of(table)) == table


def test_every_setting_has_a_default_but_name_and_rounds() -> None:
    settings = ExperimentSettings("x", 1)
    assert cells_of({"name": "x", "rounds": 1})[0].settings == ExperimentSettings("x", 1, seeds=(0,))
    assert settings.cohort_size == 10
