"""The training child: loads the bundle and the data, trains, clips, noises, compresses; or evaluates. Answers frames.

Works other than training are in `works`.

Started by `training_process`; never talks to the network. A crash in the runtime ends this process and costs the device
one round, not the agent. Run as ``python -m covey_edge.trainer``.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Optional

import msgspec
import numpy as np

from covey_edge.data_report import DataReport
from covey_edge.data_sources import Examples, state_of
from covey_edge.examples import Prepared, examine, prepared
from covey_edge.frames import Done, Frame, Open, Personalise, Probe, Problem, Run, read_frame, write_frame
from covey_edge.leak_gate import STOPPED, Stopped, judge
from covey_edge.model_screening import Screen
from covey_edge.opening import opened
from covey_edge.processes import die_with_parent, frugal_memory
from covey_edge.reading import ALL
from covey_edge.runtime import Floats, Model, Numbers, installed
from covey_edge.withheld import NO_WITHHELD_NOISE
from covey_edge.works import Made, counted, made
from covey_protocol.bundle import METRICS, Manifest, check_plan, read_bundle
from covey_protocol.captures import Array, Work
from covey_protocol.compression import decode, encode
from covey_protocol.errors import BundleError, CoveyError, DataError, TrainingError
from covey_protocol.forms import WITHHOLDING, compression_of, update_seed
from covey_protocol.messages import TRAIN, TrainingPlan
from covey_protocol.parameters import MAX_UPDATE_NORM, offsets
from covey_protocol.privacy import add_gaussian_noise, clip
from covey_protocol.seals import PublicKey
from covey_protocol.svrg import order_of, step_seed
from covey_protocol.works import CORRECT, CYCLIC, FEATURES, TEACH

if TYPE_CHECKING:
    from covey_edge.debugging import Debugged


class Trainer:
    """Holds the loaded model and data between rounds; reloads each only when it changed."""

    def __init__(self) -> None:
        self._model: Optional[Model] = None
        self._bundle_sha256 = b""
        self._data_state: tuple[object, ...] = ()
        self._prepared: Optional[Prepared] = None
        self._examples: Optional[Examples] = None
        self._screen = Screen()
        self._debugged: Optional[Debugged] = None
        self._debugged_state: tuple[object, ...] = ()
        self._told: dict[str, bytes] = {}  # what was found, until its owner hears of it

    def answer(self, request: Frame) -> Frame:
        try:
            if isinstance(request, Probe):
                return _probed(request)
            if isinstance(request, Open):
                return self._open(request)
            if isinstance(request, Run):
                return self._run(request)
            if isinstance(request, Personalise):
                from covey_edge.personal import personalised  # in a child of its own, which does nothing else

                return personalised(request)
        except Stopped as exc:
            return Problem(STOPPED, exc.what, exc.remedy, dict(exc.found))
        except CoveyError as exc:
            told = exc.told if isinstance(exc, DataError) else ""
            return Problem(type(exc).__name__, exc.what, exc.remedy, told=told)
        except MemoryError:
            return Problem("TrainingError", "the device ran out of memory while training", "raise training.memory_mb")
        finally:
            if self._model is not None:  # between rounds its buffers are not missed
                self._model.let_go()
        raise AssertionError(request)

    def _open(self, request: Open) -> Done:
        if self._model is None or self._bundle_sha256 != request.bundle_sha256:
            data = Path(request.bundle_path).read_bytes()
            if hashlib.sha256(data).digest() != request.bundle_sha256:
                raise BundleError("the bundle on the disk does not have the announced hash", "it is fetched again")
            keys = [PublicKey.from_hex(text) for text in (request.sealed_by, *request.or_by)]
            self._model = Model(opened(data, keys), request.threads)
            self._bundle_sha256, self._prepared = request.bundle_sha256, None
        report = self._load_data(self._model.manifest, request) if request.data_path else None
        return Done(runtime=self._model.runtime, report=report)

    def _load_data(self, manifest: Manifest, request: Open) -> Optional[DataReport]:
        """The part of the data that is asked for; the report, where they had to be read for it."""
        source, path = request.data_source, Path(request.data_path)
        whole = msgspec.structs.replace(request.reading, part=ALL)
        state = (source, path, whole, state_of(source, path, request.reading.options))
        report = None
        if self._prepared is None or state != self._data_state:
            self._prepared = self._examples = None  # before others are read: there may not be room for both
            self._prepared, self._data_state = prepared(source, path, whole, manifest), state
            report = self._prepared.report
        self._examples = self._prepared.part(request.reading.part)
        return report

    def _run(self, request: Run) -> Done:
        if self._model is not None and request.plan.work == CYCLIC:
            return self._coded(self._model, request)
        if self._model is None or self._examples is None:
            raise TrainingError("no model is loaded")
        x, y = self._used(self._model, self._examples, request)
        if request.plan.max_examples:
            x, y = x[: request.plan.max_examples], y[: request.plan.max_examples]
        if len(x) < request.min_examples:
            raise TrainingError(f"{len(x)} examples are fewer than this device's policy asks ({request.min_examples})")
        if request.plan.evaluate:
            return evaluated(self._model, (x, y), request)
        if request.plan.work == FEATURES:
            return counted(self._model, (x, y), request)
        if request.noise_multiplier and not request.noise_moving_statistics:
            refuse_moving_statistics(self._model.manifest)
        received = np.frombuffer(request.parameters, "<f4").astype(np.float32, copy=False)
        started = time.monotonic()
        warnings = self._screen.look(self._model.manifest, received, x, request)
        self._model.set_parameters(received)
        loss_before, accuracy_before = self._model.evaluate(x, y)
        self._model.let_go()  # its buffers to evaluate, before it gets those to train
        self._model.set_parameters(received)
        update, loss, kept, found = _made(self._model, (x, y), request, received)
        self._model.let_go()
        if not np.isfinite(update).all():
            raise TrainingError("training diverged: the update is not finite", "lower the learning rate")
        trained = update
        update = protect(update, request.clip_norm, request.noise_multiplier)
        if request.noise_multiplier:
            update = keep_variances(update, received, self._model.manifest)
        check_sendable(update, may_be_zero=request.plan.work in (TEACH, CORRECT))
        metrics = {
            "loss_before": loss_before,
            "accuracy_before": accuracy_before,
            **({"training_loss": loss} if loss is not None else {}),
            "seconds": time.monotonic() - started,
        }
        if request.noise_multiplier:  # the rest is exact functions of the data, which the noise is to cover
            metrics = {"seconds": metrics["seconds"]}
        # a metric that is not a number would only confuse whoever averages it
        finite = {name: value for name, value in metrics.items() if np.isfinite(value)}
        data, withheld = compressed(update, request)
        judge(self._model, (x, y), request, received, data)
        record = b""
        if request.record and request.plan.work == TRAIN:
            record = recorded((x, y), trained, data, request, self._model.runtime)
        told, self._told = {**self._told, **found}, {}
        return Done(data, len(x), finite, self._model.runtime, withheld or kept, told, record, warnings)

    def _coded(self, model: Model, request: Run) -> Done:
        """The row of a code; the model is looked at with each shard's examples, as with all others."""
        from covey_edge.coded import coded  # what few rounds ask for is loaded for them alone, as below

        warned: list[str] = []

        def trained(
            model: Model, examples: Examples, request: Run, name: str, received: Floats
        ) -> tuple[Floats, float]:
            warned.extend(self._screen.look(model.manifest, received, examples[0], request))
            return shard_update(model, examples, request, name, received)

        done = coded(model, request, trained)
        return msgspec.structs.replace(done, warnings=tuple(dict.fromkeys(warned)))

    def _used(self, model: Model, examples: Examples, request: Run) -> Examples:
        """The examples of this round; looked through for wrong labels once for each state of the data."""
        if not request.debug:
            return examples
        from covey_edge.debugging import debugged, is_debugged

        if not is_debugged(request.plan):
            return examples
        trusted = Path(request.trusted_path)
        stat = trusted.stat() if trusted.exists() else None
        state = (*self._data_state, self._bundle_sha256, trusted, stat and (stat.st_mtime_ns, stat.st_size))
        if self._debugged is None or state != self._debugged_state:
            self._debugged, self._debugged_state = debugged(model, examples, request), state
            self._told = self._debugged.found
        return self._debugged.used(examples, request.debug)


