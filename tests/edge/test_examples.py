"""What becomes of a device's data before a model sees them: bad rows, the split, the scale, the report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_edge import normalising
from covey_edge.config import load_agent
from covey_edge.data_report import DataReport, LeftOut, write_report
from covey_edge.data_sources import input_faults
from covey_edge.examples import Prepared, examine, other_examples, prepared
from covey_edge.frames import Done, Open, Probe, Problem, Run
from covey_edge.policy import data_for, places
from covey_edge.reading import HELD_OUT, TRAINING, Reading
from covey_edge.splitting import holdout_of, split_key
from covey_edge.trainer import Trainer
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import REQUIRED_SIGNATURES, Manifest, TensorSpec, read_bundle
from covey_protocol.errors import ConfigError, DataError, UsageError
from covey_protocol.messages import TrainingPlan
from covey_protocol.parameters import ParameterSpec
from covey_protocol.seals import SealingKey

KEY = bytes(range(32))


def manifest(size: int = 2, low: float | None = None, high: float | None = None) -> Manifest:
    return Manifest(
        format=1,
        name="m",
        model_sha256="",
        model_bytes=0,
        batch_size=4,
        input=TensorSpec((size,), "float32", low, high),
        label=TensorSpec((), "int32", 0, 2),
        parameters=(ParameterSpec("w", (2,)),),
        signatures=REQUIRED_SIGNATURES,
        loss="l",
        optimizer="sgd",
    )


def write_rows(path: Path, x: np.ndarray, y: np.ndarray) -> Path:
    rows = [",".join(repr(float(value)) for value in (*row, label)) for row, label in zip(x, y)]
    path.write_text("\n".join(["a,b,label", *rows]) + "\n")
    return path


def numbers(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(3.0, 2.0, (count, 2)), rng.integers(0, 3, count)


def read(path: Path, made: Manifest | None = None, **how: Any) -> Prepared:
    return prepared("csv", path, Reading(state_dir=state(path.parent), **how), made)


def state(folder: Path) -> str:
    """With a key that is known, so that the sides are the same in every run."""
    (folder / "state").mkdir(exist_ok=True)
    (folder / "state" / "split.key").write_bytes(KEY)
    return str(folder / "state")


def as_rows(x: np.ndarray) -> set[bytes]:
    return {row.astype("<f4").tobytes() for row in x}


# --- the split


@given(st.integers(0, 2**32), st.floats(0.0, 0.99), st.floats(0.0, 0.99))
def test_an_example_stays_on_its_side_wherever_it_stands_and_a_larger_share_takes_none_back(
    seed: int, share: float, other: float
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-9, 9, (40, 3)) / 4
    held, order = holdout_of(x, share, KEY), rng.permutation(40)
    np.testing.assert_array_equal(holdout_of(x[order], share, KEY), held[order])
    np.testing.assert_array_equal(holdout_of(x[:7].astype(np.float32), share, KEY), held[:7])
    low, high = sorted((share, other))
    assert not (holdout_of(x, low, KEY) & ~holdout_of(x, high, KEY)).any()


def test_the_share_is_kept_and_another_key_holds_out_others() -> None:
    x = np.arange(20_000, dtype=np.float64).reshape(10_000, 2)
    held, others = holdout_of(x, 0.2, KEY), holdout_of(x, 0.2, bytes(32))
    assert held.mean() == pytest.approx(0.2, abs=0.016)  # four standard deviations
    assert (held & others).mean() == pytest.approx(0.04, abs=0.008)


def test_equal_examples_lie_on_one_side_whatever_their_labels_and_zeros() -> None:
    x = np.repeat(np.arange(50.0), 3)[:, None]
    held = holdout_of(x, 0.5, KEY).reshape(50, 3)
    assert (held == held[:, :1]).all()
    assert 10 < held[:, 0].sum() < 40
    zeros = np.array([[0.0], [-0.0]])
    assert all(one[0] == one[1] for one in (holdout_of(zeros, 0.5, bytes([key]) * 32) for key in range(20)))


def test_the_key_is_made_once_also_by_processes_that_race(tmp_path: Path) -> None:
    script = "from pathlib import Path; from covey_edge.splitting import split_key; "
    script += f"print(split_key(Path({str(tmp_path / 'state')!r})).hex())"
    racing = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    keys = {process.communicate()[0].strip() for process in racing}
    assert keys == {split_key(tmp_path / "state").hex()}
    assert len(split_key(tmp_path / "state")) == 32
    path = tmp_path / "state" / "split.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["split.key"]
    path.write_bytes(b"short")
    with pytest.raises(DataError, match="damaged"):
        split_key(tmp_path / "state")


def test_no_held_out_example_is_ever_trained_on_as_data_grow_and_labels_are_mended(tmp_path: Path) -> None:
    x, y = numbers(300)
    first = read(write_rows(tmp_path / "d.csv", x[:100], y[:100]), holdout=0.3)
    grown = read(write_rows(tmp_path / "d.csv", x[::-1], (y[::-1] + 1) % 3), holdout=0.3)
    sides = [(as_rows(one.part(TRAINING)[0]), as_rows(one.part(HELD_OUT)[0])) for one in (first, grown)]
    (trained, held), (trained_later, held_later) = sides
    assert trained <= trained_later
    assert held <= held_later
    assert not trained_later & held_later
    assert (len(trained_later), len(held_later)) == (300 - grown.num_held, grown.num_held)
    assert 60 < grown.num_held < 120
    order = {row.astype("<f4").tobytes(): label for row, label in zip(x, (y + 1) % 3)}
    assert all(order[row.astype("<f4").tobytes()] == label for row, label in zip(grown.x, grown.y))


def test_a_side_without_examples_is_named(tmp_path: Path) -> None:
    alike = read(write_rows(tmp_path / "d.csv", np.ones((20, 2)), np.zeros(20)), holdout=0.5)
    with pytest.raises(DataError, match=r"none of 20 examples is (held out|left to train on)"):
        alike.part(HELD_OUT), alike.part(TRAINING)
    assert any("one side of the split" in note for note in alike.report.notes)


# --- bad rows

BAD = "a,b,label\n1,2,0\nx,2,0\n1,2,7\n1,nan,1\n5,9,1\n1,2,1\n2,2,1\n3,2,1\n"


def test_bad_rows_are_dropped_and_the_report_says_which_and_why(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(BAD.replace("nan", "inf"))
    done = read(tmp_path / "d.csv", manifest(high=5.0), bad_rows="drop")
    np.testing.assert_array_equal(done.x, [[1, 2], [1, 2], [2, 2], [3, 2]])
    assert (done.x.dtype, done.y.dtype) == (np.float32, np.int32)
    assert done.report.left_out == (
        LeftOut("not a number", "a", 1, ("3",)),
        LeftOut("x holds NaN or infinite values", "", 1, ("5",)),
        LeftOut("labels above 2", "", 1, ("4",)),
        LeftOut("x above 5", "", 1, ("6",)),
    )
    path = tmp_path / "state" / "data-report.txt"
    text = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert "8 rows read, 4 examples\n" in text
    assert "left out: 1 rows: labels above 2 (4)\n" in text
    assert "labels: 0: 1, 1: 3\n" in text
    assert "a: from 1 to 3, mean 1.75\n" in text


REFUSED = {
    "a cell that is no number": (BAD, r"a: not a number in 1 of 8 rows, first in line 3; mend them, or set bad_rows"),
    "a missing cell": (BAD.replace("x,", "1,"), "b: no value in 1 of 8 rows, first in line 5"),
    "a label": (BAD.replace("x,", "1,").replace("nan", "2"), "labels above 2 in 1 of 8 rows, first in line 4"),
    "an input": (BAD.replace("x,", "1,").replace("nan", "2").replace("2,7", "2,2"), "x above 5 in 1 of 8 rows"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_first_bad_row_is_refused_unless_rows_may_be_dropped(what: str, tmp_path: Path) -> None:
    text, message = REFUSED[what]
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "d.csv", manifest(high=5.0))
    assert "left out: 1 rows" in (tmp_path / "state" / "data-report.txt").read_text()


def test_more_than_half_is_never_dropped(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("a,b,label\n" + "1,2,0\n" * 4 + "x,2,0\n" * 3 + "1,2,9\n")
    assert read(tmp_path / "d.csv", manifest(), bad_rows="drop").report.examples == 4
    (tmp_path / "d.csv").write_text("a,b,label\n" + "1,2,0\n" * 3 + "x,2,0\n" * 3 + "1,2,9\n")
    with pytest.raises(DataError, match="4 of 7 rows would be left out, more than half"):
        read(tmp_path / "d.csv", manifest(), bad_rows="drop")
    (tmp_path / "d.csv").write_text("a,b,label\n" + "x,2,0\n" * 5)
    with pytest.raises(DataError, match="5 of 5 rows"):
        read(tmp_path / "d.csv", manifest(), bad_rows="drop")


def test_the_names_of_an_owners_files_are_in_the_report_alone(tmp_path: Path) -> None:
    """A refusal may be told to the coordinator."""
    from covey_edge.png import png

    for name in ("0", "7"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / f"anna-{name}.png").write_bytes(png(np.zeros((1, 2, 1), np.uint8)))
    image = msgspec.structs.replace(manifest(), input=TensorSpec((1, 2, 3), "float32"))
    reading = Reading(state_dir=str(tmp_path / "state"))
    with pytest.raises(DataError, match="labels above 2 in 1 of 2 rows, first in row 1") as caught:
        examine("images", tmp_path / "images", reading, image)
    assert "anna" not in str(caught.value)
    assert "anna-7.png" in (tmp_path / "state" / "data-report.txt").read_text()


# --- the scale


@pytest.mark.parametrize("how", ["standard", "range"])
def test_inputs_are_scaled_by_the_statistics_of_what_is_trained_on(how: str, tmp_path: Path) -> None:
    x, y = numbers(400)
    done = read(write_rows(tmp_path / "d.csv", x, y), manifest(low=-9.0, high=9.0), holdout=0.25, normalise=how)
    trained, held = done.part(TRAINING)[0], done.part(HELD_OUT)[0]
    if how == "standard":
        np.testing.assert_allclose(trained.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(trained.std(axis=0), 1, atol=1e-5)
        assert (np.abs(held.mean(axis=0)) > 1e-3).all()  # these it has not seen
    else:
        np.testing.assert_allclose([trained.min(axis=0), trained.max(axis=0)], [[-9, -9], [9, 9]], atol=1e-5)
        assert np.abs(held).max() <= 9
    path = tmp_path / "state" / "normalisation.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert normalising.kept(path).count == len(trained)  # type: ignore[union-attr]
    assert done.report.columns[0].mean == pytest.approx(x[:, 0].mean(), rel=1e-5)  # the report is of the raw ones


def test_kept_statistics_stay_once_they_are_old_and_drift_is_told(tmp_path: Path) -> None:
    x, y = numbers(1200)
    path = tmp_path / "d.csv"
    young = read(write_rows(path, x[:10], y[:10]), manifest(), normalise="standard").report.notes
    again = read(write_rows(path, x[:15], y[:15]), manifest(), normalise="standard").report.notes
    twice = read(write_rows(path, x[:20], y[:20]), manifest(), normalise="standard").report.notes
    old = read(write_rows(path, x, y), manifest(), normalise="standard").report.notes
    assert [bool(one) for one in (young, again, twice, old)] == [True, False, True, True]
    moved = np.concatenate([x, x, x]) + [0.0, 7.0]
    done = read(write_rows(path, moved, np.tile(y, 3)), manifest(), normalise="standard")
    assert done.x[:, 1].mean() == pytest.approx(3.5, abs=0.1)  # in the old deviations: it is not scaled away
    shift = 7.0 / x[:, 1].std()
    assert any(f"drift: the mean of b has moved by {shift:+.1f} deviations" in note for note in done.report.notes)


def test_a_constant_feature_becomes_nothing_and_stays_so(tmp_path: Path) -> None:
    x = np.array([[1.0, 0.1]] * 2 + [[2.0, 0.1]] * 2)
    used = normalising.measured(x, "csv", ("a", "b"))
    later = np.array([[1.5, 99.0]] * 40)
    for how, empty in (("standard", 0.0), ("range", 0.5)):
        scaled = normalising.scaled(later, used, how, manifest().input)
        np.testing.assert_allclose(scaled[:, 1], empty)
    later[0, 1] = 98.0
    assert normalising.drift(used, normalising.measured(later, "csv", ("a", "b"))) == [
        "a now spreads 0 times as wide",
        "b was constant, is not any more, and is left out",
    ]


def test_channels_of_images_and_sensors_of_series_are_scaled_each_by_itself() -> None:
    x = np.random.default_rng(0).normal([1.0, 50.0], [2.0, 9.0], (30, 4, 5, 2)).astype(np.float32)
    spec = TensorSpec((4, 5, 2), "float32")
    scaled = normalising.scaled(x, normalising.measured(x), "standard", spec, out=x)
    assert scaled is x
    np.testing.assert_allclose(x.reshape(-1, 2).mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(x.reshape(-1, 2).std(axis=0), 1, atol=1e-5)


def test_what_the_scale_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.csv", *numbers(50))
    with pytest.raises(DataError, match="x below 0 in"):  # a model that takes 0 to 1
        read(path, manifest(low=0.0, high=1.0), normalise="standard")
    whole = msgspec.structs.replace(manifest(), input=TensorSpec((2,), "int32"))
    with pytest.raises(DataError, match="int32, which cannot be normalised"):
        read(path, whole, normalise="range")
    with pytest.raises(DataError, match="no statistics"):
        prepared("csv", path, Reading(state_dir=str(tmp_path / "new"), normalise="range", what="trusted"), manifest())
    with pytest.raises(UsageError):
        prepared("csv", path, Reading(normalise="range"), manifest())


def test_data_beside_are_scaled_like_those_that_are_trained_on(tmp_path: Path) -> None:
    x, y = numbers(60)
    reading = Reading(state_dir=state(tmp_path), normalise="standard", holdout=0.5)
    trained = prepared("csv", write_rows(tmp_path / "d.csv", x, y), reading, manifest())
    beside, _ = other_examples("csv", write_rows(tmp_path / "t.csv", x[:9], y[:9]), reading, manifest(), "trusted")
    assert len(beside) == 9
    assert as_rows(beside) <= as_rows(trained.x)


def test_an_array_of_the_owners_function_is_not_changed(tmp_path: Path) -> None:
    """It may keep it, and give it again."""
    (tmp_path / "own.py").write_text("import numpy as np\nX = np.ones((9, 2), np.float32)\nX[0] = 3\n")
    with (tmp_path / "own.py").open("a") as file:
        file.write("def read():\n    return X, np.zeros(9)\n")
    reading = Reading(state_dir=str(tmp_path / "state"), normalise="standard")
    done = prepared("python", tmp_path / "own.py:read", reading, manifest())
    assert sys.modules["covey_owner_data"].X[0, 0] == 3
    assert done.x[0, 0] == pytest.approx(np.sqrt(8), rel=1e-5)


# --- the report


def test_a_report_has_one_part_for_each_place(tmp_path: Path) -> None:
    path = tmp_path / "data-report.txt"
    one = DataReport("a.csv", "csv", "training", 5, 4, 1, (LeftOut("r", "", 1, ("3",)),))
    other = DataReport("b.csv", "csv", "evaluation", 2, 2)
    for report in (one, other, msgspec.structs.replace(one, rows=9, examples=8)):
        write_report(path, report)
    assert path.read_text().split("\n") == [
        "== b.csv (csv, for evaluation)",
        "2 rows read, 2 examples",
        "",
        "== a.csv (csv, for training)",
        "9 rows read, 8 examples, of which 1 are held out",
        "left out: 1 rows: r (3)",
        "",
    ]


# --- the agent's settings

HEAD = f"""
device_id = "kitchen-pi"
fleet = "home"
[broker]
url = "mqtt://broker.local"
[identity]
key_file = "device.pem"
coordinator_key = "{SealingKey.from_seed(bytes(32)).public.hex()}"
[data]
path = "d.csv"
source = "csv"
"""


def agent(folder: Path, text: str) -> Any:
    (folder / "device.pem").write_bytes(SealingKey.from_seed(bytes(32)).pem())
    (folder / "agent.toml").write_text(text)
    return load_agent(folder / "agent.toml").config.data


def test_each_round_reads_its_part_of_its_tasks_data(tmp_path: Path) -> None:
    text = HEAD + 'holdout = 0.2\nnormalise = "range"\noptions = { delimiter = ";" }\n'
    text += '[data.tasks.bells]\npath = "b.sqlite"\nsource = "sqlite"\nevaluation_path = "t.sqlite"\n'
    text += '[data.tasks.bells.options]\ntable = "readings"\n'
    data = agent(tmp_path, text)
    own = Reading({"delimiter": ";"}, "refuse", "range", 0.2)
    bells = Reading({"table": "readings"}, task="bells")
    asked: dict[tuple[str, ...], tuple[Reading, bool]] = {
        ("",): (msgspec.structs.replace(own, part=TRAINING), False),
        ("", "loss"): (msgspec.structs.replace(own, part=HELD_OUT), True),
        ("bells",): (bells, False),
        ("bells", "loss"): (msgspec.structs.replace(bells, what="evaluation"), True),
    }
    for (task, *evaluate), expected in asked.items():
        place = data_for(data, TrainingPlan(1, 0.1, evaluate=tuple(evaluate), task=task))
        assert place is not None
        assert (place.reading, place.held_out) == expected
    assert [(one.path, one.reading.what) for one in places(data)] == [
        ("d.csv", "training"),
        ("b.sqlite", "training"),
        ("t.sqlite", "evaluation"),
    ]


WRONG = {
    "a mistyped option of a source": ('options = { delimeter = ";" }', r"\[data\.options\].*did you mean `delimiter`"),
    "an option of another source": ('options = { table = "t" }', "unknown field `table`"),
    "a mistyped setting": ("holdoff = 0.1", "did you mean `holdout`"),
    "a share above 1": ("holdout = 1.0", "holdout"),
    "two ways to hold out": ('holdout = 0.1\nevaluation_path = "e.csv"', "holdout with evaluation_path"),
    "a replica with a scale of its own": ('normalise = "range"\nreplica = "r"', "normalise with replica"),
    "an unknown scale": ('normalise = "minmax"', "normalise"),
    "a decimal comma beside a comma": ('options = { decimal = "," }', "delimiter, decimal and quote"),
    "an encoding that is none": ('options = { encoding = "utf9" }', "no encoding 'utf9'"),
    "a label that is an input": ('options = { columns = ["label"] }', "is a label and an input"),
    "neither table nor query": (
        "[data.tasks.a]\npath = 'p'\nsource = 'sqlite'",
        r"\[data\.tasks\.a\.options\]: give `ta",
    ),
    "the newest of a query": (
        "[data.tasks.a]\npath = 'p'\nsource = 'sqlite'\noptions = { query = 'SELECT 1', newest = 3 }",
        "`newest` with a query",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_setting_is_refused_at_the_start(what: str, tmp_path: Path) -> None:
    text, message = WRONG[what]
    with pytest.raises(ConfigError, match=message):
        agent(tmp_path, HEAD + text + "\n")


# --- in the training child


def test_a_child_trains_on_one_side_and_evaluates_on_the_other(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    rows = [",".join(map(str, (*map(int, row), label))) for row, label in zip(x[:80], y[:80])]
    head = ",".join([*(f"p{place}" for place in range(64)), "label"])
    (tmp_path / "d.csv").write_text("\n".join([head, *rows, "broken"]) + "\n")
    (tmp_path / "bundle").write_bytes(digits_bundle)
    whole = Reading({"shape": [8, 8, 1]}, "drop", "range", 0.25, state_dir=state(tmp_path))
    trainer = Trainer()
    probed = trainer.answer(Probe("csv", str(tmp_path / "d.csv"), whole, str(tmp_path / "bundle")))
    assert isinstance(probed, Done), probed
    assert probed.num_examples == 80
    assert probed.report is not None
    assert probed.report.summary.endswith("1 rows left out")

    def opened(part: Any) -> Done:
        reading = msgspec.structs.replace(whole, part=part)
        sha256, key = blob_ref(digits_bundle).sha256, coordinator_key.public.hex()
        asked = Open(str(tmp_path / "bundle"), sha256, key, "csv", str(tmp_path / "d.csv"), reading=reading)
        answer = trainer.answer(asked)
        assert isinstance(answer, Done), answer
        return answer

    def ran(plan: TrainingPlan) -> Done:
        vector = np.zeros(read_bundle(digits_bundle).manifest.dimension, "<f4").tobytes()
        answer = trainer.answer(Run("r.1", "pi", vector, plan, 0.0, 0.0, 1, screen_models="off"))
        assert isinstance(answer, Done), answer
        return answer

    held = probed.report.held_out
    assert opened(TRAINING).report is not None
    assert ran(TrainingPlan(1, 0.1)).num_examples == 80 - held
    assert opened(HELD_OUT).report is None  # the data are not read again for the other side
    assert ran(TrainingPlan(1, 0.1, evaluate=("loss",))).num_examples == held
    assert 0 < held < 40
    (tmp_path / "d.csv").write_text("\n".join([head, "1,2,3"]))
    failed = trainer.answer(Probe("csv", str(tmp_path / "d.csv"), whole))
    assert isinstance(failed, Problem)
    assert "3 cells in place of 65" in failed.what


def test_the_agent_knows_how_data_are_read_without_numpy() -> None:
    """What the parent imports for it: arrays stay in the child."""
    script = "import sys, covey_edge.reading, covey_edge.source_options, covey_edge.data_report\n"
    script += "print(sorted({'numpy', 'csv', 'sqlite3'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"[]\n"


def test_faults_of_inputs_are_found_in_whole_numbers_too() -> None:
    image = msgspec.structs.replace(manifest(), input=TensorSpec((1,), "uint8"))
    found = [fault.what for fault in input_faults(np.array([[256.0], [0.5], [1.0]]), image) if fault.rows.any()]
    assert found == ["x must be whole numbers", "x above 255"]
