"""What `covey replay` does: first whether a captured round fits together, then attacks on its updates."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from covey_coordinator.capture.consistency import Check, as_rows, check_capture, check_record, numbers, problems
from covey_coordinator.capture.picture import beside
from covey_coordinator.grid.display import Display
from covey_coordinator.inversion.contract import Attack, AttackedModel, Finding, Seen
from covey_coordinator.inversion.grading import Grade, grade
from covey_coordinator.inversion.registry import ATTACKS, CHEAP, make_attack
from covey_edge.config import read_file
from covey_edge.files import write_atomic
from covey_protocol.bundle import Manifest, read_bundle
from covey_protocol.captures import Capture, CapturedUpdate, DeviceRecord, Work, opened, work_of
from covey_protocol.errors import ConfigError, CoveyError, DataError
from covey_protocol.seals import PublicKey

Truth = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # x, y


class Request(NamedTuple):
    """As `covey replay` is asked."""

    file: Path | None
    records: tuple[Path, ...] = ()
    only_check: bool = False
    attacks: tuple[str, ...] = ()
    list_attacks: bool = False
    devices: tuple[str, ...] = ()
    coordinator_key: str | None = None
    seconds: float = 60.0
    seed: int = 0
    output: Path = Path("runs/replay")


class Attacked(NamedTuple):
    """One attack on one update. grade: None without the device's examples, which are `truth`. problem: why it could not
    run, "" if it did."""

    device_id: str
    attack: str
    finding: Finding | None
    grade: Grade | None
    problem: str = ""
    truth: Truth | None = None
    input_range: tuple[float, float] = (0.0, 1.0)


def replay(request: Request, display: Display, check: Callable[[], None] = lambda: None) -> list[Attacked]:
    """Say what fits and what the attacks find, and write it to request.output. check: may raise to end it.

    DataError where something does not fit, after everything that does was attacked.
    """
    attacks = {name: make_attack(name) for name in request.attacks or CHEAP}
    if request.list_attacks:
        for name in ATTACKS:
            display.line(f"{name}: {make_attack(name).sees}")
        return []
    capture = _capture(request)
    records = _records(request.records)
    checks = check_capture(capture)
    for record, work in records.values():
        check()
        checks += check_record(capture, record, work)
    for one in checks:
        display.line(f"{_word(one)}  {one.what}: {one.told}")
    for name, why in capture.left_out.items():
        display.line(f"absent  {name}: {why}")
    wrong = problems(checks)
    found: list[Attacked] = []
    if not request.only_check and not any(one.what in ("bundle", "parameters") for one in wrong):
        updates = _chosen(capture, request.devices, wrong, display)
        found = _attacked(capture, updates, records, attacks, request, display, check)
    _write(request.output, capture, checks, found)
    display.line(f"written to {request.output}")
    if wrong:
        raise DataError(
            f"{request.file} does not fit together in {len(wrong)} places: {wrong[0].what}: {wrong[0].told}",
            "capture the round again, or give the records that belong to it",
        )
    return found


def _capture(request: Request) -> Capture:
    if request.file is None:
        raise ConfigError("no captured round is given", "name the file that covey capture wrote")
    key = PublicKey.from_hex(request.coordinator_key) if request.coordinator_key else None
    return opened(read_file(request.file), Capture, str(request.file), key)


def _records(paths: Sequence[Path]) -> dict[str, tuple[DeviceRecord, Work]]:
    found = {}
    for path in paths:
        record = opened(read_file(path), DeviceRecord, str(path))
        if record.device_id in found:
            raise ConfigError(f"two records of {record.device_id}", "give that of the captured round")
        found[record.device_id] = record, work_of(record, str(path))
    return found


def _word(one: Check) -> str:
    return {True: "fits  ", False: "WRONG ", None: "unknown"}[one.holds]


def _chosen(capture: Capture, devices: Sequence[str], wrong: Sequence[Check], display: Display) -> list[CapturedUpdate]:
    known = {one.device_id: one for one in capture.updates}
    for name in devices:
        if name not in known:
            why = capture.left_out.get(name)
            raise ConfigError(
                f"no update of {name!r} is captured" + (f": {why}" if why else ""), f"there are {', '.join(known)}"
            )
    found = []
    for name in devices or known:
        if any(one.what.startswith(f"{name}: ") for one in wrong):
            display.line(f"{name} is not attacked: what is known of its update does not fit it")
        else:
            found.append(known[name])
    return found


def _attacked(
    capture: Capture,
    updates: Sequence[CapturedUpdate],
    records: dict[str, tuple[DeviceRecord, Work]],
    attacks: Mapping[str, Attack],
    request: Request,
    display: Display,
    check: Callable[[], None],
) -> list[Attacked]:
    from covey_coordinator.inversion.bundle_model import BundleModel

    bundle = read_bundle(capture.bundle)
    model = BundleModel(bundle)
    found = []
    with display.cells(0, len(updates) * len(attacks), "attacks") as ticker:
        for update in updates:
            record, work = records.get(update.device_id, (None, None))
            seen = seen_of(capture, update, record)
            truth = (numbers(work.x), numbers(work.y)) if work is not None else None
            for name, attack in attacks.items():
                check()
                one = _run(name, attack, model, seen, truth, request, check)
                found.append(one)
                ticker.finished(_told(one))
    for one in found:
        display.line(_told(one))
    return found


def seen_of(capture: Capture, update: CapturedUpdate, record: DeviceRecord | None = None) -> Seen:
    """What the coordinator held. The device's clipping and noise are known where its owner's record says them."""
    clip_norm = record.clip_norm if record is not None else 0.0
    return Seen(
        parameters=np.frombuffer(capture.parameters, "<f4"),
        update=np.frombuffer(update.update, "<f4"),
        plan=capture.invitation.plan,
        examples=update.num_examples,
        noise_std=clip_norm * record.noise_multiplier if record is not None else 0.0,
        clip_norm=clip_norm,
        device_id=update.device_id,
        round_number=capture.invitation.number,
    )


def _run(
    name: str,
    attack: Attack,
    model: AttackedModel,
    seen: Seen,
    truth: Truth | None,
    request: Request,
    check: Callable[[], None],
) -> Attacked:
    end = time.monotonic() + request.seconds

    def over() -> bool:
        check()
        return time.monotonic() >= end

    try:
        finding = attack.run(model, seen, seed=request.seed, stop=over)
    except CoveyError as exc:
        return Attacked(seen.device_id, name, None, None, str(exc))
    shown = truth[0] if truth is not None else finding.inputs
    input_range = _range(model.manifest, shown)
    graded = grade(finding, truth[0], truth[1], input_range) if truth is not None else None
    return Attacked(seen.device_id, name, finding, graded, "", truth, input_range)


def _range(manifest: Manifest, x: npt.NDArray[Any] | None) -> tuple[float, float]:
    """The bundle's declared range of inputs; that of these examples where it declares none."""
    low, high = manifest.input.minimum, manifest.input.maximum
    if low is not None and high is not None:
        return float(low), float(high)
    if x is None or not x.size or not x.max() > x.min():
        return 0.0, 1.0
    return float(x.min()), float(x.max())


