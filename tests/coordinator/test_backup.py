"""Backup and restore of a coordinator: what comes back, what is refused, and what a cut or a full disk may leave."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import random
import shutil
import sqlite3
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from life.power import PowerCut, PoweredDisk, State

from covey_coordinator.backup import archive, making, passphrase, restoring
from covey_coordinator.backup.archive import HEADER, KEYS, MANIFEST, SEALED, Entry, Header, Manifest
from covey_coordinator.backup.cli import backup_command, restore_command
from covey_coordinator.backup.content import content_of
from covey_coordinator.backup.making import back_up
from covey_coordinator.backup.passphrase import encrypted
from covey_coordinator.backup.restoring import UNFINISHED, next_number, refuse_unfinished, relocated, restore
from covey_coordinator.orders import Revocations
from covey_coordinator.records import ACCEPTED, DeviceVerdict
from covey_coordinator.store import SCHEMA, Checkpoint, RunStore, only_one
from covey_edge.outbox import NumberFile
from covey_edge.retired import RetiredKeys
from covey_protocol.blobs import blob_ref
from covey_protocol.codec import Sequence
from covey_protocol.encryption import KeyPair
from covey_protocol.errors import ConfigError, CoveyError, DataError, StorageError
from covey_protocol.messages import Invitation, Offer, TrainingPlan
from covey_protocol.round import Phase, RoundSettings
from covey_protocol.seals import SealingKey

D = 4
RESERVED = 1_700_000_000_000_000
CREATED_US = RESERVED
WORDS = "correct horse battery staple"
CONFIG = """
fleet = "home"
run = "bell"
bundle = "bell.covey"
key_file = "coordinator.pem"
rounds = 3

[broker]
url = "mqtts://broker.lan:8883"
ca_file = "{outside}"
key_file = "tls/key.pem"   # of the certificate
password_file = "password"
[devices]
a = "00"
"""
SECRETS = {"coordinator.pem": b"", "tls/key.pem": b"the key of TLS", "password": b"hunter2 hunter2"}


def update(value: float) -> bytes:
    return np.full(D, value, "<f4").tobytes()


def open_round(store: RunStore, number: int, *, key: KeyPair | None = None) -> str:
    blob, round_id = blob_ref(bytes(4 * D)), f"bell.{number}.abc"
    sealed = key.public if key is not None else msgspec.UNSET
    plan = TrainingPlan(1, 0.5, shuffle_seed=7)
    made = Invitation(round_id, number, 1000 * number, 60_000, blob, blob, plan, ("a", "b"), encryption_key=sealed)
    store.open_round("bell", made, RoundSettings(1, 20.0, 3.0, 4 * D), 1000 * number, key)
    return round_id


def deliver(store: RunStore, round_id: str, device_id: str, value: float) -> None:
    data = update(value)
    store.store_update(device_id, Offer(round_id, blob_ref(data, 8), 7, {"training_loss": 0.5}), data)


def publish(store: RunStore, number: int) -> None:
    round_id = open_round(store, number)
    deliver(store, round_id, "a", number)
    checkpoint = Checkpoint(number, np.full(D, number, np.float32), b"state %d" % number)
    store.conclude(round_id, Phase.PUBLISHED, "", [DeviceVerdict("a", ACCEPTED, "", 0.5)], checkpoint)


@pytest.fixture(autouse=True)
def _quick_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second each; a backup says itself how much it took."""
    monkeypatch.setattr(making, "SCRYPT_N", 2**10)
    monkeypatch.setattr(passphrase, "SCRYPT_N", 2**10)


