"""What a coordinator tells: the board, the metrics page, the live picture, JSON log lines. No processes here."""

from __future__ import annotations

import io
import json
import logging
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from rich.console import Console

from covey_coordinator.records import ACCEPTED, MISSING, REJECTED, DeviceVerdict, FleetMetric
from covey_coordinator.watching import events
from covey_coordinator.watching.board import Board
from covey_coordinator.watching.display import MOST_DEVICES, duration, live_status, printable, render, size
from covey_coordinator.watching.logs import EventLog, JsonLines
from covey_coordinator.watching.metrics import MetricsServer, Traffic, exposition, parse_listen
from covey_protocol.errors import ConfigError, TransportError

VERDICTS = [
    DeviceVerdict("a", ACCEPTED, score=1.0),
    DeviceVerdict("b", REJECTED, "too far from the others", score=9.0),
    DeviceVerdict("c", REJECTED, "not finite"),
    DeviceVerdict("d", MISSING, "declined: busy"),
]
METRICS = {"a": {"training_loss": 0.5, "accuracy_before": 0.25}, "b": {"training_loss": 1.5}}
TRAFFIC = Traffic(received=1000, sent=2000, stored=4096)


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def board(time: Time) -> Board:
    return Board(["d", "c", "b", "a"], time)


def moved(**progress: str) -> events.DevicesMoved:
    return events.DevicesMoved("r1", progress, {"a": (300, 400)})


def one_round(board: Board, time: Time, outcome: str = "published", resumed: bool = False) -> None:
    """Two seconds of inviting, three of collecting, one of aggregating."""
    board(events.RunStarted("home", "bell", 20, 6))
    for name in "abcd":
        board(events.MessageCame(name, "Presence", True))
    board(events.RoundOpened("r1", 7, "abcd", 2, 60.0, resumed))
    board(events.PhaseBegan("r1", "inviting"))
    board(moved(a="stored" if resumed else "invited", b="invited", c="invited", d="declined"))
    time.now += 2
    board(events.PhaseBegan("r1", "collecting"))
    board(moved(a="stored", b="stored", c="stored", d="declined"))
    time.now += 3
    board(events.PhaseBegan("r1", "aggregating"))
    board(events.RuleRan("r1", {"aggregate_norm": 0.75}))
    time.now += 1
    board(events.PhaseBegan("r1", outcome))
    board(moved(a="stored", b="stored", c="stored", d="declined"))
    board(events.RoundEnded("r1", 7, outcome, "", VERDICTS, METRICS, 6.0))


def samples(page: str) -> dict[str, float]:
    """The values of a page, read by the rules of the text format; an odd line fails."""
    found = {}
    for line in page.splitlines():
        if line.startswith("# HELP ") or re.fullmatch(r"# TYPE \w+ (counter|gauge)", line):
            continue
        match = re.fullmatch(r'([a-z_]+(?:\{[a-z_]+="(?:[^"\\]|\\.)*"\})?) (\S+)', line)
        assert match, line
        found[match[1]] = float(match[2])
    return found


