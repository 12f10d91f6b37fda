"""`covey_edge.inference`: answers of the model that is kept, for an application on the device."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from models_kept import digits, keep, parameters_of

from covey_edge import normalising
from covey_edge.inference import Predictor
from covey_edge.model_store import ModelStore, Scale
from covey_edge.runtime import Model
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import BundleError, DataError, StorageError
from covey_protocol.seals import SealingKey


def expected(bundle: bytes, parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
    model = Model(read_bundle(bundle))
    model.set_parameters(parameters)
    return model.infer(x)


def test_answers_are_those_of_tensorflow_for_any_number_of_examples(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    from covey_models import zoo

    keep(tmp_path, digits_bundle, parameters_of(digits_bundle), coordinator_key)
    x, _ = digits(0, 35)  # the bundle's batches are of 16
    truth = zoo.build("small-cnn", (8, 8, 1), 10, seed=0).predict(x, verbose=0)
    truth = np.exp(truth) / np.exp(truth).sum(axis=1, keepdims=True) if truth.min() < 0 else truth
    predictor = Predictor.open(tmp_path)
    for n in (1, 16, 35):
        found = predictor.predict(x[:n])
        assert found.shape == (n, 10)
        np.testing.assert_allclose(found, truth[:n], atol=1e-5)


def test_a_new_model_answers_as_soon_as_it_is_in_use_and_a_rollback_too(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    first, second = parameters_of(digits_bundle), parameters_of(digits_bundle, 0.5)
    x, _ = digits(0, 4)
    keep(tmp_path, digits_bundle, first, coordinator_key)
    predictor = Predictor.open(tmp_path)
    assert np.array_equal(predictor.predict(x), expected(digits_bundle, first, x))
    keep(tmp_path, digits_bundle, second, coordinator_key, number=2)
    assert np.array_equal(predictor.predict(x), expected(digits_bundle, second, x))
    assert str(predictor.version) == "federated model of round 2 (r.2)"
    store = ModelStore(tmp_path)
    kept = store.load()
    assert kept is not None
    store.commit(kept.rolled_back(), {})
    assert np.array_equal(predictor.predict(x), expected(digits_bundle, first, x))


def test_a_new_model_that_cannot_be_loaded_leaves_the_old_one_answering_and_says_so_once(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey, caplog: pytest.LogCaptureFixture
) -> None:
    x, _ = digits(0, 4)
    keep(tmp_path, digits_bundle, parameters_of(digits_bundle), coordinator_key)
    predictor = Predictor.open(tmp_path)
    before = predictor.predict(x)
    new = keep(tmp_path, digits_bundle, parameters_of(digits_bundle, 0.5), coordinator_key, number=2)
    (tmp_path / "models" / new.files[1]).write_bytes(b"torn")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert np.array_equal(predictor.predict(x), before)
    assert [record.message for record in caplog.records if "damaged" in record.message] == caplog.messages
    assert len(caplog.messages) == 1
    with pytest.raises(StorageError, match="damaged"):
        Predictor.open(tmp_path)


def test_a_bundle_that_another_key_sealed_is_not_loaded(tmp_path: Path, digits_bundle: bytes) -> None:
    keep(tmp_path, digits_bundle, parameters_of(digits_bundle), SealingKey.from_seed(b"x" * 32))
    with pytest.raises(BundleError, match="seal is not the expected"):
        Predictor.open(tmp_path)


def test_where_nothing_is_kept_the_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no model is kept in .*; set \[personal\] keep = true"):
        Predictor.open(tmp_path)


@pytest.mark.parametrize(
    ("x", "complaint"),
    [
        (np.full((2, 8, 8, 1), np.nan), "NaN or infinite values in 2 of 2 rows"),
        (np.zeros((2, 8, 8)), r"shape \(8, 8\), the model takes \(8, 8, 1\)"),
        (np.full((2, 8, 8, 1), 255), "above 1 in 2 of 2 rows"),
        (np.zeros((0, 8, 8, 1)), "one row or more"),
        (np.array([["a"]]), "no list of examples"),
        (3.0, "no list of examples"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_row_and_the_remedy(
    x: object, complaint: str, tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    keep(tmp_path, digits_bundle, parameters_of(digits_bundle), coordinator_key)
    with pytest.raises(DataError, match=complaint):
        Predictor.open(tmp_path).predict(x)


def test_threads_that_share_a_predictor_get_the_answers_to_their_own_questions(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    """While the model is replaced under them: every answer is one of the two models', whole."""
    models = [parameters_of(digits_bundle), parameters_of(digits_bundle, 0.5)]
    keep(tmp_path, digits_bundle, models[0], coordinator_key)
    predictor, wrong = Predictor.open(tmp_path), []
    x, _ = digits(0, 32)
    truth = [expected(digits_bundle, one, x) for one in models]
    done = threading.Event()

    def ask(place: int) -> None:
        while not done.is_set():
            found = predictor.predict(x[place : place + 8])
            if not any(np.array_equal(found, one[place : place + 8]) for one in truth):
                wrong.append(place)

    threads = [threading.Thread(target=ask, args=(place,)) for place in (0, 8, 16, 24)]
    for thread in threads:
        thread.start()
    for number in range(2, 12):
        keep(tmp_path, digits_bundle, models[number % 2], coordinator_key, number=number)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.slow
def test_an_application_needs_no_tensorflow_and_no_mqtt(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    keep(tmp_path, digits_bundle, parameters_of(digits_bundle), coordinator_key)
    script = f"""
import json, sys
import numpy as np
from covey_edge import normalising
from covey_edge.inference import Predictor
output = Predictor.open({str(tmp_path)!r}).predict(np.zeros((3, 8, 8, 1)))
heavy = sorted({{"tensorflow", "paho", "sklearn", "click", "sqlite3"}} & set(sys.modules))
print(json.dumps([output.shape, heavy]))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == [[3, 10], []]


def test_inputs_are_scaled_as_for_training_and_follow_when_the_statistics_are_made_anew(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    """[data] normalise: an application gives what its sensors say, 0 to 16 here."""
    parameters = parameters_of(digits_bundle)
    x, _ = digits(0, 40)
    keep(tmp_path, digits_bundle, parameters, coordinator_key, scale=Scale("range", "normalisation.json"))
    with pytest.raises(StorageError, match="by which inputs are normalised"):
        Predictor.open(tmp_path)
    raw = x * 16
    raw[0], raw[1] = 0, 16  # so that the range of every pixel is known
    normalising.keep(tmp_path / "normalisation.json", normalising.measured(raw))
    predictor = Predictor.open(tmp_path)
    np.testing.assert_allclose(predictor.predict(raw), expected(digits_bundle, parameters, raw / 16), atol=1e-6)
    normalising.keep(tmp_path / "normalisation.json", normalising.measured(2 * raw))
    np.testing.assert_allclose(predictor.predict(2 * raw), expected(digits_bundle, parameters, raw / 16), atol=1e-6)
