"""Looks at a model before it is trained: are these parameters made to read the data rather than to learn from them?

A hostile coordinator cannot change the graph of a sealed bundle that it did not make, but it chooses every number of
every round. This file knows the patterns of the attacks that work by such numbers (docs/malicious-models.md has what
each leaks, what is caught and what gets through), looks for them in the parameters and, where a dense layer sees the
inputs themselves, in what that layer makes of the device's own examples: a disguise can change the numbers, but an
imprint that is to work must still measure one and the same thing in many units, and a trap must still be off.

Bounds leave a wide gap to what ordinary models showed, untrained and over rounds (tests/edge/test_model_screening.py,
benchmarks/malicious.py), and none to layers that strong weight decay has made one unit, or that have mostly died
(benchmarks/screening.py counts such refusals). It does not look at the graph: a bundle whose `train` copies examples
into the update passes. Pin bundles for that (`[policy] bundles`). Pure NumPy, Python 3.9.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import numpy.typing as npt

from covey_edge.frames import Run
from covey_protocol.bundle import Manifest
from covey_protocol.errors import TrainingError
from covey_protocol.messages import run_of
from covey_protocol.parameters import ParameterSpec, offsets

Matrix = npt.NDArray[np.float64]
Generator = np.random.Generator

FEWEST_UNITS = 8  # fewer bins of an imprint, or traps, separate next to nothing
MOST_UNITS, MOST_EXAMPLES = 512, 512  # looked at; drawn where there are more. Bounds time and memory on a small device
# cosine of two units that measure the same; share of a layer's units that are so alike with one of them, or, CROWDED,
# with some others each (an imprint of many directions). k bins need a cosine of 1 - 1/k^2 to keep their order. By
# weights alone only the first is asked: a long training brings the units of small layers to 0.9
ALIKE = ((0.995, 0.1), (0.95, 0.2), (0.9, 0.4), (0.8, 0.5))
CROWDED = ((0.995, 0.5), (0.9, 0.6))
CROWD = 4  # units that are alike with one another
# bins that hold equal shares of the examples are on for shares that spread by 0.29; training aligns units, too, and
# then most are on for the same examples: half of such layers show 0.13 or less
SPREAD = 0.2
LIVE = (0.03, 0.97)  # shares of the examples that switch a unit on. Dying units of honest layers become alike
# training aligns the units of honest layers that see few numbers, or examples that vary in few directions, in which
# random units are alike, too: such layers are not judged by that
FEWEST_INPUTS = 8
TWINS, TWIN_SHARE, TWIN_TIMES = 5, 0.1, 4.0
COPIES = 0.02  # relative spread of the ratios of a unit's positive weights to its negative ones, both sorted
SELDOM = 0.2  # share of the examples that switch a unit on, on average; 0.38 and more unless most units have died
DEAD_SHARE = 0.5  # of the units of a layer that no input within the model's range can switch on
HUGE_UNIT = 100.0  # Euclidean norm of a unit's weights; Glorot's and He's are near 1
DOMINATING = 30.0  # times the median norm of the outputs' weights; or a gap between biases: e^30 to 1 in a softmax
NEW_MODEL = 1.25  # relative change of a layer between rounds of a run. Another start of the same size is 1.4 away
JUMP = "jump"  # honest rounds with high learning rates reach 1.1, and a patient attacker needs none: never refused for


class Suspicion(NamedTuple):
    """One pattern in one tensor. what: a sentence for the device's owner, with the number that was over its bound."""

    pattern: str
    tensor: str
    what: str

    @property
    def grave(self) -> bool:
        """Whether it is enough to refuse the model."""
        return self.pattern != JUMP

    def __str__(self) -> str:
        return f"{self.pattern} in {self.tensor}: {self.what}"


class Suspected(TrainingError):
    """The owner's policy is not to train such a model. Its class name is frames.SUSPECTED."""


