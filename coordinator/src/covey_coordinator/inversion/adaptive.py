"""Defences of an update, and for each the attack that knows it. What an adaptive attack breaks protects nobody.

A defence is two things here: what it does to an update before it leaves the device, and what somebody who knows it
makes of what leaves. For all of them that is Tarantola's least squares with the defence in the forward problem:
clipping in g, noise and quantisation in C_D, several rounds as more data, and numbers that a defence has spoiled as
data of infinite variance. Pruning and Soteria (which spoil some of the numbers so that a search that fits all of them
fails) fall to that last line: whoever leaves the spoiled numbers out has the others exactly.

Outputs that are rounded are a defence of a finished model, not of updates: `model_inversion` has it and its adaptive
attack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import AttackedModel, Finding, Seen
from covey_coordinator.inversion.priors import Prior
from covey_coordinator.inversion.resolution import Leakage, leakage_number, planned
from covey_coordinator.inversion.tarantola import Tarantola
from covey_protocol.compression import decode, encode
from covey_protocol.errors import UsageError
from covey_protocol.forms import Compression, update_seed
from covey_protocol.parameters import ParameterSpec, offsets
from covey_protocol.privacy import add_gaussian_noise, clip

Numbers = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Sent:
    """What left the device. seen: as somebody who knows the defence describes it, one for each round. unaware: the
    same numbers as somebody describes them who takes them for undefended. spoiled: (d,), numbers that the defence made
    useless and that can be told from what was sent."""

    seen: tuple[Seen, ...]
    unaware: Seen
    spoiled: Optional[Mask] = None


class Defence(Protocol):
    """name: for tables. knows: what the adaptive attack makes use of, in a few words."""

    @property
    def name(self) -> str: ...

    @property
    def knows(self) -> str: ...

    def sent(self, model: AttackedModel, clean: Seen, x: Numbers, y: Numbers, rng: np.random.Generator) -> Sent:
        """clean: of this batch, by `resolution.planned`."""
        ...


@dataclass(frozen=True)
class Nothing:
    """The update as it is: also larger batches and more local steps, which are settings of the plan. The attack that
    knows them computes through all steps."""

    name: str = "none"
    knows: str = "all numbers of the update and every step of the plan"

    def sent(self, model: AttackedModel, clean: Seen, x: Numbers, y: Numbers, rng: np.random.Generator) -> Sent:
        return Sent((clean,), clean)


@dataclass(frozen=True)
class ClippingAndNoise:
    """The device's own: the update shortened to clip_norm, then normal noise of noise_multiplier times that.

    rounds: in which the device trains on the same batch. In between the model moves on by a tenth of what was sent, as
    in a fleet of ten. The attack fits all rounds at once.
    """

    clip_norm: float
    noise_multiplier: float = 0.0
    rounds: int = 1

    @property
    def name(self) -> str:
        noise = f", noise {self.noise_multiplier:g}" if self.noise_multiplier else ""
        return f"clipped to {self.clip_norm:g}{noise}" + (f", {self.rounds} rounds" if self.rounds > 1 else "")

    @property
    def knows(self) -> str:
        return "the clip norm, the noise's size" + (", all rounds together" if self.rounds > 1 else "")

    def sent(self, model: AttackedModel, clean: Seen, x: Numbers, y: Numbers, rng: np.random.Generator) -> Sent:
        several: list[Seen] = []
        received = np.asarray(clean.parameters, np.float32)
        for number in range(self.rounds):
            update = planned(model, replace(clean, parameters=received), x, y).update
            noisy = add_gaussian_noise(clip(update, self.clip_norm), self.clip_norm, self.noise_multiplier, rng)
            one = replace(clean, parameters=received, update=noisy, round_number=number)
            several.append(replace(one, clip_norm=self.clip_norm, noise_std=self.noise_multiplier * self.clip_norm))
            received = received + noisy / np.float32(10)
        return Sent(tuple(several), replace(several[0], clip_norm=0.0, noise_std=0.0))


@dataclass(frozen=True)
class CentralNoise:
    """The coordinator's: only the mean of so many devices leaves it, with noise of noise_multiplier times clip_norm
    over their number.

    x, y: all devices' batches, equally large and one after the other; each takes one step. No update may be longer than
    clip_norm (UsageError), so that the mean is the update of all examples together, which is what the attack fits.
    """

    clip_norm: float
    noise_multiplier: float
    devices: int

    @property
    def name(self) -> str:
        return f"mean of {self.devices} devices, noise {self.noise_multiplier:g} on their sum"

    @property
    def knows(self) -> str:
        return "the noise's size; all devices' examples fitted together"

    def sent(self, model: AttackedModel, clean: Seen, x: Numbers, y: Numbers, rng: np.random.Generator) -> Sent:
        longest = max(
            float(np.linalg.norm(planned(model, clean, *part).update))
            for part in zip(np.array_split(x, self.devices), np.array_split(y, self.devices))
        )
        if longest > self.clip_norm or clean.plan.epochs > 1:
            raise UsageError(f"an update of length {longest:.3g} above clip_norm {self.clip_norm:g}", "clip less")
        noisy = add_gaussian_noise(clean.update, self.clip_norm / self.devices, self.noise_multiplier, rng)
        one = replace(clean, update=noisy, noise_std=self.noise_multiplier * self.clip_norm / self.devices)
        return Sent((one,), replace(one, noise_std=0.0))


@dataclass(frozen=True)
class Compressed:
    """A form in which updates travel (docs/protocol.md). The attack knows which numbers are missing and how coarse the
    others are."""

    form: str
    kept_fraction: float = 0.0

    @property
    def name(self) -> str:
        return self.form + (f", {self.kept_fraction:.0%} kept" if self.kept_fraction else "")

    @property
    def knows(self) -> str:
        return "which numbers were sent" if self.kept_fraction else "the size of the rounding"

    def sent(self, model: AttackedModel, clean: Seen, x: Numbers, y: Numbers, rng: np.random.Generator) -> Sent:
        form, seed = Compression(self.form, self.kept_fraction), update_seed("round", f"device-{rng.integers(2**31)}")
        update = decode(encode(np.asarray(clean.update, np.float32), form, seed), form, seed, len(clean.update))
        aware = _with_form(replace(clean, update=update), form)
        return Sent((aware,), replace(clean, update=update))


@dataclass(frozen=True)
class Pruned:
    """The smallest numbers of each tensor are set to 0, a share of them ("gradient pruning"). Broken in the literature:
    the zeros say which numbers to leave out. Source: Zhu et al. 2019 (arXiv:1906.08935), section 5.2."""

    share: float

    @property
    def name(self) -> str:
        return f"pruning {self.share:.0%}"

    @property
    def knows(self) -> str:
        return "that zeros are missing numbers"

    def sent(self, model: AttackedModel, clean: Seen, x: Numbers, y: Numbers, rng: np.random.Generator) -> Sent:
        update = np.array(clean.update, np.float32)
        for place in offsets(model.specs).values():
            part = update[place]
            part[np.abs(part) < np.quantile(np.abs(part), self.share)] = 0.0
        one = replace(clean, update=update)
        return Sent((one,), one, update == 0.0)


@dataclass(frozen=True)
class Soteria:
    """The gradient of one dense layer is computed from a pruned representation: its features with the largest |r_i|
    over |dr_i / dx| are set to 0, a share of them. Broken in the literature: skip the layer (Balunovic et al. 2022,
    arXiv:2111.04706).

    kernel: name of the defended layer's kernel, (features, units). represent: inputs (n, ...) -> features (n, F) with
    F the kernel's rows, a TensorFlow function of the received model. Source: Sun et al. 2021 (arXiv:2012.06043),
    Algorithm 1. Deviation: one set of features for the batch, by the mean of the score; the bias, as there, is not
    touched.
    """

    kernel: str
    represent: Callable[[Any], Any]
    share: float = 0.4

    @property
    def name(self) -> str:
        return f"Soteria {self.share:.0%} of {self.kernel}"

    @property
    def knows(self) -> str:
        return "the defended layer, which it skips"

    def sent(self, model: AttackedModel, clean: Seen, x: Numbers, y: Numbers, rng: np.random.Generator) -> Sent:
        spec, place = _place(model.specs, self.kernel)
        score = self._score(x, model.dtype)
        if len(score) != spec.shape[0]:
            raise UsageError(f"{len(score)} features for a kernel of shape {spec.shape}", "name the layer they go into")
        update = np.array(clean.update, np.float32)
        layer = update[place].reshape(spec.shape)
        layer[np.argsort(-score)[: int(self.share * len(score))]] = 0.0
        update[place] = layer.ravel()
        spoiled = np.zeros(len(update), bool)
        spoiled[place] = True
        one = replace(clean, update=update)
        return Sent((one,), one, spoiled)

    def _score(self, x: Numbers, dtype: Any) -> npt.NDArray[np.float64]:
        import tensorflow as tf

        inputs = tf.constant(x, dtype)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            features = self.represent(inputs)
        slopes = np.asarray(tape.batch_jacobian(features, inputs), np.float64).reshape(*features.shape, -1)
        sizes = np.linalg.norm(slopes, axis=-1)
        return np.asarray(np.mean(np.abs(np.asarray(features)) / np.maximum(sizes, 1e-12), axis=0))


def attacked_unaware(
    model: AttackedModel, sent: Sent, labels: Numbers, *, seed: int, prior: Optional[Prior] = None
) -> Finding:
    """The most probable batch, from one start, for somebody who takes what was sent for an undefended update."""
    return Tarantola(labels=labels, prior=prior, starts=1).run(model, sent.unaware, seed=seed)


def attacked_adaptively(
    model: AttackedModel, sent: Sent, labels: Numbers, *, seed: int, prior: Optional[Prior] = None
) -> Finding:
    """The most probable batch for somebody who knows the defence."""
    return Tarantola(labels=labels, prior=prior, ignored=sent.spoiled).run(model, sent.seen, seed=seed)


def leakage_of(model: AttackedModel, sent: Sent, x: Numbers, y: Numbers, *, prior: Optional[Prior] = None) -> Leakage:
    """The resolution of what was sent for somebody who knows the defence."""
    return leakage_number(model, sent.seen, x, y, prior=prior, ignored=sent.spoiled)


def _with_form(seen: Seen, form: Compression) -> Seen:
    plan = msgspec.structs.replace(seen.plan, compression=form.name, kept_fraction=form.kept_fraction)
    return replace(seen, plan=plan)


def _place(specs: Sequence[ParameterSpec], name: str) -> tuple[ParameterSpec, slice]:
    found = next((spec for spec in specs if spec.name == name), None)
    if found is None or len(found.shape) != 2:
        kernels = ", ".join(spec.name for spec in specs if len(spec.shape) == 2)
        raise UsageError(f"no dense kernel {name!r} in this model", f"choose from {kernels}")
    return found, offsets(specs)[name]
