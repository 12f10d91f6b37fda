"""What a fleet costs: simulated devices, a real Mosquitto and a real `covey serve`, beside the raw MQTT transfer.

    python benchmarks/fleet.py [--sizes 100,300,1000,2000] [--dimension 100000] [--repeats 3] [--rule median]
                               [--json FILE] [--plot docs/fleet.png] [--profile FILE]

Everything runs on this machine and shares its processors: one Mosquitto, one `covey serve` with a file of its own, the
devices in a few processes (`fleet_devices.py` says what of them is real), and what measures. `covey serve` is held
between two rounds by `covey pause`'s order, so that rounds and raw transfers take turns.

round      from the first chunk of the model on the broker until the coordinator has taken the word of every device that
           it has read its verdict: publishing, invitation, answers, chunks down, sealed chunks up, hashes, files and
           their syncs, the rule, the checkpoint, verdicts. Training takes no time
raw        the same connections move the same bytes in the same chunks, QoS 1, through the same broker: the model
           retained and fetched by every device by chunk, then as many bytes up to one paho client, which counts. No
           invitation, seals, hashes, files, aggregation, and no bytes kept
ratio      round / raw, medians
CPU        seconds of user and system time in a round, per kind of process; its ratio is all of a round's by all of
           raw's, which a busy machine changes less
RSS        the most that `covey serve` and Mosquitto ever held since they started (VmHWM)
up, down   bytes per device and round on the wire, as the kernel counts them on the device's end of its connection

The first round, in which the devices fetch the bundle, is not counted. A round in which not every device's update is
accepted is counted and named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Optional

import paho.mqtt.client as paho
import psutil
from fleet_devices import (
    FLEET,
    KEEPALIVE_S,
    Counts,
    Job,
    base_update,
    device_id,
    device_key,
    run_counter,
    run_crowd,
)
from paho.mqtt.enums import CallbackAPIVersion

from covey_coordinator.orders import Orders
from covey_edge.processes import die_with_parent, interrupted_by_signals
from covey_protocol import codec
from covey_protocol.blobs import blob_ref, chunks
from covey_protocol.messages import Invitation, RoundClosed
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics

SIZES = (100, 300, 1000, 2000)
PROCESSES = 2  # of devices
RUN = "load"
# `covey` under cProfile, counting the main thread's CPU time: waiting for disk, network and the processor is left out
PROFILED = """
import cProfile, runpy, sys, time
profile, path = cProfile.Profile(time.thread_time), sys.argv.pop(1)
try:
    profile.runcall(runpy.run_module, "covey_edge", run_name="__main__")
finally:
    profile.dump_stats(path)
"""
PATIENCE_S = 900.0
CONNECT_PATIENCE_S = 180.0
TELL_S = 10.0  # how often a long wait says that it goes on
FILES_PER_DEVICE = 4  # a socket, paho's pair, and one to spare
COORDINATOR_KEY = SealingKey.from_seed(b"\xff" * 32)

Say = Callable[[str], None]


class BenchmarkError(Exception):
    """A sentence for the terminal."""


@dataclass(frozen=True)
class Usage:
    """Seconds of CPU since their start, of all processes of a kind."""

    coordinator: float
    broker: float
    devices: float

    @property
    def total(self) -> float:
        return self.coordinator + self.broker + self.devices

    def since(self, before: Usage) -> Usage:
        return Usage(self.coordinator - before.coordinator, self.broker - before.broker, self.devices - before.devices)


@dataclass(frozen=True)
class Measured:
    """One round or raw transfer. up, down: bytes per device. offers, chunks: that all devices sent."""

    seconds: float
    cpu: Usage
    up: float
    down: float
    accepted: int
    offers: int
    chunks: int
    closed_after_s: float = 0.0


@dataclass(frozen=True)
class Row:
    """Medians of one size. RSS in bytes."""

    n: int
    round_s: float
    raw_s: float
    ratio: float
    cpu_ratio: float
    coordinator_cpu_s: float
    broker_cpu_s: float
    devices_cpu_s: float
    raw_receiver_cpu_s: float
    raw_broker_cpu_s: float
    raw_devices_cpu_s: float
    coordinator_rss: int
    broker_rss: int
    up: float
    down: float
    raw_up: float
    raw_down: float
    offers_per_device: float
    chunks_per_device: float
    least_accepted: int
    load_before: float
    rounds: list[Measured]
    raws: list[Measured]


# --- what is started


def tied_to_us() -> Callable[[], None]:
    """For Popen's preexec_fn: the child ends when this process does, however that ends."""
    parent = os.getpid()
    return lambda: die_with_parent(parent)