def text_of(board: Board, now: float, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(board.state(), now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- metrics


def test_a_round_is_counted_by_outcome_verdict_phase_and_score(board: Board, time: Time) -> None:
    one_round(board, time)
    page = samples(exposition(board.state(), TRAFFIC, time.now))
    assert page == {
        'covey_rounds_total{outcome="abandoned"}': 0,
        'covey_rounds_total{outcome="published"}': 1,
        "covey_rounds_published": 7,
        "covey_rounds_asked": 20,
        "covey_round_deadline_left_seconds": 0,
        "covey_devices_online": 4,
        "covey_updates_acknowledged_total": 3,
        'covey_updates_rejected_total{reason="rule"}': 1,
        'covey_updates_rejected_total{reason="screening"}': 1,
        'covey_updates_rejected_total{reason="round_abandoned"}': 0,
        'covey_updates_rejected_total{reason="revoked"}': 0,
        'covey_updates_missing_total{reason="declined"}': 1,
        "covey_received_bytes_total": 1000,
        "covey_sent_bytes_total": 2000,
        'covey_phase_seconds_total{phase="inviting"}': 2,
        'covey_phase_seconds_total{phase="collecting"}': 3,
        'covey_phase_seconds_total{phase="aggregating"}': 1,
        'covey_phases_total{phase="inviting"}': 1,
        'covey_phases_total{phase="collecting"}': 1,
        'covey_phases_total{phase="aggregating"}': 1,
        'covey_rule_measurement{name="aggregate_norm"}': 0.75,
        "covey_store_bytes": 4096,
        'covey_rule_score{of="max"}': 9,
        'covey_rule_score{of="median"}': 5,
    }


def test_an_abandoned_round_rejects_for_that_reason(board: Board, time: Time) -> None:
    one_round(board, time, "abandoned")
    page = samples(exposition(board.state(), TRAFFIC, time.now))
    assert page['covey_updates_rejected_total{reason="round_abandoned"}'] == 2
    assert page['covey_updates_rejected_total{reason="rule"}'] == 0
    assert page["covey_rounds_published"] == 6


def test_the_update_of_a_revoked_device_is_counted_as_that(board: Board, time: Time) -> None:
    board(events.MessageCame("a", "Presence", True))
    board(events.RoundOpened("r1", 7, "ab", 1, 60.0, False))
    board(moved(a="stored", b="stored"))
    board(events.DeviceRevoked("a", "revoked: stolen"))
    board(moved(a="revoked", b="stored"))
    board(events.RoundEnded("r1", 7, "published", "", [DeviceVerdict("a", REJECTED, "revoked: stolen")], {}, 6.0))
    page = samples(exposition(board.state(), TRAFFIC, time.now))
    assert page['covey_updates_rejected_total{reason="revoked"}'] == 1
    assert page["covey_devices_online"] == 0
    board(events.DeviceReadmitted("a", True))
    assert samples(exposition(board.state(), TRAFFIC, time.now))["covey_devices_online"] == 1


def test_what_was_acknowledged_before_a_restart_is_not_counted_again(board: Board, time: Time) -> None:
    one_round(board, time, resumed=True)
    assert board.state().acknowledged == 2  # b and c


def test_names_of_devices_cannot_break_the_page(board: Board, time: Time) -> None:
    board(events.RuleRan("r1", {'od"d\\\nname': 1.0}))
    page = exposition(board.state(), TRAFFIC, time.now)
    assert samples(page)['covey_rule_measurement{name="od\\"d\\\\\\nname"}'] == 1


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    made = MetricsServer("127.0.0.1:0", lambda: "covey_up 1\n")
    yield made
    made.close()


def test_only_the_metrics_are_served(server: MetricsServer) -> None:
    with urllib.request.urlopen(server.url, timeout=10) as answer:  # noqa: S310 - our own loopback server
        assert answer.read() == b"covey_up 1\n"
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(server.url.replace("/metrics", "/"), timeout=10)  # noqa: S310 - the same
    caught.value.close()


def test_a_port_in_use_is_said(server: MetricsServer) -> None:
    listen = server.url.removeprefix("http://").removesuffix("/metrics")
    with pytest.raises(TransportError, match=r"metrics cannot be served on 127\.0\.0\.1:"):
        MetricsServer(listen, str)


def test_a_closed_server_frees_its_port() -> None:
    server = MetricsServer("127.0.0.1:0", str)
    port = int(server.url.split(":")[2].split("/")[0])
    server.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("text", ["9464", "127.0.0.1", "127.0.0.1:port", "http://127.0.0.1:1", "me@host:1", "host:1/x"])
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="listen"):
        parse_listen(text)


def test_an_address_may_be_ipv6() -> None:
    assert parse_listen("[::1]:9464") == ("::1", 9464)


# --- the live picture


def test_the_picture_says_round_phase_deadline_and_devices(board: Board, time: Time) -> None:
    board(events.RunStarted("home", "bell", 20, 6))
    board(events.MessageCame("a", "Presence", True))
    board(events.RoundOpened("r1", 7, "abcd", 2, 600.0, False))
    board(events.PhaseBegan("r1", "collecting"))
    board(moved(a="uploading", b="invited", c="invited", d="invited"))
    text = text_of(board, time.now + 200)
    assert "home/bell  round 7 of 20  collecting  6 min left" in text
    assert "devices: 1 of 4 online" in text
    assert re.search(r"a +online, uploading +300 B of 400 B +3 min ago", text)
    assert re.search(r"b +offline, invited +never", text)


def test_the_picture_says_how_the_last_rounds_ended(board: Board, time: Time) -> None:
    one_round(board, time)
    text = text_of(board, time.now)
    assert "home/bell  7 of 20 rounds done" in text
    assert "round 7 published: 1 of 4 updates, median loss 1, median accuracy before 0.25" in text
    assert "  b rejected: too far from the others" in text


def test_the_picture_says_what_is_waited_for(board: Board, time: Time) -> None:
    board(events.RunStarted("home", "bell", 20, 6))
    board(events.Waits("paused by the operator: holidays"))
    assert "6 of 20 rounds done  paused by the operator: holidays" in text_of(board, time.now)


def test_a_large_fleet_does_not_fill_the_terminal(time: Time) -> None:
    board = Board([f"pi-{number:03d}" for number in range(100)], time)
    text = text_of(board, time.now)
    assert f"and {100 - MOST_DEVICES} more" in text
    assert text.count("pi-") == MOST_DEVICES


def test_a_device_cannot_steer_the_operators_terminal(board: Board, time: Time) -> None:
    verdict = DeviceVerdict("a", MISSING, "failed: \x1b[2Jgone [red]x[/red]")
    board(events.RoundEnded("r1", 1, "published", "", [verdict], {}, 1.0))
    text = text_of(board, time.now)
    assert "\x1b" not in text
    assert "?[2Jgone [red]x[/red]" in text
    assert printable("a\x1b\nb") == "a??b"


def test_lines_stand_above_the_live_picture(board: Board, time: Time) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    with live_status(board, console) as say:
        say("round 1/2 published")
    assert "round 1/2 published" in file.getvalue()
    assert "devices: 0 of 4 online" in file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.9, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (200_000, "2 d")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (15_272, "15.3 kB"), (2_100_000, "2.1 MB")])
