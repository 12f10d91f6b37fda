"""A bootable Debian bookworm for arm64, from packages: a card image with a FAT boot partition and an ext4 root.

For virtual machines (qemu's `virt`, arm64 clouds) and arm64 machines that boot by UEFI. Not for a Raspberry Pi: that
needs raspi-firmware and its own kernel; give `covey flash` Raspberry Pi OS instead. Nothing of a device or a fleet is
in it, so one is made once and kept; cards differ in their boot partition alone.

Needs no root where mmdebstrap can use user namespaces. Programs of the target run under user emulation while packages
are set up; everything else is done here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Optional

from covey_deploy.cache import cache_folder
from covey_deploy.fat import Fat
from covey_deploy.initramfs import initramfs
from covey_deploy.programs import found_program, require_programs
from covey_protocol.errors import MachineError, StorageError

Say = Callable[[str], None]
# what is ours: files and symbolic links in the root, and files of the boot partition beside the kernel
Recipe = tuple[dict[str, bytes], dict[str, str], dict[str, bytes]]

SUITE = "bookworm"
PACKAGES = (
    "usr-is-merged",  # in place of usrmerge, which brings all of Perl
    *("linux-image-cloud-arm64", "systemd-sysv", "systemd-resolved", "systemd-timesyncd", "udev", "dbus"),
    *("python3", "libstdc++6", "e2fsprogs", "busybox-static", "systemd-boot-efi"),
)
CLOUD_INIT = ("cloud-init", "sudo", "iproute2")
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/lintian/*")
# with these in place it would make an initial file system under emulation, twice: 40 minutes
NO_INITRAMFS = ("/etc/kernel/postinst.d/initramfs-tools", "/etc/kernel/postinst.d/zz-systemd-boot")

PROGRAMS = {
    "mmdebstrap": "mmdebstrap",
    "arch-test": "arch-test",
    "sfdisk": "fdisk",
    "mkfs.vfat": "dosfstools",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
}
EMULATION = {"qemu-aarch64-static": "qemu-user-static"}
BINFMT = Path("/proc/sys/fs/binfmt_misc/qemu-aarch64")

MIB = 1024 * 1024
BOOT_MIB = 256  # kernel and initrd 40, a kit 50, and room for data
SLACK_MIB = 400  # of the root, beyond its files: an installed kit has 110, and the file system grows at the first boot
ROOT_LABEL, BOOT_LABEL = "covey-root", "BOOTFS"
ROOT_TYPE = "B921B045-1DF0-41C3-AF44-4C6F280D3FAE"  # Linux root (ARM 64-bit)
BOOT_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"  # EFI system partition
# where files of this package's folder `debian` lie on the machine
OVERLAY = {
    "etc/fstab": "fstab",
    "etc/hosts": "hosts",
    "etc/systemd/network/80-wired.network": "wired.network",
    "etc/repart.d/50-root.conf": "repart.conf",
    "etc/systemd/journald.conf.d/covey.conf": "journal.conf",
}
OVERLAY_CLOUD_INIT = {"etc/cloud/cloud.cfg.d/90-covey.cfg": "nocloud.cfg"}
SYSTEM, UNITS = "etc/systemd/system", "/lib/systemd/system"
FIRST_BOOT = "covey-first-boot.service"
LINKS = {
    "etc/resolv.conf": "../run/systemd/resolve/stub-resolv.conf",
    f"{SYSTEM}/multi-user.target.wants/systemd-networkd.service": f"{UNITS}/systemd-networkd.service",
    f"{SYSTEM}/sockets.target.wants/systemd-networkd.socket": f"{UNITS}/systemd-networkd.socket",
    f"{SYSTEM}/network-online.target.wants/systemd-networkd-wait-online.service": (
        f"{UNITS}/systemd-networkd-wait-online.service"
    ),
    # nothing that computes, or wants the network, while nobody asks for it
    **{f"{SYSTEM}/{name}.timer": "/dev/null" for name in ("apt-daily", "apt-daily-upgrade", "e2scrub_all")},
}
# as on an image of Raspberry Pi OS trixie: by these `covey flash --image` tells that cloud-init reads the partition
SAMPLES = {"user-data": b"#cloud-config\n", "meta-data": b"instance-id: nobody\n"}
UNFINISHED = "covey-made-"  # folders in the cache
COMMAND_LINE = f"root=LABEL={ROOT_LABEL} ro console=ttyAMA0 net.ifnames=0 panic=10"


def build(*, cloud_init: bool = False, renew: bool = False, say: Say = print) -> Path:
    """The image of a machine that belongs to nobody yet, from the cache or made now. Copy it, never change it.

    cloud_init: with Debian's cloud-init, which reads user-data from the boot partition as Raspberry Pi OS trixie does.
    renew: with the newest packages, also where there is an image. It takes 3 GB of disk while it works.
    MachineError names what lacks here, StorageError a file that cannot be written.
    """
    kind = f"debian-{SUITE}-arm64"
    variant = f"{kind}-cloud" if cloud_init else kind
    recipe: Recipe = overlay(cloud_init), links(cloud_init), SAMPLES if cloud_init else {}
    key = _key(mmdebstrap_command(PACKAGES, ""))
    plain = cache_folder() / f"{kind}-{key}.tar"
    root = cache_folder() / f"{variant}-{_key(key, CLOUD_INIT)}.tar" if cloud_init else plain
    key = _key(root.name, recipe, init_script(), COMMAND_LINE, BOOT_MIB, SLACK_MIB)
    image = cache_folder() / f"{variant}-{key}.img"
    with _locked(cache_folder() / f"{kind}.lock", say):
        if renew:
            plain.unlink(missing_ok=True)
            root.unlink(missing_ok=True)
        for unfinished in cache_folder().glob(f"{UNFINISHED}*"):  # of who was killed, up to 3 GB
            shutil.rmtree(unfinished, ignore_errors=True)
        if renew or not image.exists():
            require_programs(PROGRAMS)
            if not root.exists() and not plain.exists():
                _made(plain, lambda path: unpack_packages(PACKAGES, None, path, say))
            if not root.exists():
                _made(root, lambda path: unpack_packages(CLOUD_INIT, plain, path, say))
            _made(image, lambda path: make_image(root, recipe, path, say))
            for old in set(cache_folder().iterdir()) - {plain, root, image}:
                if re.fullmatch(rf"{variant}-[0-9a-f]{{16}}\.(tar|img)", old.name):
                    old.unlink()
    return image


def mmdebstrap_command(packages: tuple[str, ...], target: str, base: Optional[Path] = None) -> list[str]:
    """Makes a tar of the root file system, all packages set up. base: such a tar, to which these are added."""
    excluded = [f"--dpkgopt=path-exclude={pattern}" for pattern in (*LEFT_OUT, *NO_INITRAMFS)]
    if base is None:
        begin = ["--variant=minbase", "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"]
    else:
        unpack = f'tar -C "$1" -xpf {shlex.quote(str(base))} --exclude=./etc/apt/sources.list --exclude=./dev'
        begin = ["--variant=custom", f"--setup-hook={unpack}"]
    return [
        *("mmdebstrap", "--architectures=arm64", "--components=main", "--format=tar", "--verbose", *begin),
        *(*excluded, "--dpkgopt=force-unsafe-io"),
        *('--aptopt=Acquire::Languages "none"', '--aptopt=APT::Install-Recommends "false"'),
        *(f"--include={','.join(packages)}", SUITE, target),
    ]


def overlay(cloud_init: bool) -> dict[str, bytes]:
    """Files of ours in the root file system, by path."""
    names = {**OVERLAY, **(OVERLAY_CLOUD_INIT if cloud_init else {})}
    files = {path: _packaged("debian", name) for path, name in names.items()}
    files["etc/hostname"] = b"covey\n"
    files["etc/machine-id"] = b""  # every card makes its own; empty, not missing: no questions at the first boot
    if not cloud_init:
        files[f"{SYSTEM}/{FIRST_BOOT}"] = _packaged("first_boot", FIRST_BOOT)
    return files


def links(cloud_init: bool) -> dict[str, str]:
    """Symbolic links of ours in the root file system, most of which enable or mask a unit."""
    own = {} if cloud_init else {f"{SYSTEM}/multi-user.target.wants/{FIRST_BOOT}": f"../{FIRST_BOOT}"}
    return {**LINKS, **own}


def _packaged(folder: str, name: str) -> bytes:
    return (resources.files("covey_deploy") / folder / name).read_bytes()


def init_script() -> bytes:
    return _packaged("debian", "init.sh")


def unpack_packages(packages: tuple[str, ...], base: Optional[Path], target: Path, say: Say) -> None:
    """Run mmdebstrap. Says every 20 s how far it is. base: as in `mmdebstrap_command`."""
    require_emulation()
    what = "" if base is None else f" {', '.join(packages)}"
    say(f"Debian {SUITE} for arm64{what}: fetching and setting up packages; made once, takes minutes")
    started = said = time.monotonic()
    last: list[str] = []
    done = 0
    with _process(mmdebstrap_command(packages, str(target), base)) as (process, lines):
        for line in lines:
            last = [*last, line.strip()][-3:]
            done += line.startswith("Setting up ")
            if time.monotonic() - said > 20:
                said = time.monotonic()
                say(f"  {said - started:.0f} s: {done} packages set up")
    if process.returncode:
        raise MachineError(f"mmdebstrap failed ({' / '.join(last)})", "mend what it names; it needs the network")
    say(f"  {time.monotonic() - started:.0f} s: {done} packages, {target.stat().st_size / 1e6:.0f} MB")


def require_emulation() -> None:
    """MachineError where programs for arm64 cannot be run here, or packages cannot be unpacked as this user."""
    if platform.machine() != "aarch64":
        require_programs(EMULATION)
        entry = BINFMT.read_text() if BINFMT.exists() else ""
        if "enabled" not in entry or "F" not in entry.partition("flags:")[2].split("\n")[0]:
            remedy = (
                "sudo apt install qemu-user-static; then sudo systemctl restart systemd-binfmt, or without systemd "
                "sudo mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc; sudo update-binfmts --enable "
                "qemu-aarch64 (docs/emulation.md)"
            )
            raise MachineError("programs for arm64 are not given to qemu here (binfmt_misc)", remedy)
    if os.geteuid() != 0 and not _has_subordinate_ids():
        ids = "100000-165535"
        remedy = f"run it as root, or give yourself some: sudo usermod --add-subuids {ids} --add-subgids {ids} $USER"
        raise MachineError("unpacking packages without root needs subordinate user ids", remedy)


def _has_subordinate_ids() -> bool:
    import pwd

    names = {pwd.getpwuid(os.getuid()).pw_name, str(os.getuid())}
    with contextlib.suppress(OSError):
        return any(line.partition(":")[0] in names for line in Path("/etc/subuid").read_text().splitlines())
    return False


def make_image(root: Path, recipe: Recipe, image: Path, say: Say) -> None:
    """From the tar of a root file system to a card image."""
    files, links, boot = recipe
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=image.parent, prefix="covey-root-") as folder:
        tree = Path(folder)
        owners = _extract(root, tree)
        for path, content in files.items():
            _cleared(tree / path).write_bytes(content)
            (tree / path).chmod(0o644)
        for path, aim in links.items():
            _cleared(tree / path).symlink_to(aim)
        (tree / "boot/firmware").mkdir()
        tree.chmod(0o755)
        root_mib = _size_mib(tree) + SLACK_MIB
        _partition(image, root_mib)
        _make_fat(image, {**boot_files(tree), **boot})
        _make_ext4(image, tree, root_mib, owners)
    say(f"  {time.monotonic() - started:.0f} s: image of {BOOT_MIB + root_mib} MiB")


def _extract(archive: Path, tree: Path) -> dict[str, tuple[int, int]]:
    """Unpack as this user; who owns what, where that is not root. Device files are left to devtmpfs."""
    owners = {}
    with tarfile.open(archive) as packed:
        packed.extraction_filter = lambda member, path: member  # ours, and all kinds of links are wanted
        for member in packed:
            if member.isdev():
                continue
            if member.uid or member.gid:
                owners[member.name.removeprefix("./")] = (member.uid, member.gid)
            member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
            if member.isdir():
                member.mode |= 0o700  # a folder that its owner may not enter could not be filled
            packed.extract(member, tree, numeric_owner=True)
    return owners


def _cleared(path: Path) -> Path:
    """Its folder is there, and nothing of that name."""
    for folder in reversed(path.parents):
        if not folder.exists():
            folder.mkdir()
            folder.chmod(0o755)  # whatever this user's umask is
    path.unlink(missing_ok=True)
    return path


def boot_files(tree: Path) -> dict[str, bytes]:
    """What the boot partition holds: for emulators, and for firmware that speaks UEFI (systemd-boot)."""
    (kernel,) = tree.glob("boot/vmlinuz-*")
    modules = tree / "usr/lib/modules" / kernel.name.removeprefix("vmlinuz-")
    busybox = (tree / "usr/bin/busybox").read_bytes()
    entry = f"title Debian {SUITE}\nlinux /vmlinuz\ninitrd /initrd.img\noptions {COMMAND_LINE}\n"
    return {
        "vmlinuz": kernel.read_bytes(),
        "initrd.img": initramfs(busybox, init_script(), modules),
        "cmdline.txt": f"{COMMAND_LINE}\n".encode(),
        "EFI/BOOT/BOOTAA64.EFI": (tree / "usr/lib/systemd/boot/efi/systemd-bootaa64.efi").read_bytes(),
        "loader/loader.conf": b"timeout 0\n",
        "loader/entries/debian.conf": entry.encode(),
    }


def root_offset() -> int:
    """Of an image's root file system, in bytes."""
    return (BOOT_MIB + 1) * MIB


