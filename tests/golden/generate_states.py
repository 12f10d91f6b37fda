"""Golden files of a device's state_dir: what each holds byte by byte, and what it means.

`python tests/golden/generate_states.py` adds formats and never changes an old one: they are on the disks of devices in
the field, and every later agent must read them to the same meaning. tests/edge/test_states.py verifies all of them,
and that today's code still writes its own. Where a format changes, leave its entry in READERS, give the new one
another name there and in WRITERS, and let the reader know both.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from covey_edge import normalising
from covey_edge.boot import Boot, Folder, Staged
from covey_edge.config import PrivacySettings
from covey_edge.files import DISK
from covey_edge.ledger import Ledger
from covey_edge.model_store import Kept, ModelStore, Scored, Version
from covey_edge.opting_out import OptOut
from covey_edge.outbox import Entry, NumberFile, Outbox
from covey_edge.retired import RetiredKeys
from covey_edge.sent_log import SUMMARY, SentLog, Summary, Tally, entries, read_summary
from covey_edge.splitting import KEY_BYTES, KEY_NAME, split_key
from covey_edge.updates import _heard, _remember
from covey_edge.withheld import WithheldFile
from covey_protocol import device
from covey_protocol.blobs import blob_ref
from covey_protocol.messages import Invitation, Offer, TrainingPlan, Verdict
from covey_protocol.seals import SealingKey

FILE = Path(__file__).with_name("states-v1.json")
UPDATE, MODEL = bytes(range(40)), b"model" * 20
NOW_MS = 1_790_000_000_123
KEYS = [SealingKey.from_seed(bytes([number]) * 32).public for number in (1, 2)]
OFFER = Offer("run.1.a", blob_ref(UPDATE, 64), 7, {"loss_before": 0.5})
NOISY = PrivacySettings(clip_norm=1.0, noise_multiplier=0.5)


def invitation(work: str = "train", task: str = "") -> Invitation:
    plan = TrainingPlan(1, 0.1, compression="top-k" if work == "train" else "none", work=work, task=task)
    return Invitation("run.1.a", 1, NOW_MS, 60_000, blob_ref(MODEL), blob_ref(UPDATE), plan)


def later(work: str = "train", task: str = "") -> Invitation:
    """The next round of the same run."""
    return msgspec.structs.replace(invitation(work, task), round_id="run.2.b", number=2)


def _write_old_outbox(folder: Path) -> None:
    DISK.write(folder / "outbox.msgpack", msgspec.msgpack.encode(Entry(OFFER, UPDATE)), mode=0o600)


def _write_ledger(folder: Path) -> None:
    Ledger(folder, NOISY, now_ms=lambda: NOW_MS).count(bytes(32), evaluates=False)
    Ledger(folder, PrivacySettings()).count(bytes([1]) * 32, evaluates=False)
    Ledger(folder, PrivacySettings()).count(bytes([2]) * 32, evaluates=True)


def _write_retired(folder: Path) -> None:
    retired = RetiredKeys(folder / "retired.json")
    retired.retire("coordinator")(KEYS[:1])
    retired.retire("coordinator")(KEYS)


def _write_withheld(folder: Path) -> None:
    for asked in (invitation(), invitation(task="mood"), invitation("scaffold"), invitation("teach")):
        WithheldFile.of(folder, asked).store(asked, UPDATE)


def _read_withheld(folder: Path) -> object:
    asked = (later(), later(task="mood"), later("scaffold"), later("teach"))
    return [WithheldFile.of(folder, one).load(one).hex() for one in asked]


def _write_sent(folder: Path) -> None:
    log = SentLog(folder, NOISY, now_s=lambda: NOW_MS / 1000)
    log.keep(device.Keep("run.1.a", OFFER, UPDATE), invitation())
    log.heard(device.Judged(Verdict("run.1.a", "accepted")), ("run.1.a",))


def _write_summary(folder: Path) -> None:
    summary = Summary(3, {"2026-11": {"update": Tally(2, 80, "2026-11-01T00:00:00Z", "2026-11-02T00:00:00Z")}}, 1)
    DISK.write(folder / SUMMARY, msgspec.json.encode(summary) + b"\n", mode=0o600)


def _write_models(folder: Path) -> None:
    first, second = (blob_ref(data).sha256.hex() for data in (MODEL, UPDATE))
    federated = Version("federated", first, second, (KEYS[0].hex(),), 4, "run.4.d", NOW_MS)
    scored = Scored(NOW_MS, 4, 12, {"federated": (0.25, None)}, "kept")
    kept = Kept(federated, federated, refused=("0" * 64,), history=(scored,))
    ModelStore(folder).commit(kept, {federated.files[0]: MODEL, federated.files[1]: UPDATE})


def _read_models(folder: Path) -> object:
    kept = ModelStore(folder).load()
    assert kept is not None
    return [msgspec.to_builtins(kept), [data.hex() for data in ModelStore(folder).read(kept.used)]]


def _write_statistics(folder: Path) -> None:
    numbers = ((0.5, 2.0), (0.25, 1.0), (0.0, 1.0), (1.0, 3.0))
    statistics = normalising.Statistics("csv", (2,), ("a", "b"), 30, *numbers)
    normalising.keep(folder / "normalisation.json", statistics)


def _write_releases(folder: Path) -> None:
    releases = Folder(folder / "releases")
    releases.save(Boot("1.2", "1.1", "1.4", 2, ("1.3",), "1.3 was not healthy in 3 attempts"))
    releases.stage(Staged("1.5", again=True))
    _remember(folder / "releases" / "heard.json", 17)


def _read_releases(folder: Path) -> object:
    releases = Folder(folder / "releases")
    return [str(releases.boot()), str(releases.staged()), _heard(folder / "releases" / "heard.json")]


def _read_outbox(folder: Path) -> object:
    outbox = Outbox(folder)
    return [[msgspec.json.encode(offer).decode(), (outbox.update(offer) or b"").hex()] for offer in outbox.offers()]


# today's formats
WRITERS: dict[str, Callable[[Path], None]] = {
    "message numbers": lambda folder: NumberFile(folder / "sequence").store(1_700_000_000_000_001_000),
    "outbox": lambda folder: Outbox(folder).keep(Entry(OFFER, UPDATE)),
    "outbox of one entry": _write_old_outbox,
    "privacy ledger": _write_ledger,
    "retired keys": _write_retired,
    "opt-out": lambda folder: OptOut(folder, now_ms=lambda: NOW_MS).leave(),
    "withheld numbers": _write_withheld,
    "log of what left": _write_sent,
    "summary of that log": _write_summary,
    "models": _write_models,
    "statistics": _write_statistics,
    "key of the split": lambda folder: DISK.write(folder / KEY_NAME, bytes(range(KEY_BYTES)), mode=0o600),
    "releases": _write_releases,
}
# these and all there ever were
READERS: dict[str, Callable[[Path], object]] = {
    "message numbers": lambda folder: NumberFile(folder / "sequence").load(),
    "outbox": _read_outbox,
    "outbox of one entry": _read_outbox,
    "privacy ledger": lambda folder: msgspec.to_builtins(Ledger(folder, NOISY).book()),
    "retired keys": lambda folder: sorted(key.hex() for key in RetiredKeys(folder / "retired.json").of("coordinator")),
    "opt-out": lambda folder: OptOut(folder).since_ms(),
    "withheld numbers": _read_withheld,
    "log of what left": lambda folder: [msgspec.to_builtins(line) for line in entries(folder)],
    "summary of that log": lambda folder: msgspec.to_builtins(read_summary(DISK, folder)),
    "models": _read_models,
    "statistics": lambda folder: msgspec.to_builtins(normalising.kept(folder / "normalisation.json")),
    "key of the split": lambda folder: split_key(folder, make=False).hex(),
    "releases": _read_releases,
}


def written(name: str, folder: Path) -> dict[str, str]:
    """The files that today's code makes of this format, in hex, by their place in `folder`."""
    WRITERS[name](folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes().hex() for path in files}


def vectors() -> dict[str, dict[str, object]]:
    """What today's code writes, and reads of it."""
    made = {}
    for name in WRITERS:
        with tempfile.TemporaryDirectory() as folder:
            made[name] = {"files": written(name, Path(folder)), "means": READERS[name](Path(folder))}
    return made


def main() -> None:
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    FILE.write_text(json.dumps({**vectors(), **known}, indent=1) + "\n")


if __name__ == "__main__":
    main()
