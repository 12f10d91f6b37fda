"""`covey agent check`: what would keep this device from taking part, looked for before it does.

Each check yields Findings. They use what the agent uses: its settings, its training child, its MQTT adapter (under
another client id, so that an agent that runs stays connected). Other parts of the agent add checks to CHECKS. In
state_dir a file is written and removed, and what the agent would make of the data before its first round is made (the
key of the split, the statistics, the report). Nothing is said to the fleet but an empty message, which a coordinator
passes over.
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import importlib
import os
import queue
import shutil
import socket
import stat
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

from msgspec import Struct

from covey_edge.config import Agent, load_agent
from covey_edge.files import DISK
from covey_edge.frames import Done, Frame, Open, Probe, Problem
from covey_edge.inbox import Inbox
from covey_edge.local_socket import ask, lock_holder
from covey_edge.mqtt import CONNECT_TIMEOUT_S, Incoming, MqttTransport, Refused, tls_context
from covey_edge.mqtt_reasons import EXPIRES_SOON_DAYS
from covey_edge.policy import data_for, places
from covey_edge.training_process import TrainingProcess
from covey_protocol import codec, errors
from covey_protocol.errors import EXIT_CONFIG, EXIT_DATA, EXIT_MACHINE, EXIT_STORAGE, EXIT_TRANSPORT, CoveyError
from covey_protocol.messages import Invitation, RoundClosed
from covey_protocol.seals import PublicKey
from covey_protocol.topics import Topics

OK, WARNING, WRONG = "ok", "warning", "wrong"
FREE_MB, LITTLE_MB = 50, 500  # below: wrong, a warning. A model, its parameters and an update of 4 M numbers: 50 MB
CLOCK_S = 120.0  # behind the newest invitation by more: certificates and dates in logs are not to be relied on
RETAINED_S = 2.0  # for what the broker retains to come
PROBE_S = 120.0
TIME_ERROR = 5  # of adjtimex: the clock is not synchronised


class Finding(Struct, frozen=True):
    """code: the exit code of a finding that is WRONG."""

    check: str
    level: str
    what: str
    remedy: str = ""
    code: int = 0


class Facts(Struct):
    """What one check learns for those after it. invitation: what the fleet retains, if the pinned key sealed it.
    running: whether an agent works in this state_dir now."""

    agent: Agent
    bundle: Optional[Path] = None
    invitation: Optional[Invitation] = None
    running: bool = False


# module:function of Facts, in order; a function yields Findings, and what it raises as a CoveyError is one
CHECKS = [
    "covey_edge.preflight:keys",
    "covey_edge.preflight:disk",
    "covey_edge.preflight:clock",
    "covey_edge.preflight:certificates",
    "covey_edge.preflight:broker",
    "covey_edge.preflight:data",
    "covey_edge.conditions_check:conditions",
    "covey_edge.updates_check:updates",
]


def findings(config: Path, bundle: Optional[Path] = None) -> Iterator[Finding]:
    """In order, each as soon as it is known. bundle: a model to hold the data against, None for the cache's."""
    try:
        facts = Facts(load_agent(config), bundle)
    except CoveyError as exc:
        yield wrong("settings", exc)
        return
    yield Finding("settings", OK, f"{config} is complete and every setting is known")
    holder = lock_holder(facts.agent.state_dir)
    facts.running = holder is not None
    running = f"an agent runs here (process {holder})" if holder is not None else "no agent runs here now"
    yield Finding("agent", OK, running)
    for name in CHECKS:
        module, _, function = name.partition(":")
        try:
            yield from getattr(importlib.import_module(module), function)(facts)
        except CoveyError as exc:
            yield wrong(function, exc)
        except OSError as exc:
            what = f"{exc.filename} cannot be read ({exc.strerror or exc})"
            yield Finding(function, WRONG, what, "check the path and the permissions", EXIT_CONFIG)


def wrong(check: str, error: CoveyError) -> Finding:
    return Finding(check, WRONG, error.what, error.remedy, error.exit_code)


# --- keys and disk