@pytest.fixture(scope="module")
def made_home(tmp_path_factory: pytest.TempPathFactory, coordinator_key: SealingKey) -> Path:
    """A coordinator's folder with two rounds that are over and an encrypted one under way, and the fleet's files."""
    tmp_path = tmp_path_factory.mktemp("made")
    folder = tmp_path / "home"
    (folder / "tls").mkdir(parents=True)
    (tmp_path / "ca.pem").write_bytes(b"the authority")
    (folder / "coordinator.toml").write_text(CONFIG.format(outside=tmp_path / "ca.pem"))
    (folder / "bell.covey").write_bytes(b"a bundle")
    for name, data in {**SECRETS, "coordinator.pem": coordinator_key.pem()}.items():
        (folder / name).write_bytes(data)
    store = RunStore(folder / "runs" / "bell")
    publish(store, 1)
    publish(store, 2)
    deliver(store, open_round(store, 3, key=KeyPair.of(bytes(range(32)))), "a", 3)
    store.close()
    runs = folder / "runs"
    NumberFile(runs / "home.sequence").store(RESERVED)
    RetiredKeys(runs / "home.retired.json").retire("a")([coordinator_key.public])
    Revocations(runs, "home").revoke("b", "stolen")
    return folder


@pytest.fixture
def home(made_home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_home, tmp_path / "home"))


def taken(home: Path, words: str | None = None, name: str = "home.backup") -> Path:
    out = home.parent / name
    back_up(home / "coordinator.toml", out, words)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_store(folder: Path) -> None:
    """That the run in this folder is as the fixture left it."""
    store = RunStore(folder)
    newest = store.newest_checkpoint("bell", D)
    assert newest is not None
    assert (newest.number, newest.state, newest.parameters.tolist()) == (2, b"state 2", [2.0] * D)
    row = store._database.execute("SELECT sha256 FROM devices WHERE round = 'bell.3.abc' AND id = 'a'").fetchone()
    assert (folder / "updates" / f"{row[0]}.f32").read_bytes() == update(3)
    store.close()


# --- what comes back


def test_a_restored_coordinator_has_everything_but_the_keys(home: Path, tmp_path: Path) -> None:
    made = back_up(home / "coordinator.toml", tmp_path / "home.backup", None)
    assert set(made.left_out) == {*SECRETS, "the keys of encrypted rounds"}
    assert made.path.stat().st_mode & 0o777 == 0o600
    done = restore(made.path, tmp_path / "new", lambda: pytest.fail("no passphrase is needed"))
    before, after = contents(home), contents(tmp_path / "new")
    changed = {"coordinator.toml", "runs/home.sequence", "runs/bell/coordinator.sqlite"}
    gone = {*SECRETS, "runs/bell/keys/bell.3.abc.x25519"}
    same = {
        name: data
        for name, data in before.items()
        if name not in changed | gone and not name.endswith(("-wal", "-shm"))
    }
    assert {name: after.get(name) for name in same} == same
    assert set(after) == set(same) | changed | {"outside/0/ca.pem"}
    assert "runs/home.revoked/b.json" in after
    assert after["outside/0/ca.pem"] == b"the authority"
    assert b'ca_file = "outside/0/ca.pem"' in after["coordinator.toml"]
    assert done.unchanged == {}
    same_store(tmp_path / "new" / "runs" / "bell")


def test_keys_come_back_with_their_passphrase_alone(home: Path, tmp_path: Path) -> None:
    path = taken(home, WORDS)
    with pytest.raises(ConfigError, match="do not open with this passphrase"):
        restore(path, tmp_path / "new", lambda: "another one entirely")
    assert not (tmp_path / "new").exists()
    assert restore(path, tmp_path / "new", lambda: WORDS).with_keys
    for name in (*SECRETS, "runs/bell/keys/bell.3.abc.x25519"):
        assert (tmp_path / "new" / name).read_bytes() == (home / name).read_bytes()
        assert (tmp_path / "new" / name).stat().st_mode & 0o777 == 0o600
    restore(path, tmp_path / "without", None)
    assert not any((tmp_path / "without" / name).exists() for name in SECRETS)


def test_keys_are_put_nowhere_but_into_the_new_folder(home: Path, tmp_path: Path, coordinator_key: SealingKey) -> None:
    def astray(members: dict[str, bytes]) -> None:
        salt = bytes.fromhex(msgspec.json.decode(members[HEADER], type=Header).salt)
        members[KEYS] = encrypted({"folder/../../x": b"x"}, WORDS, salt, members[HEADER])

    path = taken(home, WORDS)
    rebuilt(path, coordinator_key, astray)
    with pytest.raises(DataError, match="outside of its folder"):
        restore(path, tmp_path / "new", lambda: WORDS)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", [None, WORDS], ids=["without keys", "with keys"])
