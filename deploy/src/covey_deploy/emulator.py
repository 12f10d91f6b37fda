"""A card image, booted in qemu: an arm64 machine without hardware.

Starts one qemu-system-aarch64 (`-M virt`) with kernel, initrd and command line from the image's boot partition, a disk,
and a user network: from inside, the host is 10.0.2.2, and nobody reaches the machine from outside. Decides nothing
about covey. Linux only. A machine ends with the thread that started it, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Optional

from covey_deploy.fat import Fat
from covey_deploy.partitions import read_partitions
from covey_deploy.programs import require_programs
from covey_protocol.errors import DataError, MachineError

PROGRAMS = {"qemu-system-aarch64": "qemu-system-arm", "setpriv": "util-linux"}
HOST_FROM_INSIDE = "10.0.2.2"  # qemu's user network
KERNEL, INITRD, COMMAND_LINE = "vmlinuz", "initrd.img", "cmdline.txt"  # on the boot partition
JOURNAL_ON_CONSOLE = (
    *("systemd.journald.forward_to_console=1", "systemd.journald.max_level_console=info"),
    "systemd.show_status=no",  # the same twice, and an animation while a unit starts
)
# an emulated machine on a busy host is slow, not broken
PATIENT = ("systemd.default_timeout_start_sec=15min",)
POWER_KEY: Mapping[str, Any] = {"keys": [{"type": "qcode", "data": "power"}]}
POLL_S = 0.1


@dataclass(frozen=True)
class Hardware:
    """cpus, memory_mb: of the machine. clock: ISO 8601, what its clock shows at power-on; empty for the true time.

    snapshot: the image stays as it is, and everything the machine writes is forgotten when it ends.
    kernel_arguments: appended to the image's own.
    """

    memory_mb: int = 1024
    cpus: int = 2
    snapshot: bool = False
    clock: str = ""
    kernel_arguments: tuple[str, ...] = ()


@dataclass
class Machine:
    """One emulated machine. console: the file that its serial console is appended to.

    Not for several threads, and the thread that calls `start` must live as long as the machine.
    """

    image: Path
    console: Path
    hardware: Hardware = field(default_factory=Hardware)
    _process: Optional[subprocess.Popen[bytes]] = None
    _monitor: Optional[socket.socket] = None
    _text: str = ""  # of the console, as far as it was read: `_offset` bytes
    _offset: int = 0
    _seen: int = 0  # characters of it that wait_for and follow have used up

    def start(self) -> None:
        """Power on. MachineError where qemu is missing or ends at once, DataError where the image cannot boot."""
        if self.running:
            raise MachineError(f"the machine of {self.image} is running already", "stop it first")
        require_programs(PROGRAMS)
        self.power_cut()  # what is left of a machine that turned itself off
        self._seen = len(self.text)
        with tempfile.TemporaryDirectory(prefix="covey-emulate-") as folder:
            boot = kernel_files(self.image, Path(folder))
            here, there = socket.socketpair()
            self.console.parent.mkdir(parents=True, exist_ok=True)
            complaints = self.console.with_name(f"{self.console.name}.qemu")
            command = ["setpriv", "--pdeathsig", "KILL", *qemu_command(self.image, self.console, self.hardware, boot)]
            command += ["-chardev", f"socket,id=qmp,fd={there.fileno()}", "-mon", "chardev=qmp,mode=control"]
            try:
                with complaints.open("wb") as errors:
                    self._process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, pass_fds=[there.fileno()]
                    )
            finally:
                there.close()
            self._monitor = here
            try:
                _ask(here, "qmp_capabilities")  # qemu has read kernel and initrd when it answers
            except (OSError, ValueError) as exc:
                self.power_cut()
                said = " ".join(complaints.read_text(errors="replace").split()) or exc
                raise MachineError(f"qemu did not start ({said})", "mend what it names") from exc

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def text(self) -> str:
        """All that the console has shown, also in earlier runs that wrote to the same file."""
        with contextlib.suppress(FileNotFoundError), self.console.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
            whole = len(new) if not self.running else new.rfind(b"\n") + 1  # no half characters
            self._offset += whole
            self._text += new[:whole].decode(errors="replace").replace("\r", "")
        return self._text

    @property
    def unseen(self) -> str:
        """What of it neither `wait_for` nor `follow` has used up."""
        return self.text[self._seen :]

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """The first place on the console that fits and was not used by an earlier call.

        MachineError with the console's last lines where it does not come in time, or the machine ends before.
        """
        end = time.monotonic() + timeout_s
        while True:
            ended = not self.running
            found = re.compile(pattern).search(self.text, self._seen)
            if found:
                self._seen = found.end()
                return found
            if ended or time.monotonic() > end:
                why = "the machine has ended" if ended else f"nothing in {timeout_s:.0f} s"
                raise MachineError(f"waited for {pattern!r} on the console: {why}; it said\n{self.text[-3000:]}")
            time.sleep(POLL_S)

    def follow(self, show: Callable[[str], None], check: Callable[[], None], timeout_s: float = math.inf) -> bool:
        """Show what comes on the console until the machine ends: True; or for `timeout_s`: False.

        check: called often, and may raise. What `wait_for` or an earlier call has seen is not shown.
        """
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            ended = not self.running
            new = self.unseen
            self._seen += len(new)
            show(new)
            if ended:
                return True
            check()
            time.sleep(POLL_S)
        return False

    def press_power_button(self) -> None:
        """What asks an operating system to shut down. Where nothing listens, nothing happens.

        By ACPI, and as a keyboard's power key: without firmware there is no ACPI, and the machine's own button hangs on
        a line that Debian's cloud kernel has no driver for.
        """
        assert self._monitor is not None
        for command, arguments in (("system_powerdown", MappingProxyType({})), ("send-key", POWER_KEY)):
            with contextlib.suppress(OSError, ValueError):  # it has just ended
                _ask(self._monitor, command, arguments)

    def stop(self, timeout_s: float = 60.0) -> bool:
        """Shut down in order, or cut the power after `timeout_s`. Whether it was in order."""
        orderly = self.running
        if self.running:
            self.press_power_button()
            assert self._process is not None
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                orderly = False
        self.power_cut()
        return orderly

    def power_cut(self) -> None:
        """SIGKILL: what the machine had not flushed to its disk is lost. Does nothing where it has ended."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        if self._monitor is not None:
            self._monitor.close()
        self._process = self._monitor = None

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        self.power_cut()