def keys(facts: Facts) -> Iterator[Finding]:
    """Who may read them, and that the coordinator's is not this device's own."""
    agent, config = facts.agent, facts.agent.config
    named = {
        "identity.key_file": config.identity.key_file,
        "broker.key_file": config.broker.key_file or config.broker.cert_file,  # the key may be in the same file
        "broker.password_file": config.broker.password_file,
    }
    open_ones = 0
    for setting, name in named.items():
        if name and (mode := stat.S_IMODE((agent.folder / name).stat().st_mode)) & 0o077:
            open_ones += 1
            what = f"{setting} ({name}) may be read by others: mode {mode:o}"
            yield Finding("keys", WRONG, what, f"chmod 600 {agent.folder / name}", EXIT_CONFIG)
    if not open_ones:
        yield Finding("keys", OK, "only their owner may read keys and password")
    if agent.key.public in agent.coordinators:
        what = "identity.coordinator_key is this device's own public key"
        yield Finding("keys", WRONG, what, "put in the coordinator's: who runs it has it", EXIT_CONFIG)


def disk(facts: Facts) -> Iterator[Finding]:
    """That state_dir can be written, how much room there is, and who may read what is in it."""
    folder = facts.agent.state_dir
    trial = folder / f".check.{os.getpid()}"
    DISK.write(trial, b"covey agent check\n", mode=0o600)
    DISK.remove(trial)
    free_mb = shutil.disk_usage(folder).free / 1e6
    said = f"{free_mb:,.0f} MB free in {folder}"
    if free_mb < FREE_MB:
        yield Finding("disk", WRONG, f"{said}: too little for a model", "free some space", EXIT_STORAGE)
    elif free_mb < LITTLE_MB:
        yield Finding("disk", WARNING, said, "free some space")
    else:
        yield Finding("disk", OK, f"{folder} can be written, {said.split(' in ')[0]}")
    readable = [path for path in _private(folder) if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if readable:
        what = f"{len(readable)} files in {folder} may be read by others, among them {readable[0].name}"
        yield Finding("disk", WARNING, what, f"chmod 700 {folder}")


def _private(folder: Path) -> list[Path]:
    """Files that tell of the data."""
    names = (
        "outbox/*",
        "withheld*",
        "control*",
        "teacher*",
        "records/*",
        "stopped/**/*",
        "teaching/**/*",
        "ledger.json",
    )
    return [path for name in names for path in folder.glob(name) if path.is_file()]


# --- clock and certificates


def clock(facts: Facts) -> Iterator[Finding]:
    """Whether the kernel takes the clock for synchronised. Certificates and the coordinator's words come later."""
    now = datetime.datetime.now(datetime.timezone.utc)
    synchronised = _synchronised()
    if synchronised:
        yield Finding("clock", OK, f"{now:%Y-%m-%d %H:%M} UTC, synchronised")
    elif synchronised is None:
        yield Finding("clock", OK, f"{now:%Y-%m-%d %H:%M} UTC; this system does not say whether it is synchronised")
    else:
        what = f"{now:%Y-%m-%d %H:%M} UTC, but the system says that the clock is not synchronised"
        yield Finding("clock", WARNING, what, "turn on time synchronisation (timedatectl set-ntp true)")


def _synchronised() -> Optional[bool]:
    """None where the system does not say (not Linux, a sandbox)."""
    if Path("/run/systemd/timesync/synchronized").exists():
        return True
    if sys.platform != "linux":
        return None
    state = -1
    with suppress(OSError, AttributeError):
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(1024))  # all zero: only read
    return None if state < 0 else state != TIME_ERROR


def certificates(facts: Facts) -> Iterator[Finding]:
    """The client's, the authority's, and the one that the broker shows: when they end."""
    broker = facts.agent.broker
    if not broker.tls:
        what = f"{broker} is not encrypted on its way"
        yield Finding("certificates", WARNING, what, "use mqtts:// on any network that is not yours alone")
        return
    named = (("broker.cert_file", broker.cert_file), ("broker.ca_file", broker.ca_file))
    own = [dated(setting, path.read_bytes()) for setting, path in named if path is not None]
    yield from own
    shown = _shown(facts) if all(one.level != WRONG for one in own) else None
    if shown is not None:
        yield dated(f"the certificate of {broker}", shown)


def dated(name: str, data: bytes) -> Finding:
    """Until when a certificate (PEM, DER) is valid."""
    from cryptography import x509

    try:
        one = x509.load_pem_x509_certificate(data) if b"-----BEGIN" in data else x509.load_der_x509_certificate(data)
    except ValueError:
        return Finding("certificates", WRONG, f"{name} is no certificate", "check the path", EXIT_CONFIG)
    now = datetime.datetime.now(datetime.timezone.utc)
    end, start = one.not_valid_after_utc, one.not_valid_before_utc
    days = (end - now).days
    if now > end:
        what, remedy = f"{name} expired on {end:%Y-%m-%d %H:%M} UTC", "renew it, or set this machine's clock"
        return Finding("certificates", WRONG, what, remedy, EXIT_CONFIG)
    if now < start:
        what = f"{name} is valid only from {start:%Y-%m-%d %H:%M} UTC"
        return Finding("certificates", WRONG, what, "set this machine's clock", EXIT_CONFIG)
    if days < EXPIRES_SOON_DAYS:
        return Finding("certificates", WARNING, f"{name} expires in {days} days, on {end:%Y-%m-%d}", "renew it")
    return Finding("certificates", OK, f"{name} is valid until {end:%Y-%m-%d}")


