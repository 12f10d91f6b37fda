"""`covey grid`. Cheap to import: nothing heavy is loaded for its help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from covey_coordinator.libraries import prepare

A_FILE = click.Path(path_type=Path)


@click.command(name="grid", short_help="Run rules against attacks and draw the heat map.")
@click.option("--config", "config_path", type=A_FILE, help="TOML file with the same settings; options win over it.")
@click.option("--data", help="digits, breast-cancer, wine, or your own .npz, .csv or image folder.  [default: digits]")
@click.option("--model", help="mlp or softmax.  [default: mlp]")
@click.option("--rule", "rules", multiple=True, help="NAME[:KEY=VALUE,...] or STEP+NAME; repeat.  [default: all]")
@click.option("--attack", "attacks", multiple=True, help="NAME[:KEY=VALUE,...]; repeat.  [default: all]")
@click.option("--fraction", "fractions", multiple=True, type=float, help="Of corrupted devices; repeat.")
@click.option("--seeds", type=int, help="How many repetitions.  [default: 3]")
@click.option("--devices", type=int, help="[default: 20]")
@click.option("--rounds", type=int, help="[default: 30]")
@click.option("--steps", type=int, help="Local SGD steps per round.  [default: 10]")
@click.option("--batch", type=int, help="[default: 16]")
@click.option("--learning-rate", type=float, help="Of the devices.  [default: 0.1]")
@click.option("--momentum", type=float, help="Of the devices, over rounds.  [default: 0]")
@click.option("--alpha", type=float, help="Dirichlet concentration; smaller is less alike.  [default: 1]")
@click.option("--trusted", type=int, help="Examples of the coordinator's own, for rules that need them.  [default: 0]")
@click.option("--quick", is_flag=True, help="A small grid: one seed, 10 rounds, three fractions, nine attacks.")
@click.option("--jobs", type=int, default=0, help="Worker processes.  [default: as many as cores]")
@click.option("--output", type=A_FILE, default=Path("runs/grid"), show_default=True, help="Folder of the results.")
def grid_command(config_path: Path | None, quick: bool, jobs: int, output: Path, **options: Any) -> None:
    """Train a small fleet under every attack behind every rule, for several shares of corrupted devices.

    Writes results.csv, results.json and heatmap.png. Every finished run is saved at once: the same command goes on
    where it was interrupted. docs/attacks.md says how to read the picture.
    """
    from covey_coordinator.machine import check_machine

    check_machine()
    prepare()
    from covey_coordinator.grid.display import Display
    from covey_coordinator.grid.program import run_grid
    from covey_edge.processes import interrupted_by_signals

    settings = settings_from(config_path, options, quick)
    check = interrupted_by_signals()
    run_grid(settings, output, usable_jobs(jobs), Display(), check)


def settings_from(config_path: Path | None, options: dict[str, Any], quick: bool) -> Any:
    """Defaults, then --quick, then the file, then options."""
    import msgspec

    from covey_coordinator.grid.settings import QUICK, GridSettings, parse_spec, written_names
    from covey_edge.config import read_toml
    from covey_protocol.errors import ConfigError

    table: dict[str, Any] = dict(QUICK) if quick else {}
    if config_path is not None:
        written = read_toml(config_path, GridSettings)  # says what is wrong, by name
        table.update({name: getattr(written, name) for name in written_names(config_path)})
    for kind in ("rule", "attack"):
        options[f"{kind}s"] = tuple(parse_spec(kind, text) for text in options[f"{kind}s"])
    table.update({name: value for name, value in options.items() if value not in (None, ())})
    try:
        return msgspec.convert(table, GridSettings)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{exc}", "correct that option") from exc


def usable_jobs(jobs: int) -> int:
    from covey_protocol.errors import ConfigError

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs < 0 or jobs > cores:
        raise ConfigError(f"--jobs {jobs} on a machine with {cores} cores", f"give 1 to {cores}")
    return jobs or cores
