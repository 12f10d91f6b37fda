"""What a card gets beside its operating system: every file of the FAT boot partition that makes a device of it.

Only bytes here; `boot_partition` writes them. What becomes of them at the first boot is first_boot/first-boot.sh.
Formats follow Raspberry Pi Imager 2 (src/customization_generator.cpp), with one deviation, which docs/adr/0043 gives
the reason of: Wi-Fi is a NetworkManager file that first-boot.sh puts in its place, not a part of cloud-init's
network-config, because cloud-init writes that into /var/log/cloud-init.log with the key in it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Literal, Optional, Protocol

from covey_edge.config import Agent, load_agent
from covey_protocol.errors import ConfigError

System = Literal["trixie", "bookworm", "debian"]
FOLDER = "covey"
BOOT = "/boot/firmware"  # where all three mount the partition
SERVICE = "covey-first-boot.service"
SCRIPT = "first-boot.sh"
FIRSTRUN = "firstrun.sh"
GROUPS = "users,adm,dialout,audio,netdev,video,plugdev,cdrom,games,input,gpio,spi,i2c,render,sudo"  # Imager's
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
# where first-boot.sh may make a folder for data, in characters that a shell takes as they are
_DATA_PATH = re.compile(r"/var/lib/(?!\.)[A-Za-z0-9._+@=-]+/(?!\.)[A-Za-z0-9._+@=-]+")
_SSH_KEY = re.compile(r"(ssh-|ecdsa-|sk-)[A-Za-z0-9@.-]+ [A-Za-z0-9+/=]+( [^\x00-\x1f]*)?")


class Files(Protocol):
    """A kit, as far as a card needs it (kit.Kit)."""

    def files(self) -> Mapping[str, bytes]: ...


@dataclass(frozen=True)
class Wifi:
    """One network. country: two letters. The password never leaves this object but as the key derived from it."""

    ssid: str
    password: str
    country: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.ssid.encode()) <= 32:
            raise ConfigError(f"the Wi-Fi name {self.ssid!r} has no 1 to 32 bytes", "give the name of your network")
        if not (8 <= len(self.password) <= 63 and self.password.isascii() and self.password.isprintable()):
            raise ConfigError("a Wi-Fi password has 8 to 63 characters of ASCII", "give the network's WPA password")
        if not re.fullmatch(r"[A-Z]{2}", self.country):
            raise ConfigError(
                f"Wi-Fi needs a country of two capital letters, not {self.country!r}", "give --wifi-country, such as DE"
            )

    def __repr__(self) -> str:  # never in a log or a traceback
        return f"Wifi({self.ssid!r}, country={self.country!r})"

    def key(self) -> str:
        """The WPA key of name and password (IEEE 802.11i: PBKDF2, SHA-1, 4096 rounds), 64 hex digits."""
        return hashlib.pbkdf2_hmac("sha1", self.password.encode(), self.ssid.encode(), 4096, 32).hex()


@dataclass(frozen=True)
class Login:
    """Who may log in by ssh, with keys only. keys: lines of authorized_keys."""

    user: str
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        if not _USER.fullmatch(self.user) or self.user in ("root", "covey"):
            raise ConfigError(f"the user name {self.user!r} cannot be used", "lower-case letters, digits, - and _")
        if not self.keys:
            raise ConfigError(f"user {self.user} would have no way to log in", "give --ssh-key FILE.pub")
        for key in self.keys:
            if not _SSH_KEY.fullmatch(key):
                raise ConfigError("the ssh key is not a public key", "give a file such as id_ed25519.pub")


@dataclass(frozen=True)
class Card:
    """All files of one card. cmdline_words: appended to cmdline.txt. Paths are of the boot partition, with /."""

    files: Mapping[str, bytes]
    cmdline_words: tuple[str, ...]
    device_id: str

    def size(self) -> int:
        return sum(map(len, self.files.values()))


def card(
    kit: Files,
    device_folder: Path,
    *,
    hostname: str = "",
    wifi: Optional[Wifi] = None,
    login: Optional[Login] = None,
    data: Optional[Path] = None,
    os: System,
) -> Card:
    """Everything of one device. device_folder: as `covey provision device` makes it. hostname: the id if empty.

    data: a file that becomes the configuration's data.path. ConfigError for what would only fail on the device.
    """
    agent = load_agent(device_folder / "agent.toml")
    name = hostname or agent.config.device_id.replace("_", "-")
    if not _HOSTNAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot be a host name", "give --hostname: up to 63 letters, digits and -")
    if wifi and os == "debian":
        raise ConfigError("the Debian image has no Wi-Fi", "leave --wifi out and use a cable")
    inner = {
        **{f"kit/{path}": content for path, content in kit.files().items()},
        **_device_files(device_folder),
        **_data_files(agent, data),
        "settings": _settings(agent, name if os == "debian" else ""),
        SCRIPT: _first_boot(SCRIPT),
        SERVICE: _first_boot(SERVICE),
    }
    if wifi:
        inner["wifi.nmconnection"] = _keyfile(wifi).encode()
    written = {f"{FOLDER}/{path}": content for path, content in inner.items()}
    words = [f"cfg80211.ieee80211_regdom={wifi.country}"] if wifi else []
    if os == "trixie":
        written, more = _with_cloud_init(written, agent.config.device_id, name, login)
        words += more
    elif os == "bookworm":
        written[FIRSTRUN] = _firstrun(name, login).encode()
        words += [
            f"systemd.run={BOOT}/{FIRSTRUN}",
            "systemd.run_success_action=reboot",
            "systemd.unit=kernel-command-line.target",
        ]
    return Card(written, tuple(words), agent.config.device_id)


def _first_boot(name: str) -> bytes:
    return (package_files("covey_deploy") / "first_boot" / name).read_bytes()


def _device_files(folder: Path) -> dict[str, bytes]:
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}
    return {f"device/{name}": path.read_bytes() for name, path in found.items()}


def _data_files(agent: Agent, data: Optional[Path]) -> dict[str, bytes]:
    if data is None:
        return {}
    path = agent.config.data.path
    if not _DATA_PATH.fullmatch(path):
        raise ConfigError(
            f"--data would become data.path = {path!r}, which is not in a folder of /var/lib",
            "let data.path in agent.toml be such as /var/lib/covey-data/data.npz",
        )
    try:
        return {f"data/{Path(path).name}": data.read_bytes()}
    except OSError as exc:
        raise ConfigError(f"{data} cannot be read ({exc.strerror})", "give a file for --data") from exc


def _settings(agent: Agent, hostname: str) -> bytes:
    """What first-boot.sh has to know, one NAME=VALUE a line; nothing secret. hostname: where nothing else sets it."""
    lines = [f"release_key={agent.config.update.release_key}"]
    if _DATA_PATH.fullmatch(agent.config.data.path):  # elsewhere the owner makes the folder
        lines.append(f"data_path={agent.config.data.path}")
    if hostname:
        lines.append(f"hostname={hostname}")
    return "".join(f"{line}\n" for line in lines).encode()


def _keyfile(wifi: Wifi) -> str:
    """NetworkManager's own form (nm-settings-keyfile(5)), as imager_custom set_wlan writes it."""
    return "\n".join(
        [
            "[connection]",
            "id=covey-wifi",
            f"uuid={uuid.uuid5(uuid.NAMESPACE_DNS, 'covey-wifi.' + wifi.ssid)}",
            "type=wifi",
            "[wifi]",
            "mode=infrastructure",
            # the list of bytes takes any name, also with ; and spaces at its ends
            "ssid=" + "".join(f"{byte};" for byte in wifi.ssid.encode()),
            "[wifi-security]",
            "key-mgmt=wpa-psk",
            f"psk={wifi.key()}",
            "[ipv4]",
            "method=auto",
            "[ipv6]",
            "addr-gen-mode=default",
            "method=auto",
            "",
        ]
    )


