"""Whether a capture fits together, before anybody attacks it: parameters, buffers, batches, mode. Names what does not.

An attack on an update that was made otherwise than it believes (another batch size, parameters of another round, moving
statistics of training where it computes with those of inference, a clipped update) finds nothing and proves nothing.
With a device's record its training is done again, by the same TFLite runtime, and held against what the device sent.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_edge.runtime import Model, installed
from covey_edge.trainer import train
from covey_protocol.bundle import Bundle, Manifest, read_bundle
from covey_protocol.captures import Array, Capture, CapturedUpdate, DeviceRecord, Work
from covey_protocol.compression import decode, encode
from covey_protocol.errors import CoveyError
from covey_protocol.forms import NONE, ROTATED, compression_of, update_seed
from covey_protocol.messages import TrainingPlan
from covey_protocol.parameters import offsets
from covey_protocol.privacy import clip

Floats = npt.NDArray[np.float32]
SAME = 1e-3  # of the update's length; runtimes differ by 2e-6, a ReLU at its kink by up to a few 1e-3
EXPLAINED = 1e-2
RANGES = (255.0, 1 / 255.0)


@dataclass(frozen=True)
class Check:
    """holds: None where it could not be checked, `told` says why."""

    what: str
    holds: bool | None
    told: str


def check_capture(capture: Capture) -> list[Check]:
    """What can be said without any device's record. Never raises for what is wrong with the capture."""
    invitation = capture.invitation
    checks = [
        _hash("bundle", capture.bundle, invitation.bundle.sha256),
        _hash("parameters", capture.parameters, invitation.parameters.sha256),
    ]
    try:
        manifest = read_bundle(capture.bundle).manifest
    except CoveyError as exc:
        return [*checks, Check("bundle", False, str(exc))]
    d = manifest.dimension
    checks.append(_size("parameters", capture.parameters, d))
    if capture.aggregate:
        checks.append(_size("aggregate", capture.aggregate, d))
    for update in capture.updates:
        checks += _check_update(update, capture.parameters, manifest, invitation.plan)
    return checks


def check_record(capture: Capture, record: DeviceRecord, work: Work) -> list[Check]:
    """A device's record against its update in the capture; its training is done again."""
    name, invitation = record.device_id, capture.invitation
    update = next((one for one in capture.updates if one.device_id == name), None)
    if update is None:
        why = capture.left_out.get(name, "it was not invited")
        return [Check(f"{name}: update", False, f"the capture holds none of this device: {why}")]
    same = [
        Check(f"{name}: {what}", one == other, f"{what} of record and capture {'agree' if one == other else 'differ'}")
        for what, one, other in (
            ("round", record.round_id, invitation.round_id),
            ("bundle", record.bundle_sha256, invitation.bundle.sha256),
            ("parameters", record.parameters_sha256, invitation.parameters.sha256),
            ("plan", record.plan, invitation.plan),
        )
    ]
    try:
        x, y = numbers(work.x), numbers(work.y)
        bundle = read_bundle(capture.bundle)
        batch = _batch(name, x, y, update, bundle.manifest)
        if not batch.holds:
            return [*same, batch]
        same.append(batch)
        return [*same, *_check_training(capture, update, record, work, bundle, (x, y))]
    except (CoveyError, ValueError) as exc:
        return [*same, Check(f"{name}: training", None, f"could not be done again: {exc}")]


def numbers(array: Array) -> npt.NDArray[Any]:
    """ValueError where the bytes are not as many as the shape says."""
    return np.frombuffer(array.data, np.dtype(array.dtype).newbyteorder("<")).reshape(array.shape)


def problems(checks: Sequence[Check]) -> list[Check]:
    return [check for check in checks if check.holds is False]


# --- without a record


def _hash(what: str, data: bytes, sha256: bytes) -> Check:
    fits = hashlib.sha256(data).digest() == sha256
    return Check(what, fits, f"{what} {'are' if what.endswith('s') else 'is'} {'' if fits else 'not '}as announced")


def _size(what: str, data: bytes, d: int) -> Check:
    fits = len(data) == 4 * d and bool(np.isfinite(np.frombuffer(data, "<f4")).all())
    told = f"{what}: {d} finite numbers" if fits else f"{what}: not {d} finite float32 numbers ({len(data)} bytes)"
    return Check(what, fits, told)


