"""What the edge agent costs a device: disk, memory, time to be connected, processor time at rest, bytes on the wire.

    python benchmarks/agent.py [--quick] [--peers] [--python 3.11] [--json FILE]

The agent runs as a kit installs it on devices (docs/kits.md), from .bench/agent-kit-3.x, made anew for each lock or
source; what pip installs of the same lock (.bench/agent-3.x) is weighed beside it. It runs against a
Mosquitto on this machine and trains the reference CNN (206,922 parameters) on 600 images. --peers: beside it, in the
same run, Flower's SuperNode (flwr) with the same model, data and settings in TensorFlow and in
PyTorch, each in an environment made from benchmarks/agent-peers.txt (4 GB; the first time takes minutes).

Memory is read from /proc/PID/smaps of the program and all it has started, every 0.1 s. "Together" counts a page of a
file once for all of them: that is what the device loses to it, when nothing else on it uses the same files. Processor
time is that of all their threads (schedstat), over 5 minutes at rest after the rounds, or 30 s with --quick.
Final numbers need a quiet machine: the load is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from covey_coordinator.libraries import prepare

prepare()

import numpy as np
from fleet import start_mosquitto, tied_to_us

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from proxy import Proxy

import covey_models
from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.coordinator import Coordinator
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.fleet import Fleet
from covey_coordinator.store import RunStore
from covey_deploy import installer
from covey_deploy.agent_wheel import agent_wheel
from covey_deploy.kit import make_kit
from covey_deploy.targets import described
from covey_deploy.wheelhouse import Wheelhouse, lock_file, pinned
from covey_edge.mqtt import parse_broker
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import Presence, TrainingPlan
from covey_protocol.seals import SealingKey

ENVIRONMENTS = ROOT / ".bench"
PEERS = {"flwr, TensorFlow": "flwr-tensorflow", "flwr, PyTorch": "flwr-torch"}
EXAMPLES, BATCH, RATE = 600, 20, 0.05
PATIENCE_S = 300.0
SAMPLE_S = 0.1
GLIBC = "2.34"  # what the newest wheels of the lock ask for
CHILD_GONE_S = 60.0  # the agent ends its training child after 30 s without work
NOT_OURS = re.compile(r"^(pip|setuptools|pkg_resources|_distutils_hack|distutils-precedence|wheel)")
BARS = {"installed_mb": 85.0, "idle_mb": 45.0, "training_mb": 70.0, "start_s": 1.5, "idle_cpu_percent": 0.2}


class BenchmarkError(Exception):
    """Something that is measured did not do what it should."""


@dataclass
class Row:
    """What one program costs. MB are 10^6 bytes.

    idle_mb: of all its processes together, at rest after the rounds. training_mb: largest resident memory of any one of
    them in a round; together_mb of all at once. pss_mb: proportional set sizes, idle and largest sum, which are smaller
    the more other programs of the machine use the same libraries. start_cpu_s: processor time of all its processes
    until it is connected, which a busy machine changes less.
    """

    name: str
    python: str
    installed_mb: float = 0.0
    with_pip_mb: float = 0.0
    idle_mb: float = 0.0
    idle_processes: int = 0
    training_mb: float = 0.0
    together_mb: float = 0.0
    pss_mb: tuple[float, float] = (0.0, 0.0)
    start_s: float = 0.0
    start_cpu_s: float = 0.0
    idle_cpu_percent: float = 0.0
    round_s: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    notes: list[str] = field(default_factory=list)


# --- processes


def tree(pid: int) -> list[int]:
    """This process and all that descend from it."""
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{found[-1]}/task").iterdir():
                left += map(int, (thread / "children").read_text().split())
    return found


@dataclass
class Memory:
    """Bytes. largest: resident of the largest process. together: of all, file pages once. pss: sum."""

    largest: int = 0
    together: int = 0
    pss: int = 0

    def up_to(self, other: Memory) -> Memory:
        return Memory(*(max(pair) for pair in zip(self._values(), other._values())))

    def _values(self) -> tuple[int, int, int]:
        return self.largest, self.together, self.pss


_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ (\S+) \S+ \S+\s*(.*)$")


def memory(pids: Sequence[int]) -> Memory:
    """Of these processes; one that ends meanwhile counts as what was read of it."""
    largest = anonymous = pss = 0
    files: dict[tuple[str, str], int] = {}
    for pid in pids:
        resident, place = 0, ("", "")
        with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps") as lines:
            for line in lines:
                if (mapping := _MAPPING.match(line)) is not None:
                    place = (mapping[2], mapping[1])
                elif line.startswith("Rss:"):
                    size = int(line.split()[1]) * 1024
                    resident += size
                elif line.startswith("Pss:"):
                    pss += int(line.split()[1]) * 1024
                elif line.startswith("Anonymous:"):
                    own = int(line.split()[1]) * 1024
                    anonymous += own
                    files[place] = max(files.get(place, 0), size - own)
        largest = max(largest, resident)
    return Memory(largest, anonymous + sum(files.values()), pss)


class Watch:
    """The largest memory of a process and its descendants while the block runs."""

    def __init__(self, pid: int) -> None:
        self._pid, self._over, self.peak = pid, threading.Event(), Memory()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.peak = self.peak.up_to(memory(tree(self._pid)))


def cpu_s(pids: Sequence[int]) -> float:
    """Processor time of all threads so far; threads and processes that have ended are missing."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9