def _with_cloud_init(
    written: dict[str, bytes], device_id: str, hostname: str, login: Optional[Login]
) -> tuple[dict[str, bytes], list[str]]:
    """user-data and meta-data, and the instance's id, which differs from that of any other content."""
    files = {**written, "user-data": _user_data(hostname, login).encode()}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(hashlib.sha256(path.encode()).digest() + hashlib.sha256(files[path]).digest())
    instance = f"covey-{device_id}-{digest.hexdigest()[:12]}"
    files["meta-data"] = f"instance-id: {instance}\n".encode()
    return files, [f"ds=nocloud;i={instance}"]


def _user_data(hostname: str, login: Optional[Login]) -> str:
    """bootcmd and not runcmd: it runs at every boot, so a power cut in the first is no end of it."""
    script = f"{BOOT}/{FOLDER}/{SCRIPT}"
    begin = f"test ! -e {script} || {{ sh {script} {BOOT} --service && systemctl start --no-block {SERVICE}; }}"
    lines = [
        "#cloud-config",
        f"hostname: {hostname}",
        "manage_etc_hosts: true",
        "bootcmd:",
        f"- [ sh, -c, {json.dumps(begin)} ]",
    ]
    if login:
        lines += [
            "enable_ssh: true",
            "ssh_pwauth: false",
            "users:",
            f"- name: {login.user}",
            f"  groups: {GROUPS}",
            "  shell: /bin/bash",
            "  lock_passwd: true",
            "  ssh_authorized_keys:",
            *(f"  - {json.dumps(key)}" for key in login.keys),
            "  sudo: ALL=(ALL) NOPASSWD:ALL",
        ]
    return "\n".join([*lines, ""])