def _probed(request: Probe) -> Done:
    manifest = read_bundle(Path(request.bundle_path).read_bytes()).manifest if request.bundle_path else None
    report = examine(request.data_source, Path(request.data_path), request.reading, manifest)
    return Done(num_examples=report.examples, runtime=installed()[1], report=report)


def shard_update(model: Model, examples: Examples, request: Run, name: str, received: Floats) -> tuple[Floats, float]:
    """What one shard of a code gives: its update, clipped and fit to be sent, and its training loss.

    Judged as if it were sent by itself, which tells more than a row of several.
    """
    model.set_parameters(received)
    loss = train(model, examples, request.plan, name)
    update = protect(model.parameters() - received, request.clip_norm, 0.0)
    check_sendable(update)
    alone = msgspec.structs.replace(request.plan, work=TRAIN, coding=msgspec.UNSET)
    judge(model, examples, msgspec.structs.replace(request, plan=alone), received, update.astype("<f4").tobytes())
    return update, loss


def _made(model: Model, examples: Examples, request: Run, received: Floats) -> Made:
    """The plan's work on the model, which holds the parameters `received`."""
    if request.plan.work != TRAIN:
        return made(model, examples, request, received)
    loss = train(model, examples, request.plan, request.order_name)
    update = model.parameters()
    update -= received  # in its place: memory is what is short now
    return Made(update, loss)


