"""The personal copy of a model: made on real digits by a real runtime, in a child, after the round."""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from models_kept import digits, parameters_of
from patience import PATIENCE_S

from covey_edge.cache import BlobCache
from covey_edge.conditions import Sensors
from covey_edge.config import load_agent
from covey_edge.frames import Frame, Personalise, Personalised, Problem, Tune
from covey_edge.inference import Predictor
from covey_edge.model_store import Kept, ModelStore
from covey_edge.personal import GROUPS, moving_places
from covey_edge.personal_agent import Personal
from covey_edge.trainer import Trainer
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import ConfigError, TrainingError
from covey_protocol.messages import Invitation, TrainingPlan
from covey_protocol.parameters import offsets
from covey_protocol.seals import SealingKey

AGENT = """
device_id = "pi"
fleet = "home"
[broker]
url = "mqtt://localhost"
[identity]
key_file = "device.pem"
coordinator_key = "{key}"
[data]
path = "data.npz"
{held_out}
[personal]
{personal}
"""
BESIDE, OF_THESE = 'evaluation_path = "held-out.npz"', "holdout = 0.5"
TUNED = "keep = true\nfinetune_epochs = 5\nfinetune_learning_rate = 0.1"


@pytest.fixture
def device(tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey) -> Path:
    """A device that sees mostly threes and fours: its own data differ from the fleet's."""
    x, y = digits(0, 1797)
    own = np.flatnonzero(np.isin(y, (3, 4)))
    np.savez(tmp_path / "data.npz", x=x[own[:60]], y=y[own[:60]])
    np.savez(tmp_path / "held-out.npz", x=x[own[60:120]], y=y[own[60:120]])
    (tmp_path / "device.pem").write_bytes(SealingKey.generate().pem())
    (tmp_path / "bundle").write_bytes(digits_bundle)
    return tmp_path


def written(folder: Path, name: str, parameters: np.ndarray) -> tuple[str, str]:
    data = parameters.astype("<f4").tobytes()
    (folder / name).write_bytes(data)
    return str(folder / name), hashlib.sha256(data).hexdigest()


def asked(folder: Path, key: SealingKey, bundle: bytes, parameters: list[np.ndarray], **tune: Any) -> Frame:
    """What a child answers to these parameters, and a fine-tuning of the first where `tune` says how."""
    files = [written(folder, f"p{number}", one) for number, one in enumerate(parameters)]
    values = {"epochs": 3, "learning_rate": 0.1, "layers": (), **tune}
    plan = TrainingPlan(values["epochs"], values["learning_rate"], shuffle_seed=1)
    tuning = Tune("npz", str(folder / "data.npz"), plan, values["layers"], "pi") if tune else None
    digest, held_out = hashlib.sha256(bundle).hexdigest(), str(folder / "held-out.npz")
    sealed_by = (key.public.hex(),)
    return Trainer().answer(
        Personalise(str(folder / "bundle"), digest, sealed_by, tuple(files), "npz", held_out, tuning)
    )