def test_sizes_are_short(count: int, text: str) -> None:
    assert size(count) == text


# --- logs


@pytest.fixture
def lines() -> Iterator[list[dict[str, object]]]:
    """What the JSON formatter makes of all that is logged."""
    found: list[dict[str, object]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(self.format(record)))

    handler, covey = Keep(), logging.getLogger("covey")
    handler.setFormatter(JsonLines())
    level = covey.level
    covey.addHandler(handler)
    covey.setLevel(logging.INFO)
    yield found
    covey.removeHandler(handler)
    covey.setLevel(level)


def test_a_json_line_says_when_what_and_whose(lines: list[dict[str, object]]) -> None:
    log = EventLog()
    log(moved(a="stored"))
    log(moved(a="stored"))
    log(events.RoundEnded("r1", 7, "published", "", VERDICTS[1:2], {"b": {"training_loss": float("nan")}}, 6.0))
    moves, verdict, ended = lines
    assert str(moves.pop("time")).endswith("+00:00")
    assert moves == {"level": "info", "event": "device_moved", "round": "r1", "device": "a", "progress": "stored"}
    assert verdict["reason"] == "too far from the others"
    assert verdict["metrics"] == {"training_loss": None}
    assert ended["event"] == "round_ended"
    assert "device" not in ended