def start_mosquitto(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """On loopback, with room for many connections and no limit on what waits for the coordinator."""
    binary = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if binary is None:
        raise BenchmarkError("mosquitto is not installed (Debian: apt install mosquitto)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines = [f"listener {port} 127.0.0.1", "allow_anonymous true", "persistence false", "max_connections -1"]
    lines += ["max_queued_messages 0", "set_tcp_nodelay true"]
    (folder / "mosquitto.conf").write_text("\n".join(lines) + "\n")
    with (folder / "mosquitto.log").open("wb") as log:
        command = [binary, "-c", str(folder / "mosquitto.conf")]
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=tied_to_us())
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process, port
        time.sleep(0.1)
    process.kill()
    raise BenchmarkError(f"mosquitto did not start: {(folder / 'mosquitto.log').read_text()}")


def write_bundle(path: Path, d: int) -> None:
    """Of a net of one layer with d parameters. In a process of its own: TensorFlow would stay in the memory."""
    import keras

    import covey_models

    outputs = next(size for size in (1000, 100, 10, 2, 1) if d % size == 0 and d > size)
    layers = [keras.layers.InputLayer((d // outputs - 1,)), keras.layers.Dense(outputs)]
    model = keras.Sequential(layers)
    loss = "mean_squared_error"
    path.write_bytes(covey_models.export(model, name="load", loss=loss, batch_size=1, key=COORDINATOR_KEY))


def write_settings(path: Path, port: int, n: int, options: argparse.Namespace) -> None:
    devices = "\n".join(f'{device_id(number)} = "{device_key(number).public.hex()}"' for number in range(n))
    path.write_text(
        f"""fleet = "{FLEET}"
run = "{RUN}"
bundle = "load.covey"
key_file = "coordinator.pem"
rounds = {options.repeats + 2}

[broker]
url = "mqtt://127.0.0.1:{port}"

[round]
devices = {n}
quorum = {n // 2 + 1}
answer_s = 120.0
grace_s = 30.0

[aggregation]
rule = "{options.rule}"

[devices]
{devices}
"""
    )


def start_coordinator(folder: Path, profile: Optional[Path]) -> subprocess.Popen[str]:
    how = ["-m", "covey_edge"] if profile is None else ["-c", PROFILED, str(profile)]
    command = [sys.executable, *how, "serve", "--config", str(folder / "load.toml"), "--plain"]
    with (folder / "serve.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, preexec_fn=tied_to_us())


class Onlooker:
    """Sees the rounds as any subscriber does, and notes when."""

    def __init__(self, port: int) -> None:
        self._topics = Topics(FLEET)
        self._changed = threading.Condition()
        self.model_at = 0.0
        self.opened: dict[str, float] = {}
        self.closed: dict[str, float] = {}
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id="onlooker", protocol=paho.MQTTv5)
        self._client.on_message = self._take
        self._client.on_connect = self._subscribe
        self._client.connect("127.0.0.1", port, KEEPALIVE_S)
        self._client.loop_start()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _subscribe(self, client: Any, *rest: Any) -> None:
        client.subscribe([(self._topics.round, 1), (f"covey/1/{FLEET}/blob/+/0", 1)])

    def _take(self, client: Any, userdata: Any, message: paho.MQTTMessage) -> None:
        now = time.monotonic()
        with self._changed:
            if message.topic != self._topics.round:
                self.model_at = now if message.payload else self.model_at
            elif message.payload:
                said, _ = codec.decode_unverified(message.payload, topic=message.topic, sender=codec.COORDINATOR)
                if isinstance(said, Invitation):
                    self.opened[said.round_id] = now
                elif isinstance(said, RoundClosed):
                    self.closed[said.round_id] = now
            self._changed.notify_all()

    def wait(self, what: str, condition: Callable[[], bool], alive: Callable[[], None]) -> None:
        end = time.monotonic() + PATIENCE_S
        with self._changed:
            while not condition():
                alive()
                if time.monotonic() > end:
                    raise BenchmarkError(f"{what}: not within {PATIENCE_S:g} s")
                self._changed.wait(0.2)


class Stage:
    """Everything that one size needs, running."""

    def __init__(self, folder: Path, n: int, options: argparse.Namespace, say: Say, stack: contextlib.ExitStack):
        self.n, self._folder, self._say = n, folder, say
        self.broker, self.port = start_mosquitto(folder)
        stack.callback(_end, self.broker)
        self._crowds = [self._start(stack, run_crowd, job) for job in self._jobs(options.dimension)]
        self._counter = self._start(stack, run_counter, self.port, os.getpid())
        self._wait_online()
        write_settings(folder / "load.toml", self.port, n, options)
        (folder / "coordinator.pem").write_bytes(COORDINATOR_KEY.pem())
        self._orders = Orders(folder / "runs" / RUN)
        self._orders.pause()
        self.onlooker = Onlooker(self.port)
        stack.callback(self.onlooker.close)
        self._serve = start_coordinator(folder, options.profile)
        stack.callback(_end, self._serve)
        self._until("the coordinator starts", lambda: "paused" in self._log())

    def _jobs(self, d: int) -> list[Job]:
        shares = [self.n * share // PROCESSES for share in range(PROCESSES + 1)]
        coordinator = COORDINATOR_KEY.public.hex()
        return [
            Job(self.port, first, last - first, coordinator, d, os.getpid())
            for first, last in zip(shares, shares[1:])
            if last > first
        ]

    def _start(self, stack: contextlib.ExitStack, function: Any, *arguments: Any) -> tuple[int, Connection]:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=function, args=(*arguments, theirs), daemon=True)
        process.start()
        stack.callback(_stop, process, ours)
        assert process.pid is not None
        return process.pid, ours

    # --- one measurement

    def run_round(self) -> Measured:
        known = set(self.onlooker.opened)
        before = self._asked(), self._usage()
        self._orders.resume()
        self.onlooker.wait("a round opens", lambda: bool(set(self.onlooker.opened) - known), self._alive)
        (round_id,) = set(self.onlooker.opened) - known
        started = self.onlooker.model_at
        self._orders.pause()
        self.onlooker.wait("the round ends", lambda: round_id in self.onlooker.closed, self._alive)
        self._until("all devices hear their verdicts", lambda: self._untold(round_id) == 0)
        seconds = time.monotonic() - started
        closed_after_s = self.onlooker.closed[round_id] - started
        after = self._asked(), self._usage()
        return self._measured(seconds, before, after, self._accepted(round_id), closed_after_s)

    def run_raw(self, pieces: list[bytes]) -> Measured:
        """CPU of the coordinator is here that of the counter."""
        _, counter = self._counter
        before = self._asked(), self._usage(counter=True)
        started = time.monotonic()
        counter.send(("publish", pieces))
        counter.recv()
        counter.send(("expect", self.n * len(pieces)))
        for _, orders in self._crowds:
            orders.send(("raw", pieces))
        for _, orders in self._crowds:
            orders.recv()
        if not counter.poll(PATIENCE_S):
            raise BenchmarkError(f"the raw transfer did not end within {PATIENCE_S:g} s")
        counter.recv()
        seconds = time.monotonic() - started
        after = self._asked(), self._usage(counter=True)
        return self._measured(seconds, before, after, self.n, 0.0)

    def _measured(self, seconds: float, before: Any, after: Any, accepted: int, closed_after_s: float) -> Measured:
        (counts, up, down), usage = before
        (counts_after, up_after, down_after), usage_after = after
        if counts_after.lost:
            raise BenchmarkError(f"{counts_after.lost} devices lost their connection, see {self._folder}")
        return Measured(
            seconds,
            usage_after.since(usage),
            (up_after - up) / self.n,
            (down_after - down) / self.n,
            accepted,
            counts_after.offers - counts.offers,
            counts_after.chunks - counts.chunks,
            closed_after_s,
        )

    def peaks(self) -> tuple[int, int]:
        """(coordinator, broker): the most memory they ever had."""
        return _peak(self._serve.pid), _peak(self.broker.pid)

    # --- looking

    def _asked(self) -> tuple[Counts, int, int]:
        """(counts, bytes up, bytes down), of all devices together."""
        total, up, down = Counts(), 0, 0
        for _, orders in self._crowds:
            orders.send(("counts",))
        for _, orders in self._crowds:
            if not orders.poll(CONNECT_PATIENCE_S):
                raise BenchmarkError("a process of devices does not answer")
            counts, its_up, its_down = orders.recv()
            for name in asdict(counts):
                setattr(total, name, getattr(total, name) + getattr(counts, name))
            up, down = up + its_up, down + its_down
        return total, up, down

    def _usage(self, counter: bool = False) -> Usage:
        receiver = self._counter[0] if counter else self._serve.pid
        return Usage(_cpu(receiver), _cpu(self.broker.pid), sum(_cpu(pid) for pid, _ in self._crowds))

    def _wait_online(self) -> None:
        self._until(f"{self.n} devices connect", lambda: self._asked()[0].online == self.n, 0.5)

    def _until(self, what: str, condition: Callable[[], bool], poll_s: float = 0.05) -> None:
        end, told_at = time.monotonic() + PATIENCE_S, time.monotonic()
        while not condition():
            self._alive()
            if time.monotonic() > end:
                raise BenchmarkError(f"{what}: not within {PATIENCE_S:g} s")
            if time.monotonic() - told_at > TELL_S:
                told_at = time.monotonic()
                self._say(f"waiting: {what}")
            time.sleep(poll_s)

    def _alive(self) -> None:
        serve = getattr(self, "_serve", None)
        for name, process in (("mosquitto", self.broker), ("covey serve", serve)):
            if process is not None and process.poll() is not None:
                raise BenchmarkError(f"{name} ended with code {process.returncode}\n{self._log()[-2000:]}")

    def _log(self) -> str:
        path = self._folder / "serve.log"
        return path.read_text() if path.exists() else ""

    def _untold(self, round_id: str) -> int:
        return self._number(
            "SELECT count(*) FROM devices WHERE round = ? AND sha256 IS NOT NULL AND NOT told", round_id
        )

    def _accepted(self, round_id: str) -> int:
        return self._number("SELECT count(*) FROM devices WHERE round = ? AND status = 'accepted'", round_id)

    def _number(self, query: str, round_id: str) -> int:
        path = self._folder / "runs" / RUN / "coordinator.sqlite"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            return int(database.execute(query, (round_id,)).fetchone()[0])


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def _peak(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"process {pid} is gone")


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _stop(process: Any, orders: Connection) -> None:
    with contextlib.suppress(OSError):
        orders.send(("stop", None))
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()


# --- measuring


def measure(n: int, bundle: Path, options: argparse.Namespace, say: Say) -> Row:
    load = os.getloadavg()[0]
    base = base_update(options.dimension)
    pieces = [piece for _, piece in chunks(base, blob_ref(base))]
    rounds: list[Measured] = []
    raws: list[Measured] = []
    with (
        tempfile.TemporaryDirectory(prefix="covey-fleet-", dir=options.folder) as name,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(name)
        shutil.copy(bundle, folder / "load.covey")
        stage = Stage(folder, n, options, say, stack)
        stage.run_round()
        say("warm")
        for number in range(options.repeats):
            raws.append(stage.run_raw(pieces))
            rounds.append(stage.run_round())
            one = rounds[-1]
            say(
                f"{number + 1} of {options.repeats}: raw {raws[-1].seconds:.2f} s, round {one.seconds:.2f} s"
                f" (coordinator's CPU {one.cpu.coordinator:.1f} s), {one.accepted} accepted"
            )
        rss = stage.peaks()
    return _row(n, load, rounds, raws, rss)


def _row(n: int, load: float, rounds: list[Measured], raws: list[Measured], rss: tuple[int, int]) -> Row:
    def of(measured: list[Measured], value: Callable[[Measured], float]) -> float:
        return statistics.median(value(one) for one in measured)

    round_s, raw_s = of(rounds, lambda m: m.seconds), of(raws, lambda m: m.seconds)
    return Row(
        n=n,
        round_s=round_s,
        raw_s=raw_s,
        ratio=round_s / raw_s,
        cpu_ratio=of(rounds, lambda m: m.cpu.total) / of(raws, lambda m: m.cpu.total),
        coordinator_cpu_s=of(rounds, lambda m: m.cpu.coordinator),
        broker_cpu_s=of(rounds, lambda m: m.cpu.broker),
        devices_cpu_s=of(rounds, lambda m: m.cpu.devices),
        raw_receiver_cpu_s=of(raws, lambda m: m.cpu.coordinator),
        raw_broker_cpu_s=of(raws, lambda m: m.cpu.broker),
        raw_devices_cpu_s=of(raws, lambda m: m.cpu.devices),
        coordinator_rss=rss[0],
        broker_rss=rss[1],
        up=of(rounds, lambda m: m.up),
        down=of(rounds, lambda m: m.down),
        raw_up=of(raws, lambda m: m.up),
        raw_down=of(raws, lambda m: m.down),
        offers_per_device=of(rounds, lambda m: m.offers / n),
        chunks_per_device=of(rounds, lambda m: m.chunks / n),
        least_accepted=min(m.accepted for m in rounds),
        load_before=load,
        rounds=rounds,
        raws=raws,
    )


HEAD = (
    "     n | round s  raw s  ratio | rounds/min | CPU ratio, s: coord  broker devices | raw: recv  broker devices |"
    " RSS MB: coord broker | kB/device: up  down | offers chunks accepted"
)


def line_of(row: Row) -> str:
    return (
        f"{row.n:>6} | {row.round_s:>7.2f} {row.raw_s:>6.2f} {row.ratio:>6.2f} | {60 / row.round_s:>10.2f} |"
        f" {row.cpu_ratio:>9.2f} {row.coordinator_cpu_s:>9.2f} {row.broker_cpu_s:>7.2f} {row.devices_cpu_s:>7.2f} |"
        f" {row.raw_receiver_cpu_s:>9.2f} {row.raw_broker_cpu_s:>7.2f} {row.raw_devices_cpu_s:>7.2f} |"
        f" {row.coordinator_rss / 1e6:>13.0f} {row.broker_rss / 1e6:>6.0f} |"
        f" {row.up / 1e3:>13.1f} {row.down / 1e3:>5.1f} |"
        f" {row.offers_per_device:>6.2f} {row.chunks_per_device:>6.2f} {row.least_accepted:>8}"
    )


def growth(rows: Sequence[Row]) -> Iterator[str]:
    """value = fixed + slope n, by least squares on relative errors, for what grows with the fleet."""
    import numpy as np

    kinds: dict[str, Callable[[Row], float]] = {
        "round, s": lambda row: row.round_s,
        "raw, s": lambda row: row.raw_s,
        "coordinator CPU, s": lambda row: row.coordinator_cpu_s,
        "broker CPU, s": lambda row: row.broker_cpu_s,
        "coordinator RSS, MB": lambda row: row.coordinator_rss / 1e6,
        "broker RSS, MB": lambda row: row.broker_rss / 1e6,
        "kB down per device": lambda row: row.down / 1e3,
    }
    n = np.array([row.n for row in rows], float)
    for name, value in kinds.items():
        y = np.array([value(row) for row in rows])
        weights = 1 / y
        fixed, slope = np.linalg.lstsq(np.stack([weights, n * weights], 1), y * weights, rcond=None)[0]
        exponent = np.polyfit(np.log(n[-2:]), np.log(y[-2:]), 1)[0]
        yield (
            f"{name:<20} {fixed:>8.2f} + {1000 * slope:>8.2f} per 1000 devices;"
            f" from {rows[-2].n} to {rows[-1].n} as n^{exponent:.2f}"
        )


def plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    n = [row.n for row in rows]
    left.plot(n, [row.round_s for row in rows], "o-", label="round")
    left.plot(n, [row.raw_s for row in rows], "s--", label="raw transfer")
    left.set_ylabel("seconds")
    middle.plot(n, [row.coordinator_cpu_s for row in rows], "o-", label="coordinator")
    middle.plot(n, [row.broker_cpu_s for row in rows], "^-", label="broker")
    middle.plot(n, [row.devices_cpu_s for row in rows], "v-", label="all devices")
    middle.set_ylabel("CPU seconds per round")
    right.plot(n, [row.coordinator_rss / 1e6 for row in rows], "o-", label="coordinator")
    right.plot(n, [row.broker_rss / 1e6 for row in rows], "^-", label="broker")
    right.set_ylabel("most memory, MB")
    for axes in (left, middle, right):
        axes.set_xlabel("devices")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def raise_limits(n: int) -> None:
    """Room for the connections in this process's children. BenchmarkError where the system allows fewer."""
    needed = n * FILES_PER_DEVICE + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BenchmarkError(f"{n} devices need {needed} open files, the limit is {hard}: raise it (ulimit -Hn)")
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of devices, with commas")
    parser.add_argument("--dimension", type=int, default=100_000, help="parameters of the model")
    parser.add_argument("--repeats", type=int, default=3, help="rounds and raw transfers of each size")
    parser.add_argument("--rule", default="median", help="aggregation rule, for example median or mean")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--plot", type=Path, help="draw the growth to this file")
    parser.add_argument("--profile", type=Path, help="cProfile of the coordinator's main thread, the last size's")
    parser.add_argument("--folder", type=Path, help="for runs, on the disk to be measured; default: the system's")
    options = parser.parse_args(arguments)
    options.sizes = [int(size) for size in options.sizes.split(",")]
    return options


def main() -> None:
    options = parsed()
    interrupted_by_signals()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        raise_limits(max(options.sizes))
        rows = []
        with tempfile.TemporaryDirectory(prefix="covey-fleet-") as name:
            bundle = Path(name) / "load.covey"
            export = get_context("spawn").Process(target=write_bundle, args=(bundle, options.dimension))
            export.start()
            export.join()
            if not bundle.exists():
                raise BenchmarkError("the bundle could not be exported")
            for n in options.sizes:
                rows.append(measure(n, bundle, options, lambda text, n=n: say(f"{n} devices: {text}")))  # type: ignore[misc]
    except BenchmarkError as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    print(f"d = {options.dimension}, rule {options.rule}, {os.cpu_count()} processors, medians of {options.repeats}")
    print(HEAD)
    for row in rows:
        print(line_of(row))
    if len(rows) > 1:
        print("\n".join(growth(rows)))
    if options.json is not None:
        about = {"d": options.dimension, "rule": options.rule, "processors": os.cpu_count()}
        options.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
