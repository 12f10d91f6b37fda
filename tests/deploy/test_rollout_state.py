"""What a rollout decides: rules one by one, and fleets whose devices do anything."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_deploy.rollout.rings import Ring, failures_from, rings_from, seconds
from covey_deploy.rollout.state import (
    RESTARTS,
    Began,
    Event,
    Finished,
    Gates,
    Opened,
    Passed,
    Phase,
    Plan,
    Published,
    Resumed,
    Rounds,
    Saw,
    Stand,
    State,
    Stopped,
    Stopping,
    apply,
    begin,
    decide,
    stand,
)
from covey_protocol.errors import ConfigError, UsageError
from covey_protocol.releases import place_of

OLD, NEW = "0.1.0", "0.2.0"
NAMES = ("attic", "barn", "cellar", "den", "eaves", "foyer")
CANARY, ALL = Ring("canary", ("attic", "barn")), Ring("100%", ("attic", "barn"), 1.0)


class Told:
    """A rollout that is told what happens, at the times that are given."""

    def __init__(self, *rings: Ring, **gates: object) -> None:
        plan = Plan(
            fleet="home", version=NEW, serial=100, rings=rings or (CANARY, ALL), gates=Gates(**gates), roster=NAMES
        )
        self.events: list[Event] = [Began(0.0, plan)]
        self.state = begin(self.events[0])

    def add(self, event: Event) -> None:
        self.state = apply(self.state, event)
        self.events.append(event)

    def saw(
        self, at: float, *names: str, version: str = OLD, session: int = 1, online: bool = True, **more: object
    ) -> None:
        for name in names:
            self.add(Saw(at, name, online, session, version if online else "", **more))

    def due(self, at: float) -> Event | None:
        """What is decided until something outside must happen; publishing happens at once."""
        last = None
        while (event := decide(self.state, at)) is not None:
            self.add(event)
            last = event
            if isinstance(event, Opened):
                self.add(Published(at, event.ring))
            if isinstance(event, (Stopping, Finished)):
                break
        return last

    def stand(self, name: str, at: float) -> Stand:
        return stand(self.state, name, at)[0]


def opened(told: Told) -> list[int]:
    return [event.ring for event in told.events if isinstance(event, Opened)]


def test_a_ring_is_done_when_its_devices_have_been_healthy_for_the_soak_time() -> None:
    told = Told(soak_s=60)
    told.saw(0, *NAMES)
    told.due(0)
    told.saw(10, "attic", version=NEW, on_trial=True, session=2)
    told.saw(20, "attic", "barn", version=NEW, session=3)
    assert told.due(79) is None
    assert isinstance(told.due(80), Opened)
    assert opened(told) == [0, 1]
    told.saw(90, *NAMES[2:], version=NEW, session=2)
    assert told.due(149) is None
    assert isinstance(told.due(150), Finished)
    assert told.state.phase is Phase.FINISHED


def test_a_trial_is_not_healthy_however_long_it_lasts() -> None:
    told = Told(soak_s=60)
    told.saw(0, *NAMES)
    told.due(0)
    told.saw(1, "attic", "barn", version=NEW, on_trial=True, session=2)
    assert told.due(10_000) is None


def test_a_device_that_stays_away_holds_nobody_up_and_one_that_comes_later_counts() -> None:
    told = Told(soak_s=60)
    told.due(0)
    told.saw(1, "attic", version=NEW)
    assert told.stand("barn", 1) is Stand.AWAY
    told.saw(30, "barn")
    assert told.due(100) is None  # it is here now
    told.saw(40, "barn", online=False)
    assert told.due(100) is None  # it was here a moment ago


STOPS = {
    "names the release as bad": (
        {"bad": (NEW,), "trouble": "release 0.2.0 ended with code 1"},
        "attic: release 0.2.0 ended",
    ),
    "has new trouble": ({"trouble": "release 0.2.0 was not installed"}, "attic: release 0.2.0 was not installed"),
}


@pytest.mark.parametrize("what", STOPS)
def test_the_rollout_stops_when_a_device(what: str) -> None:
    said, why = STOPS[what]
    told = Told()
    told.saw(0, *NAMES)
    told.due(0)
    told.saw(5, "attic", **said)
    event = told.due(5)
    assert isinstance(event, Stopping)
    assert why in event.reason
    assert event.withdraw
    assert told.due(10_000) is None  # until that is published
    told.add(Stopped(6))
    assert told.due(20_000) is None


def test_trouble_of_before_is_no_sign_of_this_release() -> None:
    told = Told(soak_s=10)
    told.saw(0, "attic", "barn", trouble="release 0.1.9 ended with code 1", bad=("0.1.9",))
    told.due(0)
    told.saw(1, "attic", "barn", version=NEW, session=2)
    told.due(11)
    assert opened(told) == [0, 1]


def test_a_device_that_goes_back_by_itself_has_failed() -> None:
    told = Told()
    told.saw(0, "attic")
    told.due(0)
    told.saw(1, "attic", version=NEW, on_trial=True, session=2)
    told.saw(2, "attic", session=3)
    assert isinstance(event := told.due(3), Stopping)
    assert "attic: went back to 0.1.0" in event.reason


def test_a_device_that_vanishes_has_failed_after_a_while_and_not_before() -> None:
    told = Told(away_s=900)
    told.saw(0, "attic")
    told.due(0)
    told.saw(10, "attic", online=False)
    told.saw(500, "attic", online=False, session=2)  # the last will of another start: still away since 10
    assert told.due(909) is None
    assert isinstance(event := told.due(910), Stopping)
    assert "attic: went away" in event.reason


def test_an_agent_that_starts_again_and_again_has_failed_though_it_is_confirmed() -> None:
    told = Told(soak_s=100)
    told.saw(0, "attic")
    told.due(0)
    for start in range(RESTARTS + 1):
        assert told.due(1 + 30 * start) is None
        told.saw(1 + 30 * start, "attic", version=NEW, session=2 + start)
    assert isinstance(event := told.due(200), Stopping)
    assert "started 4 times" in event.reason


def test_a_start_now_and_then_only_begins_the_soak_time_again() -> None:
    told = Told(soak_s=100)
    told.saw(0, "attic")
    told.due(0)
    for start in range(2 * RESTARTS):
        told.saw(1000.0 * start, "attic", version=NEW, session=2 + start)
        assert told.stand("attic", 1000.0 * start) is Stand.HEALTHY
        assert told.state.devices["attic"].healthy_since == 1000.0 * start


def test_a_connection_that_breaks_does_not_begin_the_soak_time_again() -> None:
    told = Told(soak_s=100)
    told.saw(0, "attic", version=NEW)
    told.due(0)
    told.saw(50, "attic", online=False)
    told.saw(60, "attic", version=NEW)
    told.due(100)
    assert opened(told) == [0, 1]


def test_failures_that_are_borne_are_borne() -> None:
    for gates in ({"max_failures": 1}, {"max_failures_share": 0.5}):
        told = Told(soak_s=10, **gates)
        told.saw(0, "attic", "barn")
        told.due(0)
        told.saw(1, "attic", bad=(NEW,))
        assert told.due(1) is None
        told.saw(1, "barn", version=NEW)
        told.due(11)
        assert opened(told) == [0, 1]
        told.saw(12, "cellar", "den")
        told.saw(13, "cellar", "den", bad=(NEW,))
        assert isinstance(told.due(14), Stopping)


def test_who_is_here_and_does_not_take_it_is_left_behind_when_patience_is_over() -> None:
    told = Told(soak_s=10, patience_s=1000, min_healthy=0.5)
    told.saw(0, "attic", "barn")
    told.due(0)
    told.saw(1, "attic", version=NEW)
    assert told.due(999) is None
    told.due(1000)
    assert next(event for event in told.events if isinstance(event, Passed)) == Passed(1000, 0, ("barn",))
    assert opened(told) == [0, 1]


def test_where_too_few_have_taken_it_by_then_it_stops() -> None:
    told = Told(soak_s=10, patience_s=1000, min_healthy=0.6)
    told.saw(0, "attic", "barn")
    told.due(0)
    told.saw(1, "attic", version=NEW)
    assert isinstance(event := told.due(1000), Stopping)
    assert "1 of 2 devices" in event.reason
    nobody = Told(patience_s=1000)
    nobody.due(0)
    assert isinstance(nobody.due(1000), Stopping)


def test_a_later_ring_whose_new_devices_are_all_away_waits_for_them_until_patience_is_over() -> None:
    told = Told(soak_s=10, patience_s=1000)
    told.saw(0, "attic", "barn", version=NEW)
    told.due(0)
    told.due(10)
    assert opened(told) == [0, 1]
    assert told.due(1009) is None
    assert isinstance(told.due(1010), Finished)
    assert told.state.left == NAMES[2:]


def test_a_ring_that_adds_nobody_is_skipped_and_never_published_unless_it_is_the_last() -> None:
    tenth = Ring("1%", CANARY.devices, 0.0001)
    told = Told(CANARY, tenth, ALL, soak_s=10)
    told.saw(0, "attic", "barn", version=NEW)
    told.due(0)
    told.due(10)
    assert opened(told) == [0, 2]
    assert Passed(10, 1, skipped=True) in told.events


def test_rounds_that_are_abandoned_stop_it_also_when_the_coordinator_began_to_count_again() -> None:
    told = Told(max_abandoned=2)
    told.saw(0, "attic")
    told.add(Rounds(0, 40))  # of before
    told.due(0)
    told.add(Rounds(1, 41))
    told.add(Rounds(2, 1))
    assert told.due(3) is None
    told.add(Rounds(4, 2))
    assert isinstance(event := told.due(5), Stopping)
    assert "3 rounds were abandoned" in event.reason


def test_what_had_stopped_goes_on_at_its_ring_under_other_gates() -> None:
    told = Told(soak_s=10)
    told.saw(0, "attic", "barn", version=NEW)
    told.due(0)
    told.due(10)
    told.saw(11, "cellar", bad=(NEW,))
    told.due(11)
    told.add(Stopped(12))
    told.add(Resumed(20, 500, Gates(soak_s=10, max_failures=1)))
    told.due(20)
    assert opened(told) == [0, 1, 1]
    assert (told.state.plan.serial, told.state.reason) == (500, "")
    assert decide(told.state, 21) is None


def test_what_cannot_come_now_is_a_bug() -> None:
    told = Told()
    for event in (Published(0, 0), Opened(0, 1), Passed(0, 0), Stopped(0), Finished(0), Resumed(0, 1, Gates())):
        with pytest.raises(UsageError, match="cannot take"):
            apply(told.state, event)
    with pytest.raises(UsageError, match="does not begin"):
        begin(Stopped(0))


# --- fleets whose devices do anything

KINDS = ("good", "bad", "absent", "late", "vanishes", "deaf", "restless", "nightly", "relapses")


class Simulated:
    """One device in virtual time: what it says of itself, and what is true of it."""

    def __init__(self, name: str, kind: str, rng: random.Random) -> None:
        self.name, self.kind, self.rng = name, kind, rng
        self.version, self.session, self.online, self.bad, self.trial = (
            OLD,
            1,
            kind not in ("absent", "late"),
            False,
            False,
        )
        self.due: list[tuple[float, str]] = []
        self.healthy_since: float | None = None
        if kind == "late":
            self.due.append((rng.uniform(0, 400), "arrive"))
        self.took = False

    def offered(self, at: float) -> None:
        if self.took or not self.online or self.kind == "deaf":
            return
        self.took = True
        self.due.append((at + self.rng.uniform(1, 60), "try"))

    def step(self, at: float) -> bool:
        """Whether it has something to say."""
        ready = [one for one in self.due if one[0] <= at]
        self.due = [one for one in self.due if one[0] > at]
        for _, what in ready:
            getattr(self, what)(at)
        return bool(ready)

    def arrive(self, at: float) -> None:
        self.online = True

    def again(self, at: float) -> None:
        self.session += 1
        self.healthy_since = at
        self.due.append((at + 20, "again"))

    def leave(self, at: float) -> None:
        self.online = False
        if self.kind == "nightly":
            self.due.append((at + self.rng.uniform(1, 80), "arrive"))

    def back(self, at: float) -> None:
        self.version, self.trial, self.bad, self.healthy_since = OLD, False, True, None
        self.session += 1

    def try_(self, at: float) -> None:
        self.version, self.trial = NEW, True
        self.session += 1
        end = at + self.rng.uniform(1, 60)
        self.due.append((end, "back" if self.kind == "bad" else "confirm"))

    def confirm(self, at: float) -> None:
        self.trial, self.healthy_since = False, at
        self.session += 1
        more = {"vanishes": "leave", "nightly": "leave", "restless": "again", "relapses": "back"}.get(self.kind)
        if more:
            self.due.append((at + self.rng.uniform(1, 150), more))

    def says(self, at: float) -> Saw:
        if not self.online:
            return Saw(at, self.name, False, self.session)
        bad = (NEW,) if self.bad else ()
        return Saw(at, self.name, True, self.session, self.version, self.trial, bad, "it failed" if self.bad else "")


setattr(Simulated, "try", Simulated.try_)  # what happens is named by words, and this one is Python's

GATES = st.builds(
    Gates,
    soak_s=st.sampled_from([30.0, 120.0]),
    max_failures=st.integers(0, 2),
    min_healthy=st.sampled_from([0.5, 1.0]),
    patience_s=st.sampled_from([300.0, 900.0]),
    away_s=st.sampled_from([90.0, 200.0]),
)
RINGS = st.sampled_from(
    [(CANARY, ALL), (ALL,), (CANARY, Ring("30%", CANARY.devices, 0.3), ALL), (Ring("50%", (), 0.5),)]
)


def lived(
    kinds: list[str], rings: tuple[Ring, ...], gates: Gates, seed: int
) -> Iterator[tuple[Told, list[Simulated], float]]:
    """The rollout every few seconds until it ends."""
    rng = random.Random(seed)
    devices = [Simulated(name, kind, rng) for name, kind in zip(NAMES, kinds)]
    told = Told(*rings, **msgspec.structs.asdict(gates))
    for device in devices:
        told.add(device.says(0))
    for at in map(float, range(0, 6000, 5)):
        open_rings = opened(told)
        for device in devices:
            stopped = told.state.phase in (Phase.STOPPING, Phase.STOPPED)
            if open_rings and not stopped and rings[open_rings[-1]].has(NEW, device.name):
                device.offered(at)
            if device.step(at):
                told.add(device.says(at))
        told.due(at)
        yield told, devices, at
        if told.state.phase is Phase.STOPPING:
            told.add(Stopped(at))
        if told.state.phase in (Phase.STOPPED, Phase.FINISHED):
            return
    raise AssertionError("it never ends")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(KINDS), min_size=6, max_size=6), RINGS, GATES, st.integers(0, 2**32))
def test_whatever_devices_do_a_rollout_ends_and_keeps_its_rules(
    kinds: list[str], rings: tuple[Ring, ...], gates: Gates, seed: int
) -> None:
    passed: set[int] = set()
    for told, devices, at in lived(kinds, rings, gates, seed):
        members = {one.name: one for one in devices if one.name in told.state.members}
        broken = [one for one in members.values() if one.bad and one.online]
        new = [event for event in told.events if isinstance(event, Passed) and event.ring not in passed]
        for event in new:
            passed.add(event.ring)
            if event.skipped:
                continue
            ring = [one for one in devices if rings[event.ring].has(NEW, one.name)]
            well = [one for one in ring if one.online and one.healthy_since is not None]
            proven = [one for one in well if one.healthy_since <= at - gates.soak_s]
            assert proven  # somebody vouches for it
            failed = [one for one in ring if one.bad and one.online]
            assert len(failed) <= gates.max_failures
            assert {one.name for one in ring} - {one.name for one in proven} == set(event.left)
        if len(broken) > gates.max_failures:
            assert told.state.phase in (Phase.STOPPING, Phase.STOPPED)
        rings_opened = opened(told)
        assert rings_opened == sorted(set(rings_opened))  # one after the other, none twice
        assert all(ring - 1 in passed for ring in rings_opened if ring)
    assert replayed(told.events) == told.state  # what is durable is all that is needed
    if told.state.phase is Phase.FINISHED:
        assert passed == set(range(len(rings)))
    else:
        assert told.state.reason


def replayed(events: list[Event]) -> State:
    lines = [msgspec.json.encode(event) for event in events]
    first, *others = [msgspec.json.decode(line, type=Event) for line in lines]
    state = begin(first)
    for event in others:
        state = apply(state, event)
    return state


# --- what people write


def test_rings_grow_from_the_first_to_the_last() -> None:
    rings = rings_from(["canary=attic, barn", "10%", "100%"], NAMES)
    assert rings == (CANARY, Ring("10%", CANARY.devices, 0.1), Ring("100%", CANARY.devices, 1.0))
    first = min(NAMES, key=lambda name: place_of(NEW, name))
    assert Ring("x", (), place_of(NEW, first) + 1e-9).has(NEW, first)
    assert not rings[0].has(NEW, "cellar")


REFUSED = {
    "a stranger": (["canary=garage"], "garage is not in the roster"),
    "a share that shrinks": (["50%", "10%"], "not above the 50%"),
    "more than all": (["101%"], "not above the 0%"),
    "no ring": ([], "0 rings"),
    "the same twice": (["a=attic", "a=barn"], "two rings are called a"),
    "a word": (["everybody"], "names no devices"),
    "a ring without devices": (["canary="], "names no devices"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_rings_that_are_refused(what: str) -> None:
    texts, words = REFUSED[what]
    with pytest.raises(ConfigError, match=words):
        rings_from(texts, NAMES)


def test_durations_and_failures() -> None:
    assert [seconds(text) for text in ("90", "90s", "30m", "1.5h", "2d")] == [90, 90, 1800, 5400, 172800]
    assert [failures_from(text) for text in ("0", "3", "5%")] == [(0, 0.0), (3, 0.0), (0, 0.05)]
    for wrong in ("soon", "-1s", ""):
        with pytest.raises(ConfigError, match="no duration"):
            seconds(wrong)
    for wrong in ("few", "-1", "101%"):
        with pytest.raises(ConfigError, match="number of failures"):
            failures_from(wrong)
