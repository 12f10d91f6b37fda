"""A day of an agent's life, shortened (see `world`): outages, restarts, full disks, jumping clocks, power cuts,
releases of the agent that are good, fail or are to be refused, and certificates that end.

`COVEY_SEED=N pytest tests/life -k hours` lives one seed alone. A seed that fails prints the end of its story.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_edge import files
from covey_edge.frames import Frame, Run
from covey_edge.trainer import Trainer
from covey_protocol.bundle import read_bundle
from life.bugs import BUGS
from life.power import PowerCut, PoweredDisk
from life.world import Broken, Life, Trouble

SHORT_H, SHORT_CALM_S = 0.1, 420.0  # two or three rounds
RENEWING: dict[str, Any] = {"release_s": 200.0, "kinds": ("good", "dies"), "certificate_s": 300.0}
EVERY = 300  # which steps of the disk are tried every day
STATES = ("least", "most", "mixed")
KINDS = ("outage", "restart", "full disk", "clock jump", "power cut")
RENEWALS = ("upgrade", "rollback", "renewal")


def short(folder: Path, seed: int = 0, **more: Any) -> Life:
    return Life(folder, seed, every_s=60.0, **more).run(SHORT_H, SHORT_CALM_S)


def check_growth(life: Life) -> None:
    """Nothing is larger in the last quarter of the life than it ever was in the first."""
    quarter = max(1, len(life.measured) // 4)
    for name in life.measured[0][1] if life.measured else ():
        first = max(sizes[name] for _, sizes in life.measured[:quarter])
        last = min(sizes[name] for _, sizes in life.measured[-quarter:])
        life.require(last <= 1.5 * first + 4, f"{name} grows from {first} to {last}")


def test_hours_of_trouble_lose_nothing_double_nothing_and_leak_nothing(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    kept = 0
    only = os.environ.get("COVEY_SEED")
    for seed in range(2) if only is None else [int(only)]:
        trouble = Trouble(600.0, 1800.0, 400.0, 1200.0, 900.0)
        more: dict[str, Any] = {"release_s": 500.0, "kinds": ("good", "dies"), "certificate_s": 1200.0}
        life = Life(tmp_path / str(seed), seed, trouble, **(more if seed % 2 else {})).run(1.0, 700.0)
        seen += life.seen
        kept += sum(bool(one.kept) for one in life.coordinator.rounds.values())
    if only is None:  # the lives are as hard as they are meant to be
        assert kept > 5
        assert [kind for kind in (*KINDS, *RENEWALS) if not any(what.startswith(kind) for what in seen)] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 112))
def test_a_day_of_trouble_loses_nothing_and_nothing_grows(tmp_path: Path, seed: int) -> None:
    lives_s = 6 * 3600.0 if seed % 3 else 0.0  # with TLS the clock is set after its jumps, without it never
    life = Life(tmp_path, seed, Trouble(), release_s=5400.0, certificate_s=lives_s).run(24.0)
    kept = sum(bool(one.kept) for one in life.coordinator.rounds.values())
    assert kept > 100
    assert min(sum(n for what, n in life.seen.items() if what.startswith(kind)) for kind in KINDS) > 3
    assert min(life.seen[what] for what in ("upgrade", "rollback")) > 0
    assert not lives_s or sum(count for what, count in life.seen.items() if what.startswith("renewal")) > 2
    check_growth(life)
    print(f"\nseed {seed}: {len(life.coordinator.rounds)} rounds, {kept} acknowledged, {dict(life.seen)}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quiet_day_delivers_every_update(tmp_path: Path) -> None:
    life = Life(tmp_path, 2).run(24.0)
    for one in life.coordinator.rounds.values():
        assert one.kept or one.excused
    check_growth(life)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quiet_day_ends_with_the_newest_good_release(tmp_path: Path) -> None:
    life = Life(tmp_path, 3, release_s=3600.0).run(24.0)
    assert min(life.seen[what] for what in ("upgrade", "rollback")) > 3
    check_growth(life)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many steps of the disk a short life has without any trouble."""
    return len(short(tmp_path_factory.mktemp("whole"), **RENEWING).steps)


@pytest.mark.parametrize("state", STATES)
def test_a_power_cut_at_some_steps_of_the_disk_loses_nothing(tmp_path: Path, state: str, whole: int) -> None:
    for step in range(1 + STATES.index(state) * EVERY // 3, whole, EVERY):
        life = short(tmp_path / str(step), cut_at=step, state=state, **RENEWING)
        assert life.seen["power cut at " + life.steps[step - 1].split(".")[0]] == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("seed", "state"), itertools.product((0, 1, 3), STATES))
def test_nor_does_one_at_any_step(tmp_path: Path, seed: int, state: str) -> None:
    steps = len(short(tmp_path / "whole", seed, **RENEWING).steps)
    for step in range(1, steps):
        short(tmp_path / str(step), seed, cut_at=step, state=state, **RENEWING)
    print(f"\nseed {seed}, {state}: {steps} steps")


def test_a_disk_that_is_full_from_some_step_on_costs_a_round_at_most(tmp_path: Path, whole: int) -> None:
    for step in range(30, whole, EVERY):
        short(tmp_path / str(step), full_at=step, **RENEWING)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1])
def test_nor_does_one_from_any_step_on(tmp_path: Path, seed: int) -> None:
    for step in range(1, len(short(tmp_path / "whole", seed, **RENEWING).steps)):
        short(tmp_path / str(step), seed, full_at=step, **RENEWING)