def _firstrun(hostname: str, login: Optional[Login]) -> str:
    """What Raspberry Pi Imager would write, and covey's service; takes itself off the card and out of cmdline.txt.

    It runs alone, before the system's own services, and ends in a reboot. cmdline.txt is replaced last, by a whole
    file: after a power cut before that, all of it runs again.
    """
    custom = "/usr/lib/raspberrypi-sys-mods/imager_custom"
    lines = [
        "#!/bin/sh",
        "set +e",
        f"if [ -f {custom} ]; then",
        f"   {custom} set_hostname {hostname}",
        "else",
        f"   echo {hostname} >/etc/hostname",
        f'   sed -i "s/^127\\.0\\.1\\.1.*/127.0.1.1\\t{hostname}/" /etc/hosts',
        "fi",
    ]
    if login:
        lines += _ssh_lines(login, custom)
    lines += [
        f"sh {BOOT}/{FOLDER}/{SCRIPT} {BOOT} --service || exit 1",  # covey/first-boot.log says why
        "sync",
        f"sed 's| systemd\\.[^ ]*||g' {BOOT}/cmdline.txt >{BOOT}/cmdline.new && sync",
        f"mv {BOOT}/cmdline.new {BOOT}/cmdline.txt && sync",
        f"rm -f {BOOT}/{FIRSTRUN}",
        "exit 0",
    ]
    return "\n".join([*lines, ""])


def _ssh_lines(login: Login, custom: str) -> list[str]:
    """As Imager's: the first user gets the name and the keys. The first trixie of 2025-10-01 has no imager_custom."""
    keys = " ".join(shlex.quote(key) for key in login.keys)
    home = "$(getent passwd 1000 | cut -d: -f6)/.ssh"
    return [
        f"if [ -f {custom} ]; then",
        f"   {custom} enable_ssh -k {keys}",
        "else",
        f'   install -o 1000 -g 1000 -m 700 -d "{home}"',
        f"   printf '%s\\n' {keys} >\"{home}/authorized_keys\"",
        f'   chown 1000:1000 "{home}/authorized_keys"',
        f'   chmod 600 "{home}/authorized_keys"',
        "   echo 'PasswordAuthentication no' >>/etc/ssh/sshd_config",
        "   systemctl enable ssh",
        "fi",
        f"/usr/lib/userconf-pi/userconf {shlex.quote(login.user)} ''",
    ]
