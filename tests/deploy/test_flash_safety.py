"""`covey flash` on real block devices (loop): what must be refused is, what breaks in the middle is said, and no byte
of any other disk changes. Needs root. The computer's own disk is only asked about, never named to the command.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from kit_helpers import small_kit
from made_up_image import BOOKWORM, MIB, ROOT, TRIXIE, make_image

from covey_deploy import card_writing
from covey_deploy.disks import Machine, contents
from covey_deploy.fat import Fat
from covey_deploy.partitions import read_partitions
from covey_deploy.provisioning import init
from covey_edge.cli import main
from covey_protocol.errors import EXIT_CONFIG, EXIT_STORAGE, ConfigError, StorageError
from covey_protocol.seals import SealingKey

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("losetup"), reason="needs root and losetup (mount)"),
]
CARD = 96 * MIB


def attach(backing: Path, *options: str) -> Path:
    shown = subprocess.run(
        ["losetup", "--find", "--show", *options, backing], check=True, capture_output=True, text=True
    )
    return Path(shown.stdout.strip())


def detach(loop: Path) -> None:
    subprocess.run(["losetup", "--detach", loop], check=False, capture_output=True)


def sparse(path: Path, size: int, content: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Desk:
    """A fleet, a kit, images, a card, and two disks beside it that nobody may touch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machine = Machine()
        self.fleet = init(folder / "home", "home", ["broker.lan"])
        release = SealingKey.from_pem(self.fleet.release_key_path.read_bytes(), "release")
        (folder / "here.kit").write_bytes(small_kit(key=release))
        self.image = make_image(folder / "pios.img", BOOKWORM, root_mib=70)
        self.backing = sparse(folder / "card", CARD, b"what was on the card")
        self.card = attach(self.backing)
        self.beside = [sparse(folder / f"beside-{n}", 8 * MIB, f"disk {n}".encode() * 9999) for n in (1, 2)]
        self.others = [attach(path) for path in self.beside]
        self.before = self.seen()

    def seen(self) -> dict[Path, str]:
        return {path: digest(path) for path in (*self.beside, self.image)}

    def close(self) -> None:
        for loop in (self.card, *self.others):
            detach(loop)
        assert self.seen() == self.before

    def flash(self, *more: str, device: Path | None = None) -> int:
        command = ["flash", "--image", str(self.image), "--fleet-folder", str(self.fleet.path)]
        command += ["--kit", str(self.folder / "here.kit"), "--device", str(device or self.card), "--fixed-disk"]
        with pytest.raises(SystemExit) as ended:
            main([*command, *(more or ("--id", "kitchen-pi", "--yes"))])
        assert isinstance(ended.value.code, int)
        return ended.value.code


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.close()


