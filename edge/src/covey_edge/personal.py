"""The personal model: fine-tuning a federated model on this device's data, and scoring models on its held-out data.

Runs in a child process of its own, beside the one that trains for rounds, whose model keeps what it remembers (moving
statistics that stay on the device). Nothing made here leaves the device. What is decided by the scores is
`model_rules`'.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import numpy as np

from covey_edge.data_sources import Examples
from covey_edge.examples import prepared
from covey_edge.frames import Personalise, Personalised, Tune
from covey_edge.model_rules import Score
from covey_edge.opening import opened
from covey_edge.reading import Reading
from covey_edge.runtime import Floats, Model
from covey_edge.trainer import train
from covey_protocol.bundle import Manifest
from covey_protocol.errors import BundleError, DataError, TrainingError
from covey_protocol.parameters import offsets
from covey_protocol.seals import PublicKey

GROUPS = 30  # of held-out examples: enough for a standard error, and each costs at least one batch


def personalised(request: Personalise) -> Personalised:
    """Raises DataError, BundleError, TrainingError."""
    keys = [PublicKey.from_hex(text) for text in request.sealed_by]
    model = Model(opened(_read(request.bundle_path, request.bundle_sha256), keys), request.threads)
    first = np.frombuffer(_read(*request.parameters[0]), "<f4").astype(np.float32)
    every = [first, *(_or_nothing(model, *one) for one in request.parameters[1:])]
    made = fine_tuned(model, first, request.tune) if request.tune is not None else None
    if made is not None:
        every.append(made)
    counts: tuple[int, ...] = ()
    scores: list[Score] = []
    if request.data_path:
        examples = _examples(model, request.data_source, request.data_path, request.reading)
        for parameters in every:
            counts, score = scored(model, parameters, examples)
            scores.append(score)
    has_classes = model.manifest.num_classes is not None
    return Personalised(counts, tuple(scores), has_classes, b"" if made is None else made.astype("<f4").tobytes())


def _examples(model: Model, source: str, path: str, reading: Reading) -> Examples:
    return prepared(source, Path(path), reading, model.manifest).part(reading.part)


def scored(model: Model, parameters: Floats, examples: Examples) -> tuple[tuple[int, ...], Score]:
    """(examples of each group, score). Every 30th example is of one group, so that files sorted by label have mixed
    groups."""
    x, y = examples
    groups = min(GROUPS, len(x))
    model.set_parameters(parameters)
    means = [model.evaluate(x[place::groups], y[place::groups]) for place in range(groups)]
    counts = tuple(len(x[place::groups]) for place in range(groups))
    losses = tuple(loss * count for (loss, _), count in zip(means, counts))
    return counts, Score(losses, tuple(accuracy * count for (_, accuracy), count in zip(means, counts)))


def fine_tuned(model: Model, received: Floats, tune: Tune) -> Floats:
    """The parameters (d,) after the plan's epochs on this device's data.

    Only the layers that are named move: after every step the others are put back. For an optimizer that treats each
    number by itself (all of Keras') that is training those layers alone; with gradient clipping the norm is still that
    of all layers.
    """
    examples = _examples(model, tune.data_source, tune.data_path, tune.reading)
    model.set_parameters(received)
    train(model, examples, tune.plan, tune.name, _putting_back(model, received, tune.layers))
    parameters = model.parameters()
    if not np.isfinite(parameters).all():
        raise TrainingError(
            "fine-tuning diverged: the personal model is not finite", "lower personal.finetune_learning_rate"
        )
    return parameters


def _putting_back(model: Model, received: Floats, layers: tuple[str, ...]) -> Callable[[], None]:
    moving = moving_places(model.manifest, layers)
    if moving is None:
        return lambda: None

    def put_back() -> None:
        model.set_parameters(np.where(moving, model.parameters(), received).astype(np.float32))

    return put_back


def moving_places(manifest: Manifest, layers: tuple[str, ...]) -> Optional[np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """Which of the (d,) parameters belong to these layers; None for all. TrainingError names the nearest layer.

    A layer is what a parameter's name begins with, up to a slash: `dense` of `dense/kernel`, `block/conv` of
    `block/conv/kernel`.
    """
    if not layers:
        return None
    places = offsets(manifest.parameters)
    moving = np.zeros(manifest.dimension, np.bool_)
    for layer in layers:
        own = [place for name, place in places.items() if name.startswith(f"{layer}/")]
        if not own:
            known = sorted({name.rsplit("/", 1)[0] for name in places})
            close = difflib.get_close_matches(layer, known, n=1, cutoff=0.0)
            raise TrainingError(
                f"bundle {manifest.name!r} has no layer {layer!r} (personal.finetune_layers in agent.toml)",
                f"did you mean {close[0]!r}? known: {', '.join(known)[:200]}",
            )
        for place in own:
            moving[place] = True
    return moving


def _or_nothing(model: Model, path: str, sha256: str) -> Floats:
    """Parameters that are only compared with; numbers that are none, which lose to any others, where their file is
    gone or damaged: then it is replaced."""
    try:
        return np.frombuffer(_read(path, sha256), "<f4").astype(np.float32)
    except (DataError, BundleError):
        return np.full(model.manifest.dimension, np.nan, np.float32)


def _read(path: str, sha256: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as exc:
        raise DataError(f"{path} cannot be read ({exc.strerror})", "the next round brings it again") from exc
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BundleError(f"{path} is damaged", "the next round brings it again")
    return data
