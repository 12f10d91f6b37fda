"""What every attack on updates is given and gives back, and the model it attacks.

An attacker holds what a compromised coordinator holds: the bundle, the parameters it sent, the plan, and what came
back. The truth is used to grade an attack, never by it; `grading` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from covey_protocol.bundle import Manifest, TensorSpec
from covey_protocol.messages import TrainingPlan
from covey_protocol.parameters import ParameterSpec

Numbers = npt.NDArray[Any]


class AttackedModel(Protocol):
    """The model of a bundle as functions of TensorFlow that can be differentiated any number of times.

    Arguments and results are tensors of `dtype` (float32 or float64). x: (n, *input shape); y: (n, *label shape), of
    any number type, or (n, num_classes) of `dtype` where labels are to be soft: their loss is the mean of the
    classes' losses with these weights. weights: (n,), None for ones. n may be any number of examples.
    """

    @property
    def manifest(self) -> Manifest: ...

    @property
    def dtype(self) -> Any: ...

    @property
    def specs(self) -> Sequence[ParameterSpec]: ...

    @property
    def input(self) -> TensorSpec: ...

    def loss(self, parameters: Any, x: Any, y: Any, weights: Any = None) -> Any:
        """(): the weighted mean loss that the bundle trains on."""
        ...

    def gradient(self, parameters: Any, x: Any, y: Any, weights: Any = None) -> Any:
        """(d,): of `loss` with respect to the flat parameters, 0 for what is not trained."""
        ...

    def outputs(self, parameters: Any, x: Any) -> Any:
        """(n, ...): what `infer` gives."""
        ...

    def update(self, parameters: Any, batches: Sequence[tuple[Any, Any, Any]], plan: TrainingPlan) -> Any:
        """(d,): parameters after a step of the bundle's own `train` on each (x, y, weights), minus those before.

        Every batch has the bundle's batch size. Differentiable in the inputs of the batches.
        """
        ...


class OfBundle:
    """The facts of an AttackedModel, for those who implement it."""

    def __init__(self, manifest: Manifest, dtype: Any) -> None:
        self._manifest, self._dtype = manifest, dtype

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def dtype(self) -> Any:
        return self._dtype

    @property
    def specs(self) -> Sequence[ParameterSpec]:
        return self._manifest.parameters

    @property
    def input(self) -> TensorSpec:
        return self._manifest.input


@dataclass(frozen=True)
class Seen:
    """What the attacker holds. One entry per update; several where it uses several devices or rounds.

    parameters, update: (d,), as the device received and sent them. examples: as many as the device said it has.
    noise_std: standard deviation of noise that the attacker knows was added to each number, 0 for none or unknown.
    clip_norm: the length the update was shortened to if it was longer, 0 for none. The attacker knows both settings.
    """

    parameters: Numbers
    update: Numbers
    plan: TrainingPlan
    examples: int
    noise_std: float = 0.0
    clip_norm: float = 0.0
    device_id: str = ""
    round_number: int = 0


@dataclass(frozen=True)
class Finding:
    """What an attack says it found. sees: one sentence on what the attacker needs.

    inputs: (m, *input shape), m <= examples, None where it finds none. labels: (m,) of each input where there are
    inputs, else the classes it says are in the batch, each as often as it says, in no order. score: the attack's own
    objective at the end, comparable between runs of one attack on one update.
    """

    attack: str
    sees: str
    inputs: Numbers | None = None
    labels: npt.NDArray[np.int64] | None = None
    score: float | None = None
    seconds: float = 0.0
    iterations: int = 0
    notes: tuple[str, ...] = ()


class Progress(Protocol):
    def __call__(self, done: int, total: int) -> None: ...


Stop = Callable[[], bool]  # asked between iterations; True ends the attack with the best it has


class Attack(Protocol):
    """Attacks are dataclasses of their settings. seed: draws everything random."""

    @property
    def name(self) -> str: ...

    @property
    def sees(self) -> str: ...

    def run(
        self, model: AttackedModel, seen: Seen, *, seed: int, stop: Stop | None = None, progress: Progress | None = None
    ) -> Finding: ...
