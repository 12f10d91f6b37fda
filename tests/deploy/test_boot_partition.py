"""The boot partition: FAT written without mounting, systems told apart, and what a card gets."""

from __future__ import annotations

import io
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_image import BOOKWORM, BOOT_MIB, BOOT_START, MIB, ROOT, TRIXIE, boot_file, format_fat, issue, make_image

from covey_deploy.boot_partition import check, customise, detect, with_words
from covey_deploy.card import Card, Login, System, Wifi, card
from covey_deploy.fat import Fat
from covey_deploy.partitions import read_at, read_partitions
from covey_deploy.provisioning import NewDevice, add_devices, init
from covey_protocol.errors import ConfigError, DataError, StorageError

PASSWORD = "correct horse battery"
SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE9mYWtlZmFrZWZha2VmYWtl me@desk"


class Kit:
    def files(self) -> Mapping[str, bytes]:
        return {
            "manifest.json": b"{}",
            "seal": b"s" * 64,
            "install.py": b"",
            "wheels/a-1-py3-none-any.whl": b"w" * 9000,
        }


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of kitchen_pi, as `covey provision` makes it."""
    folder = tmp_path_factory.mktemp("fleet") / "home"
    fleet = init(folder, "home", ["broker.lan"])
    add_devices(folder, [NewDevice("kitchen_pi")])
    return fleet.device("kitchen_pi")


def made(device: Path, system: System, **more: object) -> Card:
    return card(Kit(), device, os=system, **more)  # type: ignore[arg-type]


# --- FAT


def volume(fat32: bool) -> tuple[io.BytesIO, Fat]:
    size = 2 * MIB if fat32 else 9 * MIB
    file = io.BytesIO(bytes(MIB + size))
    format_fat(file, MIB, size, fat32=fat32)
    return file, Fat(file, MIB)


names = st.text("abAB.-_ é~1", min_size=1, max_size=40).filter(lambda name: name == name.strip(" ."))


@settings(max_examples=15, deadline=None)
@given(
    st.dictionaries(names, st.binary(max_size=9000), max_size=20),
    st.dictionaries(names, st.binary(max_size=9000), max_size=20),
)
def test_what_was_written_is_read_back_by_a_second_look_and_replaced_files_leave_no_gap(
    first: dict[str, bytes], second: dict[str, bytes]
) -> None:
    lowered = [{name.lower(): name for name in files} for files in (first, second)]
    first, second = ({name: files[name] for name in low.values()} for files, low in zip((first, second), lowered))
    file, fat = volume(fat32=True)
    empty = fat.free_bytes()
    for files in (first, second):
        Fat(file, MIB).write({f"covey/kit/{name}": content for name, content in files.items()})
    fat = Fat(file, MIB)
    expected = {name.lower(): content for files in (first, second) for name, content in files.items()}
    assert {name.lower() for name in fat.names("covey/kit")} == set(expected)
    for name, content in expected.items():
        assert fat.read(f"COVEY/kit/{name.upper()}" if name.isascii() else f"covey/kit/{name}") == content
    clusters = sum(-(-len(content) // fat.cluster_size) for content in expected.values())
    folders = (empty - fat.free_bytes()) // fat.cluster_size - clusters
    assert folders <= 2 + len(expected) * 5 * 32 // fat.cluster_size + 1 if first or second else folders == 0


def test_fat32_keeps_both_tables_and_the_count_of_free_clusters() -> None:
    file, fat = volume(fat32=True)
    fat.write({"covey/a long name of a file.txt": b"x" * 5000, "b": b""})
    content = file.getvalue()[MIB:]
    reserved, table = struct.unpack_from("<H", content, 14)[0] * 512, struct.unpack_from("<I", content, 36)[0] * 512
    assert content[reserved : reserved + table] == content[reserved + table : reserved + 2 * table]
    (free,) = struct.unpack_from("<I", content, 512 + 488)
    assert free * 512 == Fat(file, MIB).free_bytes()


def test_files_that_do_not_fit_leave_every_byte_as_it_was() -> None:
    file, fat = volume(fat32=False)
    fat.write({"keep.txt": b"kept"})
    before = file.getvalue()
    with pytest.raises(StorageError, match="8 MiB free, not 11"):
        fat.write({"keep.txt": b"replaced", "large": bytes(10 * MIB)})
    assert file.getvalue() == before


@pytest.mark.parametrize("name", ["a:b", "", "a/", "a/./b", "x" * 256, "tab\tb", "ends."])
def test_names_that_fat_cannot_hold_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="cannot be a name"):
        volume(fat32=False)[1].write({name: b""})


def test_a_damaged_table_is_an_error_and_no_endless_loop() -> None:
    file, fat = volume(fat32=False)
    fat.write({"large": bytes(20_000)})
    table = MIB + 512
    content = bytearray(file.getvalue())
    struct.pack_into("<H", content, table + 2 * 2, 2)  # the file's first cluster follows itself
    with pytest.raises(DataError, match="damaged"):
        Fat(io.BytesIO(bytes(content)), MIB).read("large")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("fsck.vfat") or not shutil.which("mtype"), reason="needs dosfstools and mtools")
@pytest.mark.parametrize("fat32", [True, False])
def test_fsck_and_mtools_find_our_fat_whole(fat32: bool, tmp_path: Path) -> None:
    generator = random.Random(3)
    image = make_image(tmp_path / "i.img", TRIXIE, boot_mib=40 if fat32 else 32, fat32=fat32)
    files = {
        f"covey/wheels/numpy-{i}-cp311-manylinux_2_17_aarch64.whl": generator.randbytes(i * 3000) for i in range(60)
    }
    with image.open("r+b") as file:
        Fat(file, BOOT_START).write({**files, "cmdline.txt": b"x" * 5000, "covey/ümläut.txt": b"u"})
    alone = tmp_path / "boot"
    with image.open("rb") as file:
        (boot, _) = read_partitions(file)
        alone.write_bytes(read_at(file, boot.start, boot.size))
    checked = subprocess.run(["fsck.vfat", "-n", alone], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    for path, content in files.items():
        shown = subprocess.run(["mtype", "-i", alone, f"::/{path}"], capture_output=True, check=True)
        assert shown.stdout == content


# --- systems


@pytest.mark.parametrize(
    ("files", "system"),
    [
        (TRIXIE, "trixie"),
        (BOOKWORM, "bookworm"),
        ({**BOOKWORM, "issue.txt": issue("2025-12-04")}, "bookworm"),  # the legacy edition of that day
        ({**TRIXIE, "issue.txt": b""}, "trixie"),  # another system with cloud-init
    ],
)
def test_systems_are_told_by_what_their_makers_put_on_the_partition(
    files: Mapping[str, bytes], system: str, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "i.img", files)
    with image.open("rb") as file:
        assert detect(Fat(file, BOOT_START)) == system


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"cmdline.txt": b"root=/dev/sda2"}, "neither cloud-init's"),
        ({**BOOKWORM, "issue.txt": issue("2023-05-03")}, "older than bookworm"),
        ({**TRIXIE, "kernel7.img": b"k"}, "32-bit"),
        ({**TRIXIE, "covey/settings": b""}, "prepared for a device already"),
        ({**BOOKWORM, "cmdline.txt": b"root=x systemd.run=/boot/firstrun.sh"}, "prepared for a device already"),
    ],
)
def test_what_cannot_become_a_device_is_refused_by_its_reason(
    files: Mapping[str, bytes], complaint: str, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "i.img", files)
    with image.open("rb") as file, pytest.raises(ConfigError, match=complaint):
        detect(Fat(file, BOOT_START))


def test_words_replace_what_sets_the_same_and_keep_the_rest_on_one_line() -> None:
    line = with_words("root=/dev/x  ds=nocloud;i=old quiet\n", ("ds=nocloud;i=new", "a.b=c"))
    assert line == "root=/dev/x quiet ds=nocloud;i=new a.b=c\n"


# --- what a card gets


@pytest.mark.parametrize(("system", "files"), [("trixie", TRIXIE), ("bookworm", BOOKWORM)])
def test_a_customised_image_differs_only_in_its_boot_partition(
    system: System, files: Mapping[str, bytes], device: Path, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "i.img", files)
    before = image.read_bytes()
    wifi = Wifi("home", PASSWORD, "DE")
    with image.open("r+b") as file:
        written = customise(file, lambda found: made(device, found, wifi=wifi))
        check(file, written)
    after = image.read_bytes()
    end = BOOT_START + BOOT_MIB * MIB
    assert (after[:BOOT_START], after[end:]) == (before[:BOOT_START], before[end:])
    assert ROOT in after[end:]
    for name in ("config.txt", "kernel8.img", "overlays/README", "network-config"):
        assert boot_file(image, name) == files.get(name)
    cmdline = (boot_file(image, "cmdline.txt") or b"").decode()
    assert cmdline.startswith(files["cmdline.txt"].decode().strip() + " ")
    assert cmdline.count("\n") == 1
    assert "cfg80211.ieee80211_regdom=DE" in cmdline.split()
    if system == "trixie":
        (instance,) = re.findall(rb"instance-id: (\S+)", boot_file(image, "meta-data") or b"")
        assert f"ds=nocloud;i={instance.decode()}" in cmdline.split()
    else:
        assert "systemd.run=/boot/firmware/firstrun.sh" in cmdline.split()


def test_a_file_that_the_card_gives_back_differently_is_named(device: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path / "i.img", TRIXIE)
    with image.open("r+b") as file:
        written = customise(file, lambda found: made(device, found))
        Fat(file, BOOT_START).write({"covey/kit/seal": b"t" * 64})
        with pytest.raises(StorageError, match="covey/kit/seal"):
            check(file, written)


def test_a_kit_for_another_python_is_refused_before_the_card(device: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path / "i.img", TRIXIE)
    with image.open("r+b") as file, pytest.raises(ConfigError, match=r"Python 3\.11.*\(trixie\) has Python 3\.13"):
        customise(file, lambda found: made(device, found), python="3.11")


@pytest.mark.parametrize("system", ["trixie", "bookworm", "debian"])
def test_secrets_lie_only_where_the_first_boot_wipes_them_and_the_password_nowhere(
    system: System, device: Path
) -> None:
    wifi = None if system == "debian" else Wifi("home", PASSWORD, "DE")
    written = made(device, system, wifi=wifi, login=Login("me", (SSH_KEY,)))
    secrets = [(device / name).read_bytes() for name in ("key.pem", "seal.pem")]
    secrets += [wifi.key().encode()] if wifi else []
    for path, content in written.files.items():
        assert PASSWORD.encode() not in content
        wiped = path.startswith("covey/device/") or path == "covey/wifi.nmconnection"
        assert wiped or not any(secret in content for secret in secrets), path
    assert PASSWORD not in repr(wifi)
    assert set(written.files) >= {f"covey/device/{name}" for name in ("key.pem", "seal.pem", "agent.toml", "cert.pem")}


def test_the_wifi_key_is_that_of_the_standard() -> None:
    # IEEE 802.11-2016, J.4.2, test case 1
    expected = "f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e"
    assert Wifi("IEEE", "password", "DE").key() == expected


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Wifi("home", "short", "DE"), "8 to 63"),
        (lambda: Wifi("home", PASSWORD, ""), "country"),
        (lambda: Wifi("", PASSWORD, "DE"), "1 to 32 bytes"),
        (lambda: Login("root", (SSH_KEY,)), "user name 'root'"),
        (lambda: Login("me; reboot", (SSH_KEY,)), "user name"),
        (lambda: Login("me", ("-----BEGIN OPENSSH PRIVATE KEY-----",)), "not a public key"),
        (lambda: Login("me", (SSH_KEY + "\nevil: x",)), "not a public key"),
    ],
)
def test_wrong_networks_and_logins_are_refused(make: object, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as raised:
        make()  # type: ignore[operator]
    assert "short" not in str(raised.value)


def test_data_and_hostname_go_where_the_device_looks_for_them(device: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.npz").write_bytes(b"numbers")
    written = made(device, "debian", hostname="kitchen", data=tmp_path / "mine.npz")
    assert written.files["covey/data/data.npz"] == b"numbers"
    lines = written.files["covey/settings"].decode().splitlines()
    assert lines[1:] == ["data_path=/var/lib/covey-data/data.npz", "hostname=kitchen"]
    assert re.fullmatch("release_key=[0-9a-f]{64}", lines[0])
    assert b"hostname: kitchen-pi\n" in made(device, "trixie").files["user-data"]
    with pytest.raises(ConfigError, match="host name"):
        made(device, "trixie", hostname="a b")


@pytest.mark.parametrize("path", ["/var/lib/data.npz", "/var/lib/../etc/x", "/etc/x/y", "mine.npz", "/var/lib/a b/c"])
def test_data_never_go_where_a_folder_of_the_system_would_change_hands(path: str, device: Path, tmp_path: Path) -> None:
    other = tmp_path / "device"
    shutil.copytree(device, other)
    text = (other / "agent.toml").read_text()
    (other / "agent.toml").write_text(text.replace("/var/lib/covey-data/data.npz", path))
    assert b"data_path" not in made(other, "debian").files["covey/settings"]
    with pytest.raises(ConfigError, match="is not in a folder of /var/lib"):
        made(other, "debian", data=other / "agent.toml")


def test_user_data_is_the_yaml_that_cloud_init_is_to_get(device: Path) -> None:
    import msgspec

    text = made(device, "trixie", login=Login("me", (SSH_KEY,))).files["user-data"]
    assert text.startswith(b"#cloud-config\n")
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    content = msgspec.yaml.decode(text)
    assert content["users"][0]["ssh_authorized_keys"] == [SSH_KEY]
    assert content["users"][0]["lock_passwd"] is True
    ((shell, flag, command),) = content["bootcmd"]
    assert (shell, flag) == ("sh", "-c")
    assert "covey/first-boot.sh /boot/firmware --service" in command