def test_nothing_of_the_data_is_told_after_opting_out(tmp_path: Path) -> None:
    for seed in range(2):
        life = Life(tmp_path / str(seed), seed, Trouble(600.0, 900.0, 300.0, 1200.0, 900.0), every_s=60.0)
        life.at(700.0 + 37.0 * seed, life.leave)
        life.run(0.5, 300.0)
        assert life.left
        assert any(one.kept for one in life.coordinator.rounds.values())
        assert [one for one in life.coordinator.excuses if "opted out" in one]


class RealTraining:
    """The production Trainer in this process, on real digits."""

    def __init__(self) -> None:
        self._trainer, self.trained = Trainer(), 0

    def __call__(self, life: Life, frame: Frame) -> Frame:
        answer = self._trainer.answer(frame)
        self.trained += isinstance(frame, Run)
        return answer


def test_real_training_lets_no_data_out(tmp_path: Path, digits_bundle: bytes, coordinator_key: Any) -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    examples = (x[:40] / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    device, training = tmp_path / "device", RealTraining()
    life = Life(tmp_path, 0, Trouble(600.0, 0.0, 300.0, 0.0, 0.0), work=training, bundle=digits_bundle)
    np.savez(device / "data.npz", x=examples, y=y[:40])
    life.disk.adopt()
    life.coordinator.keys[0] = life.coordinator.key = coordinator_key
    text = (device / "agent.toml").read_text().splitlines()
    keys = f'coordinator_key = "{coordinator_key.public.hex()}"'
    (device / "agent.toml").write_text("\n".join(keys if "coordinator_key" in line else line for line in text))
    life.disk.adopt()
    life.coordinator.rotate = lambda: None  # type: ignore[method-assign]
    dimension = read_bundle(digits_bundle).manifest.dimension
    life.parameters = lambda number: _small(dimension, number)  # type: ignore[method-assign]
    life.inspector.secrets += [one.tobytes()[start : start + 16] for one in examples for start in (64, 128)]
    life.inspector.secrets = [secret for secret in life.inspector.secrets if any(secret)]
    life.run(0.4, 400.0)
    assert training.trained > 2
    assert sum(bool(one.kept) for one in life.coordinator.rounds.values()) > 1


def _small(dimension: int, seed: int) -> bytes:
    return (0.05 * np.random.default_rng(seed).standard_normal(dimension)).astype("<f4").tobytes()


STORY = """
import sys
from pathlib import Path
from life.world import Life, Trouble
trouble = Trouble(600.0, 900.0, 300.0, 1200.0, 900.0)
life = Life(Path(sys.argv[1]), 1, trouble, release_s=700.0, certificate_s=1200.0).run(2.0)
print("\\n".join(life.steps), life.story(10**6).replace(sys.argv[1], ""))
"""


@pytest.mark.slow
def test_a_life_can_be_repeated(tmp_path: Path) -> None:
    """Whatever the order of sets and the real time."""
    told = []
    for seed in ("1", "2"):
        where = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)}
        command = [sys.executable, "-c", STORY, str(tmp_path / seed)]
        told.append(subprocess.run(command, env={**os.environ, **where}, check=True, capture_output=True).stdout)
    assert len(told[0]) > 10_000
    assert told[0] == told[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("what", BUGS)
def test_it_is_found_that(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[what](monkeypatch)
    with pytest.raises((Broken, AssertionError)):
        live(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_found_where_there_is_no_bug(tmp_path: Path) -> None:
    live(tmp_path)


def live(folder: Path) -> None:
    """Lives in which each planted bug shows: hard ones, quiet ones at whose end nothing has grown, and some that the
    power leaves while the launcher notes what it knows or an update is put into the outbox."""
    for seed in range(4):
        trouble = Trouble(600.0, 900.0, 300.0, 0.0, 900.0)
        Life(folder / str(seed), seed, trouble).run(3.0)  # too short and hard to tell growth from a beginning
        check_growth(Life(folder / f"quiet {seed}", seed).run(6.0))
        Life(folder / f"renewing {seed}", seed, trouble, release_s=900.0, certificate_s=2400.0).run(3.0)
        Life(folder / f"quiet, renewing {seed}", seed, release_s=1800.0, certificate_s=2400.0 * (seed % 2)).run(6.0)
    whole = short(folder / "whole", release_s=200.0, kinds=("good", "dies"))
    for step, state in itertools.product(range(1, len(whole.steps)), STATES):
        if any(name in whole.steps[step - 1] for name in ("boot.json", "outbox")):
            short(folder / f"{step} {state}", cut_at=step, state=state, release_s=200.0, kinds=("good", "dies"))


def test_the_disk_knows_what_a_power_cut_may_leave(tmp_path: Path) -> None:
    """Old or new, never a torn file, where the production code writes durably; torn or missing where it does not."""
    found: dict[str, set[bytes | None]] = {"file": set(), "scratch": set()}
    for seed in range(60):
        for name in found:
            folder = tmp_path / name / str(seed)
            folder.mkdir(parents=True)
            (folder / "file").write_bytes(b"old!")
            found[name].add(_left(folder, name, seed))
    assert found["file"] == {b"old!", b"new!"}
    assert {None, b"", b"new!"} < found["scratch"]


def _left(folder: Path, name: str, seed: int) -> bytes | None:
    """The file after a power cut at some step of writing it."""
    disk, random_ = PoweredDisk(folder), random.Random(seed)
    left = iter(range(random_.randrange(12)))

    def step(what: str) -> None:
        if next(left, None) is None:
            disk.cut()

    disk.on_step = step
    with disk.watched(), contextlib.suppress(PowerCut):
        if name == "file":
            files.write_atomic(folder / name, b"new!")
        else:
            files.Disk().write_scratch(folder / name, b"new!")
    disk.lose_power("mixed", random_)
    return (folder / name).read_bytes() if (folder / name).exists() else None
