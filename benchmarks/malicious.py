"""What a malicious coordinator reads, what a device's screening stops of it, and what updates tell of their makers.

Parts: imprint (share of examples recovered over bins and batch), traps, screening (what disguises leak and whether they
are refused), linkability and properties (fleets of devices with the real training code and runtime, alike and not,
with clipping and noise). docs/malicious-models.md and docs/linkability.md hold a run's tables.

Run: COVEY_DATA=FOLDER python benchmarks/malicious.py [PART ...] [--data mnist|digits] [--seeds N] [--pictures FOLDER]
With a data folder that holds no mnist.npz, --data digits (needs none).
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from covey_coordinator.inversion.bundle_model import BundleModel
from covey_coordinator.inversion.contract import Seen
from covey_coordinator.inversion.extraction import recovered_share
from covey_coordinator.inversion.grading import auc
from covey_coordinator.inversion.imprint import Disguise, Imprint, imprinted
from covey_coordinator.inversion.linkability import linkability, picture
from covey_coordinator.inversion.properties import Auxiliary, PropertyInference, trained
from covey_coordinator.inversion.trap_weights import UnitReading, trapped
from covey_edge.model_screening import suspicions
from covey_edge.runtime import Model
from covey_models import export, zoo
from covey_models._tensorflow import import_tensorflow
from covey_models.datasets import Dataset, load
from covey_models.partitions import dirichlet, iid
from covey_protocol.bundle import Bundle, read_bundle
from covey_protocol.messages import TrainingPlan
from covey_protocol.privacy import add_gaussian_noise, clip

Array = np.ndarray[Any, Any]
LEAST_DB = 30.0
DISGUISES = {
    "none": Disguise(),
    "rows permuted": Disguise(permuted=True),
    "rows scaled, up to 4 times": Disguise(permuted=True, scales=3.0),
    "noise 0.03": Disguise(noise=0.03),
    "noise 0.1": Disguise(noise=0.1),
    "noise 0.3": Disguise(noise=0.3),
    "noise 1": Disguise(noise=1.0),
    "half of the units": Disguise(permuted=True, share=0.5),
    "a seventh of the units": Disguise(permuted=True, share=0.15),
    "a twelfth of the units": Disguise(permuted=True, share=0.08),
}


def dense_bundle(data: Dataset, units: int, batch: int) -> Bundle:
    """A first layer of so many ReLUs on the inputs, and logits."""
    tf = import_tensorflow()
    start = tf.keras.initializers.GlorotUniform
    layers = [
        tf.keras.layers.Flatten(input_shape=data.input_shape, name="flat"),
        tf.keras.layers.Dense(units, "relu", kernel_initializer=start(1), name="dense"),
        tf.keras.layers.Dense(data.num_classes, kernel_initializer=start(2), name="logits"),
    ]
    model = tf.keras.Sequential(layers)
    return read_bundle(export(model, name="dense", batch_size=batch, input_range=data.input_range))


class Victim(NamedTuple):
    """A device of one batch and the bundle it trains."""

    data: Dataset
    bundle: Bundle
    device: Model
    model: BundleModel
    start: Array

    @classmethod
    def of(cls, data: Dataset, units: int, batch: int) -> Victim:
        bundle = dense_bundle(data, units, batch)
        device = Model(bundle)
        return cls(data, bundle, device, BundleModel(bundle), device.parameters())

    def drawn(self, seed: int, count: int) -> tuple[Array, Array, Array]:
        """(the attacker's own examples, the device's x and y)"""
        order = np.random.default_rng(seed).permutation(len(self.data))
        own = self.data.take(order[2 * count : 2 * count + 2000])
        its = self.data.take(order[:count])
        return own.x, its.x, its.y

    def share(self, parameters: Array, x: Array, y: Array, attack: Any) -> float:
        """Of the batch, that came out of one step on it."""
        plan = TrainingPlan(1, 0.1, shuffle_seed=1)
        update = trained(self.device, parameters, (x, y), plan, "pi")
        finding = attack.run(self.model, Seen(parameters, update, plan, len(x)), seed=0)
        return recovered_share(x, finding.inputs, self.data.input_range, LEAST_DB)


def imprint(data: Dataset, seeds: int) -> None:
    print("\nImprint and trap weights: share of a batch recovered at 30 dB from one TFLite step, mean (least to most)")
    print("bins or units | batch | imprint | (1 - 1/k)^(B-1) | trap weights | honest start")
    for units in (32, 128, 512):
        for batch in (8, 32, 128):
            victim = Victim.of(data, units, batch)
            specs = victim.bundle.manifest.parameters
            shares = []
            for seed in range(seeds):
                own, x, y = victim.drawn(seed, batch)
                hostile = imprinted(specs, victim.start, own, seed=seed)
                traps = trapped(specs, victim.start, own, seed=seed, on=1 / batch)
                pairs = ((hostile, Imprint()), (traps, UnitReading()), (victim.start, UnitReading()))
                shares.append([victim.share(parameters, x, y, attack) for parameters, attack in pairs])
            theory = (1 - 1 / units) ** (batch - 1)
            found = [f"{np.mean(one):.2f} ({np.min(one):.2f} to {np.max(one):.2f})" for one in np.transpose(shares)]
            print(f"{units} | {batch} | {found[0]} | {theory:.2f} | {found[1]} | {found[2]}", flush=True)


def screening(data: Dataset, seeds: int) -> None:
    units, batch = 128, 32
    victim = Victim.of(data, units, batch)
    specs, manifest = victim.bundle.manifest.parameters, victim.bundle.manifest
    print(f"\nScreening: {units} units, batch {batch}, {seeds} seeds, 300 examples on the device")
    print("parameters | recovered at 20 dB or better | refused | patterns")
    cases: dict[str, Any] = {"honest start": (lambda own, seed: victim.start, UnitReading())}
    for name, disguise in DISGUISES.items():

        def make(own: Array, seed: int, disguise: Disguise = disguise) -> Array:
            return imprinted(specs, victim.start, own, seed=seed, disguise=disguise)

        cases[f"imprint, disguise: {name}"] = (make, Imprint())
    for on in (0.03, 0.1, 0.2, 0.25):
        for noise in (0.0, 0.3):

            def trap(own: Array, seed: int, on: float = on, noise: float = noise) -> Array:
                return trapped(specs, victim.start, own, seed=seed, on=on, noise=noise)

            cases[f"traps, {on:.0%} on, noise {noise:g}"] = (trap, UnitReading())
    for name, (make_parameters, attack) in cases.items():
        shares, refused, patterns = [], 0, set()
        for seed in range(seeds):
            own, x, y = victim.drawn(seed, 300)
            parameters = make_parameters(own, seed)
            shares.append(victim.share(parameters, x[:batch], y[:batch], attack))
            found = [one for one in suspicions(manifest, parameters, x) if one.grave]
            refused += bool(found)
            patterns |= {one.pattern for one in found}
        told = ", ".join(sorted(patterns)) or "none"
        print(f"{name} | {np.mean(shares):.2f} | {refused} of {seeds} | {told}", flush=True)


# --- fleets

DEVICES, ROUNDS, EXAMPLES = 10, 6, 60
PROTECTIONS = ((0.0, 0.0), (0.5, 0.0), (0.5, 0.01), (0.5, 0.03), (0.5, 0.1), (0.5, 1.0))


def fleet_model(data: Dataset) -> Model:
    keras = zoo.build("mlp", data.input_shape, data.num_classes, seed=0)
    return Model(read_bundle(export(keras, name="mlp", batch_size=16, input_range=data.input_range)))


def protected(update: Array, clip_norm: float, noise: float, rng: np.random.Generator) -> Array:
    if not clip_norm:
        return update
    clipped = clip(update, clip_norm)
    return add_gaussian_noise(clipped, clip_norm, noise, rng) if noise else clipped


def rounds_of(model: Model, shards: list[Any], noise: tuple[float, float], fresh: bool, seed: int) -> Any:
    """(rows, ids, numbers) of a fleet's rounds, FedAvg. fresh: whether devices meet new examples every round."""
    parameters, rng = model.parameters(), np.random.default_rng(seed)
    rows, ids, numbers = [], [], []
    for number in range(ROUNDS):
        plan = TrainingPlan(1, 0.1, shuffle_seed=100 * seed + number)
        updates = []
        for name, (x, y) in enumerate(shards):
            part = np.array_split(np.arange(len(x)), ROUNDS)[number] if fresh else np.arange(len(x))[:EXAMPLES]
            update = trained(model, parameters, (x[part], y[part]), plan, f"device-{name}")
            updates.append(protected(update, *noise, rng))
            ids.append(f"device-{name}")
            numbers.append(number)
        rows += updates
        parameters = parameters + np.mean(updates, axis=0).astype(np.float32)
    return np.stack(rows), ids, numbers