def evaluated(model: Model, examples: Examples, request: Run) -> Done:
    """The metrics of the plan, float32 little-endian, in its order, as the update. Nothing is trained, noised, clipped.

    TrainingError for numbers that a coordinator would refuse from anybody.
    """
    check_plan(model.manifest, request.plan)
    started = time.monotonic()
    model.set_parameters(np.frombuffer(request.parameters, "<f4").astype(np.float32))
    found = dict(zip(METRICS, model.evaluate(*examples)))
    with np.errstate(over="ignore"):
        values = np.array([found[name] for name in request.plan.evaluate], "<f4")
        sendable = float(np.linalg.norm(values)) <= MAX_UPDATE_NORM
    if not sendable:
        told = ", ".join(f"{name} {found[name]:g}" for name in request.plan.evaluate)
        raise TrainingError(f"the model cannot be evaluated on these data: {told}", "look at the data and the model")
    metrics = {"seconds": time.monotonic() - started, "held_out": float(request.held_out)}
    return Done(values.tobytes(), len(examples[0]), metrics, model.runtime)


def check_sendable(update: Floats, *, may_be_zero: bool = False) -> None:
    """TrainingError for what a coordinator refuses from anybody; a device that works reports a failure instead.

    Whoever sends it all the same is counted among the hostile devices that the coordinator's rule bears.
    may_be_zero: of a teacher that has no use for any of its instances.
    """
    with np.errstate(over="ignore"):  # infinity is too large as well
        norm = float(np.linalg.norm(update))
    if not norm <= MAX_UPDATE_NORM:
        raise TrainingError(f"training diverged: the update has norm {norm:.1e}", "lower the learning rate")
    if not may_be_zero and not update.any():
        raise TrainingError("training changed nothing: the update is all zeros", "raise the learning rate")


def train(
    model: Model, examples: Examples, plan: TrainingPlan, order_name: str, after_step: Callable[[], None] = lambda: None
) -> float:
    """plan.epochs passes in an order fixed by the plan's seed and the name; the mean loss of the last pass.

    FedProx's centre is the parameters the model holds at the start.
    """
    x, y = examples
    rng = order_of(plan.shuffle_seed, order_name)
    size = model.manifest.batch_size
    draws = "seed" in model.manifest.train_inputs
    mean_loss, step = float("nan"), 0
    model.start_training(plan)
    for _ in range(plan.epochs):
        order = rng.permutation(len(x))
        loss_sum = 0.0
        for rows in (order[start : start + size] for start in range(0, len(x), size)):
            seed = step_seed(plan.shuffle_seed, order_name, step) if draws else 0
            loss_sum += model.train_batch(x[rows], y[rows], plan.learning_rate, seed) * len(rows)
            after_step()
            step += 1
        mean_loss = loss_sum / len(x)
    return mean_loss