class Screen:
    """What the training child asks about every model, and the last one it let pass."""

    def __init__(self) -> None:
        self._run, self._passed = "", np.zeros(0, np.float32)

    def look(
        self, manifest: Manifest, received: npt.NDArray[np.float32], examples: npt.NDArray[Any], request: Run
    ) -> tuple[str, ...]:
        """Warnings for the owner. Suspected where the owner's policy refuses the model.

        Rounds are compared within a run, as long as this process lives: another run may start anew.
        """
        if request.screen_models == "off" or received.shape != (manifest.dimension,):
            return ()  # another length is refused by the model itself
        run = run_of(request.round_id)
        previous = self._passed if run == self._run and self._passed.shape == received.shape else None
        found = suspicions(manifest, received, examples, previous)
        grave = [str(one) for one in found if one.grave]
        if grave and request.screen_models == "refuse":
            raise Suspected(
                f"the model looks made to read this device's data: {'; '.join(grave)}",
                'it was not trained; docs/malicious-models.md, and privacy.screen_models = "warn" in agent.toml',
            )
        self._run, self._passed = run, received
        return tuple(f"the model looks suspicious: {one}" for one in found)


class Layer(NamedTuple):
    """weights: (fan_in, units) of a kernel of any rank, the last axis its units. bias: (units,) where one follows."""

    name: str
    weights: Matrix
    bias: Optional[Matrix]


def suspicions(
    manifest: Manifest,
    parameters: npt.NDArray[Any],
    examples: Optional[npt.NDArray[Any]] = None,
    previous: Optional[npt.NDArray[Any]] = None,
) -> list[Suspicion]:
    """Every pattern of a hostile model in these parameters (d,), in their order; none for honest ones.

    examples: (n, *input shape), the device's own, which never leave it. previous: (d,) of the round before of the same
    run, None for a run's first. Takes about as long as one training step on MOST_EXAMPLES examples.
    """
    wild = _not_finite(manifest.parameters, parameters)
    if wild:
        return wild
    rng = np.random.default_rng(zlib.crc32(parameters.tobytes()))
    layers = list(_layers(manifest.parameters, parameters))
    found: list[Suspicion] = []
    for place, layer in enumerate(layers):
        inner = place + 1 < len(layers)  # the last one's units are the model's outputs
        if inner:
            found += [*_huge(layer), *_alike(layer, None, rng), *_copies(layer)]
            if _sees_inputs(layer, manifest):
                found += [*_dead(layer, manifest), *_on_examples(layer, examples, rng)]
        elif manifest.num_classes is not None and layer.weights.shape[1] == manifest.num_classes > 2:
            found += _dominating(layer)
    if previous is not None:
        found += _jumped(layers, _layers(manifest.parameters, previous))
    return list(dict.fromkeys(found))


def _layers(specs: Sequence[ParameterSpec], flat: npt.NDArray[Any]) -> Iterator[Layer]:
    """One after the other: in float64 a large layer takes twice the memory of its parameters."""
    places = offsets(specs)
    for spec, after in zip(specs, [*specs[1:], None]):
        if not spec.trainable or len(spec.shape) < 2 or not spec.size:
            continue
        weights = flat[places[spec.name]].astype(np.float64).reshape(-1, spec.shape[-1])
        follows = after is not None and after.trainable and after.shape == spec.shape[-1:]
        bias = flat[places[after.name]].astype(np.float64) if after is not None and follows else None
        yield Layer(spec.name, weights, bias)


def _not_finite(specs: Sequence[ParameterSpec], parameters: npt.NDArray[Any]) -> list[Suspicion]:
    return [
        Suspicion("numbers that are none", name, "it holds NaN or infinity")
        for name, place in offsets(specs).items()
        if not np.isfinite(parameters[place]).all()
    ]


def _sees_inputs(layer: Layer, manifest: Manifest) -> bool:
    return bool(layer.weights.shape[0] == int(np.prod(manifest.input.shape)))


# --- imprints: many units that measure one thing