def test_no_secret_can_be_read_in_the_file(home: Path, words: str | None) -> None:
    data = taken(home, words).read_bytes()
    for secret in [(home / name).read_bytes() for name in SECRETS] + [bytes(range(32)), WORDS.encode()]:
        assert secret not in data


def test_a_password_in_the_address_makes_the_whole_file_secret(home: Path, tmp_path: Path) -> None:
    config = home / "coordinator.toml"
    config.write_text(config.read_text().replace("mqtts://", "mqtts://me:hunter3@"))
    with pytest.raises(ConfigError, match=r"has a password in broker\.url"):
        taken(home)
    path = taken(home, WORDS)
    assert b"hunter3" not in path.read_bytes()
    restore(path, tmp_path / "new", lambda: WORDS)
    assert "hunter3" in (tmp_path / "new" / "coordinator.toml").read_text()


def test_only_the_runs_come_back_where_the_configuration_is_kept_elsewhere(home: Path, tmp_path: Path) -> None:
    restore(taken(home), tmp_path / "volume", None, only_runs=True)
    assert {path.name for path in (tmp_path / "volume").iterdir()} == {
        *("bell", "home.sequence", "home.retired.json", "home.revoked")
    }
    same_store(tmp_path / "volume" / "bell")


def test_tasks_have_a_folder_each_and_share_the_fleets_files(home: Path, tmp_path: Path) -> None:
    tasks = '[[tasks]]\nname = "one"\nbundle = "one.covey"\n[[tasks]]\nname = "two"\n[tasks.trusted]\npath = "mine"\n'
    config = home / "coordinator.toml"
    config.write_text(config.read_text() + tasks)
    for name in ("one", "two"):
        (home / f"{name}.covey").write_bytes(name.encode())
        RunStore(home / "runs" / f"bell-{name}").close()
    (home / "mine" / "cats").mkdir(parents=True)
    (home / "mine" / "cats" / "1.png").write_bytes(b"a cat")
    assert content_of(config).runs == ("bell-one", "bell-two")
    restore(taken(home), tmp_path / "new", None)
    found = contents(tmp_path / "new")
    assert {"runs/bell-one/coordinator.sqlite", "runs/bell-two/coordinator.sqlite", "one.covey"} <= set(found)
    assert found["mine/cats/1.png"] == b"a cat"


def test_paths_are_corrected_and_nothing_else_of_the_settings() -> None:
    text = 'a = "/x/y"  # "/x/y"\n[b]\nc = ["/x/y"]\n'
    assert relocated('a = "/x/y"  # "/x/y"\n', {"/x/y": "o/y"}) == 'a = "o/y"  # "/x/y"\n'
    assert relocated(text, {"/x/y": "o/y"}) is None  # left to the operator, not half done


def test_what_is_there_is_never_overwritten(home: Path, tmp_path: Path) -> None:
    path = taken(home)
    with pytest.raises(ConfigError, match="exists already"):
        taken(home)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "diary").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        restore(path, tmp_path / "used", None)
    assert contents(tmp_path / "used") == {"diary": b"mine"}
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)  # of a new file system
    restore(path, tmp_path / "volume", None)


def test_nothing_is_restored_beside_the_coordinator_that_still_runs(home: Path, tmp_path: Path) -> None:
    path = taken(home)
    with only_one(home / "runs" / "bell"):
        taken(home, name="while-it-runs.backup")
        with pytest.raises(ConfigError, match="stop it first, for good"):
            restore(path, tmp_path / "new", None)
    restore(path, tmp_path / "new", None)


# --- message numbers