def test_a_card_holds_the_image_with_the_devices_files_and_nothing_of_what_was_on_it(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    old_table = b"EFI PART".ljust(512)
    with desk.card.open("r+b") as file:  # an old GPT has its second table at the end
        file.seek(CARD - 512)
        file.write(old_table)
    assert desk.flash() == 0
    said = capsys.readouterr()
    assert f"{desk.card} is kitchen-pi" in said.out
    assert f"reading {desk.card} back: 100%" in said.err
    content, original = desk.backing.read_bytes(), desk.image.read_bytes()
    with desk.card.open("rb") as file:
        boot, root = read_partitions(file)
        fat = Fat(file, boot.start)
        for source in desk.fleet.device("kitchen-pi").iterdir():
            assert fat.read(f"covey/device/{source.name}") == source.read_bytes()
        assert fat.read("covey/kit/install.py")
    assert content[: boot.start] == original[: boot.start]
    assert content[root.start : len(original)] == original[root.start :]
    assert ROOT in content
    assert content[CARD - MIB :] == bytes(MIB)
    (entry,) = map(json.loads, (desk.fleet.path / "flashed.jsonl").read_text().splitlines())
    assert (entry["id"], entry["written"]) == ("kitchen-pi", hashlib.sha256(content[: len(original)]).hexdigest())


def refused(desk: Desk, capsys: pytest.CaptureFixture[str], device: Path | None = None) -> str:
    before = digest(desk.backing)
    assert desk.flash(device=device) == EXIT_CONFIG
    assert digest(desk.backing) == before
    assert not (desk.fleet.path / "flashed.jsonl").exists()
    return capsys.readouterr().err


@contextlib.contextmanager
def mounted(device: Path, folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", device, folder], check=True)
    try:
        subprocess.run(["sync"], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="needs mkfs.ext4 (e2fsprogs)")
def test_a_mounted_card_is_refused_and_so_is_one_with_a_mounted_partition(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mkfs.ext4", "-q", desk.card], check=True)
    with mounted(desk.card, desk.folder / "mnt"):
        assert f"{desk.card} is mounted at {desk.folder}/mnt; unmount it first" in refused(desk, capsys)
    image = sparse(desk.folder / "parted", CARD, desk.image.read_bytes())
    loop = attach(image)
    subprocess.run(["partx", "--add", loop], check=True)  # kernels without a parser for tables have no --partscan
    try:
        part = loop.with_name(f"{loop.name}p2")
        subprocess.run(["mkfs.ext4", "-q", "-L", "rootfs", part], check=True)
        assert f"{part} is a partition of {loop}, not a disk; give the whole disk: {loop}" in refused(
            desk, capsys, part
        )
        described = ["  partition 1: 0.00 GB bootfs", "  partition 2: 0.07 GB rootfs"]
        assert contents(desk.machine.find(loop)) == described
        with mounted(part, desk.folder / "root"):
            assert f"{loop} is mounted at {desk.folder}/root" in refused(desk, capsys, loop)
    finally:
        subprocess.run(["partx", "--delete", loop], check=False)
        detach(loop)


def test_the_computers_own_disk_is_refused_whatever_is_allowed(desk: Desk) -> None:
    own = [
        disk
        for disk in map(desk.machine.disk, os.listdir("/sys/block"))
        if "own system" in next(desk.machine.uses(disk), "")
    ]
    if not own:
        pytest.skip("this computer's system lies on no disk that it can see")
    for disk in own:
        with pytest.raises(ConfigError, match="own system"):
            desk.machine.check(disk, 0, fixed=True, large=True)
        with (
            pytest.raises(ConfigError, match=r"is in use|is read-only|may not be written"),
            card_writing.opened(disk, desk.machine),
        ):
            pytest.fail("it could be opened")  # the kernel's own refusal, behind ours


def test_a_disk_behind_a_loop_device_a_file_and_a_read_only_card_are_refused(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    above = attach(desk.card)
    try:
        assert f"{desk.card} is behind {above.name}" in refused(desk, capsys)
    finally:
        detach(above)
    assert f"{desk.backing} is not a disk" in refused(desk, capsys, desk.backing)
    locked = attach(desk.beside[0], "--read-only")
    try:
        assert f"{locked} is read-only" in refused(desk, capsys, locked)
    finally:
        detach(locked)


def test_a_card_that_is_too_small_is_refused_before_a_byte_is_written(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "too small: 0.01 GB, and the image has 0.08 GB" in refused(desk, capsys, desk.others[0])


def test_without_a_yes_and_without_a_terminal_nothing_is_erased(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    before = digest(desk.backing)
    assert desk.flash("--id", "kitchen-pi") == EXIT_CONFIG
    assert "would be erased, and nobody can be asked" in capsys.readouterr().err
    assert digest(desk.backing) == before


def test_two_at_once_do_not_write_the_same_card(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    with card_writing.opened(desk.machine.find(desk.card), desk.machine):
        assert f"{desk.card} is in use" in refused(desk, capsys)
    assert desk.flash() == 0


def test_a_damaged_image_a_wrong_checksum_and_a_wrong_system_are_found_before_the_card_is_touched(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digest(desk.backing)
    for image, complaint in (
        (make_image(desk.folder / "other.img", TRIXIE), "has Python 3.13"),
        (make_image(desk.folder / "32.img", {**BOOKWORM, "kernel7.img": b""}), "32-bit"),
    ):
        assert desk.flash("--id", "kitchen-pi", "--yes", "--image", str(image)) == EXIT_CONFIG
        assert complaint in capsys.readouterr().err
    assert desk.flash("--id", "kitchen-pi", "--yes", "--sha256", "0" * 64) != 0
    assert digest(desk.backing) == before


def test_a_card_that_lies_about_its_size_is_said_to_be_incomplete(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sparse file on a file system that is full: the kernel reports an I/O error, as of a counterfeit card."""
    small = desk.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20M", "tmpfs", small], check=True)
    try:
        loop = attach(sparse(small / "card", CARD))
        image = desk.folder / "full.img"  # without holes
        image.write_bytes(desk.image.read_bytes()[: 10 * MIB] + os.urandom(60 * MIB))
        try:
            assert desk.flash("--id", "kitchen-pi", "--yes", "--image", str(image), device=loop) == EXIT_STORAGE
            said = capsys.readouterr().err
            assert f"{loop} failed (Input/output error); it holds a part of the image and does not start" in said
            with loop.open("rb") as file:
                assert read_partitions(file) == []  # nothing starts from half a card
        finally:
            detach(loop)
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_card_that_is_pulled_out_is_said_to_be(desk: Desk) -> None:
    disk = desk.machine.find(desk.card)

    def pull(done: int) -> None:
        os.truncate(desk.backing, 0)
        subprocess.run(["losetup", "--set-capacity", desk.card], check=True)

    pieces = [os.urandom(4 * MIB) for _ in range(24)]
    with pytest.raises(StorageError) as raised, card_writing.opened(disk, desk.machine) as written:
        card_writing.write(written, pieces, pull)
    assert raised.value.what == (
        f"{desk.card} was pulled out or lost its connection; it holds a part of the image and does not start"
    )


def test_a_card_that_forgets_a_bit_is_found_by_reading_it_back(desk: Desk) -> None:
    disk = desk.machine.find(desk.card)
    piece = os.urandom(4 * MIB)
    with card_writing.opened(disk, desk.machine) as written:
        sha256 = card_writing.write(written, [piece, piece], lambda done: None)
        card_writing.verify(written, 8 * MIB, sha256, lambda done: None)
        with desk.backing.open("r+b") as file:  # under the kernel's copy of it
            file.seek(5 * MIB)
            file.write(bytes([piece[MIB] ^ 1]))
        with pytest.raises(StorageError, match="gives back other bytes"):
            card_writing.verify(written, 8 * MIB, sha256, lambda done: None)


def test_a_card_that_is_swapped_for_a_smaller_one_in_between_is_not_written(desk: Desk) -> None:
    disk = replace(desk.machine.find(desk.card), size=2 * CARD)
    with pytest.raises(ConfigError, match="too small"):
        desk.machine.check(desk.machine.disk(disk.name), CARD + 1, fixed=True)
