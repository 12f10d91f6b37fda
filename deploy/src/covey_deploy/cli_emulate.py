"""`covey emulate`: a card image as a machine, with its console on this terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import click


@click.command(name="emulate", short_help="Boot a card image in an emulated arm64 machine.")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--memory", "memory_mb", default=1024, show_default=True, type=click.IntRange(256), help="MiB.")
@click.option("--cpus", default=2, show_default=True, type=click.IntRange(1, 8))
@click.option("--snapshot", is_flag=True, help="Leave the image as it is; forget what the machine writes.")
@click.option("--serial", type=click.Path(path_type=Path), help="The file that keeps the console (default: IMAGE.log).")
@click.option("--clock", default="", help="What the machine's clock shows at power-on, such as 2024-01-01T00:00:00.")
@click.option("--journal", is_flag=True, help="Show the whole journal on the console.")
@click.option("--quiet", is_flag=True, help="Do not show the console here.")
def emulate_command(
    image: Path,
    memory_mb: int,
    cpus: int,
    snapshot: bool,
    serial: Optional[Path],
    clock: str,
    journal: bool,
    quiet: bool,
) -> None:
    """Boot IMAGE, a card of `covey flash --debian`, and show its console until the machine is off.

    The machine reaches this one as 10.0.2.2; nobody reaches the machine. Ctrl-C presses its power button and waits two
    minutes for its shutdown; a second one cuts the power.
    """
    from covey_deploy.emulator import HOST_FROM_INSIDE, JOURNAL_ON_CONSOLE, Hardware, Machine
    from covey_edge.processes import interrupted_by_signals
    from covey_protocol.errors import EXIT_INTERRUPTED

    show: Callable[[str], None] = (lambda text: None) if quiet else (lambda text: click.echo(text, nl=False))
    check = interrupted_by_signals(at_once=False)
    hardware = Hardware(memory_mb, cpus, snapshot, clock, JOURNAL_ON_CONSOLE if journal else ())
    with Machine(image, serial or image.with_name(f"{image.name}.log"), hardware) as machine:
        machine.start()
        click.echo(f"booting {image}; this machine is {HOST_FROM_INSIDE} from inside; Ctrl-C shuts down", err=True)
        try:
            machine.follow(show, check)
            return
        except KeyboardInterrupt:
            check = interrupted_by_signals()  # from here on the next one strikes at once
        click.echo("\nshutting down; Ctrl-C again cuts the power", err=True)
        machine.press_power_button()
        if not machine.follow(show, check, SHUTDOWN_S):
            click.echo(f"no shutdown in {SHUTDOWN_S:.0f} s: the power is cut", err=True)
    sys.exit(EXIT_INTERRUPTED)


SHUTDOWN_S = 120.0  # takes 10 to 60 s under emulation
