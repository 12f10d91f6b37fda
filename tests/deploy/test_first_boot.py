"""first-boot.sh: read by shellcheck, and run in a Debian of its own, cut off at every command. docs/flashing.md.

The Debian is made by mmdebstrap once a session and stays as it is: every run sees it through an overlay.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from covey_deploy.card import Card, System, Wifi, card
from covey_deploy.provisioning import NewDevice, add_devices, init

SCRIPT = Path(__file__).parents[2] / "deploy/src/covey_deploy/first_boot/first-boot.sh"
SECRETS = ("key.pem", "seal.pem")
BOOT = "boot/firmware"
SHIMMED = (
    *("install", "sync", "mv", "shred", "rm", "cp", "chmod", "chown", "mkdir", "sed", "tail", "getent"),
    *("systemd-sysusers", "python3", "systemctl", "grep", "hostname", "date"),
)
# what an installer and the agent it installs do, as far as first-boot.sh sees it; the real ones are tried once below
INSTALLER = b"""
import os, pathlib, sys
assert sys.argv[1:4:2] == ["--prefix", "--release-key"], sys.argv
bin = pathlib.Path(sys.argv[2]) / "bin"
bin.mkdir(parents=True, exist_ok=True)
(bin / "covey").write_text('''#!/bin/sh
[ "$*" = "agent unit --config /etc/covey/agent.toml --install" ] || exit 2
printf '[Install]\\\\nWantedBy=multi-user.target\\\\n' >/etc/systemd/system/covey-agent.service
''')
os.chmod(bin / "covey", 0o755)
"""
needs_userland = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("mmdebstrap"), reason="needs root and mmdebstrap (apt install mmdebstrap)"
)


class StandIn:
    def files(self) -> Mapping[str, bytes]:
        return {"install.py": INSTALLER, "wheels/a.whl": b"w" * 1000}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    checked = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_script_is_one_that_sh_reads() -> None:
    subprocess.run(["sh", "-n", str(SCRIPT)], check=True)


@pytest.fixture(scope="module")
def userland(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("userland") / "root"
    command = ["mmdebstrap", "--variant=minbase", "--include=systemd,systemd-sysv,python3", "bookworm", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet") / "home"
    fleet = init(folder, "home", ["broker.lan"])
    add_devices(folder, [NewDevice("kitchen-pi")])
    return fleet.device("kitchen-pi")


class Machine:
    """A Debian with a card's boot partition in it, through an overlay."""

    def __init__(self, userland: Path, folder: Path) -> None:
        self.root = folder / "root"
        self._parts = [folder / name for name in ("upper", "work")]
        for path in (self.root, *self._parts):
            path.mkdir(parents=True)
        layers = f"lowerdir={userland},upperdir={self._parts[0]},workdir={self._parts[1]}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)], check=True)
        subprocess.run(["mount", "-t", "proc", "proc", str(self.root / "proc")], check=True)

    def close(self) -> None:
        for path in (self.root / "proc", self.root):
            subprocess.run(["umount", str(path)], check=True)

    def put(self, made: Card) -> None:
        for path, content in made.files.items():
            place = self.root / BOOT / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)

    def shim(self) -> None:
        """Every command counts itself, and the one whose turn it is ends all of it, as a power cut would."""
        shims = self.root / "shims"
        shims.mkdir()
        for name in SHIMMED:
            text = f"""#!/bin/sh
read -r count </shims/.count
count=$((count + 1))
echo $count >/shims/.count
read -r last </shims/.last
[ $count -ne $last ] || kill -9 0
for folder in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do
  [ ! -x $folder/{name} ] || exec $folder/{name} "$@"
done
exit 127
"""
            (shims / name).write_text(text)
            (shims / name).chmod(0o755)

    def run(self, *more: str, cut_at: int = 0) -> int:
        """The first boot; its exit code. cut_at: the command at which the power goes, 0 for never."""
        path = "/shims:" if (self.root / "shims").exists() else ""
        if path:
            (self.root / "shims/.count").write_text("0\n")
            (self.root / "shims/.last").write_text(f"{cut_at}\n")
        command = ["chroot", str(self.root), "/bin/sh", f"/{BOOT}/covey/first-boot.sh", f"/{BOOT}", *more]
        environment = {"PATH": path + os.environ["PATH"]}
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, start_new_session=True, check=False, timeout=500
        )
        self.said = ended.stdout + ended.stderr
        return ended.returncode

    def read(self, path: str) -> bytes:
        place = self.root / path
        return place.read_bytes() if place.exists() else b""

    def on_boot(self) -> bytes:
        return b"".join(path.read_bytes() for path in sorted((self.root / BOOT).rglob("*")) if path.is_file())


@pytest.fixture
def machine(userland: Path, tmp_path: Path) -> Iterator[Machine]:
    made = Machine(userland, tmp_path / "machine")
    yield made
    made.close()


def made_card(kit: object, device: Path, tmp_path: Path, system: System = "bookworm") -> Card:
    (tmp_path / "mine.npz").write_bytes(b"what nobody else may see")
    wifi = None if system == "debian" else Wifi("home", "correct horse battery", "DE")
    return card(kit, device, wifi=wifi, data=tmp_path / "mine.npz", hostname="kitchen", os=system)  # type: ignore[arg-type]


