"""What systemd hears of the agent, over a real socket; and that a hung agent is not petted."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from brokers import RunningBroker
from patience import PATIENCE_S
from release_helpers import write_device

from covey_edge.inbox import Inbox
from covey_edge.mqtt import MqttTransport, parse_broker
from covey_edge.service import JournalFormatter, Notifier, error_prefix, watchdog_s
from covey_protocol.seals import SealingKey


@pytest.fixture
def heard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[socket.socket]:
    """A socket as systemd has one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path_factory.mktemp("n") / "s"))
        listener.settimeout(PATIENCE_S)
        yield listener


def said(listener: socket.socket) -> str:
    return listener.recv(4096).decode()


def nothing_waits(listener: socket.socket) -> bool:
    listener.setblocking(False)
    try:
        listener.recv(4096)
    except BlockingIOError:
        return True
    finally:
        listener.settimeout(PATIENCE_S)
    return False


def test_it_speaks_to_the_socket_it_was_given_and_leaves_it_to_no_child(heard: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": heard.getsockname(), "WATCHDOG_USEC": "600000000", "WATCHDOG_PID": "7", "HOME": "/"}
    notifier = Notifier(environment)
    assert environment == {"HOME": "/"}
    assert set(notifier.inherited) == {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
    notifier.ready()
    notifier.status("waits\nfor the next round")
    notifier.status("waits\nfor the next round")
    notifier.pet()
    notifier.pet()
    notifier.stopping()
    words = [said(heard) for _ in range(4)]
    assert words == ["READY=1", "STATUS=waits for the next round", "WATCHDOG=1", "STOPPING=1"]
    assert nothing_waits(heard)


def test_it_pets_three_times_in_the_time_of_the_watchdog(heard: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": heard.getsockname(), "WATCHDOG_USEC": "300000"})
    end = time.monotonic() + 0.35
    while time.monotonic() < end:
        notifier.pet()
        time.sleep(0.001)
    assert 2 <= sum(not nothing_waits(heard) for _ in range(10)) <= 4


def test_an_abstract_socket_is_one_too() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        name = f"covey-test-{os.getpid()}"
        listener.bind(f"\0{name}")
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).ready()
        assert said(listener) == "READY=1"


def test_without_a_socket_or_with_one_that_is_gone_nothing_happens(tmp_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}, {"WATCHDOG_USEC": "nonsense"}):
        notifier = Notifier(environment)
        notifier.ready()
        notifier.pet()
        notifier.stopping()
    assert watchdog_s({"WATCHDOG_USEC": "nonsense"}) == 0


def test_a_listener_that_does_not_read_blocks_nothing(heard: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": heard.getsockname()})
    for number in range(5000):  # far more than a socket holds
        notifier.status(str(number))


def test_every_line_for_the_journal_has_its_priority_and_no_time() -> None:
    formatter = JournalFormatter("%(message)s")

    def line(level: int, text: str) -> str:
        return formatter.format(logging.LogRecord("covey", level, "", 0, text, (), None))

    assert line(logging.INFO, "connected") == "<6>connected"
    assert line(logging.WARNING, "two\nlines") == "<4>two\n<4>lines"
    assert line(logging.ERROR, "no") == "<3>no"


def test_the_last_line_of_a_failing_agent_is_an_error_in_the_journal() -> None:
    reading, writing = os.pipe()
    file = os.fstat(writing)
    with os.fdopen(reading) as lines:
        subprocess.run(
            [sys.executable, "-m", "covey_edge", "agent", "--config", "/nonexistent.toml"],
            stderr=writing,
            env={**os.environ, "JOURNAL_STREAM": f"{file.st_dev}:{file.st_ino}"},
            check=False,
            timeout=PATIENCE_S,
        )
        os.close(writing)
        assert lines.read().startswith("<3>covey: error: /nonexistent.toml cannot be read")


def test_a_stream_that_is_not_the_journals_has_no_priorities(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        file = os.fstat(log.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{file.st_dev}:{file.st_ino + 1}")
        assert error_prefix() == ""
        monkeypatch.setenv("JOURNAL_STREAM", f"{file.st_dev}:{file.st_ino}")
        assert error_prefix() == "<3>"


# --- who is petted


@pytest.mark.broker
def test_a_transport_is_alive_with_and_without_a_connection_but_not_when_a_thread_hangs_or_ends(
    mosquitto: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("covey_edge.mqtt.STUCK_S", 0.5)
    transport = MqttTransport(parse_broker(mosquitto.url), "covey-home-kitchen-pi", Inbox())
    assert not transport.alive  # not begun
    transport.connect()
    until(lambda: transport.alive)
    hold = [True]
    transport._commands.put(lambda: [time.sleep(0.01) for _ in iter(lambda: hold[0], False)])  # its keeper hangs
    until(lambda: not transport.alive)
    hold.clear()
    hold.append(False)
    until(lambda: transport.alive)
    mosquitto.process.terminate()
    mosquitto.process.wait()
    until(lambda: not transport.connected)
    stays = [transport.alive for _ in range(10) if time.sleep(0.05) is None]
    assert all(stays)  # it waits for the next attempt
    transport.close()
    assert not transport.alive


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def silent(listener: socket.socket) -> bool:
    try:
        said(listener)
    except socket.timeout:
        return True
    return False


HUNG = """
import sys, threading, time
from covey_edge import cli_agent, agent
from pathlib import Path
take = agent.AgentProgram._take_message
def hang(self, item):
    time.sleep(3600) if item.topic.endswith("down") else take(self, item)
agent.AgentProgram._take_message = hang
cli_agent.run(Path(sys.argv[1]), False, None)
"""


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
def test_an_agent_says_that_it_is_ready_and_lives_until_its_loop_hangs(
    mosquitto: RunningBroker, coordinator_key: SealingKey, tmp_path: Path, heard: socket.socket
) -> None:
    """A supervisor as systemd: READY, then a sign of life in every interval; who gives none is killed."""
    import paho.mqtt.publish as publish

    config = write_device(tmp_path / "device", mosquitto.url, coordinator_key)
    environment = {**os.environ, "NOTIFY_SOCKET": heard.getsockname(), "WATCHDOG_USEC": "6000000"}
    agent = subprocess.Popen([sys.executable, "-c", HUNG, str(config)], env=environment)
    try:
        assert said(heard) == "READY=1"
        signs = [said(heard) for _ in range(3)]
        assert "WATCHDOG=1" in signs
        assert any(sign.startswith("STATUS=waits for the next round ; connected") for sign in signs)
        publish.single("covey/1/home/device/kitchen-pi/down", b"x", qos=1, port=mosquitto.port)
        heard.settimeout(8.0)
        while not silent(heard):
            pass
        assert agent.poll() is None  # it hangs, and nobody pets it
    finally:
        agent.send_signal(signal.SIGABRT)  # as systemd does
        assert agent.wait(PATIENCE_S) == -signal.SIGABRT


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
def test_an_agent_that_is_asked_to_end_says_so_and_shows_its_release_state(
    mosquitto: RunningBroker, coordinator_key: SealingKey, tmp_path: Path, heard: socket.socket
) -> None:
    config = write_device(tmp_path / "device", mosquitto.url, coordinator_key)
    command = [sys.executable, "-m", "covey_edge.launcher", "--state", str(tmp_path / "device/state"), "--"]
    agent = subprocess.Popen(
        [*command, "--config", str(config)], env={**os.environ, "NOTIFY_SOCKET": heard.getsockname()}
    )
    assert said(heard) == "READY=1"
    asked = subprocess.check_output(
        [sys.executable, "-m", "covey_edge", "agent", "--config", str(config), "status", "--json"], timeout=PATIENCE_S
    )
    assert json.loads(asked)["pid"] == agent.pid  # the launcher has gone, the agent has its place
    assert json.loads(asked)["sections"]["update"]["release"] == ""
    agent.terminate()
    words = ""
    while words != "STOPPING=1":
        words = said(heard)
    assert agent.wait(PATIENCE_S) == 0
