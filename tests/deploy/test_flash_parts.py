"""The parts of `covey flash` that need no disk: images and their sizes, what the kernel tells of disks, series of
cards, lines of progress. Disks are judged on made-up trees of sysfs and proc; real loop devices are in
test_flash_safety.py.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_image import TRIXIE, make_image

from covey_deploy.card_writing import opened
from covey_deploy.cli_flash import _write_file
from covey_deploy.device_table import Wanted, read_table
from covey_deploy.disks import LARGE, Disk, Machine
from covey_deploy.images import CHUNK, find_image
from covey_deploy.partitions import label, read_partitions
from covey_deploy.prepared import Prepared
from covey_deploy.progress_line import ProgressLine
from covey_deploy.series import finished, left_to_do, note, numbered, wait_for_next_card
from covey_protocol.errors import ConfigError, CoveyError, DataError

SECTOR = b"\0" * 510 + b"\x55\xaa"

# --- images


def several_streams(data: bytes) -> bytes:
    """As concatenation makes it."""
    third = len(data) // 3
    return b"".join(map(xz, (data[:third], data[third : 2 * third], data[2 * third :])))


def xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=0)


@pytest.mark.parametrize("packed", [bytes, xz, several_streams, gzip.compress], ids=["raw", "xz", "xz streams", "gz"])
def test_an_images_size_is_known_before_its_bytes_are_and_both_are_right(
    packed: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    data = SECTOR + bytes(CHUNK) + b"end".ljust(512)
    path = tmp_path / "an image"  # the name says nothing
    path.write_bytes(packed(data))
    image = find_image(path)
    assert image.size == len(data)
    assert b"".join(image.chunks()) == data
    assert image.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=5))
def test_the_index_of_an_xz_file_tells_its_size(sizes: list[int]) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(xz(SECTOR * size) for size in sizes))
        file.flush()
        assert find_image(Path(file.name)).size == 512 * sum(sizes)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("xz") or not shutil.which("zstd"), reason="needs xz-utils and zstd")
@pytest.mark.parametrize("command", ["xz -T2 --block-size=100KiB", "zstd -q"])
def test_files_of_the_real_programs_are_read(command: str, tmp_path: Path) -> None:
    data = SECTOR + b"abc".ljust(512) * 9000
    (tmp_path / "i.img").write_bytes(data)
    subprocess.run([*command.split(), "--keep", str(tmp_path / "i.img")], check=True)
    (packed,) = tmp_path.glob("i.img.*")
    image = find_image(packed)
    assert (image.size, b"".join(image.chunks())) == (len(data), data)
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(DataError, match="damaged"):
        list(find_image(packed).chunks())


def test_an_image_that_ends_early_is_damaged_and_not_a_smaller_one(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(SECTOR * 2)
    image = find_image(tmp_path / "i")
    (tmp_path / "i").write_bytes(SECTOR)
    with pytest.raises(DataError, match="512 bytes came out of it, not 1024"):
        list(image.chunks())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no partition table"),
        (b"PK\x03\x04" + bytes(600), "zip"),
        (bytes(1024), "no partition table"),
        (SECTOR + b"half", "no whole sectors"),
        (xz(SECTOR)[:-8], "damaged"),
        (xz(SECTOR) + bytes(4) + xz(SECTOR), "damaged"),
        (gzip.compress(SECTOR)[:-4], "damaged"),
    ],
)
def test_what_is_no_image_is_refused_by_its_reason(content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(content)
    with pytest.raises(CoveyError, match=complaint):
        find_image(tmp_path / "i")


def test_an_image_that_is_not_the_published_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(SECTOR)
    right = hashlib.sha256(SECTOR).hexdigest()
    assert find_image(tmp_path / "i", right.upper()).sha256 == right
    with pytest.raises(DataError, match="has the SHA-256"):
        find_image(tmp_path / "i", "0" * 64)


def test_partitions_of_both_kinds_of_tables_are_found_with_their_labels(tmp_path: Path) -> None:
    with make_image(tmp_path / "i", TRIXIE).open("rb") as file:
        boot, root = read_partitions(file)
        assert (boot.may_be_fat, root.may_be_fat, boot.end) == (True, False, root.start)
        assert label(file, boot) == "bootfs"
    efi = bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b") + bytes(16) + struct.pack("<QQ", 2048, 4095)
    header = bytearray(512)
    header[:8] = b"EFI PART"
    struct.pack_into("<QII", header, 72, 2, 4, 128)
    protective = bytearray(SECTOR)
    protective[450] = 0xEE
    disk = bytes(protective) + bytes(header) + bytes(128) + efi.ljust(128, b"\0") + bytes(256)
    (found,) = read_partitions(io.BytesIO(disk))
    assert (found.number, found.start, found.size, found.may_be_fat) == (2, 2**20, 2**20, True)
    assert read_partitions(io.BytesIO(bytes(512))) == []


# --- disks


class Tree:
    """A made-up sysfs and proc with a card reader sdb, whose card has two partitions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machine = Machine(folder / "sys", folder / "proc", folder / "dev")
        self.number = 0
        self.mounts: list[str] = []
        self.put("proc/swaps", "Filename Type Size Used Priority\n")
        self.add("sdb", "pci0/usb1/1-1/host0/block", size=64_000_000, parts=2)
        self.put("sys/devices/pci0/usb1/1-1/host0/block/sdb/device/model", "Card Reader")

    def put(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def link(self, path: str, target: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).symlink_to(self.folder / target)

    def add(self, name: str, where: str, size: int, *, removable: bool = False, parts: int = 0) -> None:
        """A disk; its numbers are 8:0 and on, its partitions' 9:0 and on."""
        place = f"sys/devices/{where}/{name}"
        self.put(f"{place}/size", str(size))
        self.put(f"{place}/ro", "0")
        self.put(f"{place}/removable", str(int(removable)))
        self.link(f"sys/block/{name}", place)
        self.link(f"sys/class/block/{name}", place)
        self.link(f"sys/dev/block/8:{self.number}", place)
        for part in range(1, parts + 1):
            self.put(f"{place}/{name}{part}/partition", str(part))
            self.link(f"sys/class/block/{name}{part}", f"{place}/{name}{part}")
            self.link(f"sys/dev/block/9:{16 * self.number + part}", f"{place}/{name}{part}")
        self.number += 1

    def mount(self, number: str, point: str, kind: str = "ext4", source: str = "none", options: str = "rw") -> None:
        self.mounts.append(f"1 1 {number} / {point} rw - {kind} {source} {options}\n")
        self.put("proc/self/mountinfo", "".join(self.mounts))

    def refusal(self, **allowed: bool) -> str:
        try:
            self.machine.check(self.machine.disk("sdb"), 2 * 10**9, **allowed)
        except ConfigError as exc:
            return exc.what
        return ""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_card_that_nobody_uses_may_be_written_and_is_listed(tree: Tree) -> None:
    assert tree.refusal() == ""
    (card,) = tree.machine.cards()
    assert (card.name, card.size, card.model, card.partitions) == (
        "sdb",
        32_768_000_000,
        "Card Reader",
        ("sdb1", "sdb2"),
    )


def mounted_through_lvm(tree: Tree) -> None:
    tree.add("dm-0", "virtual/block", size=1)
    tree.put("sys/devices/virtual/block/dm-0/dm/name", "vg-root")
    tree.link("sys/devices/virtual/block/dm-0/slaves/sdb2", "sys/devices/pci0/usb1/1-1/host0/block/sdb/sdb2")
    tree.mount("8:1", "/")


def held_by_raid(tree: Tree) -> None:
    tree.put("sys/devices/pci0/usb1/1-1/host0/block/sdb/sdb1/holders/md0", "")


def behind_a_loop(tree: Tree) -> None:
    tree.add("loop3", "virtual/block", size=1)
    tree.put("sys/devices/virtual/block/loop3/loop/backing_file", str(tree.folder / "dev/sdb1"))


def replaced(path: str, text: str) -> Callable[[Tree], None]:
    return lambda tree: tree.put(f"sys/devices/pci0/usb1/1-1/host0/block/sdb/{path}", text)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tree: tree.mount("9:1", "/media/my\\040card"), "is mounted at /media/my card"),
        (lambda tree: tree.mount("8:0", "/mnt"), "is mounted at /mnt"),
        (lambda tree: tree.mount("9:2", "/"), "holds this computer's own system (mounted at /)"),
        (
            lambda tree: tree.mount("9:1", "/boot/firmware"),
            "holds this computer's own system (mounted at /boot/firmware)",
        ),
        (mounted_through_lvm, "holds this computer's own system (mounted at /)"),
        (held_by_raid, "is part of md0 (LVM, RAID or encryption)"),
        (behind_a_loop, "is behind loop3"),
        (replaced("size", "0"), "has no card in it"),
        (replaced("ro", "1"), "is read-only"),
        (replaced("size", "3900000"), "is too small: 2.00 GB, and the image has 2.00 GB"),
        (replaced("size", str(LARGE // 512 + 1)), "this is large for a card"),
    ],
)
def test_a_disk_that_must_not_be_written_is_refused_by_its_reason(
    change: Callable[[Tree], None], complaint: str, tree: Tree
) -> None:
    change(tree)
    assert complaint in tree.refusal()
    if "small" not in complaint:
        assert tree.machine.cards() == []


def test_built_in_disks_and_parts_of_cards_need_more_than_a_name(tree: Tree) -> None:
    tree.add("nvme0n1", "pci0/nvme", size=64_000_000)
    tree.add("mmcblk0", "platform/mmc0/mmc0:1/block", size=64_000_000)
    tree.put("sys/devices/platform/mmc0/mmc0:1/block/mmcblk0/device/type", "SD")
    tree.add("mmcblk0boot0", "platform/mmc0/mmc0:1/block", size=64_000_000)
    disks = {name: tree.machine.disk(name) for name in ("nvme0n1", "mmcblk0", "mmcblk0boot0")}
    tree.machine.check(disks["mmcblk0"], 0)
    with pytest.raises(ConfigError, match="built-in disk"):
        tree.machine.check(disks["nvme0n1"], 0)
    tree.machine.check(disks["nvme0n1"], 0, fixed=True)
    with pytest.raises(ConfigError, match="is not a card"):
        tree.machine.check(disks["mmcblk0boot0"], 0, fixed=True, large=True)


def test_a_mounted_disk_is_refused_whatever_is_allowed(tree: Tree) -> None:
    tree.mount("9:2", "/")
    assert "own system" in tree.refusal(fixed=True, large=True)


def test_a_disk_that_came_under_the_name_of_the_confirmed_one_is_not_opened(tree: Tree) -> None:
    tree.put("dev/sdb", "a backup of years")
    disk = tree.machine.disk("sdb")
    with opened(disk, tree.machine) as written:
        assert written.disk == disk
    tree.put("sys/devices/pci0/usb1/1-1/host0/block/sdb/device/model", "Backup Disk")
    with pytest.raises(ConfigError, match=r"is another disk now \(.*Backup Disk, 32\.8 GB"):
        opened(disk, tree.machine).__enter__()


def test_an_image_is_never_written_over_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "sdb")
    with pytest.raises(ConfigError, match="is no file"):
        _write_file(tmp_path / "sdb", True, cast(Prepared, None))
    assert (tmp_path / "sdb").is_fifo()


