"""Emulated machines: a real qemu boots tiny images. What Debian does in one is tested in tests/device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from patience import PATIENCE_S
from tiny_machines import TURNS_OFF, bootable, image, require_qemu

from covey_deploy.cli_emulate import emulate_command
from covey_deploy.emulator import BootFiles, Hardware, Machine, qemu_command
from covey_deploy.programs import require_programs
from covey_protocol.errors import DataError, MachineError


def test_the_console_is_read_from_this_boot_on_and_the_power_can_be_cut(tmp_path: Path) -> None:
    require_qemu()
    card = bootable(tmp_path / "card.img", "hello from inside\n")
    with Machine(card, tmp_path / "console") as machine:
        machine.start()
        machine.wait_for("hello from (.*)", PATIENCE_S)
        assert machine.running
        with pytest.raises(MachineError, match="is running already"):
            machine.start()
        machine.power_cut()
        assert not machine.running
        machine.start()
        found = machine.wait_for("hello from (.*)", PATIENCE_S)  # not the one of the first boot
        assert found[1] == "inside"
        assert machine.text.count("hello") == 2
        with pytest.raises(MachineError, match="nothing in 0 s; it said"):
            machine.wait_for("hello", 0.0)
        assert not machine.stop(timeout_s=0.2)  # nothing in there hears the power button


def test_a_machine_that_turns_itself_off_has_ended(tmp_path: Path) -> None:
    require_qemu()
    card = bootable(tmp_path / "card.img", "good night\n", TURNS_OFF)
    with Machine(card, tmp_path / "console") as machine:
        machine.start()
        shown: list[str] = []
        assert machine.follow(shown.append, lambda: None, PATIENCE_S)
        assert "".join(shown) == "good night\n"
        with pytest.raises(MachineError, match="the machine has ended; it said\ngood night"):
            machine.wait_for("good morning", PATIENCE_S)
        machine.start()  # and can be turned on again
        machine.wait_for("good night", PATIENCE_S)


def test_a_machine_does_not_outlive_the_program_that_started_it(tmp_path: Path) -> None:
    require_qemu()
    card = bootable(tmp_path / "card.img", "up\n")
    program = (
        "import sys; from pathlib import Path; from covey_deploy.emulator import Machine\n"
        f"machine = Machine(Path({str(card)!r}), Path({str(tmp_path / 'console')!r})); machine.start()\n"
        "machine.wait_for('up', 200); print(machine._process.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    qemu = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    end = time.monotonic() + PATIENCE_S
    while _runs(qemu) and time.monotonic() < end:
        time.sleep(0.02)
    assert not _runs(qemu)


def _runs(pid: int) -> bool:
    try:
        return "qemu-system" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def test_the_command_shows_the_console_until_the_machine_is_off(tmp_path: Path) -> None:
    require_qemu()
    card = bootable(tmp_path / "card.img", "good night\n", TURNS_OFF)
    command = [sys.executable, "-m", "covey_edge", "emulate", str(card)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert (ended.returncode, ended.stdout) == (0, "good night\n"), ended.stderr
    assert (tmp_path / "card.img.log").read_text() == "good night\n"


def test_ctrl_c_asks_for_a_shutdown_and_a_second_one_cuts_the_power(tmp_path: Path) -> None:
    require_qemu()
    card = bootable(tmp_path / "card.img", "up\n")
    command = [sys.executable, "-m", "covey_edge", "emulate", str(card)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "up\n"
        assert process.stderr.readline().startswith("booting ")
        process.send_signal(signal.SIGINT)
        said = [process.stderr.readline(), process.stderr.readline()]
        assert said == ["\n", "shutting down; Ctrl-C again cuts the power\n"]
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130


NO_BOOT = {
    "an image without a kernel": ({"cmdline.txt": b""}, "has no vmlinuz on a boot partition"),
    "an image without a command line": ({"vmlinuz": b"x", "initrd.img": b"x"}, "has no cmdline.txt"),
}


@pytest.mark.parametrize("case", NO_BOOT)
def test_what_cannot_boot_is_told(case: str, tmp_path: Path) -> None:
    require_qemu()
    files, says = NO_BOOT[case]
    machine = Machine(image(tmp_path / "card.img", files), tmp_path / "console")
    with pytest.raises(DataError, match=says):
        machine.start()


def test_files_that_are_no_image_are_told(tmp_path: Path) -> None:
    require_qemu()
    (tmp_path / "zeros").write_bytes(bytes(4096))
    with pytest.raises(DataError, match="zeros has no vmlinuz"):
        Machine(tmp_path / "zeros", tmp_path / "console").start()
    with pytest.raises(DataError, match=r"absent.*cannot be read \(No such file"):
        Machine(tmp_path / "absent", tmp_path / "console").start()


def test_an_image_that_another_machine_has_open_is_refused(tmp_path: Path) -> None:
    require_qemu()
    card = bootable(tmp_path / "card.img", "up\n")
    with Machine(card, tmp_path / "console") as first:
        first.start()
        first.wait_for("up", PATIENCE_S)
        with pytest.raises(MachineError, match=r"qemu did not start .*lock"):
            Machine(card, tmp_path / "another").start()


def test_missing_programs_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(MachineError, match="no-such-program, nor-this; install it: sudo apt install one-package"):
        require_programs({"no-such-program": "one-package", "nor-this": "one-package"})


def test_paths_and_settings_reach_qemu() -> None:
    boot = BootFiles(Path("/k"), Path("/i"), "root=LABEL=covey-root")
    hardware = Hardware(768, 1, snapshot=True, clock="2024-01-01T00:00:00", kernel_arguments=("quiet",))
    command = qemu_command(Path("/srv/a,b.img"), Path("/srv/c"), hardware, boot)
    assert "file=/srv/a,,b.img,format=raw,if=none,id=card,cache=writeback,snapshot=on" in command
    assert "base=2024-01-01T00:00:00,clock=vm" in command
    arguments = command[command.index("-append") + 1]
    assert arguments.startswith("root=LABEL=covey-root ")
    assert arguments.endswith(" quiet")
    assert (command[command.index("-m") + 1], command[command.index("-smp") + 1]) == ("768", "1")


def test_the_help_says_how_to_end_it() -> None:
    assert "Ctrl-C" in CliRunner().invoke(emulate_command, ["--help"]).output