def idle_cpu_percent(pid: int, seconds: float) -> float:
    """Of one core, in percent."""
    before, started = cpu_s(tree(pid)), time.monotonic()
    time.sleep(seconds)
    return 100.0 * (cpu_s(tree(pid)) - before) / (time.monotonic() - started)


def end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# --- environments


def found_python(version: str) -> str:
    managed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in (*map(str, managed), shutil.which(f"python{version}")):
        if candidate and subprocess.run([candidate, "-c", ""], check=False, capture_output=True).returncode == 0:
            return candidate
    raise BenchmarkError(f"no Python {version} was found")


def environment(name: str, python: str, state: str, *installs: Sequence[str]) -> Path:
    """A virtual environment of this name, made anew unless the last one was made of the same state."""
    folder = ENVIRONMENTS / name
    stamp = folder / ".made-of"
    if not stamp.exists() or stamp.read_text() != state:
        print(f"making {folder.relative_to(ROOT)}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for arguments in installs:
            subprocess.run([*pip, *arguments], check=True)
        stamp.write_text(state)
    return folder


def agent_environment(version: str) -> Path:
    """The agent's wheel and what its lock names, as docs/install.md says."""
    lock = ROOT / "locks" / "edge.txt"
    sources = sorted((ROOT / "edge").rglob("*.py")) + [lock, ROOT / "edge" / "pyproject.toml"]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    with tempfile.TemporaryDirectory() as name:
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", name, str(ROOT / "edge")]
        subprocess.run(build, check=True, capture_output=True)
        (wheel,) = Path(name).glob("*.whl")
        from_lock = ["--no-compile", "--require-hashes", "--only-binary", ":all:", "-r", str(lock)]
        own = ["--no-compile", "--no-deps", str(wheel)]
        return environment(f"agent-{version}", found_python(version), state, from_lock, own)


def kit_environment(version: str) -> Path:
    """The prefix of a kit's installation for this machine and this Python."""
    target = described(version, platform.machine(), GLIBC)
    wheels = Wheelhouse(ENVIRONMENTS / "wheels").wheels(pinned(lock_file().read_text(), target), target)
    kit = make_kit(target, {**wheels, **dict([agent_wheel()])}, SealingKey.from_seed(bytes(32)))
    folder, state = ENVIRONMENTS / f"agent-kit-{version}", hashlib.sha256(kit).hexdigest()
    stamp = folder / ".made-of"
    if not stamp.exists() or stamp.read_text() != state:
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as name:
            for file, data in installer.members(kit):
                (Path(name) / file).parent.mkdir(exist_ok=True)
                (Path(name) / file).write_bytes(data)
            command = [found_python(version), str(Path(name) / "install.py"), "--prefix", str(folder)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        stamp.write_text(state)
    return folder


def peer_environment(name: str, version: str) -> Path:
    """Flower, and the framework that the environment's name ends with."""
    wanted = Path(__file__).with_name("agent-peers.txt").read_text()
    lines = [line.split("#")[0].strip() for line in wanted.splitlines()]
    framework = name.split("-")[1]
    packages = [line for line in lines if line and line.split("==")[0] in ("flwr", framework)]
    return environment(name, found_python(version), "\n".join(packages), packages)


def as_after_a_boot(folder: Path) -> Path:
    """The kernel forgets these files, and reads them again when they are asked for.

    What was just written lies in memory in large pieces, and a process that maps one gets the whole of it: 4 MB more of
    numpy's BLAS (Linux 6.18, ext4) than on a device that has been switched on since.
    """
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return folder


def installed_mb(folder: Path) -> tuple[float, float]:
    """(what was installed, all of the environment), without links to the Python it is made of."""
    (packages,) = folder.glob("lib/python*/site-packages")
    own = sum(_bytes(path) for path in packages.iterdir() if not NOT_OURS.match(path.name))
    return own / 1e6, _bytes(folder) / 1e6


def _bytes(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(_bytes(one) for one in path.iterdir())


# --- the agent


@dataclass(frozen=True)
class Material:
    """The same for all: a bundle with its first weights, the key it is sealed with, and one device's images."""

    bundle: bytes
    key: SealingKey
    parameters: Any
    shard: Shard


def material() -> Material:
    from train_step import reference_cnn

    from covey_edge.runtime import Model

    key, rng = SealingKey.generate(), np.random.default_rng(0)
    bundle = covey_models.export(
        reference_cnn(), name="reference", batch_size=BATCH, input_range=(0.0, 1.0), num_classes=10, key=key
    )
    x, y = rng.random((EXAMPLES, 28, 28, 1), np.float32), rng.integers(0, 10, EXAMPLES).astype(np.int32)
    return Material(bundle, key, Model(read_bundle(bundle)).parameters(), Shard(x, y))


@contextlib.contextmanager
def running_agent(folder: Path, python: Path, config: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "agent.log").open("ab") as log:
        command = [str(python / "bin" / "covey"), "agent", "--config", str(config), "--parent", str(os.getpid())]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=plain_environment())
    try:
        yield process
    finally:
        end(process)


def plain_environment(**more: str) -> dict[str, str]:
    """As a device has it: without what this environment sets."""
    ours = ("PYTHON", "OMP_", "OPENBLAS_", "MKL_", "TF_", "VIRTUAL_ENV")
    return {**{name: value for name, value in os.environ.items() if not name.startswith(ours)}, **more}


def measure_agent(made: Material, version: str, seconds: float, starts: int, rounds: int) -> Row:
    python = as_after_a_boot(kit_environment(version))
    # a device's second start is the usual one: Python keeps the bytecode of what it has imported
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mosquitto, port = start_mosquitto(folder)
        proxy = Proxy(port)
        url = f"mqtt://127.0.0.1:{port}"
        device = make_device("pi", folder / "pi", "bench", {"url": proxy.url}, made.key.public, made.shard)
        fleet = Fleet(parse_broker(url), "bench", made.key, {"pi": device.public})
        try:
            fleet.connect()
            row, times, cpu = Row("covey agent", version), [], []
            for _ in range(starts + 1):
                started = time.monotonic()
                with running_agent(folder, python, device.config) as process:
                    online(fleet, True)
                    times.append(time.monotonic() - started)
                    cpu.append(cpu_s(tree(process.pid)))
                online(fleet, False)
            row.start_s, row.start_cpu_s = statistics.median(times[1:]), statistics.median(cpu[1:])
            with running_agent(folder, python, device.config) as process:
                online(fleet, True)
                agent_rounds(row, made, fleet, folder, proxy, process.pid, rounds)
                rest_of(row, process.pid, seconds, lambda: len(tree(process.pid)) == 1)
        finally:
            fleet.close()
            proxy.close()
            end(mosquitto)
    tree_of_kit = installer.Prefix(python).running()
    assert tree_of_kit is not None
    row.installed_mb = installer.size_of(tree_of_kit) / 1e6
    by_pip, row.with_pip_mb = installed_mb(agent_environment(version))
    row.notes.append(
        f"installed by a kit {row.installed_mb:.1f} MB, by pip {by_pip:.1f} (without bytecode), with pip more"
    )
    return row


def online(fleet: Fleet, is_online: bool) -> None:
    """Wait until the device says that it is, or is not."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        received = fleet.next(1.0)
        if received is not None and isinstance(received.message, Presence) and received.message.online == is_online:
            return
    raise BenchmarkError(f"the agent is not {'online' if is_online else 'offline'}")


def agent_rounds(row: Row, made: Material, fleet: Fleet, folder: Path, proxy: Proxy, pid: int, rounds: int) -> None:
    """Some rounds, of which the first also brings the bundle: bytes and seconds are medians of the others."""
    coordinator = Coordinator(fleet, RunStore(folder / "run"))
    coordinator.wait_for(1, PATIENCE_S)
    engine = make_engine("direct", make_rule("mean"), read_bundle(made.bundle).manifest.parameters)
    parameters, seen = made.parameters, []
    with Watch(pid) as watch:
        for number in range(1, rounds + 1):
            before, started = proxy.settled(), time.monotonic()
            result = coordinator.run_round(
                run_id="bench",
                number=number,
                bundle=made.bundle,
                parameters=parameters,
                plan=TrainingPlan(epochs=1, learning_rate=RATE),
                device_ids=["pi"],
                quorum=1,
                engine=engine,
            )
            if result.outcome != "published":
                raise BenchmarkError(
                    f"round {number} was {result.outcome}: {(folder / 'agent.log').read_text()[-500:]}"
                )
            seconds, after = time.monotonic() - started, proxy.settled()
            seen.append((seconds, after[0] - before[0], after[1] - before[1]))
            parameters = result.parameters
    of_rounds(row, seen, watch.peak)


def of_rounds(row: Row, seen: Sequence[tuple[float, int, int]], peak: Memory) -> None:
    """Medians over all rounds but the first."""
    seconds, up, down = zip(*seen[1:])
    row.round_s = statistics.median(seconds)
    row.up_bytes, row.down_bytes = int(statistics.median(up)), int(statistics.median(down))
    row.training_mb, row.together_mb = peak.largest / 1e6, peak.together / 1e6
    row.pss_mb = (row.pss_mb[0], peak.pss / 1e6)


def rest_of(row: Row, pid: int, seconds: float, rests: Callable[[], bool]) -> None:
    """Memory and processor time at rest, once `rests` is true, or CHILD_GONE_S after the last round."""
    until = time.monotonic() + CHILD_GONE_S
    while not rests() and time.monotonic() < until:
        time.sleep(1.0)
    idle = memory(tree(pid))
    row.idle_mb, row.idle_processes = idle.together / 1e6, len(tree(pid))
    row.pss_mb = (idle.pss / 1e6, row.pss_mb[1])
    row.idle_cpu_percent = idle_cpu_percent(pid, seconds)


# --- Flower


def measure_flower(name: str, made: Material, version: str, seconds: float, starts: int, rounds: int) -> Row:
    """Flower's SuperNode, which on a device is what the agent is, with its ClientApp in processes of their own."""
    framework = PEERS[name].split("-")[1]
    python = as_after_a_boot(peer_environment(PEERS[name], version))
    row = Row(name, version)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        np.savez(folder / "data.npz", x=made.shard.x, y=made.shard.y)
        with flower_superlink(folder, python) as port, contextlib.closing(Proxy(port)) as proxy:
            times, cpu = [], []
            for _ in range(starts + 1):
                with running_supernode(folder, python, proxy.port) as (process, started_s):
                    times.append(started_s)
                    cpu.append(cpu_s(tree(process.pid)))
            row.start_s, row.start_cpu_s = statistics.median(times[1:]), statistics.median(cpu[1:])
            with running_supernode(folder, python, proxy.port) as (process, _):
                flower_rounds(row, folder, python, proxy, process.pid, framework, rounds)
                rest_of(row, process.pid, seconds, lambda: len(tree(process.pid)) <= 2)
    row.installed_mb, row.with_pip_mb = installed_mb(python)
    row.notes.append("a ClientApp is a new process in every round; SuperNode polls every 3 s, without TLS")
    return row


def flower_environment(folder: Path, python: Path) -> dict[str, str]:
    path = f"{python / 'bin'}{os.pathsep}{os.environ['PATH']}"  # it starts its own programs by name
    return plain_environment(
        PATH=path, FLWR_HOME=str(folder / "flwr"), FLWR_TELEMETRY_ENABLED="0", PYTHONUNBUFFERED="1"
    )


@contextlib.contextmanager
def flower_superlink(folder: Path, python: Path) -> Iterator[int]:
    """A SuperLink on a free port, and Flower's settings that name it."""
    port = free_port()
    (folder / "flwr").mkdir()
    settings = f'[superlink]\ndefault = "local"\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (folder / "flwr" / "config.toml").write_text(settings)
    more = ["--insecure", "--disable-runtime-dependency-installation", "--port", str(port)]
    command = [str(python / "bin" / "flower-superlink"), *more]
    with said_by(command, folder, python, "Uvicorn running on"):
        yield port


@contextlib.contextmanager
def running_supernode(folder: Path, python: Path, port: int) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A SuperNode, and how many seconds it took to have its id from the SuperLink."""
    more = ["--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
    command = [str(python / "bin" / "flower-supernode"), *more]
    started = time.monotonic()
    with said_by(command, folder, python, "SuperNode ID") as process:
        yield process, time.monotonic() - started


@contextlib.contextmanager
def said_by(command: Sequence[str], folder: Path, python: Path, words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process once it has said these words; what it says goes to a file. It ends with the block, its children too."""
    log = folder / f"{Path(command[0]).name}-{time.monotonic_ns()}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=flower_environment(folder, python),
            start_new_session=True,
            preexec_fn=tied_to_us(),
        )
    try:
        until = time.monotonic() + PATIENCE_S
        while words.encode() not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > until:
                raise BenchmarkError(f"{command[0]} did not say {words!r}: {log.read_text()[-1000:]}")
            time.sleep(0.01)
        yield process
    finally:
        family = tree(process.pid)
        end(process)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flower_rounds(row: Row, folder: Path, python: Path, proxy: Proxy, pid: int, framework: str, rounds: int) -> None:
    """Rounds as the SuperLink's log tells them apart, a second late at most."""
    app = write_app(folder)
    given = {"framework": f'"{framework}"', "data": f'"{folder / "data.npz"}"', "rounds": rounds, "batch": BATCH}
    config = " ".join(f"{key}={value}" for key, value in {**given, "rate": RATE}.items())
    command = [str(python / "bin" / "flwr"), "run", str(app), "local", "--stream", "--run-config", config]
    marks: list[tuple[float, int, int]] = []
    said = []
    with Watch(pid) as watch:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=flower_environment(folder, python),
            preexec_fn=tied_to_us(),
        )
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.decode(errors="replace"))
            if re.search(rb"\[ROUND \d|execution finished", line):
                marks.append((time.monotonic(), proxy.up, proxy.down))
        process.wait()
    if len(marks) != rounds + 1:
        raise BenchmarkError(f"Flower's rounds went wrong: {''.join(said)[-2000:]}")
    seen = [(b[0] - a[0], b[1] - a[1], b[2] - a[2]) for a, b in zip(marks, marks[1:])]
    of_rounds(row, seen, watch.peak)


