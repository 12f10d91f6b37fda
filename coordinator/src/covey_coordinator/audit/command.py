"""`covey audit`. Cheap to import: nothing heavy is loaded for its help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from covey_coordinator.libraries import prepare

A_PATH = click.Path(path_type=Path)
MAX_SEED = 2**31


@click.command(name="audit", short_help="Attack a model's updates on your own data, and judge a plan.")
@click.argument("bundle", metavar="MODEL.covey", type=A_PATH)
@click.option("--data", help="Data set by name, .npz, .csv or folder of images.  [default: [data] of the plan]")
@click.option("--plan", type=A_PATH, help="TOML file: training, privacy, fleet.  [default: a plain round]")
@click.option("--policy", type=A_PATH, help="TOML file: what may leak.  [default: docs/audit.md]")
@click.option("--quick", "level", flag_value="quick", default=True, help="Small attacks, about 3 minutes.  [default]")
@click.option("--full", "level", flag_value="full", help="As many iterations as the papers, about an hour.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="The time it may take.")
@click.option("--holdout", type=click.FloatRange(0, 1, True, True), help="Share of the data that no device gets.")
@click.option("--data-dir", type=A_PATH, help="Folder of downloaded data sets.  [default: $COVEY_DATA]")
@click.option("--out", type=A_PATH, help="Folder; one that an audit was interrupted in goes on.  [default: a new one]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, MAX_SEED))
def audit_command(bundle: Path, plan: Path | None, policy: Path | None, level: str, seed: int, **told: Any) -> None:
    """What can be found out about people from the updates of MODEL.covey, trained on DATA as the plan says?

    Makes updates with the agent's own trainer, plays the curious and the malicious coordinator, and writes report.html,
    results.json and verdict.json. Exit code 0: within the policy; 9: not, or not shown to be.
    """
    from covey_coordinator.machine import check_machine

    check_machine()
    prepare()
    from covey_coordinator.audit.policy import read_policy
    from covey_coordinator.audit.program import Request, audit
    from covey_coordinator.audit.settings import read_plan
    from covey_coordinator.audit.suite import FULL, QUICK
    from covey_coordinator.grid.display import Display
    from covey_coordinator.simulation.folder import new_path
    from covey_edge.processes import interrupted_by_signals
    from covey_protocol.errors import LeakError

    chosen = FULL if level == "full" else QUICK
    request = Request(
        bundle,
        read_plan(plan, told["data"], told["holdout"]),
        read_policy(policy),
        chosen,
        told["minutes"] or chosen.minutes,
        told["out"] or new_path(Path("runs"), f"audit-{bundle.stem}"),
        seed,
        told["data_dir"],
    )
    outcome = audit(request, Display(), interrupted_by_signals())
    failed = [one for one in outcome.judged if not one.kept]
    if failed:
        raise LeakError(
            f"{len(failed)} of {len(outcome.judged)} limits are not kept: {failed[0].said}",
            f"see {request.out / 'report.html'}",
        )