def _told(one: Attacked) -> str:
    if one.finding is None:
        return f"{one.device_id}, {one.attack}: could not run: {one.problem}"
    parts = [f"{0 if one.finding.inputs is None else len(one.finding.inputs)} inputs"]
    if one.finding.labels is not None and one.finding.inputs is None:
        parts = [f"{len(one.finding.labels)} labels"]
    if one.grade is not None:
        if np.isfinite(one.grade.mse).any():
            parts.append(f"the closest {one.grade.psnr_db[one.grade.best]:.1f} dB")
        if one.grade.label_rate is not None:
            parts.append(f"{one.grade.label_rate:.0%} of the labels")
    return f"{one.device_id}, {one.attack}: {', '.join(parts)} in {one.finding.seconds:.1f} s"


# --- files


def _write(folder: Path, capture: Capture, checks: Sequence[Check], found: Sequence[Attacked]) -> None:
    facts = {
        "round": capture.invitation.round_id,
        "plan": msgspec.to_builtins(capture.invitation.plan),
        "checks": as_rows(checks),
        "left_out": capture.left_out,
        "attacks": [_facts(one) for one in found],
    }
    write_atomic(folder / "replay.json", json.dumps(facts, indent=2, default=str).encode(), mode=0o600)
    for one in found:
        if one.finding is not None and one.finding.inputs is not None and len(one.finding.inputs):
            name = f"{one.device_id}-{one.attack}"
            buffer = io.BytesIO()
            np.savez_compressed(buffer, inputs=one.finding.inputs)
            write_atomic(folder / f"{name}.npz", buffer.getvalue(), mode=0o600)
            truth = one.truth[0] if one.truth is not None else None
            drawn = beside(one.finding.inputs, one.input_range, _told(one), truth, one.grade)
            write_atomic(folder / f"{name}.png", drawn, mode=0o600)


def _facts(one: Attacked) -> dict[str, Any]:
    finding, graded = one.finding, one.grade
    facts: dict[str, Any] = {"device": one.device_id, "attack": one.attack, "problem": one.problem}
    if finding is not None:
        facts |= {
            "sees": finding.sees,
            "inputs": 0 if finding.inputs is None else len(finding.inputs),
            "labels": None if finding.labels is None else [int(label) for label in finding.labels],
            "score": finding.score,
            "seconds": finding.seconds,
            "notes": list(finding.notes),
        }
    if graded is not None:
        facts |= {
            "psnr_db": [None if np.isnan(value) else round(float(value), 2) for value in graded.psnr_db],
            "label_rate": graded.label_rate,
        }
    return facts