def write_app(folder: Path) -> Path:
    app = folder / "app"
    app.mkdir()
    shutil.copy(Path(__file__).with_name("agent_peers_app.py"), app)
    module = "agent_peers_app"
    (app / "pyproject.toml").write_text(
        f"""
[project]
name = "{module.replace("_", "-")}"
version = "1.0.0"
description = "The reference CNN"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "covey"
[tool.flwr.app.components]
serverapp = "{module}:server"
clientapp = "{module}:client"
[tool.flwr.app.config]
framework = "torch"
data = ""
rounds = 3
batch = 20
rate = 0.05
"""
    )
    return app


# --- what is printed

COLUMNS: Mapping[str, tuple[str, Callable[[Row], str]]] = {
    "program": ("", lambda row: row.name),
    "installed_mb": ("installed; with pip, MB", lambda row: f"{row.installed_mb:.0f}; {row.with_pip_mb:.0f}"),
    "idle_mb": ("idle (PSS), MB", lambda row: f"{row.idle_mb:.1f} ({row.pss_mb[0]:.1f})"),
    "training_mb": ("training, largest process, MB", lambda row: f"{row.training_mb:.1f}"),
    "together_mb": ("all processes (PSS), MB", lambda row: f"{row.together_mb:.1f} ({row.pss_mb[1]:.1f})"),
    "start_s": (
        "start to connected (processor time), s",
        lambda row: f"{row.start_s:.2f} ({row.start_cpu_s:.2f})",
    ),
    "idle_cpu_percent": ("idle CPU, %", lambda row: f"{row.idle_cpu_percent:.3f}"),
    "round_s": ("round, s", lambda row: f"{row.round_s:.2f}"),
    "up_bytes": ("bytes up", lambda row: f"{row.up_bytes:,}"),
    "down_bytes": ("bytes down", lambda row: f"{row.down_bytes:,}"),
}