def _alike(layer: Layer, x: Optional[Matrix], rng: Generator) -> list[Suspicion]:
    """x: (n, fan_in) examples: then live units are compared by what they make of these, else by their weights."""
    fan_in, units = layer.weights.shape
    places = _drawn(units, MOST_UNITS, rng)
    weights = layer.weights[:, places]
    if x is None:
        told = "have the same weights, up to a factor"
        seen = weights[:, np.count_nonzero(weights, axis=0) >= FEWEST_INPUTS]  # few left by pruning are often alike
        on = None
    else:
        told = "measure the same of your examples"
        on = _on(x, layer)[places]
        live = (on > LIVE[0]) & (on < LIVE[1])
        x = x - x.mean(0)
        seen, on = (x @ weights)[:, live], on[live]
    if seen.shape[1] < FEWEST_UNITS or fan_in < FEWEST_INPUTS:
        return []
    ours = _cosines(seen)
    others: list[Matrix] = []  # made where they are needed: they cost more than all the rest
    rules = [(cosine, share, _largest_group) for cosine, share in (ALIKE if on is not None else ALIKE[:1])]
    rules += [(cosine, share, _crowd) for cosine, share in CROWDED if on is not None]
    for cosine, share, counted in rules:
        count = counted(ours > cosine)
        if count < max(FEWEST_UNITS, share * weights.shape[1]):
            continue
        others = others or [_cosines(one if x is None else x @ one) for one in _twins(weights, rng)]
        twin = max(counted(one > cosine) for one in others)
        if count < TWIN_TIMES * twin or twin > max(1, TWIN_SHARE * weights.shape[1]):
            continue
        if on is None or _spread(seen, on, ours > cosine) >= SPREAD:
            text = f"{count} of {weights.shape[1]} units {told} (cosine {cosine}; of random units {twin} would)"
            return [Suspicion("imprint", layer.name, text)]
    return []


def _twins(weights: Matrix, rng: Generator) -> list[Matrix]:
    """Layers of the same shape at random."""
    return [rng.standard_normal(weights.shape) for _ in range(TWINS)]


def _cosines(columns: Matrix) -> Matrix:
    """(units, units): without signs, as a unit and its negative measure the same; 0 for columns of zeros."""
    unit = columns / np.maximum(_lengths(columns), 1e-300)
    return np.asarray(np.abs(unit.T @ unit))


def _largest_group(alike: npt.NDArray[np.bool_]) -> int:
    """How many units are alike with one of them, at most over all of them."""
    return int(np.max(np.sum(alike, axis=0), initial=0))


def _crowd(alike: npt.NDArray[np.bool_]) -> int:
    """How many units have some others that are alike."""
    return int(np.sum(np.sum(alike, axis=0) >= CROWD))


def _spread(seen: Matrix, on: Matrix, alike: npt.NDArray[np.bool_]) -> float:
    """Standard deviation, over the largest group, of the shares of the examples that switch its units on.

    seen: (n, units), what the units make of the examples; on: (units,). A unit that measures the negative is on where
    others are off.
    """
    one = int(np.argmax(np.sum(alike, axis=0)))
    group = alike[one]
    same = seen[:, group].T @ seen[:, one] > 0
    return float(np.std(np.where(same, on[group], 1.0 - on[group])))


def _on(x: Matrix, layer: Layer) -> Matrix:
    """(units,): the share of the examples that switch each on, were it a ReLU."""
    bias = 0.0 if layer.bias is None else layer.bias
    return np.asarray(np.mean(x @ layer.weights + bias > 0, axis=0))


# --- traps: units that are off


def _copies(layer: Layer) -> list[Suspicion]:
    fan_in, units = layer.weights.shape
    if units < FEWEST_UNITS or fan_in < 16:
        return []
    halved = np.sum(layer.weights > 0, axis=0) == np.sum(layer.weights < 0, axis=0)  # few units of an honest layer
    copied = sum(_is_copy(column) for column in layer.weights.T[halved])
    if copied < max(FEWEST_UNITS, units / 2):
        return []
    return [Suspicion("trap weights", layer.name, f"in {copied} of {units} units one half is the other's negative")]


