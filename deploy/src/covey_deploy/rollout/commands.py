"""What the commands of `covey fleet` do: beginning, going on with, stopping and taking back a rollout."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import click
import msgspec

from covey_deploy.rollout.descriptions import sealed_rings
from covey_deploy.rollout.journal import STOP, Journal, alone, journals
from covey_deploy.rollout.metrics import abandoned_rounds
from covey_deploy.rollout.program import Desk, Rollout, look
from covey_deploy.rollout.reversion import version_above, with_version
from covey_deploy.rollout.rings import rings_from
from covey_deploy.rollout.state import ENDED, Gates, Phase, Plan, Resumed, State
from covey_deploy.rollout.words import Progress, picture, report_facts, report_text
from covey_edge.config import read_file
from covey_edge.files import write_atomic
from covey_edge.held import Busy
from covey_edge.releasing import described
from covey_edge.updates import read_bounded
from covey_edge.wheels import AGENT, look_at
from covey_protocol.errors import ConfigError, RunError
from covey_protocol.releases import MAGIC, Release, is_newer, read_release_file, release_file, seal_release
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.versions import plain_name

LEFT_OPEN = "the open ring stays open; `covey fleet rollout --resume` goes on, `--stop` stops"


def maker_key(path: Path, pinned: PublicKey) -> SealingKey:
    """The private key that seals releases. ConfigError where it is not the one that devices pin."""
    key = SealingKey.from_pem(read_file(path), str(path))
    if key.public != pinned:
        raise ConfigError(f"{path} is not the release key that this fleet pins", "give the right one with --key")
    return key


def planned(desk: Desk, data: bytes, rings: Sequence[str], gates: Gates) -> tuple[Plan, Release]:
    """What a rollout of this release file would be. Looks at the broker, for the newest serial there is."""
    _, release, _ = read_release_file(data, desk.key)
    if gates.metrics:
        abandoned_rounds(gates.metrics)  # a wrong address is known now
    _, there = look(desk)
    if there is not None and is_newer(there.version, release.version):
        raise ConfigError(
            f"release {there.version} is on the broker, {release.version} is older: no device would go back to it",
            "`covey fleet rollback --to` gives old code a higher version",
        )
    least = max(release.serial, there.serial if there is not None else 0) + 1
    plan = Plan(
        fleet=desk.fleet,
        version=release.version,
        serial=max(int(time.time() * 1000), least),
        rings=rings_from(rings, desk.standing),
        gates=gates,
        roster=desk.standing,
    )
    return plan, release


def plan_text(desk: Desk, plan: Plan) -> str:
    """For a dry run: who is in which ring, and who of them is here."""
    watch, _ = look(desk)
    here = {name for name, presence in watch.newest.items() if presence.online}
    lines = [f"release {plan.version} for {plan.fleet}, {len(plan.roster)} devices; nothing is published"]
    for place, ring in enumerate(plan.rings):
        new = [name for name in plan.members(place) if name not in plan.members(place - 1)]
        names = ", ".join(name if name in here else f"{name} (away)" for name in new[:20])
        more = f" and {len(new) - 20} more" if len(new) > 20 else ""
        lines.append(f"ring {place + 1}, {ring.name}: {len(new)} more{': ' if new else ''}{names}{more}")
    return "\n".join(lines)


def roll_out(desk: Desk, data: bytes, rings: Sequence[str], gates: Gates, key: SealingKey) -> State:
    """Begin a rollout and see it to its end."""
    with alone(desk.rollouts):
        _check_none_is_open(desk.rollouts)
        plan, release = planned(desk, data, rings, gates)
        (desk.rollouts / STOP).unlink(missing_ok=True)
        journal = Journal.new(desk.rollouts, plan, data, sealed_rings(release, plan, key), time.time())
        return _run(desk, journal)


def resume(desk: Desk, changes: Mapping[str, Any], key_path: Optional[Path]) -> State:
    """Go on with the newest rollout. changes: of the gates, of one that had stopped; that one also needs the key."""
    with alone(desk.rollouts):
        journal = _newest(desk.rollouts)
        plan, phase = journal.state.plan, journal.state.phase
        if phase is Phase.FINISHED:  # a kill may have come between that and its report
            keep_report(journal)
            return journal.state
        if phase is not Phase.STOPPED and changes:
            raise ConfigError(f"the rollout of {plan.version} is under way", "stop it before you change its gates")
        (desk.rollouts / STOP).unlink(missing_ok=True)
        if phase is Phase.STOPPED:
            _reopen(desk, journal, msgspec.structs.replace(plan.gates, **changes), key_path)
        return _run(desk, journal)


def _reopen(desk: Desk, journal: Journal, gates: Gates, key_path: Optional[Path]) -> None:
    if key_path is None:
        raise ConfigError("a stopped rollout is sealed anew, which needs the release key", "give it with --key")
    key, plan = maker_key(key_path, desk.key), journal.state.plan
    _, release, _ = read_release_file(journal.release(), desk.key)
    _, there = look(desk)
    if there is not None and is_newer(there.version, plan.version):
        raise ConfigError(f"release {there.version} is on the broker", f"{plan.version} is older: begin a new rollout")
    serial = max(int(time.time() * 1000), plan.serial + len(plan.rings) + 1, there.serial + 1 if there else 0)
    again = msgspec.structs.replace(plan, serial=serial, gates=gates)
    journal.keep_sealed(serial, sealed_rings(release, again, key))
    journal.add(Resumed(max(time.time(), journal.state.at), serial, gates))


def stop(desk: Desk) -> None:
    """Stop the newest rollout; where another command works on it, ask that one to."""
    journal = _newest(desk.rollouts, mend=False)
    if journal.state.phase in ENDED:
        raise ConfigError(f"the rollout of {journal.state.plan.version} has ended already", "nothing is to be stopped")
    write_atomic(desk.rollouts / STOP, b"", mode=0o600)
    try:
        with alone(desk.rollouts):
            _run(desk, _newest(desk.rollouts))
    except Busy:
        click.echo("the command that works on it was asked to stop it")


def taken_back(desk: Desk, file: Optional[Path], key: SealingKey) -> bytes:
    """A release file: the code of `file`, or of the newest other rollout that was finished, under a version above the
    one that the fleet has now."""
    folders = journals(desk.rollouts)
    _check_none_is_open(desk.rollouts)
    now = _version_now(desk, folders)
    wheels = _wheels_of(file, desk.key) if file is not None else _finished_before(folders, now, desk.key)
    code = _version_of(wheels)
    made = with_version(wheels, version_above(now, code))
    release = described(
        made,
        serial=int(time.time() * 1000),
        share=0.0,
        minimum_version="",
        notes=f"takes {now} back: the code of {code}",
    )
    return release_file(seal_release(release, key), list(made.values()))


def _version_now(desk: Desk, folders: Sequence[Path]) -> str:
    """The newest that this fleet was given, by a rollout or by another hand."""
    _, there = look(desk)
    found = [Journal.open(folder, mend=False).state.plan.version for folder in folders[-1:]]
    found += [there.version] if there is not None else []
    if not found:
        raise ConfigError("no release was given to this fleet", "there is nothing to take back")
    return found[-1] if len(found) == 1 or is_newer(found[-1], found[0]) else found[0]


def _finished_before(folders: Sequence[Path], version: str, key: PublicKey) -> dict[str, bytes]:
    """The wheels of the newest release that was finished and was not taken back itself."""
    found = [Journal.open(folder, mend=False) for folder in folders]
    given = {journal.state.plan.version for journal in found}
    for journal in reversed(found):
        one = journal.state.plan.version
        taken_back = version_above(one, "0") in given
        if journal.state.phase is Phase.FINISHED and one != version and not taken_back:
            return _wheels_in(journal.release(), key)
    raise ConfigError(
        f"no rollout was finished before {version}",
        "give what to go back to with --to: a release, or covey-edge's wheel",
    )


def _version_of(wheels: Mapping[str, bytes]) -> str:
    for name, data in wheels.items():
        facts = look_at(name, data)
        if plain_name(facts.name) == AGENT:
            return facts.version
    raise ConfigError("none of the wheels is covey-edge's", "give a release, or covey-edge's wheel")


def _wheels_of(file: Path, key: PublicKey) -> dict[str, bytes]:
    data = read_bounded(file)
    return _wheels_in(data, key) if data.startswith(MAGIC) else {file.name: data}


def _wheels_in(data: bytes, key: PublicKey) -> dict[str, bytes]:
    _, release, wheels = read_release_file(data, key)
    return {wheel.name: content for wheel, content in zip(release.wheels, wheels)}


def _newest(rollouts: Path, *, mend: bool = True) -> Journal:
    folders = journals(rollouts)
    if not folders:
        raise ConfigError(f"no rollout has begun in {rollouts}", "begin one: covey fleet rollout RELEASE RING...")
    return Journal.open(folders[-1], mend=mend)


def _check_none_is_open(rollouts: Path) -> None:
    for folder in journals(rollouts)[-1:]:
        state = Journal.open(folder, mend=False).state  # another command may be writing a line to it
        if state.phase not in ENDED:
            raise ConfigError(
                f"the rollout of {state.plan.version} is not over", "`--resume` goes on, `--stop` stops it"
            )


def _run(desk: Desk, journal: Journal) -> State:
    progress = Progress()
    try:
        Rollout(desk, journal, progress).run()
    except KeyboardInterrupt:
        progress.say(LEFT_OPEN)
        raise
    finally:
        progress.end()
        keep_report(journal)
    return journal.state


def newest_as_told(desk: Desk) -> tuple[Journal, float]:
    """The newest rollout, and the time for which it is to be told: of one that has ended, its end."""
    journal = _newest(desk.rollouts, mend=False)
    return journal, _told_at(journal.state)


def _told_at(state: State) -> float:
    return state.at if state.phase in ENDED else max(state.at, time.time())


def keep_report(journal: Journal) -> None:
    """report.txt, report.json and report.svg beside the journal."""
    state, now = journal.state, _told_at(journal.state)
    write_atomic(journal.folder / "report.txt", (report_text(state, now) + "\n").encode(), mode=0o600)
    facts = msgspec.json.format(msgspec.json.encode(report_facts(state, now)), indent=1)
    write_atomic(journal.folder / "report.json", facts + b"\n", mode=0o600)
    write_atomic(journal.folder / "report.svg", picture(journal.events, now).encode(), mode=0o600)


def ended(desk: Desk, state: State) -> None:
    """Tell how it went. RunError where it stopped."""
    click.echo(report_text(state, _told_at(state)))
    if state.phase is Phase.STOPPED:
        raise RunError(
            f"the rollout of {state.plan.version} stopped: {state.reason}",
            f"see report.txt in {journals(desk.rollouts)[-1]}; `covey fleet rollback` takes back what is installed",
        )
