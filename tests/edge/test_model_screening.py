"""Screening of models on the device: honest ones pass, untrained and over rounds; what reads data is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator.inversion.extraction import layer_on_input
from covey_coordinator.inversion.imprint import Disguise, imprinted
from covey_coordinator.inversion.trap_weights import trapped
from covey_edge import model_screening
from covey_edge.frames import SUSPECTED, Done, Open, Problem, Run
from covey_edge.model_screening import JUMP, suspicions
from covey_edge.runtime import Model
from covey_edge.trainer import Trainer, train
from covey_models import zoo
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import FORMAT_VERSION, Bundle, Manifest, TensorSpec, read_bundle
from covey_protocol.messages import TrainingPlan
from covey_protocol.parameters import ParameterSpec, offsets
from covey_protocol.seals import SealingKey

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def digits() -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return (x[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1), y[order].astype(np.int32)


@pytest.fixture(scope="module")
def bundle(dense_bundle: bytes) -> Bundle:
    return read_bundle(dense_bundle)


@pytest.fixture(scope="module")
def start(bundle: Bundle) -> Array:
    return Model(bundle).parameters()


def manifest_of(keras: Any, num_classes: int) -> tuple[Manifest, Array]:
    """Of a model that is not exported: its parameters as an export names and orders them, moving statistics last."""
    variables = [*keras.trainable_weights, *keras.non_trainable_weights]
    trained = len(keras.trainable_weights)
    specs = tuple(
        ParameterSpec(f"{number}/{one.name}", tuple(one.shape), trainable=number < trained)
        for number, one in enumerate(variables)
    )
    manifest = Manifest(
        format=FORMAT_VERSION,
        name=keras.name,
        model_sha256="",
        model_bytes=0,
        batch_size=16,
        input=TensorSpec(tuple(keras.input_shape[1:]), "float32"),
        label=TensorSpec((), "int32"),
        parameters=specs,
        signatures=(),
        loss="sparse_categorical_crossentropy",
        optimizer="sgd",
        num_classes=num_classes,
    )
    return manifest, np.concatenate([np.ravel(one.numpy()) for one in variables]).astype(np.float32)


SHAPES = {"ds-cnn": (25, 10, 1), "activity-cnn": (32, 6), "transformer": (32, 6)}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_untrained_models_of_the_zoo_pass(name: str) -> None:
    shape = SHAPES.get(name, (28, 28, 1))
    manifest, parameters = manifest_of(zoo.build(name, shape, 10, seed=3), 10)
    assert suspicions(manifest, parameters, np.random.default_rng(0).random((64, *shape), np.float32)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_models_of_the_zoo_pass_over_rounds(name: str, rate: float, digits: tuple[Array, Array]) -> None:
    """Also at a rate at which half of the units of some die. One shard of all digits and one of two classes look."""
    import tensorflow as tf

    x, y = digits
    if name in ("activity-cnn", "transformer"):
        x = x[..., 0]
    keras = zoo.build(name, x.shape[1:], 10, seed=1)
    keras.compile(tf.keras.optimizers.SGD(rate), tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = None
    for _ in range(6):
        manifest, parameters = manifest_of(keras, 10)
        if not np.isfinite(parameters).all():
            return  # this model does not bear the rate
        for own in (x, x[y < 2]):
            assert [str(one) for one in suspicions(manifest, parameters, own, before) if one.grave] == []
        before = parameters
        keras.fit(x, y, batch_size=16, epochs=2, verbose=0)


def a_table(inputs: int, seed: int) -> tuple[Array, Array]:
    """400 examples of two classes that vary in 2, 5 or 8 directions, standardised; or from 0 to 1 where seed is 1."""
    rng = np.random.default_rng([inputs, seed])
    directions = min(inputs, 2 + 3 * seed)
    x = rng.standard_normal((400, directions)) @ rng.standard_normal((directions, inputs))
    x = (x - x.mean(0)) / x.std(0)
    if seed == 1:
        x = (x - x.min(0)) / (x.max(0) - x.min(0))
    return x.astype(np.float32), (x @ rng.standard_normal((inputs, 2))).argmax(1)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [2, 5, 8, 13, 30])
@pytest.mark.parametrize("units", [8, 16, 32, 64])
def test_long_trainings_on_small_tables_pass(inputs: int, units: int) -> None:
    """Here training aligns up to half of the units, as in an imprint, where data vary in few directions."""
    import tensorflow as tf

    for seed, rate in enumerate((0.05, 0.5, 0.3)):
        x, y = a_table(inputs, seed)
        tf.keras.utils.set_random_seed(seed)
        layers = [tf.keras.layers.Dense(units, "relu", input_shape=(inputs,)), tf.keras.layers.Dense(2)]
        keras = tf.keras.Sequential(layers)
        keras.compile(tf.keras.optimizers.SGD(rate), tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        for _ in range(4):
            manifest, parameters = manifest_of(keras, 2)
            assert [str(one) for one in suspicions(manifest, parameters, x) if one.grave] == []
            keras.fit(x, y, batch_size=16, epochs=8, verbose=0)


def test_a_model_in_training_passes_in_every_round_on_devices_of_few_classes_too(
    bundle: Bundle, digits: tuple[Array, Array], start: Array
) -> None:
    model, (x, y) = Model(bundle), digits
    before = None
    for number in range(8):
        parameters = model.parameters()
        for own in (x[:300], x[y < 2][:60]):
            assert suspicions(bundle.manifest, parameters, own, before) == [], number
        before = parameters
        train(model, (x[:600], y[:600]), TrainingPlan(2, 0.3, shuffle_seed=number), "pi")


def fished(parameters: Array, bundle: Bundle, bias: float) -> Array:
    """Class fishing: the logits' weights 0 but for one class, or all the same and only the biases apart."""
    places, hostile = offsets(bundle.manifest.parameters), parameters.copy()
    if bias:
        hostile[places["logits/bias"]] = bias
        hostile[places["logits/bias"]][3] = 0.0
    else:
        kernel = hostile[places["logits/kernel"]].reshape(-1, 10)
        kernel[:, np.arange(10) != 3] = 0.0
    return hostile