def _size_mib(tree: Path) -> int:
    """What the files take in an ext4 with blocks of 4 KiB, generously."""
    blocks = sum(path.lstat().st_size // 4096 + 1 for path in tree.rglob("*"))
    return blocks * 4096 * 21 // 20 // MIB + 1


def _partition(image: Path, root_mib: int) -> None:
    """An empty image, sparse, with a GPT: boot from 1 MiB on, then root, and 1 MiB for the second table."""
    with image.open("wb") as file:
        file.truncate((BOOT_MIB + root_mib + 2) * MIB)
    script = (
        "label: gpt\n"
        f"start=1MiB, size={BOOT_MIB}MiB, type={BOOT_TYPE}, name=boot\n"
        f"start={BOOT_MIB + 1}MiB, size={root_mib}MiB, type={ROOT_TYPE}, name=root\n"
    )
    _run("sfdisk", "--quiet", str(image), given=script.encode())


def _make_fat(image: Path, files: Mapping[str, bytes]) -> None:
    options = ("-F", "32", "-n", BOOT_LABEL, "--offset", str(MIB // 512))
    _run("mkfs.vfat", *options, str(image), str(BOOT_MIB * 1024))
    with image.open("r+b") as file:
        Fat(file, MIB).write(files)


def _make_ext4(image: Path, tree: Path, size_mib: int, owners: Mapping[str, tuple[int, int]]) -> None:
    """Root owns everything, whoever runs this; then those files that belong to others are given to them."""
    as_root = () if os.geteuid() == 0 else ("unshare", "--map-root-user")
    options = ("-q", "-t", "ext4", "-L", ROOT_LABEL, "-m", "1", "-E", f"offset={root_offset()}", "-d", str(tree))
    _run(*as_root, found_program("mke2fs") or "mke2fs", *options, str(image), f"{size_mib}m")
    commands = [
        f'set_inode_field "/{path}" {field} {number}'
        for path, numbers in sorted(owners.items())
        for field, number in zip(("uid", "gid"), numbers)
    ]
    _run("debugfs", "-w", "-f", "-", f"{image}?offset={root_offset()}", given="\n".join(commands).encode())


def _run(program: str, *arguments: str, given: bytes = b"") -> None:
    found = found_program(program) or program
    ended = subprocess.run([found, *arguments], input=given, capture_output=True, check=False)
    if ended.returncode:
        said = (ended.stderr or ended.stdout).decode(errors="replace").strip().splitlines()
        raise StorageError(f"{program} failed ({said[-1] if said else ended.returncode})", "is the disk full?")


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], Iterator[str]]]:
    """A program and its lines. It ends with us, also where we are interrupted."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    try:
        yield process, iter(process.stdout)
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()  # it takes its own children and its folder with it
            process.wait()
        process.stdout.close()


def _made(path: Path, make: Callable[[Path], None]) -> None:
    """Make a file whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as folder:
        made = Path(folder) / f"arm64{path.suffix}"
        try:
            make(made)
        except OSError as exc:
            raise StorageError(f"cannot make {path} ({exc.strerror or exc})", "free 3 GB of disk") from exc
        os.replace(made, path)


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """One at a time makes an image; the others wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another covey makes this image; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