def test_a_copy_that_saw_this_devices_data_is_better_on_its_held_out_data(
    device: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    received = parameters_of(digits_bundle)
    answer = asked(device, coordinator_key, digits_bundle, [received, received], epochs=3)
    assert isinstance(answer, Personalised), answer
    assert answer.has_classes
    assert (len(answer.counts), sum(answer.counts)) == (GROUPS, 60)
    first, again, tuned = answer.scores
    assert first == again
    assert sum(tuned.losses) < 0.5 * sum(first.losses)
    assert sum(tuned.correct) > sum(first.correct)


def test_the_same_request_gives_the_same_copy_bit_by_bit(
    device: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    received = parameters_of(digits_bundle)
    answers = [asked(device, coordinator_key, digits_bundle, [received], epochs=1) for _ in range(2)]
    assert answers[0] == answers[1]


def test_layers_that_are_not_named_do_not_move_by_a_bit_and_those_that_are_do(
    device: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    received, manifest = parameters_of(digits_bundle), read_bundle(digits_bundle).manifest
    last = manifest.parameters[-1].name.rsplit("/", 1)[0]
    answer = asked(device, coordinator_key, digits_bundle, [received], epochs=2, layers=(last,))
    assert isinstance(answer, Personalised), answer
    moved = np.frombuffer(answer.parameters, "<f4") != received
    for name, place in offsets(manifest.parameters).items():
        assert moved[place].any() == name.startswith(f"{last}/"), name


def test_a_layer_that_is_not_there_is_named_with_the_nearest(digits_bundle: bytes) -> None:
    manifest = read_bundle(digits_bundle).manifest
    name = manifest.parameters[-1].name.rsplit("/", 1)[0]
    with pytest.raises(TrainingError, match=f"no layer '{name}s' .*; did you mean '{name}'"):
        moving_places(manifest, (f"{name}s",))
    assert moving_places(manifest, ()) is None


@pytest.mark.parametrize("bad", ["diverges", "damaged", "foreign seal"])
def test_what_cannot_be_done_is_a_problem_with_a_reason(
    bad: str, device: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    received, key, bundle = parameters_of(digits_bundle), coordinator_key, digits_bundle
    if bad == "damaged":
        (device / "bundle").write_bytes(digits_bundle[:-1] + b"?")
    if bad == "foreign seal":
        key = SealingKey.generate()
    start = received * np.float32(1e20) if bad == "diverges" else received
    answer = asked(device, key, bundle, [start], epochs=1)
    assert isinstance(answer, Problem)
    expected = {"diverges": "fine-tuning diverged", "damaged": "is damaged", "foreign seal": "seal is not the expected"}
    assert expected[bad] in answer.what


# --- the agent's part, with real children


class Device:
    """`Personal` and its inbox, without a broker."""

    def __init__(self, folder: Path, bundle: bytes, key: SealingKey, personal: str, held_out: str) -> None:
        text = AGENT.format(key=key.public.hex(), personal=personal, held_out=held_out)
        (folder / "agent.toml").write_text(text)
        self.agent = load_agent(folder / "agent.toml")
        self.cache = BlobCache(self.agent.state_dir / "blobs")
        self.answers: queue.Queue[tuple[object, Frame]] = queue.Queue()
        self.now, self.root = 0.0, folder / "root"
        self.battery("Charging")
        self.personal = Personal(
            self.agent,
            self.cache,
            lambda token, frame: self.answers.put((token, frame)),
            Sensors(self.agent.state_dir, self.root, {}),
            lambda: self.now,
        )
        self.store = ModelStore(self.agent.state_dir)
        self._bundle = bundle
        self.numbers = iter(range(1, 100))

    def battery(self, status: str) -> None:
        for name, text in (("type", "Battery"), ("status", status)):
            path = self.root / "sys/class/power_supply/BAT0" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def look(self, after_s: float = 10.0) -> None:
        self.now += after_s
        self.personal.tick(idle=True)

    def round(self, parameters: np.ndarray, task: str = "") -> Invitation:
        """This device has worked in a round with these parameters."""
        data, number = parameters.astype("<f4").tobytes(), next(self.numbers)
        refs = [blob_ref(one) for one in (self._bundle, data)]
        for ref, one in zip(refs, (self._bundle, data)):
            self.cache.put(one, ref.sha256)
        invitation = Invitation(f"r.{number}.a", number, 0, 1000, refs[0], refs[1], TrainingPlan(1, 0.1, task=task))
        self.personal.worked(invitation)
        return invitation

    def answer(self) -> bool:
        return self.personal.takes(*self.answers.get(timeout=PATIENCE_S))

    def settle(self) -> Kept:
        self.personal.tick(idle=True)
        while self.personal._job is not None:
            assert self.answer()
        kept = self.store.load()
        assert kept is not None
        return kept


@pytest.fixture
def made(device: Path, digits_bundle: bytes, coordinator_key: SealingKey) -> Iterator[Any]:
    every: list[Device] = []

    def make(personal: str, held_out: str = BESIDE) -> Device:
        every.append(Device(device, digits_bundle, coordinator_key, personal, held_out))
        return every[-1]

    yield make
    for one in every:
        one.personal.close()


def test_the_models_of_a_device_over_rounds(made: Any, digits_bundle: bytes, device: Path) -> None:
    """Kept and tuned after the first round; a worse one is kept out; a better one let in and tuned; rolled back."""
    owner = made(TUNED)
    start = parameters_of(digits_bundle)
    owner.round(start)
    owner.personal.tick(idle=False)
    assert owner.store.load() is None  # the device is still at work for the round
    kept = owner.settle()
    assert (kept.used.kind, kept.used.number, kept.federated.number) == ("personal", 1, 1)
    assert kept.used.base == kept.federated.parameters
    told = kept.history[-1].scores
    assert told["tuned"][0] < told["federated"][0]
    assert owner.personal._child.pid is None  # the child has gone

    assert kept.personal is not None
    own = owner.store.path(kept.personal.files[1])
    whole = own.read_bytes()
    own.write_bytes(b"damaged")
    owner.round(start * 30)  # saturated nonsense
    kept = owner.settle()
    assert (kept.federated.number, kept.used.number) == (1, 1)
    assert kept.history[-1].decision.startswith("kept out, worse by loss")
    assert kept.history[-1].scores["personal"][0] is None  # it loses, and stops nothing
    own.write_bytes(whole)

    predictor = Predictor.open(owner.agent.state_dir)
    x, y = digits(0, 1797)
    personal = (predictor.predict(x).argmax(axis=1) == y)[np.isin(y, (3, 4))].mean()
    assert personal > 0.9

    better = np.frombuffer(owner.store.read(kept.used)[1], "<f4")  # a fleet that has learned what this device knows
    owner.round(better)
    kept = owner.settle()
    assert kept.federated.number == 3
    assert kept.personal is not None
    assert kept.personal.number == 3
    back = kept.rolled_back()
    with owner.store.changing():
        owner.store.commit(back, {})
    owner.round(better)
    assert owner.settle().used == back.used
    assert str(predictor.version) == str(back.used)


def test_a_copy_pauses_when_conditions_do_not_hold_and_a_round_that_begins_stops_it_at_once(
    made: Any, digits_bundle: bytes
) -> None:
    owner = made("keep = true\nfinetune_epochs = 1000\n[conditions]\ncharging = true")
    owner.battery("Discharging")
    owner.round(parameters_of(digits_bundle))
    owner.look()
    owner.battery("Charging")
    owner.look()
    assert owner.personal._child.pid is None  # it is not looked again so soon
    owner.look(after_s=60.0)
    assert owner.answer()  # scored; the copy is being made
    pid = owner.personal._child.pid
    state = Path(f"/proc/{pid}/stat")
    owner.battery("Discharging")
    owner.look()
    end = time.monotonic() + PATIENCE_S
    while state.read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < end
    owner.battery("Charging")
    owner.look()
    owner.look()
    while state.read_text().rsplit(")", 1)[1].split()[0] == "T":
        assert time.monotonic() < end
    assert owner.personal._child.pid == pid
    kept = owner.store.load()
    assert kept is not None
    owner.personal.interrupt()
    assert owner.personal._child.pid is None
    assert owner.store.load() == kept
    owner.personal.tick(idle=False)
    assert not owner.personal._child.busy
    owner.personal.tick(idle=True)
    assert owner.personal._child.busy  # it is made later


@pytest.mark.slow
def test_an_owner_who_rolls_back_while_a_copy_is_made_is_obeyed(made: Any, digits_bundle: bytes) -> None:
    owner = made(TUNED, OF_THESE)
    owner.round(parameters_of(digits_bundle))
    owner.personal.tick(idle=True)
    assert owner.answer()
    kept = owner.store.load()
    assert kept is not None
    assert 20 <= kept.history[0].examples <= 40  # half of 60
    changed = msgspec.structs.replace(kept, refused=("x",))
    with owner.store.changing():
        owner.store.commit(changed, {})
    assert owner.answer()
    assert owner.store.load() == changed


def test_without_keep_nothing_is_kept_and_with_nothing_to_compute_no_child_runs(
    made: Any, digits_bundle: bytes
) -> None:
    start = parameters_of(digits_bundle)
    silent = made("keep = false\n[personal.tasks.door]\nkeep = true", held_out="")
    silent.round(start)
    silent.personal.tick(idle=True)
    assert not (silent.agent.state_dir / "models").exists()
    silent.store = ModelStore(silent.agent.state_dir, "door")
    silent.round(start, task="door")
    silent.personal.tick(idle=True)
    assert silent.personal._child.pid is None
    assert silent.settle().used.number == 2


def test_a_copy_that_cannot_be_made_costs_nothing_else(
    made: Any, digits_bundle: bytes, device: Path, caplog: pytest.LogCaptureFixture
) -> None:
    owner = made(f'{TUNED}\nfinetune_layers = ["dense_of_another"]')
    owner.round(parameters_of(digits_bundle))
    assert owner.settle().used.kind == "federated"
    assert "no layer 'dense_of_another'" in caplog.text
    assert owner.personal._child.pid is None


@pytest.mark.parametrize(
    ("personal", "complaint"),
    [
        ("finetune_epochs = 3", "finetune_epochs without keep"),
        ('keep = true\nuse = "personal"', "a personal model that nothing makes"),
        ("keep = true\nfinetune_layers = ['dense']", "a personal model that nothing makes"),
        ("kep = true", "did you mean `keep`"),
        ("[personal.tasks.door]\nfinetune_epochs = 1", r"\[personal.tasks.door\] finetune_epochs without keep"),
        ("[personal.tasks.door]\nkeeep = true", "did you mean `keep`"),
        ("min_gain = -1", "personal.min_gain"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_at_the_start(
    personal: str, complaint: str, device: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Device(device, digits_bundle, coordinator_key, personal, BESIDE)