def dead(parameters: Array, bundle: Bundle) -> Array:
    """For devices whose updates are only to hide in the sum of one victim's."""
    hostile = parameters.copy()
    hostile[offsets(bundle.manifest.parameters)["dense/bias"]] = -1000.0
    return hostile


Make = Callable[[Bundle, Array, Array], Array]


def imprint(**settings: Any) -> Make:
    return lambda bundle, start, own: imprinted(
        bundle.manifest.parameters, start, own, seed=1, disguise=Disguise(**settings)
    )


def traps(**settings: Any) -> Make:
    return lambda bundle, start, own: trapped(bundle.manifest.parameters, start, own, seed=1, **settings)


def in_unused_inputs(bundle: Bundle, start: Array, own: Array) -> Array:
    """An imprint whose rows differ widely, but only in pixels that are always dark."""
    hostile = imprinted(bundle.manifest.parameters, start, own, seed=1)
    layer, _ = layer_on_input(bundle.manifest.parameters, own[0].size)
    kernel = hostile[layer.kernel_place].reshape(layer.kernel.shape)
    unused = own.reshape(len(own), -1).max(0) == 0
    assert unused.sum() >= 2
    kernel[unused] = np.random.default_rng(0).standard_normal((unused.sum(), kernel.shape[1]))
    return hostile