def test_message_numbers_begin_beyond_all_that_may_have_been_used_since() -> None:
    minute = 60_000_000
    for ahead in (-minute, 0, 3600 * minute):  # how far the old coordinator's numbers ran ahead of its clock
        reserved = CREATED_US + ahead
        for gone in (0, minute, 10_000 * minute):
            used = max(reserved, CREATED_US + ahead) + gone + Sequence.BLOCK
            assert next_number(reserved, CREATED_US, CREATED_US + gone) > used
    assert next_number(RESERVED, CREATED_US, CREATED_US - minute) > RESERVED  # a clock that is behind


def test_a_restored_coordinator_says_nothing_under_an_old_number(home: Path, tmp_path: Path) -> None:
    restore(taken(home), tmp_path / "new", None, now_us=RESERVED - 10**9)
    numbers = NumberFile(tmp_path / "new" / "runs" / "home.sequence")
    assert Sequence(0, numbers.load(), numbers.store).next() > RESERVED
    assert (home / "runs" / "home.sequence").read_text() == str(RESERVED)


# --- what is refused


def rebuilt(path: Path, key: SealingKey, change: Callable[[dict[str, bytes]], Any]) -> None:
    """The backup once more with other members, and hashes and seal that fit."""
    with tarfile.open(path) as tar:
        members = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    del members[MANIFEST], members["seal"]
    change(members)
    entries = {name: Entry(len(data), hashlib.sha256(data).hexdigest()) for name, data in members.items()}
    members[MANIFEST] = msgspec.json.encode(Manifest(entries))
    members["seal"] = key.seal(SEALED + members[MANIFEST])
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def with_header(**fields: Any) -> Callable[[dict[str, bytes]], Any]:
    def change(members: dict[str, bytes]) -> None:
        header = msgspec.json.decode(members[HEADER], type=Header)
        members[HEADER] = msgspec.json.encode(msgspec.structs.replace(header, **fields))

    return change