def table(rows: Sequence[Row]) -> str:
    """One column for each program; the bars beside them."""
    lines = [f"| | {' | '.join(row.name for row in rows)} | bar |", f"|---|{'---|' * (len(rows) + 1)}"]
    for key, (title, told) in list(COLUMNS.items())[1:]:
        bar = f"{BARS[key]:g}" if key in BARS else ""
        lines.append(f"| {title} | {' | '.join(told(row) for row in rows)} | {bar} |")
    return "\n".join(lines)


def failures(row: Row) -> list[str]:
    values = asdict(row)
    return [f"{key} is {values[key]:.3g}, the bar is {bar:g}" for key, bar in BARS.items() if values[key] > bar]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer starts and rounds, 30 s at rest")
    parser.add_argument("--peers", action="store_true", help="Flower beside it")
    parser.add_argument("--python", default="3.11", help="of the agent's environment")
    parser.add_argument("--idle", type=float, help="seconds at rest")
    parser.add_argument("--json", type=Path, help="write what was measured")
    options = parser.parse_args()
    seconds = options.idle or (30.0 if options.quick else 300.0)
    starts, rounds = (2, 3) if options.quick else (7, 6)
    made = material()
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    print(f"the agent: {starts} starts, {rounds} rounds, {seconds:g} s at rest", flush=True)
    rows = [measure_agent(made, options.python, seconds, starts, rounds)]
    for name in PEERS if options.peers else ():
        print(f"{name}: the same", flush=True)
        rows.append(measure_flower(name, made, "3.11", seconds, starts, rounds))
    print(f"load after: {os.getloadavg()[0]:.1f}\n\n{table(rows)}")
    for row in rows:
        for note in row.notes:
            print(f"{row.name}: {note}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    for failure in failures(rows[0]):
        print(f"not kept: {failure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