def in_many_directions(bundle: Bundle, start: Array, own: Array) -> Array:
    """Twelve imprints of ten or eleven units: too few of one kind to be a tenth of the layer."""
    layer, behind = layer_on_input(bundle.manifest.parameters, own[0].size)
    assert behind is not None
    hostile = start.copy()
    for seed in range(12):
        whole, units = imprinted(bundle.manifest.parameters, start, own, seed=seed), slice(seed, None, 12)
        for place, shape in ((layer.kernel_place, layer.kernel.shape), (behind.kernel_place, behind.kernel.shape)):
            to, of = hostile[place].reshape(shape), whole[place].reshape(shape)
            if shape == layer.kernel.shape:
                to[:, units] = of[:, units]
            else:
                to[units] = of[units]
        hostile[layer.bias_place][units] = whole[layer.bias_place][units]
    return hostile


HOSTILE: dict[str, tuple[str, Make]] = {
    "an imprint": ("imprint", imprint()),
    "a sparse imprint": (
        "huge weights",
        lambda bundle, start, own: imprinted(bundle.manifest.parameters, start, own, seed=1, sparse=True),
    ),
    "an imprint with permuted and scaled rows": ("imprint", imprint(permuted=True, scales=3.0)),
    "an imprint with noise on its rows": ("imprint", imprint(noise=0.03)),
    "an imprint with noise that costs it a third": ("imprint", imprint(noise=0.3)),
    "an imprint in a fifth of the units": ("imprint", imprint(share=0.2, permuted=True)),
    "imprints of twelve directions": ("imprint", in_many_directions),
    "an imprint that hides in dark pixels": ("imprint", in_unused_inputs),
    "trap weights": ("trap weights", traps(on=0.05)),
    "trap weights that are no copies": ("trap weights", traps(on=0.05, noise=0.3)),
    "trap weights that are on more often": ("trap weights", traps(on=0.15, noise=0.3)),
    "class fishing by weights": ("one dominating output", lambda bundle, start, own: fished(start, bundle, 0.0)),
    "class fishing by biases": ("one dominating output", lambda bundle, start, own: fished(start, bundle, 1000.0)),
    "a dead layer": ("dead layer", lambda bundle, start, own: dead(start, bundle)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_parameters_are_recognised(
    name: str, bundle: Bundle, start: Array, digits: tuple[Array, Array]
) -> None:
    pattern, make = HOSTILE[name]
    x = digits[0]
    found = suspicions(bundle.manifest, make(bundle, start, x[:800]), x[800:1000])
    assert pattern in [one.pattern for one in found if one.grave], found


def test_without_examples_the_weights_alone_give_the_plain_attacks_away(
    bundle: Bundle, start: Array, digits: tuple[Array, Array]
) -> None:
    x = digits[0][:800]
    for name in ("an imprint", "an imprint with permuted and scaled rows", "trap weights"):
        pattern, make = HOSTILE[name]
        assert pattern in [one.pattern for one in suspicions(bundle.manifest, make(bundle, start, x))], name
    assert suspicions(bundle.manifest, in_unused_inputs(bundle, start, x)) == []


def test_what_gets_through_is_an_imprint_so_noisy_that_it_reads_no_more_than_an_honest_model_gives(
    bundle: Bundle, start: Array, digits: tuple[Array, Array]
) -> None:
    x = digits[0]
    noisy = imprint(noise=1.0)(bundle, start, x[:800])
    assert [one for one in suspicions(bundle.manifest, noisy, x[800:1000]) if one.grave] == []


def test_units_that_training_has_aligned_are_no_imprint(
    bundle: Bundle, digits: tuple[Array, Array], start: Array
) -> None:
    """All of them measure one thing, but at one threshold, so that they tell examples apart no better than one unit."""
    x = digits[0]
    layer, _ = layer_on_input(bundle.manifest.parameters, 64)
    aligned = imprint()(bundle, start, x[:800])
    kernel = aligned[layer.kernel_place].reshape(layer.kernel.shape)
    aligned[layer.bias_place] = -np.median(x[:800].reshape(800, -1) @ kernel, axis=0)
    examples = suspicions(bundle.manifest, aligned, x[800:1000])
    assert "measure the same of your examples" not in " ".join(map(str, examples))


def test_few_directions_in_the_data_make_no_suspicion() -> None:
    """On three numbers that vary as one, all units of an honest layer are alike."""
    rng = np.random.default_rng(0)
    specs = (
        ParameterSpec("a/kernel", (3, 64)), ParameterSpec("a/bias", (64,)),
        ParameterSpec("b/kernel", (64, 2)), ParameterSpec("b/bias", (2,)),
    )  # fmt: skip
    manifest, _ = manifest_of(zoo.build("softmax", (3,), 2), 2)
    manifest = Manifest(
        **{**{name: getattr(manifest, name) for name in manifest.__struct_fields__}, "parameters": specs}
    )
    x = rng.standard_normal((100, 1)) * np.ones((1, 3)) + 1e-3 * rng.standard_normal((100, 3))
    assert suspicions(manifest, rng.standard_normal(3 * 64 + 64 + 130).astype(np.float32), x) == []


def test_another_model_in_the_middle_of_a_run_is_a_warning(bundle: Bundle, start: Array) -> None:
    other = np.concatenate([np.random.default_rng(1).permutation(part) for part in np.split(start, [64 * 128])])
    (found,) = suspicions(bundle.manifest, other, previous=start)
    assert found.pattern == JUMP
    assert not found.grave
    assert suspicions(bundle.manifest, start, previous=start) == []


def test_numbers_that_are_none_are_named(bundle: Bundle, start: Array) -> None:
    broken = start.copy()
    broken[-1] = np.nan
    assert [one.tensor for one in suspicions(bundle.manifest, broken)] == ["logits/bias"]


class Child:
    """A trainer with the dense bundle and forty digits."""

    def __init__(self, folder: Path, bundle: bytes, key: SealingKey, digits: tuple[Array, Array]) -> None:
        (folder / "bundle").write_bytes(bundle)
        np.savez(folder / "data.npz", x=digits[0][:40], y=digits[1][:40])
        self._trainer = Trainer()
        sha256 = blob_ref(bundle).sha256
        opened = Open(str(folder / "bundle"), sha256, key.public.hex(), "npz", str(folder / "data.npz"))
        assert isinstance(self._trainer.answer(opened), Done)

    def run(self, parameters: Array, policy: str, round_id: str = "r.1.a") -> Any:
        data = parameters.astype("<f4").tobytes()
        plan = TrainingPlan(1, 0.1, shuffle_seed=1)
        return self._trainer.answer(Run(round_id, "pi", data, plan, 0.0, 0.0, 1, screen_models=policy))


@pytest.fixture
def child(tmp_path: Path, dense_bundle: bytes, coordinator_key: SealingKey, digits: tuple[Array, Array]) -> Child:
    return Child(tmp_path, dense_bundle, coordinator_key, digits)


def test_the_owners_policy_decides_what_becomes_of_a_hostile_model(
    child: Child, bundle: Bundle, start: Array, digits: tuple[Array, Array]
) -> None:
    hostile = imprint()(bundle, start, digits[0][:800])
    refused = child.run(hostile, "refuse")
    assert isinstance(refused, Problem)
    assert refused.kind == SUSPECTED == model_screening.Suspected.__name__
    assert "imprint in dense/kernel" in refused.what
    assert "screen_models" in refused.remedy
    warned = child.run(hostile, "warn")
    assert isinstance(warned, Done)
    assert any("imprint in dense/kernel" in one for one in warned.warnings)
    silent = child.run(hostile, "off")
    assert isinstance(silent, Done)
    assert silent.warnings == ()
    assert silent.update == warned.update


def test_rounds_are_compared_within_a_run_only(child: Child, start: Array) -> None:
    other = np.concatenate([np.random.default_rng(1).permutation(part) for part in np.split(start, [64 * 128])])
    assert child.run(start, "refuse").warnings == ()
    assert child.run(other, "refuse", "another.1.a").warnings == ()  # it may start anew
    (warning,) = child.run(start, "refuse", "another.2.a").warnings
    assert "jump in dense/kernel" in warning
