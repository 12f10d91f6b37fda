"""What an owner's commands do with the files of an agent that does not run: sent, leave, forget, status."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from covey_edge import sent_log
from covey_edge.cli_agent import agent as command
from covey_edge.cli_status import _span
from covey_edge.config import Agent, load_agent
from covey_edge.forgetting import FORGOTTEN, KEPT, STAYS, delete, gone, plan, sweep, unknown
from covey_edge.local_socket import StateLock
from covey_edge.opting_out import NAME as LEFT_NAME
from covey_edge.opting_out import OptOut
from covey_edge.outbox import Entry, Outbox
from covey_edge.sent_log import SentLog
from covey_protocol import device
from covey_protocol.blobs import blob_ref
from covey_protocol.errors import ConfigError, StorageError
from covey_protocol.messages import Offer, Verdict
from covey_protocol.seals import SealingKey

KEY = SealingKey.from_seed(bytes(32))
DAY_S = 86_400.0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "device.pem").write_bytes(KEY.pem())
    (tmp_path / "data.npz").write_bytes(b"data")
    path = tmp_path / "agent.toml"
    path.write_text(
        'device_id = "pi"\nfleet = "home"\nstate_dir = "."\n[broker]\nurl = "mqtt://127.0.0.1:1"\n'
        f'[identity]\nkey_file = "device.pem"\ncoordinator_key = "{KEY.public.hex()}"\n[data]\npath = "data.npz"\n'
    )
    return path


@pytest.fixture
def agent(config: Path) -> Agent:
    return load_agent(config)


def run(config: Path, *arguments: str, give: str | None = None) -> Result:
    return CliRunner().invoke(command, [*arguments, "--config", str(config)], input=give)


def update(folder: Path, number: int, now_s: float, *, offered: bool = True, verdict: str = "") -> None:
    """What the log holds of one update."""
    log = SentLog(folder, load_agent(folder / "agent.toml").config.privacy, now_s=lambda: now_s)
    offer = Offer(f"r.{number}", blob_ref(number.to_bytes(4, "little")), 3)
    log.keep(device.Keep(offer.round_id, offer, b""), None)
    if offered:
        log.before(offer)
    if verdict:
        log.heard(device.Judged(Verdict(offer.round_id, verdict)), (offer.round_id,))


# --- forget


def test_only_what_covey_makes_is_deleted_also_where_the_state_lies_beside_keys_and_settings(
    agent: Agent, tmp_path: Path
) -> None:
    for name in FORGOTTEN:
        (tmp_path / name.replace("*", "-hall")).write_bytes(b"12345")
    for name in (*KEPT, *STAYS):
        (tmp_path / name.replace("*", "x")).write_bytes(b"1")
    (tmp_path / "diary.txt").write_bytes(b"mine")
    before = set(tmp_path.iterdir())
    doomed = plan(tmp_path, agent.config, tmp_path, data=False, everything=False)
    assert len(doomed) == len(FORGOTTEN)
    assert sum(one.size for one in doomed) == 5 * len(FORGOTTEN)
    assert unknown(tmp_path) == ["agent.toml", "data.npz", "device.pem", "diary.txt"]
    delete(doomed)
    assert before - set(tmp_path.iterdir()) == {one.path for one in doomed}
    everything = plan(tmp_path, agent.config, tmp_path, data=True, everything=True)
    assert {one.path.name for one in everything} == {*(name.replace("*", "x") for name in KEPT), "data.npz"}


def test_what_a_crash_left_unfinished_goes_and_what_is_not_coveys_stays(agent: Agent) -> None:
    names = (".sequence.4711.tmp", ".withheld-digits.msgpack.4711.tmp", "records/.r.1.record.4711.tmp")
    for name in (*names, ".theirs.4711.tmp"):
        (agent.state_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (agent.state_dir / name).write_bytes(b"half")
    doomed = {one.path.name for one in plan(agent.folder, agent.config, agent.state_dir, data=False, everything=False)}
    assert doomed == {".sequence.4711.tmp", ".withheld-digits.msgpack.4711.tmp", "records"}
    sweep(agent.state_dir)
    assert [path.name for path in agent.state_dir.rglob(".*")] == [".theirs.4711.tmp"]


def test_a_link_out_of_the_folder_is_cut_and_what_it_names_stays(agent: Agent, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "photo").write_bytes(b"mine")
    (tmp_path / "records").symlink_to(elsewhere)
    delete(plan(tmp_path, agent.config, tmp_path, data=False, everything=False))
    assert not (tmp_path / "records").exists()
    assert (elsewhere / "photo").exists()


def test_data_go_once_with_what_lies_in_them_and_where_a_link_leads(config: Path, tmp_path: Path) -> None:
    """Two tasks share a folder, a third's data lie in it, and a link leads to the fourth's on another disk."""
    disk = tmp_path / "disk"
    for folder in (tmp_path / "pictures" / "test", disk):
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(b"123")
    (tmp_path / "linked").symlink_to(disk)
    paths = {"a": "pictures", "b": "pictures", "c": "pictures/test", "d": "linked"}
    tables = "".join(f'[data.tasks.{task}]\nsource = "images"\npath = "{path}"\n' for task, path in paths.items())
    config.write_text(config.read_text().replace('[data]\npath = "data.npz"\n', tables))
    doomed = plan(tmp_path, load_agent(config).config, tmp_path / "state", data=True, everything=False)
    assert [one.path for one in doomed] == [
        tmp_path / "pictures",
        tmp_path / "pictures/test",
        tmp_path / "linked",
        disk,
    ]
    delete(doomed)
    assert not {"pictures", "linked", "disk"} & {path.name for path in tmp_path.iterdir()}


def test_what_cannot_be_deleted_is_named_and_the_rest_is_gone(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("blobs", "records"):
        (tmp_path / name).mkdir()
    remove = shutil.rmtree

    def refuse(path: Path) -> None:
        if path.name == "blobs":
            raise OSError(30, "Read-only file system")
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StorageError, match=r"cannot delete .*blobs \(Read-only file system\)"):
        delete(plan(tmp_path, agent.config, tmp_path, data=False, everything=False))
    assert not (tmp_path / "records").exists()


def test_who_forgets_is_asked_and_told_what_cannot_be_called_back(config: Path, tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    update(tmp_path, 1, 1.7e9, verdict="accepted")
    update(tmp_path, 2, 1.7e9 + DAY_S, verdict="rejected")
    update(tmp_path, 3, 1.7e9 + 2 * DAY_S, offered=False)  # never left
    ended = run(config, "forget", give="n\n")
    assert ended.exit_code == 1
    assert (tmp_path / "records").exists()
    words = "2 updates and 0 evaluations left this device between 2023-11-14T22:13:20Z and 2023-11-15T22:13:20Z; 1 of"
    assert words in ended.output
    assert "keep    sent*.json*: the log of what left" in ended.output
    assert run(config, "forget", "--yes").exit_code == 0
    assert not (tmp_path / "records").exists()
    assert "nothing to delete" in run(config, "forget", "--yes").output


def test_what_left_is_known_after_years(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent_log, "MAX_FILE_BYTES", 600)
    monkeypatch.setattr(sent_log, "KEPT_FILES", 2)
    for number in range(12):
        update(tmp_path, number, 1.7e9 + 30 * DAY_S * number, verdict="accepted")
    left = gone(tmp_path)
    assert (left.updates, left.accepted, left.first) == (12, 12, "2023-11-14T22:13:20Z")
    told = run(config, "sent").output.splitlines()
    assert told[0].startswith("2023-11               1 update (4 bytes)")
    assert "verdict: accepted" in told[0]
    since = run(config, "sent", "--since", "2024-08-15", "--json").output.splitlines()
    assert [json.loads(line)["kind"] for line in since if "kind" in json.loads(line)].count("update") == 2


def test_a_date_that_is_none_is_refused(config: Path) -> None:
    refused = run(config, "sent", "--since", "yesterday")
    assert isinstance(refused.exception, ConfigError)
    assert "write 2026-11-01, or 7d" in str(refused.exception)
    assert run(config, "sent", "--since", "7d").exit_code == 0


# --- leave and join


def test_opting_out_holds_keeps_its_date_and_ends_with_join(config: Path, tmp_path: Path) -> None:
    assert run(config, "leave").exit_code == 0
    since = OptOut(tmp_path).since_ms()
    assert since is not None
    assert run(config, "leave").exit_code == 0
    assert OptOut(tmp_path).since_ms() == since
    assert "declines every round" not in run(config, "status").output  # it does not run: nothing is declined
    assert "opted out" in run(config, "status").output
    assert run(config, "join").exit_code == 0
    assert OptOut(tmp_path).since_ms() is None
    assert run(config, "join").exit_code == 0


@pytest.mark.parametrize("content", [b"", b"torn", b"{}", b'{"since_ms": "x"}'])
def test_an_opt_out_that_cannot_be_read_still_holds(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LEFT_NAME).write_bytes(content)
    assert OptOut(tmp_path).since_ms() == 0
    OptOut(tmp_path).leave()
    assert OptOut(tmp_path).since_ms() is not None


# --- status


def test_without_an_agent_the_files_say_what_is_owed_and_nothing_is_changed(config: Path, tmp_path: Path) -> None:
    offer = Offer("r.1", blob_ref(b"update"), 3)
    Outbox(tmp_path).keep(Entry(offer, b"update"))
    (tmp_path / "outbox" / "torn.msgpack").write_bytes(b"torn")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    facts = json.loads(run(config, "status", "--json").output)
    assert (facts["state"], facts["outbox"], facts["pid"]) == ("stopped", ["r.1"], None)
    assert facts["doing"] == "does not run; this is from its files"
    assert "without a verdict: r.1" in run(config, "status").output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("seconds", "words"), [(-3.0, "0 s"), (45.4, "45 s"), (200.0, "00:03:20"), (187_200.0, "2 d 04:00:00")]
)
def test_spans_of_time_are_told_in_words(seconds: float, words: str) -> None:
    assert _span(seconds) == words


def test_an_agent_that_is_just_starting_is_told_so(config: Path, tmp_path: Path) -> None:
    lock = StateLock(tmp_path)
    assert f"is starting or ending (process {os.getpid()})" in run(config, "status").output
    lock.close()