def linking(data: Dataset, seeds: int, pictures: Path | None) -> None:
    model = fleet_model(data)
    start = model.parameters()
    print(f"\nLinkability: {DEVICES} devices, {ROUNDS} rounds, one pass over {EXAMPLES} examples, mlp, {seeds} seeds")
    print("data | examples | clip norm, noise multiplier | AUC | named rightly | chance")
    for kind in ("IID", "Dirichlet 0.3"):
        for fresh in (False, True):
            for noise in PROTECTIONS:
                found = []
                for seed in range(seeds):
                    few = data.take(np.random.default_rng(seed).permutation(len(data))[: DEVICES * EXAMPLES * ROUNDS])
                    least = ROUNDS * 4
                    parts = iid(few.y, DEVICES, seed) if kind == "IID" else dirichlet(few.y, DEVICES, 0.3, seed, least)
                    rng = np.random.default_rng(seed)
                    shards = [(few.x[part], few.y[part]) for part in (rng.permutation(one) for one in parts)]
                    model.set_parameters(start)
                    rows, ids, numbers = rounds_of(model, shards, noise, fresh, seed)
                    found.append(linkability(rows, ids, numbers))
                if pictures is not None and noise in (PROTECTIONS[0], PROTECTIONS[-1]):
                    name = f"linkability-{kind[:3].lower()}-{'fresh' if fresh else 'same'}-{noise[1]:g}.png"
                    told = f"{kind}, {'new' if fresh else 'the same'} examples, noise {noise[1]:g}"
                    (pictures / name).write_bytes(picture(found[0], ids, told))
                numbers_found = [[one.auc, one.identified, one.chance] for one in found]
                area, named, chance = np.mean(numbers_found, axis=0)
                what = "new each round" if fresh else "the same"
                print(
                    f"{kind} | {what} | {noise[0]:g}, {noise[1]:g} | {area:.2f} | {named:.2f} | {chance:.2f}",
                    flush=True,
                )