REFUSED = {
    "a newer format": (
        with_header(format=2, covey="9.9"),
        ConfigError,
        r"made by covey 9\.9 in format 2.*update covey",
    ),
    "a newer store": (with_header(schema=len(SCHEMA) + 1), ConfigError, "store of version .*update covey"),
    "a file above the folder": (lambda m: m.update({"folder/../x": b"x"}), DataError, "no backup has"),
    "an absolute file": (lambda m: m.update({"/etc/x": b"x"}), DataError, "no backup has"),
    "a file elsewhere": (lambda m: m.update({"x": b"x"}), DataError, "no backup has"),
    "runs above the folder": (with_header(runs_in="../old"), DataError, "outside of its folder"),
    "runs elsewhere": (with_header(runs_in="/var/lib/old"), DataError, "outside of its folder"),
    "settings above the folder": (with_header(config="../coordinator.toml"), DataError, "outside of its folder"),
    "numbers of a fleet elsewhere": (with_header(fleet="../old"), ConfigError, "cannot be used"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_backup_is_refused_by_name(what: str, home: Path, tmp_path: Path, coordinator_key: SealingKey) -> None:
    change, error, words = REFUSED[what]
    path = taken(home)
    rebuilt(path, coordinator_key, change)
    with pytest.raises(error, match=words):
        restore(path, tmp_path / "new", None)
    assert not (tmp_path / "new").exists()


def test_a_backup_that_was_cut_or_changed_anywhere_is_refused(home: Path, tmp_path: Path) -> None:
    """Cut at every 2 KiB; one bit changed at places of every part (tar's padding is all that may differ)."""
    path = taken(home, WORDS)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        parts = [(one.offset_data, one.offset_data + one.size) for one in tar]
    end = parts[-1][1]
    rng = random.Random(0)
    for place in range(0, end, 2048):
        path.write_bytes(data[:place])
        with pytest.raises(DataError):
            archive.read(path, lambda *_: None)
    inside = [rng.randrange(start, stop) for start, stop in parts for _ in range(3)]
    for place in inside:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        with pytest.raises(CoveyError) as caught:
            restoring.checked(path)
        assert isinstance(caught.value, (DataError, ConfigError))
    path.write_bytes(data)
    restoring.checked(path)
    with pytest.raises(DataError):
        restore(_torn(path, end), tmp_path / "new", None)
    assert not (tmp_path / "new").exists()


def _torn(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[: size // 2])
    return path


def test_another_coordinators_backup_is_refused_where_its_key_is_named(home: Path, tmp_path: Path) -> None:
    path = taken(home)
    with pytest.raises(ConfigError, match="is of the coordinator with the key"):
        restore(path, tmp_path / "new", None, sealed_by=SealingKey.generate().public)


def test_a_file_of_another_kind_is_no_backup(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello")
    (tmp_path / "empty").touch()
    with tarfile.open(tmp_path / "tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("hello"))
    for name in ("x", "empty", "tar"):
        with pytest.raises(DataError, match=r"not a backup|damaged"):
            restoring.checked(tmp_path / name)


def test_a_damaged_database_is_not_backed_up(home: Path) -> None:
    path = home / "runs" / "bell" / "coordinator.sqlite"
    sqlite3.connect(path).execute("PRAGMA wal_checkpoint(TRUNCATE)").connection.close()
    data = bytearray(path.read_bytes())
    data[4096 * 2 : 4096 * 3] = bytes(4096)
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"damaged|cannot copy"):
        taken(home)
    assert not (home.parent / "home.backup").exists()


# --- while the coordinator works


def _work(folder: Path, started: Any, stop: Any) -> None:
    store, number = RunStore(folder), 4
    store.conclude("bell.3.abc", Phase.ABANDONED, "", [])
    while not stop.is_set():
        publish(store, number)
        store.prune("bell", 10**15)
        number += 1
        if number == 20:
            started.set()
    store.close()


def taken_in_the_end(home: Path, name: str) -> Path:
    """Where rounds end faster than a busy machine copies them, `covey backup` says so: "try again"."""
    for _ in range(20):
        try:
            return taken(home, name=name)
        except StorageError as exc:
            if "change faster than they are copied" not in exc.what:
                raise
    raise AssertionError("never taken")


def test_a_backup_of_a_coordinator_at_work_is_of_one_moment(home: Path, tmp_path: Path) -> None:
    """A process ends rounds, and tidies old ones away, as fast as the disk bears it."""
    context = multiprocessing.get_context("fork")
    started, stop = context.Event(), context.Event()
    worker = context.Process(target=_work, args=(home / "runs" / "bell", started, stop))
    worker.start()
    try:
        assert started.wait(60), worker.exitcode
        paths = [taken_in_the_end(home, f"{number}.backup") for number in range(3)]
    finally:
        stop.set()
        worker.join(60)
    newest = []
    for path in paths:
        restore(path, tmp_path / path.stem, None)
        store = RunStore(tmp_path / path.stem / "runs" / "bell")
        rows = store._database.execute("SELECT number FROM checkpoints ORDER BY number DESC LIMIT 1").fetchall()
        found = store.newest_checkpoint("bell", D)
        assert found is not None
        assert found.number == rows[0][0]  # none was passed over
        assert found.parameters[0] == found.number
        newest.append(found.number)
        assert [store.read_update(f"bell.{found.number}.abc", "a").tolist()] == [[found.number] * D]
        store.close()
    assert newest == sorted(newest)
    assert newest[0] >= 19


# --- cuts and full disks

STATES: tuple[State, ...] = ("least", "most", "mixed")


def steps_of(disk: PoweredDisk, act: Callable[[], Any]) -> list[str]:
    steps: list[str] = []
    disk.on_step = steps.append
    with disk.watched():
        act()
    return steps


def cut_at(disk: PoweredDisk, act: Callable[[], Any], place: int) -> None:
    """Do it, but lose the power before this step."""
    left = iter(range(place, -1, -1))

    def step(what: str) -> None:
        if next(left, 0) == 0:  # and no step after it
            raise PowerCut

    disk.on_step = step
    with disk.watched(), pytest.raises(PowerCut):
        act()


def test_a_backup_that_loses_power_at_any_step_is_whole_or_not_there(home: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    disk = PoweredDisk(tmp_path / "disk")
    out, rng = tmp_path / "disk" / "home.backup", random.Random(0)
    act = lambda: back_up(home / "coordinator.toml", out, None)  # noqa: E731
    steps = steps_of(disk, act)
    assert any(step.startswith("rename") for step in steps)
    for place in range(len(steps)):
        out.unlink(missing_ok=True)
        disk.adopt()
        cut_at(disk, act, place)
        disk.lose_power(STATES[place % 3], rng)
        if out.exists():
            restoring.checked(out)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_restore_that_loses_power_at_any_step_is_done_or_begun_again(home: Path, tmp_path: Path, every: int) -> None:
    path, to, rng = taken(home), tmp_path / "disk" / "new", random.Random(0)
    (tmp_path / "disk").mkdir()
    disk = PoweredDisk(tmp_path / "disk")
    act = lambda: restore(path, to, None, now_us=RESERVED)  # noqa: E731
    count = len(steps_of(disk, act))
    disk.check_complete()
    whole = contents(to)
    finished = 0
    for place in range(count - 1, -1, -every):
        _clear(to)
        disk.adopt()
        cut_at(disk, act, place)
        disk.lose_power(STATES[place % 3], rng)
        begun = to.is_dir() and (to / UNFINISHED).exists()
        if (to / "coordinator.toml").exists() and not begun:
            assert contents(to) == whole
            finished += 1
            continue
        assert begun or not any(to.glob("[!.]*"))  # covey serve refuses it, or there is nothing to serve
        steps_of(disk, act)
        assert contents(to) == whole
    assert finished >= 1


def _clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def test_serving_from_a_restore_that_was_cut_off_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / UNFINISHED).touch()
    with pytest.raises(ConfigError, match="was not finished; run covey restore once more"):
        refuse_unfinished(tmp_path, tmp_path / "new")
    restore(taken(home), tmp_path / "new", None)
    refuse_unfinished(tmp_path / "new", tmp_path / "new" / "runs")


def test_a_full_disk_leaves_nothing_under_the_backups_name_and_says_so(home: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    disk, out = PoweredDisk(tmp_path / "disk"), tmp_path / "disk" / "home.backup"
    disk.full = lambda: True
    with disk.watched(), pytest.raises(StorageError, match=r"No space left on device\).*free some space"):
        back_up(home / "coordinator.toml", out, None)
    assert not list((tmp_path / "disk").iterdir())
    path, to = taken(home), tmp_path / "disk" / "new"
    left = iter(range(20))
    disk.full = lambda: next(left, None) is None
    with disk.watched(), pytest.raises(StorageError, match=r"No space left on device\).*free some space"):
        restore(path, to, None)
    with pytest.raises(ConfigError, match="was not finished"):
        refuse_unfinished(to)
    restore(path, to, None)


# --- as commands


def test_the_commands_say_what_is_left_to_do(home: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_text(WORDS + "\n")
    out, new = str(tmp_path / "home.backup"), tmp_path / "new"
    said = CliRunner().invoke(
        backup_command,
        [str(home / "coordinator.toml"), "--out", out, "--with-keys", "--passphrase-file", str(words)],
        catch_exceptions=False,
    )
    assert said.output.startswith(f"{out}: ")
    assert "with keys" in said.output
    said = CliRunner().invoke(restore_command, [out, "--check"], catch_exceptions=False)
    assert "is whole" in said.output
    assert "fleet home, run bell" in said.output
    said = CliRunner().invoke(
        restore_command, [out, "--to", str(new), "--passphrase-file", str(words)], catch_exceptions=False
    )
    assert said.output.endswith(f"then: covey serve --config {new / 'coordinator.toml'}\n")
    assert "revocations" in said.output
    assert WORDS not in said.output
    said = CliRunner().invoke(
        restore_command, [out, "--to", str(tmp_path / "bare"), "--without-keys"], catch_exceptions=False
    )
    for name in SECRETS:
        assert f"missing: put {name} into {tmp_path / 'bare'}" in said.output


def test_a_short_passphrase_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("hunter2\n")
    with pytest.raises(ConfigError, match="7 characters; take 12 or more"):
        passphrase.asked(tmp_path / "words", new=True)