def check_done(machine: Machine, made: Card, device: Path) -> None:
    root = machine.root
    (uid,) = [int(line.split(":")[2]) for line in machine.read("etc/passwd").decode().splitlines() if "covey:x" in line]
    for source in device.iterdir():
        place = root / "etc/covey" / source.name
        assert place.read_bytes() == source.read_bytes(), source.name
        assert (place.stat().st_mode & 0o777, place.stat().st_uid) == (0o600, uid)
    data = root / "var/lib/covey-data/data.npz"
    assert (data.read_bytes(), data.stat().st_mode & 0o777, data.stat().st_uid) == (
        made.files["covey/data/data.npz"],
        0o600,
        uid,
    )
    network = root / "etc/NetworkManager/system-connections/covey-wifi.nmconnection"
    if "covey/wifi.nmconnection" in made.files:
        assert network.read_bytes() == made.files["covey/wifi.nmconnection"]
        assert (network.stat().st_mode & 0o777, network.stat().st_uid) == (0o600, 0)
    assert (root / "etc/systemd/system/multi-user.target.wants/covey-agent.service").is_symlink()
    assert not (root / "etc/systemd/system/covey-first-boot.service").exists()
    assert [path.name for path in (root / BOOT / "covey").iterdir()] == ["first-boot.log"]
    for secret in told_secrets(made, device):
        assert secret not in machine.on_boot()
    assert not list((root / "etc/covey").glob("*.part"))
    assert (data.parent.stat().st_mode & 0o777, data.parent.stat().st_uid) == (0o750, uid)


def told_secrets(made: Card, device: Path) -> list[bytes]:
    lines = [line for name in SECRETS for line in (device / name).read_bytes().splitlines() if b"-----" not in line]
    keyfile = made.files.get("covey/wifi.nmconnection", b"")
    return [*lines, made.files["covey/data/data.npz"], *(line[4:] for line in keyfile.split() if line[:4] == b"psk=")]


@pytest.mark.slow
@needs_userland
def test_a_first_boot_ends_at_a_service_and_leaves_no_secret_on_the_boot_partition_nor_in_a_log(
    machine: Machine, device: Path, tmp_path: Path
) -> None:
    made = made_card(StandIn(), device, tmp_path, "debian")
    machine.put(made)
    assert machine.run("--service") == 0, machine.said
    assert (machine.root / "etc/systemd/system/multi-user.target.wants/covey-first-boot.service").is_symlink()
    assert machine.run() == 0, machine.said
    check_done(machine, made, device)
    assert machine.read("etc/hostname") == b"kitchen\n"
    logs = machine.said.encode() + b"".join(
        p.read_bytes() for p in (machine.root / "var/lib/covey-first-boot").iterdir()
    )
    for secret in told_secrets(made, device):
        assert secret not in logs


@pytest.mark.slow
@needs_userland
def test_a_kit_that_cannot_be_installed_is_said_on_the_boot_partition_and_tried_again(
    machine: Machine, device: Path, tmp_path: Path
) -> None:
    made = made_card(StandIn(), device, tmp_path)
    machine.put(made)
    installer = machine.root / BOOT / "covey/kit/install.py"
    installer.write_bytes(b"raise SystemExit('covey: this machine has Python 3.9')")
    assert machine.run() != 0
    log = machine.read(f"{BOOT}/covey/first-boot.log").decode()
    assert "install.py: covey: this machine has Python 3.9" in log
    assert "failed at: installing the agent in /opt/covey" in log
    for secret in told_secrets(made, device):  # the identity is safe already, and wiped
        assert secret not in machine.on_boot()
    installer.write_bytes(INSTALLER)
    assert machine.run() == 0, machine.said
    check_done(machine, made, device)


@pytest.mark.slow
@needs_userland
def test_wherever_the_power_goes_nothing_is_lost_and_the_next_boot_finishes(
    userland: Path, device: Path, tmp_path: Path
) -> None:
    made = made_card(StandIn(), device, tmp_path)
    cut_at, finished = 0, False
    while not finished:
        cut_at += 1
        machine = Machine(userland, tmp_path / str(cut_at))
        try:
            machine.put(made)
            machine.shim()
            code = machine.run(cut_at=cut_at)
            finished = code == 0
            assert finished or code == -signal.SIGKILL, machine.said
            for source in device.iterdir():
                kept = machine.read(f"etc/covey/{source.name}"), machine.read(f"{BOOT}/covey/device/{source.name}")
                assert source.read_bytes() in kept, f"{source.name} is lost at command {cut_at}"
            if (machine.root / BOOT / "covey/first-boot.sh").exists():  # else the service has nothing to do any more
                assert machine.run() == 0, f"after a cut at command {cut_at}: {machine.said}"
            check_done_but_for_the_service(machine, made, device)
        finally:
            machine.close()
            shutil.rmtree(tmp_path / str(cut_at))
    assert cut_at > 60


def check_done_but_for_the_service(machine: Machine, made: Card, device: Path) -> None:
    """A cut after the script is gone leaves the service's file, whose condition never holds again."""
    for path in ("covey-first-boot.service", "multi-user.target.wants/covey-first-boot.service"):
        (machine.root / "etc/systemd/system" / path).unlink(missing_ok=True)
    check_done(machine, made, device)