def _check_update(update: CapturedUpdate, parameters: bytes, manifest: Manifest, plan: TrainingPlan) -> Iterator[Check]:
    name, d = update.device_id, manifest.dimension
    size = _size(f"{name}: update", update.update, d)
    yield size
    if not size.holds:
        return
    steps = steps_of(update.num_examples, manifest.batch_size, plan)
    yield Check(
        f"{name}: batches",
        not plan.max_examples or update.num_examples <= plan.max_examples,
        f"{update.num_examples} examples, {steps} steps of {manifest.batch_size}, {plan.epochs} epochs at rate "
        f"{plan.learning_rate:g} ({manifest.optimizer})",
    )
    yield from _check_buffers(name, np.frombuffer(update.update, "<f4"), manifest)


def _check_buffers(name: str, update: Floats, manifest: Manifest) -> Iterator[Check]:
    """Moving statistics: whether they moved says in which mode the device computed."""
    buffers = [spec for spec in manifest.parameters if not spec.trainable]
    if not buffers:
        return
    places = offsets(manifest.parameters)
    still = [spec.name for spec in buffers if not np.any(update[places[spec.name]])]
    if not still:
        told = f"{len(buffers)} moving statistics moved: trained in training mode, with each batch's own statistics"
    else:
        told = f"{len(still)} of {len(buffers)} moving statistics did not move ({still[0]}): frozen, or put back"
    yield Check(f"{name}: mode", not still, told)