def marked(examples: tuple[Array, Array], low: float, high: float) -> tuple[Array, Array]:
    """The planted property: a corner of 2x2 in the brightest value, as of a burnt-in caption or a scratched lens."""
    x = examples[0].copy()
    x[:, :2, :2] = high
    return x, examples[1]


def properties(data: Dataset, seeds: int) -> None:
    model = fleet_model(data)
    start = model.parameters()
    print(f"\nProperties: a bright corner in a share of {EXAMPLES} examples; {seeds} seeds, 20 + 20 updates each")
    print("share with it | clip norm, noise multiplier | AUC, made for it | AUC, not adapted")
    for share in (1.0, 0.25, 0.1):
        for noise in PROTECTIONS:
            aucs = []
            for seed in range(seeds):
                order = np.random.default_rng(seed).permutation(len(data))
                half = len(data) // 2
                own, others = data.take(order[:half][:2000]), data.take(order[half:])
                auxiliary = Auxiliary(marked((own.x, own.y), *data.input_range), (own.x, own.y))
                plan = TrainingPlan(1, 0.1, shuffle_seed=seed)
                row = []
                for used in (noise, (0.0, 0.0)):
                    attack = PropertyInference(EXAMPLES, share, 60, *used)
                    classifier = attack.fit(model, start, plan, auxiliary, seed=seed)
                    rng = np.random.default_rng([seed, 1])
                    scores: dict[bool, list[Any]] = {True: [], False: []}
                    for number in range(40):
                        places = rng.choice(len(others), EXAMPLES, replace=False)
                        x, y = others.x[places].copy(), others.y[places]
                        has = number % 2 == 0
                        if has:
                            count = round(share * EXAMPLES)
                            x[:count], _ = marked((x[:count], y[:count]), *data.input_range)
                        update = trained(model, start, (x, y), plan, f"device-{number}")
                        scores[has].append(protected(update, *noise, rng))
                    row.append(auc(classifier.scores(scores[True]), classifier.scores(scores[False])))
                aucs.append(row)
            adapted, plain = np.mean(aucs, axis=0)
            print(f"{share:g} | {noise[0]:g}, {noise[1]:g} | {adapted:.2f} | {plain:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="imprint, screening, linkability, properties; all if none is named")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pictures", type=Path)
    given = parser.parse_args()
    parts = {
        "imprint": lambda data: imprint(data, given.seeds),
        "screening": lambda data: screening(data, given.seeds),
        "linkability": lambda data: linking(data, given.seeds, given.pictures),
        "properties": lambda data: properties(data, given.seeds),
    }
    data = load(given.data)
    if given.pictures is not None:
        given.pictures.mkdir(parents=True, exist_ok=True)
    for name in given.parts or parts:
        if name not in parts:
            parser.error(f"there is no part {name!r}")
        started = time.monotonic()
        parts[name](data)
        print(f"({name}: {time.monotonic() - started:.0f} s, {given.data}, seeds 0 to {given.seeds - 1})", flush=True)


if __name__ == "__main__":
    main()