def _shown(facts: Facts) -> Optional[bytes]:
    """What the broker shows (DER); None where the handshake fails: then `broker` says why."""
    broker = facts.agent.broker
    context = tls_context(broker)
    assert context is not None
    try:
        raw = socket.create_connection((broker.host, broker.port), CONNECT_TIMEOUT_S)
        with context.wrap_socket(raw, server_hostname=broker.host) as wrapped:  # closes `raw`, also where it fails
            return wrapped.getpeercert(binary_form=True)
    except OSError:  # of which TLS errors are a kind
        return None


# --- the broker and the fleet


def broker(facts: Facts) -> Iterator[Finding]:
    """Connects as this device would; listens and speaks where it would; looks at what the fleet retains."""
    if facts.running and facts.agent.broker.cert_file is not None:
        yield _of_the_agent(facts.agent)
        return
    agent, inbox = facts.agent, Inbox()
    device_id, topics = agent.config.device_id, Topics(agent.config.fleet)
    transport = MqttTransport(agent.broker, f"covey-{agent.config.fleet}-{device_id}-check", inbox)
    started = time.monotonic()
    transport.connect()
    try:
        took_ms = 1000 * (time.monotonic() - started)
        user = f" as {agent.broker.username}" if agent.broker.username else ""
        yield Finding("broker", OK, f"{agent.broker} takes us{user}: MQTT {transport.protocol}, {took_ms:.0f} ms")
        listened = [topics.round, topics.down(device_id)]
        transport.subscribe(listened)
        problems = []
        try:
            sent = transport.publish(topics.up(device_id), b"", expiry_s=1.0)  # an empty message is passed over
            if not transport.flush([sent], CONNECT_TIMEOUT_S):
                problems.append(errors.TransportError(f"{agent.broker} did not acknowledge a message"))
        except errors.TransportError as exc:
            problems.append(exc)
        items = arrivals(inbox)
        problems += [item.error for item in items if isinstance(item, Refused) and item.topic in listened]
        for problem in problems:
            yield wrong("broker", problem)
        if not problems:
            silent = "" if transport.protocol == "5" else " (MQTT 3.1.1 brokers drop forbidden messages silently)"
            yield Finding("broker", OK, f"may listen and speak on the topics of {device_id}{silent}")
        yield from _fleet(facts, [item for item in items if isinstance(item, Incoming) and item.topic == topics.round])
    finally:
        transport.close()


def _of_the_agent(agent: Agent) -> Finding:
    """What the agent that runs here says: a second connection would end its own where the broker names clients by
    their certificates."""
    status = ask(agent.state_dir, "status")
    if not status["connected"]:
        what = f"the agent that runs here is not connected: {status['connection']}"
        return Finding("broker", WRONG, what, "stop it and check again: then more is looked at", EXIT_TRANSPORT)
    what = f"the agent that runs here is {status['connection']}: a second connection with its certificate could end it"
    return Finding("broker", OK, what)


def arrivals(inbox: Inbox) -> list[Any]:
    """What comes within RETAINED_S."""
    items, end = [], time.monotonic() + RETAINED_S
    while (left := end - time.monotonic()) > 0:
        with suppress(queue.Empty):
            items.append(inbox.get(timeout=left))
    return items


def _fleet(facts: Facts, retained: list[Incoming]) -> Iterator[Finding]:
    """Of the coordinator: its key and its clock, by what it has left on the broker."""
    told, facts.invitation = said_of_the_round(facts.agent.config.fleet, facts.agent.coordinators, retained)
    yield from told