def _is_copy(column: Matrix) -> bool:
    positive, negative = np.sort(column[column > 0]), np.sort(-column[column < 0])
    if len(positive) < FEWEST_UNITS:
        return False
    ratios = positive / negative
    return bool(np.std(ratios) < COPIES * np.mean(ratios))


def _dead(layer: Layer, manifest: Manifest) -> list[Suspicion]:
    low, high = manifest.input.minimum, manifest.input.maximum
    if layer.bias is None or low is None or high is None:
        return []
    most = np.maximum(layer.weights * low, layer.weights * high).sum(0) + layer.bias
    dead = int(np.sum(most < 0))
    if dead < max(FEWEST_UNITS, DEAD_SHARE * len(most)):
        return []
    return [Suspicion("dead layer", layer.name, f"no input can switch on {dead} of {len(most)} units")]


def _on_examples(layer: Layer, examples: Optional[npt.NDArray[Any]], rng: Generator) -> list[Suspicion]:
    if examples is None or len(examples) < FEWEST_UNITS or examples.dtype == np.int32:  # these are names of things
        return []
    x = examples.reshape(len(examples), -1)[_drawn(len(examples), MOST_EXAMPLES, rng)].astype(np.float64)
    found = _alike(layer, x, rng)
    on = float(np.mean(_on(x, layer)))
    # where examples have much in common a unit is on for most or for none of them, and few units may be off by chance
    by_chance = 0.5 - 3 * 0.5 / math.sqrt(layer.weights.shape[1])
    if on < min(SELDOM, by_chance):
        told = (
            f"one of your examples switches on {on:.1%} of its units; in good health honest layers show 38 % and more"
        )
        found.append(Suspicion("trap weights", layer.name, told))
    return found


# --- sizes


def _huge(layer: Layer) -> list[Suspicion]:
    norm = float(np.median(_lengths(layer.weights)))
    if norm <= HUGE_UNIT:
        return []
    return [Suspicion("huge weights", layer.name, f"half of its units have weights of norm {norm:.3g} or more")]


def _dominating(layer: Layer) -> list[Suspicion]:
    """Class and feature fishing (Wen et al. 2022, arXiv:2202.00580): one output alone lets a gradient through."""
    norms = _lengths(layer.weights)
    ratio = norms.max() / max(float(np.median(norms)), 1e-300) if norms.max() > 0 else 0.0
    if ratio > DOMINATING:
        told = f"the weights of output {int(norms.argmax())} are {min(ratio, 1e9):.3g} times as long as the others'"
        return [Suspicion("one dominating output", layer.name, told)]
    if layer.bias is not None:
        gaps = np.abs(layer.bias - np.median(layer.bias))
        if gaps.max() > DOMINATING:
            told = f"the bias of output {int(gaps.argmax())} is {gaps.max():.3g} away from the others'"
            return [Suspicion("one dominating output", layer.name, told)]
    return []


def _jumped(layers: Sequence[Layer], before: Iterator[Layer]) -> list[Suspicion]:
    """Of the layers but the last, which starts small and soon is several times as long."""
    found = []
    for layer, old in zip(layers[:-1], before):
        size = _length(old.weights)
        old.weights[...] -= layer.weights
        change = _length(old.weights) / size if size else 0.0
        if change > NEW_MODEL:
            told = f"it is {change:.2f} times its own length away from the round before: another model"
            found.append(Suspicion(JUMP, layer.name, told))
    return found


def _length(values: Matrix) -> float:
    """Without the copy that numpy's norm makes of what it squares; so is that of every column."""
    return float(_lengths(values.reshape(-1, 1))[0])


def _lengths(columns: Matrix) -> Matrix:
    return np.asarray(np.sqrt(np.einsum("ij,ij->j", columns, columns)))


def _drawn(count: int, most: int, rng: Generator) -> Any:
    return slice(None) if count <= most else np.sort(rng.choice(count, most, replace=False))
