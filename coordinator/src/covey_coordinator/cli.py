"""`covey demo` and `covey serve`. Cheap to import: TensorFlow is loaded when a command runs, not for its help."""

from __future__ import annotations

from pathlib import Path

import click

from covey_coordinator.libraries import prepare

MAX_SEED = 2**31  # times a million and the round's number, a shuffle_seed stays within the protocol's 2^53
A_FILE = click.Path(path_type=Path)


@click.command(name="demo", short_help="Train ten devices, three of them corrupted, and report.")
@click.option(
    "--data",
    default="digits",
    show_default=True,
    help="digits, breast-cancer, wine, or your own .npz, .csv or image folder.",
)
@click.option("--broker", help="mqtt://HOST:PORT or mqtts://HOST:PORT instead of the embedded broker.")
@click.option("--ca-file", type=A_FILE, help="Authority of the broker's certificate (mqtts).")
@click.option("--cert-file", type=A_FILE, help="Client certificate (mqtts).")
@click.option("--key-file", type=A_FILE, help="Key of the client certificate (mqtts).")
@click.option("--fleet", default="demo", show_default=True, help="Fleet name in the topics.")
@click.option("--engine", type=click.Choice(["tff", "direct"]), default="tff", show_default=True)
@click.option("--rule", default="multi-krum", show_default=True, help="Robust rule to compare with the plain mean.")
@click.option("--rounds", default=20, show_default=True, type=int)
@click.option("--devices", default=10, show_default=True, type=int)
@click.option("--corrupted", default=3, show_default=True, type=int, help="How many devices are corrupted.")
@click.option(
    "--alpha",
    default=1.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Dirichlet concentration of the shards; smaller is less alike.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, MAX_SEED))
@click.option("--name", default="", help="Name of the run's folder [default: data and time].")
@click.option("--runs-dir", type=A_FILE, default=Path("runs"), show_default=True)
def demo_command(broker: str | None, data: str, **options: object) -> None:
    """Train a model across real agent processes, with and without corrupted devices, and write a report.

    Three runs of one fleet: the clean reference, the plain mean with corrupted devices, the robust rule with the same
    corrupted devices; then a first inversion check on one real update.
    """
    from covey_coordinator.machine import check_machine

    check_machine()
    prepare()
    from covey_coordinator.demo.display import Display
    from covey_coordinator.demo.program import run_demo
    from covey_coordinator.demo.settings import DemoSettings

    run_demo(DemoSettings(data=data, broker=broker, **options), Display())  # type: ignore[arg-type]


@click.command(name="serve", short_help="Coordinate a fleet as a TOML file says.")
@click.option("--config", "config_path", type=A_FILE, default=Path("coordinator.toml"), show_default=True)
@click.option(
    "--log-format",
    type=click.Choice(["plain", "json"]),
    default="plain",
    show_default=True,
    help="Of the logs on standard error; json logs every event as an object on a line.",
)
@click.option("--plain", is_flag=True, help="Plain lines also on a terminal, instead of a live status.")
def serve_command(config_path: Path, log_format: str, plain: bool) -> None:
    """Run the coordinator of a real fleet until its rounds are done. Started again, it goes on where it was."""
    from covey_coordinator.machine import check_machine

    check_machine()
    prepare()
    from rich.console import Console

    from covey_coordinator.serve import serve
    from covey_coordinator.watching.logs import set_up
    from covey_edge.processes import interrupted_by_signals

    set_up(log_format)
    console = Console()
    terminal = console if console.is_terminal and not plain else None
    check = interrupted_by_signals(at_once=False)  # a signal cuts off nothing that writes or tidies
    serve(config_path, click.echo, check, terminal=terminal, log_events=log_format == "json")