def protect(update: Floats, clip_norm: float, noise_multiplier: float) -> Floats:
    """The owner's policy: clip to clip_norm (0 = off), then Gaussian noise from the operating system's entropy."""
    if not clip_norm:
        return update
    clipped = clip(update, clip_norm)
    if not noise_multiplier:
        return clipped
    rng = np.random.default_rng(int.from_bytes(os.urandom(32), "big"))
    return add_gaussian_noise(clipped, clip_norm, noise_multiplier, rng)


def compressed(update: Floats, request: Run) -> tuple[bytes, bytes]:
    """The update as it travels, and what is withheld of it for later rounds (b"" where nothing is).

    Withheld before, request.withheld, is added first. So what is sent may be longer than this round's update; with a
    clip_norm it is clipped again, and what that takes away is withheld, too. TrainingError on a device that adds noise:
    the largest numbers of a noised update are mostly noise. Other works do not go with such a form (works.check_work).
    Source: Karimireddy et al. 2019 (arXiv:1901.09847), Algorithm 1 (EF-SGD), there a step's gradient times its rate.
    """
    form, seed = compression_of(request.plan), update_seed(request.round_id, request.device_id)
    if form.name not in WITHHOLDING:
        return encode(update, form, seed), b""
    if request.noise_multiplier:
        raise TrainingError(*NO_WITHHELD_NOISE)
    total = update + np.frombuffer(request.withheld, "<f4") if request.withheld else update
    data = encode(clip(total, request.clip_norm) if request.clip_norm else total, form, seed)
    withheld = total - decode(data, form, seed, len(total))
    return data, withheld.astype("<f4").tobytes()


def recorded(examples: Examples, trained: Floats, data: bytes, request: Run, runtime: str) -> bytes:
    """What was done in this round, for the owner: an encoded Work. data: the update as it travels."""
    form, seed = compression_of(request.plan), update_seed(request.round_id, request.device_id)
    sent = decode(data, form, seed, len(trained)).astype("<f4").tobytes()
    x, y = (_array(values) for values in examples)
    sha256 = hashlib.sha256(sent).digest()
    return msgspec.msgpack.encode(Work(x, y, trained.astype("<f4").tobytes(), sha256, request.order_name, runtime))


def _array(values: Numbers) -> Array:
    return Array(values.dtype.name, values.shape, values.astype(values.dtype.newbyteorder("<")).tobytes())


def refuse_moving_statistics(manifest: Manifest) -> None:
    """TrainingError where noise on the update would also be noise on moving statistics.

    A weight bears noise and learns on; a variance of 0.1 with a noise of 0.5 is another model, or none at all.
    """
    moving = [spec.name for spec in manifest.parameters if not spec.trainable]
    if moving:
        raise TrainingError(
            f"this device adds noise, and {len(moving)} tensors of the model are moving statistics ({moving[0]}, ...)",
            "export the model with `--moving-statistics local`, use GroupNormalization, or set "
            "privacy.noise_moving_statistics = true in agent.toml",
        )


def keep_variances(update: Floats, received: Floats, manifest: Manifest) -> Floats:
    """The update, with no moving variance below 0 in received + update; (d,) each.

    Noise makes a small variance negative, and the root of it NaN on every device. Cutting off at 0 uses nothing that
    the receiver does not know, so it costs no privacy; it lifts variances that the noise is as large as.
    """
    update = update.copy()
    for name, place in offsets(manifest.parameters).items():
        if name.endswith("moving_variance"):
            update[place] = np.maximum(update[place], -received[place])
    return update


def _private_stdout() -> BinaryIO:
    """The pipe to the agent. Whatever libraries print goes to stderr, so that it cannot break a frame."""
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return pipe


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the agent decides
    if len(sys.argv) > 1:
        die_with_parent(int(sys.argv[1]))  # where this does nothing, the closed pipe ends us
    frugal_memory()
    output, trainer = _private_stdout(), Trainer()
    while (request := read_frame(sys.stdin.buffer)) is not None:
        write_frame(output, trainer.answer(request))


if __name__ == "__main__":
    main()
