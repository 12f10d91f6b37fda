"""Live rounds with a rule that needs the coordinator's own update: real agents, a real Mosquitto, real kills."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from clinic import PUBLISHED, USED, Clinic, digits_shards, make_clinic, run_with_kills, told_by_devices

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import LOSSES, UPDATE, Trusted
from covey_coordinator.serve import serve
from covey_coordinator.store import RunStore
from covey_coordinator.trusted_training import TrustedSettings, TrustedTraining
from covey_edge.runtime import Model
from covey_edge.trainer import train
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import BundleError, ConfigError, CoveyError, DataError, RuleError
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

RULE = 'rule = "mean"'
FLTRUST = 'rule = "fltrust"\n[trusted]\npath = "trusted.npz"'


def trusted_digits(count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x[-count:] / 16).astype(np.float32).reshape(-1, 8, 8, 1), y[-count:].astype(np.int32)


@pytest.fixture
def trusted_file(tmp_path: Path) -> Path:
    x, y = trusted_digits()
    np.savez(tmp_path / "trusted.npz", x=x, y=y)
    return tmp_path / "trusted.npz"


def training(path: Path, bundle: bytes, key: SealingKey, needs: str = UPDATE, **settings: float) -> TrustedTraining:
    asked = TrustedSettings("trusted.npz", **settings)  # type: ignore[arg-type]
    return TrustedTraining(needs, asked, path, bundle, key.public.hex())


@pytest.fixture
def own(trusted_file: Path, digits_bundle: bytes, coordinator_key: SealingKey) -> Iterator[TrustedTraining]:
    made = training(trusted_file, digits_bundle, coordinator_key)
    yield made
    made.close()


PLAN = TrainingPlan(epochs=2, learning_rate=0.1, shuffle_seed=7)


def by_hand(bundle: bytes, plan: TrainingPlan) -> np.ndarray:
    """What a device called "coordinator" would make of these data."""
    model = Model(read_bundle(bundle))
    received = model.parameters()
    train(model, trusted_digits(), plan, "coordinator")
    return model.parameters() - received


def test_the_update_is_what_a_device_would_make_and_the_same_bits_every_time(
    own: TrustedTraining, digits_bundle: bytes
) -> None:
    parameters = Model(read_bundle(digits_bundle)).parameters()
    plan = msgspec.structs.replace(PLAN, compression="rotated-8bit")  # it does not travel
    expected, found = by_hand(digits_bundle, PLAN), []
    for number in range(2):
        own.begin(f"run.1.{number}", parameters, plan)
        found.append(own.given().update)
        assert own.is_ready()
    for update in found:
        np.testing.assert_array_equal(update, expected)


def test_a_round_that_is_given_up_leaves_nothing_to_the_next(own: TrustedTraining, digits_bundle: bytes) -> None:
    parameters = Model(read_bundle(digits_bundle)).parameters()
    own.begin("run.1.1", np.zeros_like(parameters), msgspec.structs.replace(PLAN, epochs=50))
    own.begin("run.2.2", parameters, PLAN)
    np.testing.assert_array_equal(own.given().update, by_hand(digits_bundle, PLAN))
    own.stop()
    assert own.is_ready()  # nothing is waited for: an evaluation round begins none


def test_losses_are_those_of_the_models_on_the_trusted_data(
    trusted_file: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    own = training(trusted_file, digits_bundle, coordinator_key, LOSSES)
    model = Model(read_bundle(digits_bundle))
    first = model.parameters()
    own.begin("run.1.1", first, PLAN)
    losses = own.given().losses
    assert losses is not None
    found = losses(np.stack([first, first + 1, np.full_like(first, np.nan)]))
    for row, parameters in zip(found, (first, first + 1)):
        model.set_parameters(parameters)
        loss, accuracy = model.evaluate(*trusted_digits())
        np.testing.assert_allclose(row, [loss, 1 - accuracy], rtol=1e-6)
    np.testing.assert_array_equal(found[2], [np.inf, 1.0])
    own.close()


def test_a_child_that_dies_fails_the_round_and_names_trusted(own: TrustedTraining, digits_bundle: bytes) -> None:
    parameters = Model(read_bundle(digits_bundle)).parameters()
    own.begin("run.1.1", parameters, msgspec.structs.replace(PLAN, epochs=1000))
    child = own._child
    assert child is not None
    while child.pid is None:
        pass
    child._child.kill()  # type: ignore[union-attr]  # from outside, as a crash of the runtime
    with pytest.raises(RuleError, match=r"\[trusted\]: the training process died \(SIGKILL\)"):
        own.given()
    own.begin("run.1.2", parameters, PLAN)
    np.testing.assert_array_equal(own.given().update, by_hand(digits_bundle, PLAN))


def test_a_child_that_takes_too_long_fails_the_round(
    trusted_file: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    own = training(trusted_file, digits_bundle, coordinator_key, timeout_s=0.01)
    own.begin("run.1.1", Model(read_bundle(digits_bundle)).parameters(), PLAN)
    with pytest.raises(RuleError, match=r"\[trusted\]: training took longer than 0.01 s"):
        own.given()
    own.close()


def test_what_is_wrong_with_data_or_bundle_is_said_before_any_round(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    x, y = trusted_digits()
    np.savez(tmp_path / "wrong.npz", x=x[:, :4], y=y)
    np.savez(tmp_path / "right.npz", x=x, y=y)
    cases: list[tuple[str, SealingKey, type[CoveyError], str]] = [
        ("nothing.npz", coordinator_key, DataError, r"\[trusted\]: .*nothing.npz.*; check its path"),
        ("wrong.npz", coordinator_key, DataError, r"\[trusted\]: .*wrong.npz"),
        ("right.npz", SealingKey.generate(), BundleError, r"\[trusted\]"),
    ]
    for name, key, error, told in cases:
        with closing(training(tmp_path / name, digits_bundle, key)) as one, pytest.raises(error, match=told):
            one.check()
    with closing(training(tmp_path / "right.npz", digits_bundle, coordinator_key)) as one:
        one.check()


# ---- rounds


@pytest.fixture
def clinic(tmp_path: Path, trusted_file: Path, digits_bundle: bytes, coordinator_key: SealingKey) -> Iterator[Clinic]:
    made = make_clinic(tmp_path, digits_bundle, coordinator_key, digits_shards())
    yield made
    made.stop()


def configure(clinic: Clinic, rounds: int, aggregation: str, training: str = "") -> None:
    clinic.configure(rounds, epochs=3)
    path = clinic.folder / "coordinator.toml"
    path.write_text(path.read_text().replace(RULE, aggregation).replace("[training]", f"[training]\n{training}"))


def models_again(clinic: Clinic, bundle: bytes, rule: str) -> None:
    """Every model once more: from the stored updates, and trusted updates that are made once more."""
    opened, store = read_bundle(bundle), RunStore(clinic.runs / "digits")
    engine = make_engine("direct", make_rule(rule), opened.manifest.parameters, "adam", 0.01)
    model, parameters = Model(opened), Model(opened).parameters()
    for round_id, number in clinic.rows(PUBLISHED):
        model.set_parameters(parameters)
        train(model, trusted_digits(), store.invitation(str(round_id)).plan, "coordinator")
        given = Trusted(model.parameters() - parameters)
        used = [row[:2] for row in clinic.rows(USED) if row[2] == round_id]
        counts = [msgspec.msgpack.decode(offer)["num_examples"] for _, offer in used]
        updates = [store.read_update(str(round_id), str(name)) for name, _ in used]
        parameters = engine.step(parameters, updates, counts, [str(name) for name, _ in used], given).parameters
        path = store.checkpoints("digits") / f"round-{number:05d}.f32"
        assert path.read_bytes() == parameters.tobytes(), number
    store.close()


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.timeout(900)
def test_rounds_with_fltrust_survive_a_kill_of_the_coordinator_to_the_bit(clinic: Clinic, digits_bundle: bytes) -> None:
    configure(clinic, 2, FLTRUST)
    run_with_kills(clinic, 2, seed=1, most_kills=1)
    assert clinic.kills["serve"] == 1
    assert [number for _, number in clinic.rows(PUBLISHED)] == [1, 2], clinic.story()
    told_by_devices(clinic)
    models_again(clinic, digits_bundle, "fltrust")


@pytest.mark.parametrize(
    ("aggregation", "training", "told"),
    [
        ('rule = "fltrust"', "", r"the rule 'fltrust' needs trusted data"),
        (FLTRUST, 'algorithm = "fsvrg-naive"\nlocal_steps = 3', r"the rule 'fltrust' with the algorithm 'fsvrg-naive'"),
        (FLTRUST.replace("trusted.npz", "gone.npz"), "", r"\[trusted\]: .*gone.npz"),
    ],
)
def test_what_cannot_work_is_refused_before_a_broker_is_asked(
    clinic: Clinic, aggregation: str, training: str, told: str
) -> None:
    """No broker runs: whoever asked it first would say so."""
    configure(clinic, 1, aggregation, training)
    path = clinic.folder / "coordinator.toml"
    path.write_text(path.read_text().replace('optimizer = "adam"', 'optimizer = "sgd"'))
    with pytest.raises((ConfigError, DataError), match=told):
        serve(path, print)


def test_a_rule_with_trusted_data_and_asynchronous_rounds_are_refused(clinic: Clinic) -> None:
    configure(clinic, 1, FLTRUST)
    path = clinic.folder / "coordinator.toml"
    path.write_text(path.read_text().replace("goal = 0\nmax_staleness = 0", "goal = 2\nmax_staleness = 3"))
    with pytest.raises(ConfigError, match=r"'fltrust' with round.max_staleness"):
        serve(path, print)