def said_of_the_round(
    fleet: str, keys: Iterable[PublicKey], retained: list[Incoming]
) -> tuple[list[Finding], Optional[Invitation]]:
    """Findings on what the fleet's topic retains, and the invitation if one of the keys sealed one."""
    said = [item for item in retained if item.payload]
    if not said:
        what = f"the fleet {fleet} has no round on the broker: nothing to hold the pinned key against"
        return [Finding("coordinator", OK, what)], None
    message: Any = None
    for key in keys:
        with suppress(errors.PeerError):
            message, _ = codec.decode_from_coordinator(said[-1].payload, topic=said[-1].topic, key=key)
    if message is None:
        what = "the fleet's round on the broker is not sealed by identity.coordinator_key"
        return [
            Finding("coordinator", WRONG, what, "pin the key that who runs the coordinator names", EXIT_CONFIG)
        ], None
    told = [Finding("coordinator", OK, f"the fleet's round {message.round_id} is sealed by the pinned key")]
    if isinstance(message, RoundClosed):
        return told, None
    behind_s = message.issued_at_ms / 1000 - time.time()
    if behind_s > CLOCK_S:
        what = f"this machine's clock is {behind_s:,.0f} s behind the coordinator's"
        told.append(Finding("clock", WARNING, what, "set it, or turn on time synchronisation"))
    return told, message


# --- the runtime and the data


def data(facts: Facts) -> Iterator[Finding]:
    """In a training child, as the agent does it: the runtime, every data file, and the model's shape."""
    answers: queue.SimpleQueue[tuple[object, Frame]] = queue.SimpleQueue()
    child = TrainingProcess(lambda token, frame: answers.put((token, frame)), facts.agent.config.training.memory_mb)
    runtime = ""

    def asked(request: Frame) -> Frame:
        child.request("check", request, PROBE_S)
        return answers.get()[1]

    try:
        for place in places(facts.agent.config.data):
            path = facts.agent.folder / place.path
            answer = asked(Probe(place.source, str(path), place.looked_at(facts.agent.state_dir)))
            if isinstance(answer, Problem):
                yield _problem(answer)
                continue
            assert isinstance(answer, Done)
            assert answer.report is not None
            if not runtime:
                runtime = answer.runtime
                yield Finding("runtime", OK, f"{runtime} on Python {sys.version.split()[0]}")
            few = answer.num_examples - answer.report.held_out < facts.agent.config.privacy.min_examples
            what = f"{path} holds {answer.report.summary}"
            if few:
                what += f", fewer than privacy.min_examples ({facts.agent.config.privacy.min_examples})"
            yield Finding("data", WARNING if few else OK, what, "record more" if few else "")
            yield from (Finding("data", WARNING, f"{path}: left out: {one}") for one in answer.report.left_out)
            yield from (Finding("data", OK, f"{path}: {note}") for note in answer.report.notes)
        yield from _shape(facts, asked)
    finally:
        child.stop()


def _problem(problem: Problem) -> Finding:
    kind = getattr(errors, problem.kind, errors.TrainingError)
    check = "runtime" if kind.exit_code == EXIT_MACHINE else "data"
    return Finding(check, WRONG, problem.what, problem.remedy, kind.exit_code or EXIT_DATA)


def _shape(facts: Facts, asked: Any) -> Iterator[Finding]:
    """The data that a round of this model would train, against the model."""
    agent = facts.agent
    path = facts.bundle or _cached(facts)
    if path is None:
        yield Finding("model", OK, "no model has been fetched yet: give one with --bundle to hold the data against it")
        return
    own = data_for(agent.config.data, facts.invitation.plan) if facts.invitation is not None else None
    where = own or (places(agent.config.data)[0] if not agent.config.data.tasks else None)
    if where is None or not where.path:
        yield Finding("model", WARNING, f"{path.name}: which task's data it is for is not known", "ask during a round")
        return
    try:
        digest = hashlib.sha256(path.read_bytes()).digest()
    except OSError as exc:
        raise errors.ConfigError(f"{path} cannot be read ({exc.strerror})", "check the path") from exc
    keys_hex = [key.hex() for key in agent.coordinators]
    data_path, reading = str(agent.folder / where.path), where.looked_at(agent.state_dir)
    request = Open(str(path), digest, keys_hex[-1], where.source, data_path, tuple(keys_hex[:-1]), reading)
    answer = asked(request)
    if isinstance(answer, Problem):
        yield _problem(answer)
    else:
        yield Finding("model", OK, f"{where.path} has the shape, the types and the ranges that {path.name[:16]} takes")


def _cached(facts: Facts) -> Optional[Path]:
    """The bundle of the round that is open, else the newest in the cache."""
    blobs = facts.agent.state_dir / "blobs"
    if facts.invitation is not None and (blobs / facts.invitation.bundle.sha256.hex()).exists():
        return blobs / facts.invitation.bundle.sha256.hex()
    bundles = [path for path in blobs.glob("?" * 64) if zipfile.is_zipfile(path)]
    return max(bundles, key=lambda path: path.stat().st_mtime, default=None)