def steps_of(num_examples: int, batch_size: int, plan: TrainingPlan) -> int:
    return plan.steps or plan.epochs * -(-num_examples // batch_size)


# --- with a record


def _batch(name: str, x: npt.NDArray[Any], y: npt.NDArray[Any], update: CapturedUpdate, manifest: Manifest) -> Check:
    shapes = x.shape[1:] == tuple(manifest.input.shape) and y.shape[1:] == tuple(manifest.label.shape)
    told = f"{len(x)} examples and {len(y)} labels in the record, {update.num_examples} announced"
    if not shapes:
        told += f"; of shapes {x.shape[1:]} and {y.shape[1:]}, the bundle's are {manifest.input.shape} and "
        told += f"{manifest.label.shape}"
    return Check(f"{name}: batch", shapes and len(x) == len(y) == update.num_examples, told)


def _check_training(
    capture: Capture,
    update: CapturedUpdate,
    record: DeviceRecord,
    work: Work,
    bundle: Bundle,
    examples: tuple[npt.NDArray[Any], npt.NDArray[Any]],
) -> Iterator[Check]:
    name, plan = record.device_id, capture.invitation.plan
    received = np.frombuffer(capture.parameters, "<f4")
    sent, trained = np.frombuffer(update.update, "<f4"), np.frombuffer(work.trained, "<f4")
    if trained.shape != sent.shape:
        yield Check(f"{name}: training", False, f"the record's update has {trained.size} numbers, not {sent.size}")
        return
    again = _trained(bundle, received, plan, work.order_name, examples)
    off = distance(again, trained)
    runtime = installed()[1]
    if off <= SAME:
        told = "training again gives the same bits" if off == 0 else f"training again comes within {off:.1e} of it"
        yield Check(f"{name}: training", True, f"{told} ({work.runtime} there, {runtime} here)")
    else:
        why = _explained(bundle, capture, plan, work.order_name, examples, trained, again)
        where = layers(again, trained, bundle.manifest)
        yield Check(f"{name}: training", False, f"training again gives another update: {why}; {where}")
    yield _check_sent(name, sent, trained, work, record, plan)


def _trained(
    bundle: Bundle,
    received: Floats,
    plan: TrainingPlan,
    order_name: str,
    examples: tuple[npt.NDArray[Any], npt.NDArray[Any]],
) -> Floats:
    model = Model(bundle)
    model.set_parameters(received)
    train(model, examples, plan, order_name)
    return model.parameters() - received


def distance(one: Floats, other: Floats) -> float:
    """|one - other| / |other|, infinite where other is 0 and one is not."""
    length = float(np.linalg.norm(other.astype(np.float64)))
    off = float(np.linalg.norm(one.astype(np.float64) - other))
    return off / length if length else (0.0 if off == 0 else float("inf"))


def layers(one: Floats, other: Floats, manifest: Manifest, most: int = 3) -> str:
    """Which parameters differ most, each relative to its own length."""
    found = sorted(
        ((distance(one[place], other[place]), name) for name, place in offsets(manifest.parameters).items()),
        reverse=True,
    )
    worst = [f"{name} by {off:.2g}" for off, name in found[:most] if off > SAME]
    same = sum(off <= SAME for off, _ in found)
    return f"differing: {', '.join(worst)}; {same} of {len(found)} parameters agree"


def _explained(
    bundle: Bundle,
    capture: Capture,
    plan: TrainingPlan,
    order_name: str,
    examples: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    got: Floats,
    again: Floats,
) -> str:
    """The first hypothesis that brings the two together, in words."""
    received = np.frombuffer(capture.parameters, "<f4")
    moving = np.concatenate([np.full(spec.size, not spec.trainable) for spec in bundle.manifest.parameters])
    if moving.any() and distance(again[~moving], got[~moving]) <= EXPLAINED:
        return "only moving statistics differ, so the mode does (training, inference)"
    factor = _factor(again, got)
    if factor is not None:
        return f"it is {factor:.4g} times as long: another learning rate, or clipped"
    for told, other in _hypotheses(bundle, capture, plan, order_name, examples, received):
        try:
            made = other()
        except CoveyError:
            continue
        if distance(made, got) <= EXPLAINED:
            return told
    return "no other order, rate, number of epochs, range of inputs or model that was tried explains it"


def _factor(again: Floats, got: Floats) -> float | None:
    wide = again.astype(np.float64)
    square = float(wide @ wide)
    if not square:
        return None
    factor = float(wide @ got) / square
    return factor if factor > 0 and distance((factor * wide).astype(np.float32), got) <= EXPLAINED else None


def _hypotheses(
    bundle: Bundle,
    capture: Capture,
    plan: TrainingPlan,
    order_name: str,
    examples: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    received: Floats,
) -> Iterator[tuple[str, Callable[[], Floats]]]:
    x, y = examples
    if capture.aggregate:
        after = np.frombuffer(capture.aggregate, "<f4")
        yield (
            "it started from the model that came of the round",
            lambda: _trained(bundle, after, plan, order_name, examples),
        )
    initial = Model(bundle).parameters()
    yield (
        "it started from the bundle's own parameters",
        lambda: _trained(bundle, initial, plan, order_name, examples),
    )
    for update in capture.updates:
        if update.device_id != order_name:
            other = update.device_id
            yield (
                f"its examples were in the order of {other}",
                lambda other=other: _trained(bundle, received, plan, other, examples),  # type: ignore[misc]
            )
    for epochs in {1, plan.epochs - 1, plan.epochs + 1} - {plan.epochs, 0}:
        longer = _with(plan, epochs=epochs)
        yield (
            f"it made {epochs} epochs, not {plan.epochs}",
            lambda longer=longer: _trained(bundle, received, longer, order_name, examples),  # type: ignore[misc]
        )
    for factor in RANGES:
        scaled = (x * np.asarray(factor, x.dtype) if x.dtype.kind == "f" else x, y)
        yield (
            f"its inputs were {factor:.4g} times as large",
            lambda scaled=scaled: _trained(bundle, received, plan, order_name, scaled),  # type: ignore[misc]
        )
    if len(x) > 1:
        yield (
            "it left out its last example",
            lambda: _trained(bundle, received, plan, order_name, (x[:-1], y[:-1])),
        )


def _with(plan: TrainingPlan, **changes: Any) -> TrainingPlan:
    import msgspec

    return msgspec.structs.replace(plan, **changes)


# --- from the trained update to the one that was sent


def _check_sent(
    name: str, sent: Floats, trained: Floats, work: Work, record: DeviceRecord, plan: TrainingPlan
) -> Check:
    """Clipping, noise and compression between training and sending, as record and plan say them."""
    what = f"{name}: protection"
    if hashlib.sha256(sent.astype("<f4").tobytes()).digest() != work.sent_sha256:
        return Check(what, False, "the update in the capture is not the one that the record says was sent")
    expected = clip(trained, record.clip_norm) if record.clip_norm else trained
    steps = [f"clipped to {record.clip_norm:g}" if record.clip_norm else "not clipped"]
    form = compression_of(plan)
    if record.noise_multiplier:
        std, measured = record.clip_norm * record.noise_multiplier, float(np.std(sent - expected))
        steps.append(f"noise of {measured:.3g}, {std:.3g} asked")
        if form.name in ROTATED:
            return Check(what, None, f"{', '.join(steps)}, and {form.name}: what is noise cannot be told")
        return Check(what, abs(measured / std - 1) <= 5 / np.sqrt(2 * sent.size) + 0.01, ", ".join(steps))
    steps.append("no noise")
    if form.name not in (NONE, *ROTATED):
        return Check(what, None, f"{', '.join(steps)}, {form.name} carries what earlier updates left out")
    if form.name in ROTATED:
        seed = update_seed(record.round_id, record.device_id)
        expected = decode(encode(expected, form, seed), form, seed, len(expected))
        steps.append(form.name)
    off = distance(sent, expected)
    told = ", ".join(steps) + ("" if off <= 1e-6 else f"; what was sent differs from that by {off:.2g} of its length")
    return Check(what, off <= 1e-6, told)


def as_rows(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """For JSON."""
    return [dataclasses.asdict(check) for check in checks]
