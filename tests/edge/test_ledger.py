"""The privacy ledger: what is counted, what is refused, what survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from covey_edge.cli_privacy import privacy
from covey_edge.config import PrivacySettings, load_agent
from covey_edge.ledger import NAME, SPENT, Ledger, Overspent
from covey_edge.outbox import Outbox
from covey_edge.performer import Performer
from covey_protocol import device
from covey_protocol.errors import ConfigError, StorageError
from covey_protocol.messages import Answer, BlobRef, Failure, Invitation, Offer, TrainingPlan
from covey_protocol.seals import SealingKey

NOISED = PrivacySettings(clip_norm=1.0, noise_multiplier=2.0, epsilon_limit=8.0)
# at delta 1e-5: 4.38 after one update, 6.57 after two, 8.37 after three


def ledger(folder: Path, privacy: PrivacySettings = NOISED) -> Ledger:
    return Ledger(folder, privacy, now_ms=lambda: 1000)


def test_updates_are_counted_until_the_limit_and_then_refused(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    for update in (b"1", b"2"):
        assert book.refusal(evaluates=False) == ""
        book.count(update, evaluates=False)
    assert book.book().epsilon(1e-5) == pytest.approx(6.57, abs=0.01)
    assert book.rounds_left(book.book()) == 0
    assert book.refusal(evaluates=False) == SPENT
    with pytest.raises(Overspent):
        book.count(b"3", evaluates=False)
    assert book.book().noised == {"2.0": 2}


def test_another_process_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    ledger(tmp_path).count(b"1", evaluates=False)
    again = ledger(tmp_path)
    again.count(b"1", evaluates=False)  # the same update
    again.count(b"2", evaluates=False)
    assert ledger(tmp_path).book().noised == {"2.0": 2}
    assert ledger(tmp_path).book().since_ms == 1000


def test_updates_of_another_noise_are_added_up_with_the_old_ones(tmp_path: Path) -> None:
    ledger(tmp_path).count(b"1", evaluates=False)
    quieter = ledger(tmp_path, PrivacySettings(clip_norm=5.0, noise_multiplier=20.0, epsilon_limit=8.0))
    quieter.count(b"2", evaluates=False)
    assert quieter.book().noised == {"2.0": 1, "20.0": 1}
    assert 4.38 < quieter.book().epsilon(1e-5) < 4.41


def test_exact_numbers_are_counted_apart(tmp_path: Path) -> None:
    exact = ledger(tmp_path, PrivacySettings(exact_evaluation=True))
    exact.count(b"1", evaluates=False)
    exact.count(b"2", evaluates=True)
    book = exact.book()
    assert (book.exact_updates, book.exact_evaluations, book.noised) == (1, 1, {})
    assert book.epsilon(1e-5) == 0


@pytest.mark.parametrize("content", [b"", b"{", b'{"since_ms": 1, "noised": {"2.0": -1}}'])
def test_a_damaged_ledger_is_no_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(StorageError, match="cannot be read"):
        ledger(tmp_path).count(b"1", evaluates=False)


class Around:
    """A device that is asked to train and says what it does."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def say(self, message: Any) -> None:
        self.said.append(message)

    def conditions(self, invitation: Invitation) -> device.ConditionsChecked:
        return device.ConditionsChecked(invitation.round_id, True)

    def fetch(self, blobs: tuple[BlobRef, ...]) -> None: ...

    def train(self, invitation: Invitation) -> None: ...

    def stop_working(self) -> None: ...


def test_an_update_beyond_the_limit_is_neither_kept_nor_offered(tmp_path: Path) -> None:
    """Where the round had been accepted before: a crash let it be trained twice."""
    around, blob = Around(), BlobRef(bytes(32), 40, 16)
    performer = Performer(device.DeviceMachine("a"), Outbox(tmp_path), around, lambda: 0.0, ledger(tmp_path))
    for number in range(3):
        invitation = Invitation(f"run.{number}.1", number, 0, 60_000, blob, blob, TrainingPlan(1, 0.1))
        performer.handle(device.Invited(invitation))
        performer.handle(device.BlobReady(blob.sha256))
        performer.handle(device.Trained(invitation.round_id, bytes([number]) * 40, 5))
    kinds = [type(message) for message in around.said]
    assert kinds == [Answer, Offer, Answer, Offer, Answer, Failure]
    assert around.said[-1].reason == SPENT
    assert len(Outbox(tmp_path).offers()) == 2


def agent_toml(folder: Path, privacy: str) -> Path:
    key = SealingKey.from_seed(bytes(32))
    (folder / "device.pem").write_bytes(key.pem())
    path = folder / "agent.toml"
    path.write_text(
        f'device_id = "a"\nfleet = "f"\n[broker]\nurl = "mqtt://localhost"\n[identity]\nkey_file = "device.pem"\n'
        f'coordinator_key = "{key.public.hex()}"\n[data]\npath = "data.npz"\n[privacy]\n{privacy}\n'
    )
    return path


@pytest.mark.parametrize(
    "privacy",
    ["epsilon_limit = 8.0", "epsilon_limit = 8.0\nclip_norm = 1.0\nnoise_multiplier = 2.0\nexact_evaluation = true"],
)
def test_a_limit_that_nothing_keeps_is_refused(tmp_path: Path, privacy: str) -> None:
    with pytest.raises(ConfigError, match="epsilon_limit"):
        load_agent(agent_toml(tmp_path, privacy))


def test_covey_privacy_tells_the_owner(tmp_path: Path) -> None:
    path = agent_toml(tmp_path, "clip_norm = 1.0\nnoise_multiplier = 2.0\nepsilon_limit = 8.0")
    state = tmp_path / "state"
    ledger(state).count(b"1", evaluates=False)
    ledger(state, PrivacySettings()).count(b"2", evaluates=False)
    (state / "stopped").mkdir()
    (state / "stopped" / "stopped.txt").write_text("why")
    told = CliRunner().invoke(privacy, ["--config", str(path)], catch_exceptions=False).output
    assert "1 noised updates since 1970-01-01: epsilon 4.377 at delta 1e-05" in told
    assert "limit 8: 1 more rounds" in told
    assert "not covered by any epsilon: 1 updates without noise" in told
    assert "stopped.txt" in told
    facts = json.loads(CliRunner().invoke(privacy, ["--config", str(path), "--json"]).output)
    assert facts["rounds_left"] == 1


COUNTING = """
import sys
from pathlib import Path
from covey_edge.config import PrivacySettings
from covey_edge.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), PrivacySettings(clip_norm=1.0, noise_multiplier=2.0))
number = int(sys.argv[2])
while True:
    ledger.count(number.to_bytes(8, "big"), evaluates=False)
    print(number, flush=True)
    number += 1
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing_that_was_counted(tmp_path: Path) -> None:
    told = 0
    for kill in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", COUNTING, str(tmp_path), str(told)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.001 * kill)
        os.kill(child.pid, signal.SIGKILL)
        lines = child.stdout.read().split()
        child.stdout.close()
        child.wait()
        told = int(lines[-1]) + 1 if lines else told + 1
        assert told <= ledger(tmp_path).book().noised["2.0"] <= told + kill + 1
