"""The script for phones, in a made-up Termux: refusals everywhere, and a whole way on a real Debian.

Termux's own programs are small stand-ins here (proot-distro becomes chroot); the Debian, its Python, the kit, the agent
and the broker are real. No phone has seen any of it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from arm64 import require_emulation, userland
from brokers import RunningBroker
from real_kits import MAKER, digits, real_kit
from reporting import one_round

import covey_deploy
from covey_deploy.targets import Target, described, named
from covey_protocol.seals import SealingKey

SCRIPT = Path(covey_deploy.__file__).parent / "android" / "install-termux.sh"
PROOT_DISTRO = """\
case $1 in
  install) echo "$@" >>{calls}; [ "$2" = --name ] || exit 1; touch {installed} ;;
  login) [ -e {installed} ] || exit 1; shift 3; exec unshare -m sh -c '
    for name in {borrowed}; do mkdir -p {root}/$name; mount --rbind /$name {root}/$name; done
    exec chroot {root} /usr/bin/env -i PATH=/usr/bin:/bin HOME=/root "$@"' sh "$@" ;;
esac
"""


def made_up_termux(folder: Path, root: Path, borrowed: str = "") -> dict[str, str]:
    """The environment of a Termux in which proot-distro is not installed yet. borrowed: folders of this machine that
    its Debian shows."""
    prefix, home = folder / "com.termux" / "files" / "usr", folder / "home"
    home.mkdir()
    (prefix / "bin").mkdir(parents=True)
    names = {"calls": folder / "calls", "installed": folder / "installed", "root": root, "borrowed": borrowed}
    scripts = {
        "uname": "echo aarch64",
        "pkg": f'echo pkg "$@" >>{names["calls"]}; mv {folder}/later/* {prefix}/bin/',
        "termux-wake-lock": f"echo wake-lock >>{names['calls']}",
        "termux-wake-unlock": f"echo wake-unlock >>{names['calls']}",
        "../../../../later/proot-distro": PROOT_DISTRO.format(**names),
        "../../../../later/termux-battery-status": "echo '{}'",
    }
    (folder / "later").mkdir()
    for name, text in scripts.items():
        path = prefix / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    (prefix / "bin" / "sh").symlink_to("/bin/sh")
    path = f"{prefix / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PREFIX": str(prefix), "HOME": str(home), "PATH": path, "TERMUX_VERSION": "0.118.0"}


REFUSED = {
    "outside Termux": ({"PREFIX": "/usr"}, "this is not Termux", 3),
    "without a kit": ({}, "there is no kit", 2),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_script_refuses_by_name_what_it_cannot_do(what: str, tmp_path: Path) -> None:
    changes, words, code = REFUSED[what]
    environment = {**made_up_termux(tmp_path, tmp_path), **changes}
    command = ["sh", str(SCRIPT), str(tmp_path / "no.kit"), str(tmp_path)]
    ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert ended.returncode == code
    assert words in ended.stderr
    assert not (tmp_path / "calls").exists()  # nothing was installed


@pytest.mark.slow
def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("not installed: shellcheck (Debian: apt install shellcheck)")
    subprocess.run(["shellcheck", str(SCRIPT)], check=True)


INSTALL_AND_START = """\
#!/bin/sh
# as one_round starts an agent: agent --config FILE
set -e
sh {script} {kit} "$(dirname "$3")" {key}
exec "$HOME/.termux/boot/covey"
"""


def emulated(root: Path) -> tuple[Target, str]:
    """A copy of a real Debian trixie for arm64."""
    require_emulation()
    base = userland("trixie", "dash", "coreutils", "tar")
    subprocess.run(["cp", "-a", "--reflink=auto", str(base), str(root)], check=True)
    return named("termux-debian-arm64"), ""


def native(root: Path) -> tuple[Target, str]:
    """This machine's own programs, which are faster, with folders of its own for all else."""
    python = subprocess.run(["/usr/bin/python3", "-V"], check=False, capture_output=True, text=True).stdout
    if os.geteuid() != 0 or not python.startswith(("Python 3.11.", "Python 3.13.")):
        pytest.skip("needs root, and /usr/bin/python3 of Debian bookworm or trixie")
    root.mkdir()
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
    return described(python.split()[1].rpartition(".")[0], platform.machine(), "2.36"), "usr dev proc"


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("debian", [native, emulated])
def test_a_made_up_phone_installs_trains_and_reports(
    debian: Callable[[Path], tuple[Target, str]],
    mosquitto: RunningBroker,
    digits_bundle: bytes,
    coordinator_key: SealingKey,
    tmp_path: Path,
) -> None:
    root = tmp_path / "root"
    target, borrowed = debian(root)
    kit = tmp_path / "some.kit"
    kit.write_bytes(real_kit(target))
    start = tmp_path / "start"
    start.write_text(INSTALL_AND_START.format(script=SCRIPT, kit=kit, key=MAKER.public.hex()))
    start.chmod(0o755)
    try:
        reported = one_round(
            [str(start)],
            tmp_path,
            mosquitto,
            digits_bundle,
            coordinator_key,
            digits(32),
            environment=made_up_termux(tmp_path, root, borrowed),
        )
        agent_log = (tmp_path / "home" / "covey.log").read_text()
        assert reported.outcome == "published", agent_log
        assert reported.change > 0.001
        assert f"on Python {target.python}." in agent_log
        calls = (tmp_path / "calls").read_text().splitlines()
        assert calls == [
            "pkg install -y proot-distro termux-api",
            f"install --name covey debian:{'trixie' if target.python == '3.13' else 'bookworm'}",
            "wake-lock",
            "wake-unlock",
        ]
        settings = root / "etc" / "covey"
        came_along = [settings, *(settings / name for name in ("agent.toml", "device.pem", "data.npz"))]
        assert [path for path in came_along if path.stat().st_mode & 0o077] == []
    finally:
        shutil.rmtree(root)