@dataclass(frozen=True)
class BootFiles:
    """kernel, initrd: files on this machine. arguments: the kernel's command line."""

    kernel: Path
    initrd: Path
    arguments: str


def kernel_files(image: Path, folder: Path) -> BootFiles:
    """Copy what boots out of the image's boot partition into `folder`. DataError names what is missing there."""
    copied = {}
    with _opened(image) as file:
        first = next(iter(read_partitions(file)), None)
        boot = Fat(file, first.start) if first is not None and first.may_be_fat else None
        for name in (KERNEL, INITRD, COMMAND_LINE):
            content = boot.read(name) if boot is not None else None
            if content is None:
                remedy = "give an image of `covey flash --debian`; Raspberry Pi OS boots on a Raspberry Pi only"
                raise DataError(f"{image} has no {name} on a boot partition", remedy)
            copied[name] = folder / name
            copied[name].write_bytes(content)
    arguments = " ".join(copied[COMMAND_LINE].read_text().split())
    return BootFiles(copied[KERNEL], copied[INITRD], arguments)


def _opened(image: Path) -> BinaryIO:
    try:
        return image.open("rb")
    except OSError as exc:
        raise DataError(f"{image} cannot be read ({exc.strerror})", "give an image of `covey flash --debian`") from exc


def qemu_command(image: Path, console: Path, hardware: Hardware, boot: BootFiles) -> list[str]:
    """The program and its arguments. A Raspberry Pi 4's kind of processor; KVM where this machine is an arm64 one."""
    own = platform.machine() == "aarch64" and os.access("/dev/kvm", os.R_OK | os.W_OK)
    clock = f"base={hardware.clock},clock=vm" if hardware.clock else "base=utc"
    snapshot = ",snapshot=on" if hardware.snapshot else ""
    # a comma ends an option's value unless it is doubled
    disk, serial = (str(path).replace(",", ",,") for path in (image, console))
    return [
        *("qemu-system-aarch64", "-M", "virt", "-nodefaults", "-display", "none", "-no-user-config"),
        *(("-accel", "kvm", "-cpu", "host") if own else ("-accel", "tcg,thread=multi", "-cpu", "cortex-a72")),
        *("-smp", str(hardware.cpus), "-m", str(hardware.memory_mb), "-rtc", clock),
        *("-kernel", str(boot.kernel), "-initrd", str(boot.initrd)),
        *("-append", " ".join([boot.arguments, *(() if own else PATIENT), *hardware.kernel_arguments])),
        *("-drive", f"file={disk},format=raw,if=none,id=card,cache=writeback{snapshot}"),
        *("-device", "virtio-blk-pci,drive=card"),
        # without romfile= it looks for a boot ROM of the network card, which Debian packages elsewhere
        *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
        *("-device", "virtio-rng-pci", "-device", "virtio-keyboard-pci"),
        *("-chardev", f"file,id=console,path={serial},append=on", "-serial", "chardev:console"),
    ]


def _ask(monitor: socket.socket, command: str, arguments: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """One QMP command and its answer; events and the greeting are passed over. ValueError where it is refused."""
    monitor.sendall(json.dumps({"execute": command, "arguments": dict(arguments)}).encode() + b"\n")
    with monitor.makefile("rb") as lines:
        for line in lines:
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                raise ValueError(answer["error"].get("desc", command))
            if "return" in answer:
                return answer
    raise ValueError("qemu has ended")