def test_files_folders_and_missing_names_are_no_disks(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", Path("/dev/null")):
        with pytest.raises(ConfigError, match=r"is not a disk|there is no"):
            Machine().find(path)


# --- series


def test_numbers_and_tables_name_devices_once_each(tmp_path: Path) -> None:
    assert [one.device_id for one in numbered("pi-{n:03}", 3, 9)] == ["pi-009", "pi-010", "pi-011"]
    for pattern in ("pi", "pi-{m}", "pi-{", "{n.real.x}", "bad id {n}"):
        with pytest.raises(ConfigError):
            numbered(pattern, 2, 1)
    table = tmp_path / "t.csv"
    table.write_text("id, hostname, data\nkitchen, kitchen.lan, k.npz\nhall,,\n")
    assert read_table(table) == [Wanted("kitchen", "kitchen.lan", str(tmp_path / "k.npz")), Wanted("hall")]
    for text in ("name\na\n", "id\n", "id,hostname\na\n", "id\na\na\n", "id\na,b\n", "id\noperator\n", 'id\n"a\n'):
        table.write_text(text)
        with pytest.raises(ConfigError):
            read_table(table)


def test_a_series_that_was_broken_off_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    journal = tmp_path / "flashed.jsonl"
    assert finished(journal) == set()
    note(journal, "pi-1", "a" * 64, "/dev/sdb", "b" * 64)
    note(journal, "pi-2", "a" * 64, "/dev/sdb", "b" * 64)
    journal.write_bytes(journal.read_bytes()[:-20])  # the power went
    assert finished(journal) == {"pi-1"}
    note(journal, "pi-2", "a" * 64, "/dev/sdb", "b" * 64)
    assert finished(journal) == {"pi-1", "pi-2"}
    assert [one.device_id for one in left_to_do(numbered("pi-{n}", 3, 1), finished(journal))] == ["pi-3"]


def test_the_next_card_is_waited_for_until_the_last_one_was_taken_out(tree: Tree) -> None:
    sizes, looks = [64, 64, 0, 0, 64, 64], []

    def look(seconds: float) -> None:
        looks.append(seconds)
        replaced("size", str(sizes[min(len(looks), len(sizes) - 1)]))(tree)

    wait_for_next_card("sdb", tree.machine, look)
    assert len(looks) == 5  # four until it is there, and one for the kernel


def test_progress_is_a_changing_line_on_a_terminal_and_rare_lines_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, ending in ((Terminal(), "\n"), (io.StringIO(), "\n")):
        now = iter(range(0, 1000, 10))
        line = ProgressLine("writing /dev/sdb", 100 * 10**6, stream, lambda now=now: float(next(now)))  # type: ignore[misc]
        for done in range(10, 101, 10):
            line(done * 10**6)
        assert stream.getvalue().endswith(ending)
        assert "100% of 0.10 GB, 1.0 MB/s, 100 s" in stream.getvalue()
        assert "50% of 0.10 GB, 1.0 MB/s, 50 s left" in stream.getvalue() or not stream.isatty()
        assert stream.getvalue().count("\n") == (1 if stream.isatty() else 5)


def test_a_disk_says_what_it_is() -> None:
    disk = Disk("sdb", Path("/dev/sdb"), 32 * 10**9, True, False, "", ())
    assert disk.described() == "/dev/sdb: unknown model, 32.0 GB, removable"
