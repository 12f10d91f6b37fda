"""What `train` takes beside a batch, on the device: neutral when off, exact against NumPy when on, never left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import handmade_bundles as handmade
import msgspec
import numpy as np
import pytest

from covey_edge.frames import Done, Open, Problem, Run
from covey_edge.runtime import NO_CLIPPING, Model
from covey_edge.trainer import Trainer, step_seed, train
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import read_bundle, write_bundle
from covey_protocol.errors import BundleError, TrainingError
from covey_protocol.messages import TrainingPlan
from covey_protocol.parameters import offsets
from covey_protocol.seals import SealingKey

Array = np.ndarray[Any, Any]
PLACES = offsets(handmade.SPECS)
RATE = 0.01
PLAN = TrainingPlan(epochs=1, learning_rate=RATE, shuffle_seed=7)


@pytest.fixture(scope="module")
def linear(coordinator_key: SealingKey) -> bytes:
    return handmade.linear_bundle(coordinator_key)


@pytest.fixture
def model(linear: bytes) -> Model:
    return Model(read_bundle(linear))


@pytest.fixture(scope="module")
def examples() -> tuple[Array, Array]:
    """Ten examples: two batches of four and a half-full one."""
    random = np.random.default_rng(3)
    return random.integers(0, 6, (10, handmade.INPUTS), np.uint8), random.standard_normal((10, 3)).astype(np.float32)


def kernel_of(parameters: Array) -> Array:
    return parameters[PLACES["linear/kernel"]].reshape(handmade.INPUTS, handmade.OUTPUTS)


def gradient_of(kernel: Array, x: Array, y: Array) -> Array:
    wide = x.astype(np.float64)
    return wide.T @ (wide @ kernel - y) / len(x)


def reference(plan: TrainingPlan, x: Array, y: Array, correction: Array | float = 0.0) -> Array:
    """The kernel after `plan` on one device whose examples fit one batch, in float64: momentum, FedProx, clipping."""
    start = handmade.start_kernel().astype(np.float64)
    kernel, velocity = start.copy(), np.zeros_like(start)
    for _ in range(plan.epochs):
        step = gradient_of(kernel, x, y)
        if plan.gradient_clip_norm:
            step *= min(1.0, plan.gradient_clip_norm / np.linalg.norm(step))
        step += correction + plan.proximal_weight * (kernel - start)
        velocity = handmade.MOMENTUM * velocity + step
        kernel -= plan.learning_rate * velocity
    return kernel


PLANS = {
    "plain": {},
    "clipped": {"gradient_clip_norm": 2.0},
    "FedProx": {"proximal_weight": 8.0},
    "both": {"gradient_clip_norm": 2.0, "proximal_weight": 8.0},
}


@pytest.mark.parametrize("what", PLANS)
def test_a_plan_is_followed_to_float32(what: str, model: Model, examples: tuple[Array, Array]) -> None:
    plan = msgspec.structs.replace(PLAN, epochs=5, **PLANS[what])
    x, y = (array[:4] for array in examples)
    train(model, (x, y), plan, "pi")
    np.testing.assert_allclose(kernel_of(model.parameters()), reference(plan, x, y), atol=1e-6)


def test_the_plans_differ_enough_for_the_test_above(examples: tuple[Array, Array]) -> None:
    plans = [msgspec.structs.replace(PLAN, epochs=5, **changes) for changes in PLANS.values()]
    ends = [reference(plan, *(array[:4] for array in examples)) for plan in plans]
    for index, one in enumerate(ends):
        assert all(np.abs(one - other).max() > 1e-3 for other in ends[:index])


def test_a_correction_is_added_to_every_steps_gradient(model: Model, examples: tuple[Array, Array]) -> None:
    x, y = (array[:4] for array in examples)
    correction = np.zeros(model.manifest.dimension, np.float32)
    correction[PLACES["linear/kernel"]] = np.linspace(-1, 1, 12)
    start = model.parameters()
    model.start_training(PLAN, correction)
    for _ in range(3):
        model.train_batch(x, y, RATE)
    expected = reference(msgspec.structs.replace(PLAN, epochs=3), x, y, kernel_of(correction))
    np.testing.assert_allclose(kernel_of(model.parameters()), expected, atol=1e-6)
    model.set_parameters(start)
    model.start_training(PLAN)  # the next round has none
    model.train_batch(x, y, RATE)
    np.testing.assert_allclose(kernel_of(model.parameters()), reference(PLAN, x, y), atol=1e-6)


def test_clipping_off_reaches_the_bundle_as_a_norm_nothing_exceeds(model: Model, examples: tuple[Array, Array]) -> None:
    train(model, examples, PLAN, "pi")
    assert model.parameters()[PLACES["given/clip_norm"]] == np.float32(NO_CLIPPING) * handmade.CLIP_UNIT
    train(model, examples, msgspec.structs.replace(PLAN, gradient_clip_norm=0.5), "pi")
    assert model.parameters()[PLACES["given/clip_norm"]] == 0.5 * handmade.CLIP_UNIT


def test_every_step_draws_from_its_own_seed_and_so_does_every_device(
    model: Model, examples: tuple[Array, Array]
) -> None:
    plan = msgspec.structs.replace(PLAN, epochs=2)  # of three batches
    drawn = {}
    for device_id in ("pi", "porch"):
        train(model, examples, plan, device_id)
        drawn[device_id] = model.parameters()[PLACES["given/seeds"]][-6:].tolist()
        expected = [step_seed(7, device_id, step) % handmade.SEED_UNIT for step in range(6)]
        assert drawn[device_id] == expected
    train(model, examples, msgspec.structs.replace(plan, shuffle_seed=8), "pi")
    drawn["another round"] = model.parameters()[PLACES["given/seeds"]][-6:].tolist()
    assert len({seed for seeds in drawn.values() for seed in seeds}) == 18


def test_a_steps_seed_is_the_documented_one() -> None:
    """docs/protocol.md promises this number to whoever repeats a run."""
    assert step_seed(42, "kitchen-pi", 0) == 1135462192
    assert all(0 <= step_seed(2**53, "pi", step) < 2**31 for step in range(200))


def test_the_optimizers_state_does_not_outlive_a_round(model: Model, examples: tuple[Array, Array]) -> None:
    start = model.parameters()
    train(model, examples, PLAN, "pi")
    first = kernel_of(model.parameters()).copy()
    model.set_parameters(start)
    train(model, examples, PLAN, "pi")
    np.testing.assert_array_equal(kernel_of(model.parameters()), first)
    model.set_parameters(start)
    model.train_batch(*(array[:4] for array in examples), RATE)  # without a new round the velocity pushes on
    moved = kernel_of(model.parameters()) - kernel_of(start)
    plain = -RATE * gradient_of(kernel_of(start), *(array[:4] for array in examples))
    assert np.abs(moved - plain).max() > 1e-4


def test_the_gradient_is_the_mean_over_all_examples_and_changes_nothing(
    model: Model, examples: tuple[Array, Array]
) -> None:
    before = model.parameters()
    x, y = examples
    gradient = model.gradient(x, y)
    expected = gradient_of(kernel_of(before).astype(np.float64), x, y)
    np.testing.assert_allclose(kernel_of(gradient), expected, rtol=1e-5)
    np.testing.assert_array_equal(model.parameters(), before)


def test_each_batch_of_a_gradient_draws_from_the_next_seed(model: Model, examples: tuple[Array, Array]) -> None:
    rest = model.gradient(*examples, seed=10)[PLACES["given/seeds"]]
    np.testing.assert_allclose(rest, (4 * 10 + 4 * 11 + 2 * 12) / 10)


def bundle_of(linear: bytes, key: SealingKey | None = None, **changes: Any) -> bytes:
    """The same model under another manifest."""
    return write_bundle(handmade.manifest(**changes), read_bundle(linear).model, key)


REFUSED_PLANS = {
    "gradient clipping": ({"gradient_clip_norm": 0.5}, r"gradient_clip_norm = 0.5\).*--clip"),
    "FedProx": ({"proximal_weight": 0.1}, r"proximal_weight = 0.1\).*--proximal"),
}


@pytest.mark.parametrize("what", REFUSED_PLANS)
def test_a_plan_the_bundle_cannot_follow_is_refused_with_the_remedy(what: str, digits_bundle: bytes) -> None:
    changes, words = REFUSED_PLANS[what]
    with pytest.raises(TrainingError, match=words):
        Model(read_bundle(digits_bundle)).start_training(msgspec.structs.replace(PLAN, **changes))


def test_a_correction_the_bundle_cannot_add_is_refused(digits_bundle: bytes) -> None:
    model = Model(read_bundle(digits_bundle))
    with pytest.raises(TrainingError, match="cannot add a correction"):
        model.start_training(PLAN, np.zeros(model.manifest.dimension, np.float32))


WRONG_MANIFESTS = {
    "an input the model has and the manifest does not name": {"train_inputs": ("seed", "proximal", "correction")},
    "another batch size": {"batch_size": 8},
    "another number of parameters": {"parameters": handmade.SPECS[:3]},
    "an entry point the model lacks": {"signatures": (*handmade.manifest().signatures, "grow")},
}


@pytest.mark.parametrize("what", WRONG_MANIFESTS)
def test_a_model_that_is_not_what_its_manifest_says_is_a_bundle_error(
    what: str, linear: bytes, examples: tuple[Array, Array]
) -> None:
    with pytest.raises(BundleError, match="'linear'"):
        train(Model(read_bundle(bundle_of(linear, **WRONG_MANIFESTS[what]))), examples, PLAN, "pi")


# --- through the training child's door: data, and noise on moving statistics


@pytest.fixture
def device(tmp_path: Path, linear: bytes, examples: tuple[Array, Array]) -> Path:
    x, y = examples
    np.savez(tmp_path / "data.npz", x=x.astype(np.float64), y=y)
    (tmp_path / "bundle").write_bytes(linear)
    return tmp_path


def opened(folder: Path, key: SealingKey) -> tuple[Trainer, Done | Problem]:
    bundle = folder / "bundle"
    sha256 = blob_ref(bundle.read_bytes()).sha256
    trainer = Trainer()
    return trainer, trainer.answer(Open(str(bundle), sha256, key.public.hex(), "npz", str(folder / "data.npz")))


def run_request(linear: bytes, **changes: Any) -> Run:
    received = Model(read_bundle(linear)).parameters().astype("<f4").tobytes()
    values: dict[str, Any] = {"clip_norm": 0.0, "noise_multiplier": 0.0, "min_examples": 1}
    return Run("r.1", "pi", received, PLAN, **{**values, **changes})


def test_whole_numbers_in_any_dtype_train_a_uint8_model_with_vectors_as_labels(
    device: Path, linear: bytes, coordinator_key: SealingKey
) -> None:
    trainer, answer = opened(device, coordinator_key)
    assert isinstance(answer, Done), answer
    done = trainer.answer(run_request(linear))
    assert isinstance(done, Done), done
    assert done.num_examples == 10
    assert np.abs(np.frombuffer(done.update, "<f4")[:12]).min() > 0


BAD_VALUES = {"256": "above 255", "-1": "below 0", "1.5": "whole numbers"}


@pytest.mark.parametrize("value", BAD_VALUES)
def test_what_does_not_fit_the_models_integers_is_refused_and_never_wraps(
    value: str, device: Path, coordinator_key: SealingKey, examples: tuple[Array, Array]
) -> None:
    x = examples[0].astype(np.float64)
    x[7, 2] = float(value)
    np.savez(device / "data.npz", x=x, y=examples[1])
    _, problem = opened(device, coordinator_key)
    assert isinstance(problem, Problem)
    assert problem.kind == "DataError"
    assert BAD_VALUES[value] in problem.what
    assert "first in row 7" in problem.what


def test_moving_statistics_are_never_noised_unasked(device: Path, linear: bytes, coordinator_key: SealingKey) -> None:
    trainer, _ = opened(device, coordinator_key)
    problem = trainer.answer(run_request(linear, clip_norm=1.0, noise_multiplier=0.5))
    assert isinstance(problem, Problem)
    assert problem.kind == "TrainingError"
    assert "moving statistics (norm/moving_variance" in problem.what
    for remedy in ("GroupNormalization", "--moving-statistics local", "noise_moving_statistics = true"):
        assert remedy in problem.remedy
    assert isinstance(trainer.answer(run_request(linear, clip_norm=1.0)), Done)  # clipping alone needs no permission


def test_asked_to_the_device_noises_them_too_and_leaves_no_variance_below_zero(
    device: Path, linear: bytes, coordinator_key: SealingKey
) -> None:
    trainer, _ = opened(device, coordinator_key)
    received = Model(read_bundle(linear)).parameters()
    place, clamped, noised = PLACES["norm/moving_variance"], 0, 0
    for _ in range(20):
        done = trainer.answer(run_request(linear, clip_norm=1.0, noise_multiplier=1.0, noise_moving_statistics=True))
        assert isinstance(done, Done), done
        update = np.frombuffer(done.update, "<f4")
        variances = received[place] + update[place]
        assert (variances >= 0).all()
        clamped += int((variances == 0).sum())
        noised += int((update[place] > 0).sum())
    # noise of deviation 1 around a variance of 0.25: P(below 0) = 0.40, P(above 0.25) = 0.5, of 80 draws each
    assert 15 < clamped < 50
    assert 20 < noised < 60
