"""`covey export`: a user's Keras model in a Python file becomes a .covey file. `covey inspect`: what is in one.

Importing this file imports nothing heavy: `covey --help` on a desktop must not wait for TensorFlow.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import click

from covey_models.names import LOSSES, OPTIMIZERS
from covey_protocol.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from covey_protocol.seals import SealingKey


@click.command("export")
@click.argument("source", metavar="MODULE.py:FUNCTION")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
@click.option("--name", help="Name of the model; the function's name if left out.")
@click.option("--batch", default=16, show_default=True, help="Examples per training step (fixed in the bundle).")
@click.option(
    "--loss",
    default=LOSSES[0],
    show_default=True,
    metavar="NAME | MODULE.py:FUNCTION",
    help=f"One of {', '.join(LOSSES)}; or your own function (labels, outputs) -> one number per example.",
)
@click.option(
    "--optimizer",
    default=OPTIMIZERS[0],
    show_default=True,
    metavar="NAME | MODULE.py:FUNCTION",
    help=f"One of {', '.join(OPTIMIZERS)}; or your own function that returns a Keras optimizer. "
    "The learning rate is an input of the step.",
)
@click.option("--input-range", nargs=2, type=float, metavar="LO HI", help="Bounds of every input number.")
@click.option("--classes", type=int, help="How many classes; checked against the model.")
@click.option("--label-dtype", type=click.Choice(["int32", "float32"]), help="Labels of your own loss.")
@click.option("--label-shape", metavar="N,N,...", help='Shape of one label of your own loss; "" for one number.')
@click.option("--clip", is_flag=True, help="Give the step an input for clipping the gradient's global norm.")
@click.option("--proximal", is_flag=True, help="Give the step the inputs of FedProx's proximal term.")
@click.option("--correction", is_flag=True, help="Give the step a vector to add to the gradient (SVRG, SCAFFOLD).")
@click.option("--teach", is_flag=True, help="Train the last Dense layer only; add the entry point `represent`.")
@click.option(
    "--round-outputs",
    type=float,
    default=0.0,
    metavar="UNIT",
    help="Round the probabilities that `infer` answers with to multiples of UNIT, such as 0.01; training is untouched.",
)
@click.option(
    "--moving-statistics",
    type=click.Choice(["average", "local"]),
    default="average",
    show_default=True,
    help="Whether BatchNorm's moving statistics travel and are averaged, or stay on each device.",
)
@click.option(
    "--key", type=click.Path(dir_okay=False, path_type=Path), help="PEM file of the key that seals the bundle."
)
@click.option("--seed", default=0, show_default=True, help="Of the data the bundle proves itself on.")
def export_command(
    source: str,
    output: Path,
    name: Optional[str],
    loss: str,
    optimizer: str,
    classes: Optional[int],
    label_shape: Optional[str],
    key: Optional[Path],
    **settings: Any,
) -> None:
    """Export a Keras model as a training bundle.

    FUNCTION in MODULE.py takes no arguments and returns a built Keras model. The bundle proves itself against
    TensorFlow before it is written; if it fails, nothing is written.
    """
    from covey_models.export import export
    from covey_models.user_code import UserCode
    from covey_protocol.bundle import read_bundle

    sealing = None if key is None else _read_key(key)
    files = UserCode()
    model = files.built(source)
    data = export(
        model,
        name=name or source.rpartition(":")[2],
        loss=files.function(loss) if ".py:" in loss else loss,
        optimizer=files.built(optimizer) if ".py:" in optimizer else optimizer,
        batch_size=settings.pop("batch"),
        num_classes=classes,
        label_shape=None if label_shape is None else _shape(label_shape),
        key=sealing,
        **settings,
    )
    _write(output, data)
    manifest = read_bundle(data).manifest
    assert manifest.proof is not None  # export always fills it in
    judge = "TensorFlow" if manifest.proof.judgement == "float32" else "float64 TensorFlow"
    click.echo(
        f"{output}: {manifest.dimension} parameters, {len(data)} bytes, "
        f"{'sealed' if sealing else 'not sealed'}, equal to {judge} within {manifest.proof.max_abs_error:.1e} "
        f"after {manifest.proof.steps} steps in {manifest.proof.runtime}"
    )


@click.command("inspect", short_help="Say what a bundle holds and what it costs a device.")
@click.argument("bundle", metavar="MODEL.covey", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--target", type=click.Choice(["edge", "android"]), default="edge", show_default=True)
@click.option("--key", metavar="HEX", help="Public key that must have sealed it, 64 hexadecimal digits.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def inspect_command(bundle: Path, target: str, key: Optional[str], as_json: bool) -> None:
    """Say what a bundle holds and what it costs a device.

    Reads the file and never loads the model. Ends with code 6 where the bundle is damaged, not sealed by --key, or
    needs an operator that the target's runtime does not have.
    """
    import msgspec

    from covey_edge.config import read_file
    from covey_models.inspecting import as_plain, inspect, lines
    from covey_protocol.errors import BundleError
    from covey_protocol.seals import PublicKey

    inspection = inspect(read_file(bundle), target, None if key is None else PublicKey.from_hex(key))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(as_plain(inspection)), indent=1).decode())
    else:
        for line in lines(inspection):
            click.echo(line)
    if inspection.problems:
        raise BundleError(
            f"{bundle} does not run on the target {target!r}: {inspection.problems[0]}",
            "replace the layer that needs it",
        )


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(",") if size)
    except ValueError as exc:
        raise ConfigError(f"{text!r} is no shape", "write whole numbers with commas, such as 28,28") from exc


def _read_key(path: Path) -> SealingKey:
    from covey_edge.config import read_file
    from covey_protocol.seals import SealingKey

    return SealingKey.from_pem(read_file(path), str(path))


def _write(path: Path, data: bytes) -> None:
    """Atomically, into a folder that is there: a mistyped folder is refused, not made."""
    from covey_edge.files import write_atomic

    if not path.parent.is_dir():
        raise StorageError(f"{path} cannot be written (no such folder)", "check the folder and its free space")
    write_atomic(path, data)