def test_a_line_that_is_only_text_is_one_object_all_the_same(lines: list[dict[str, object]]) -> None:
    logging.getLogger("covey.coordinator").warning("ignored a message: %s", 'a "quoted"\nname')
    assert lines[0]["event"] == "log"
    assert lines[0]["level"] == "warning"
    assert lines[0]["message"] == 'ignored a message: a "quoted"\nname'


def test_an_error_ends_the_log_as_an_error(lines: list[dict[str, object]]) -> None:
    EventLog()(events.RunEnded(8, "run bell was aborted by the operator"))
    assert (lines[0]["level"], lines[0]["code"]) == ("error", 8)


# --- several tasks, and evaluations

METRIC = FleetMetric("accuracy", 0.91, 0.93, 0.02, 3, 1)


def two_tasks(board: Board) -> None:
    board(events.RunStarted("home", "bell-x", 20, 6))
    board(events.RunStarted("home", "bell-y", 10, 0))
    board(events.RoundOpened("bell-x.7.abc", 7, "ab", 2, 60.0, False))
    board(events.RoundEnded("bell-x.7.abc", 7, "published", "", VERDICTS, METRICS, 1.0))
    board(events.RoundOpened("bell-x.e7.abd", 7, "ab", 2, 60.0, False, ("accuracy",)))
    board(events.PhaseBegan("bell-x.e7.abd", "inviting"))


def test_an_evaluation_is_no_round_of_training_and_a_task_counts_its_own(board: Board, time: Time) -> None:
    two_tasks(board)
    assert "home/bell-x  evaluation of round 7 of 20  inviting" in text_of(board, time.now)
    ended = events.RoundEnded("bell-x.e7.abd", 7, "published", "", VERDICTS[:1], {}, 1.0, ("accuracy",), (METRIC,))
    board(events.PhaseBegan("bell-x.e7.abd", "published"))
    board(ended)
    board(events.Waits("y: waiting for 3 devices"))
    state, text = board.state(), text_of(board, time.now)
    assert [(line.done, line.rounds) for line in state.runs.values()] == [(7, 20), (0, 10)]
    assert "home  rounds done: bell-x 7 of 20, bell-y 0 of 10  y: waiting for 3 devices" in text
    told = "accuracy 0.93 (mean 0.91, spread 0.02), 1 of 3 on held-out data"
    assert f"bell-x evaluation of round 7 published: 1 of 1 updates, {told}" in text
    page = samples_with_labels(exposition(state, TRAFFIC, time.now))
    assert page["covey_rounds_published"] == 7
    assert page["covey_rounds_asked"] == 30
    assert page['covey_run_rounds_published{run="bell-y"}'] == 0
    values = {of: page[f'covey_evaluation{{run="bell-x",metric="accuracy",of="{of}"}}'] for of in ("mean", "median")}
    assert values == {"mean": 0.91, "median": 0.93}
    assert page['covey_evaluation_round{run="bell-x"}'] == 7


def samples_with_labels(page: str) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_json_lines_say_what_an_evaluation_gave_and_whose_run_ended(caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog()
    with caplog.at_level(logging.INFO, "covey.events"):
        log(events.RoundOpened("bell-x.e7.abd", 7, "ab", 2, 60.0, False, ("accuracy",)))
        log(events.RoundEnded("bell-x.e7.abd", 7, "published", "", (), {}, 1.0, ("accuracy",), (METRIC,)))
        log(events.RunEnded(8, "aborted", "bell-x"))
    opened, ended, over = (json.loads(JsonLines().format(record)) for record in caplog.records)
    assert (opened["event"], opened["evaluates"]) == ("round_opened", ["accuracy"])
    assert ended["evaluation"] == [
        {"name": "accuracy", "mean": 0.91, "median": 0.93, "spread": 0.02, "devices": 3, "held_out": 1}
    ]
    assert (over["event"], over["run"], over["code"]) == ("run_ended", "bell-x", 8)
