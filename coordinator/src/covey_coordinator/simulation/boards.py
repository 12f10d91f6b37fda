"""A cell's curves for TensorBoard: event files of TensorFlow's own writer, and the varied keys as hyperparameters.

A cell that is taken up writes its files anew from its records, so no step is there twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from covey_coordinator.simulation.results import RoundRecord
from covey_coordinator.simulation.sweep import Cell, label_of


class TensorBoard:
    """Scalars of a cell: loss/train, evaluation/*, devices/*, rule/*, and the seconds of a round."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, record: RoundRecord) -> None:
        import tensorflow as tf

        with self._writer.as_default(step=record.number):
            for name, value in scalars_of(record).items():
                tf.summary.scalar(name, value)


def scalars_of(record: RoundRecord) -> dict[str, float]:
    found = {} if record.loss is None else {"loss/train": record.loss}
    for group, values in (
        ("evaluation", record.evaluation),
        ("devices", record.device_evaluation),
        ("rule", record.measurements),
    ):
        found.update({f"{group}/{name}": value for name, value in values.items()})
    if record.verdicts:
        found["rule/accepted"] = float(sum(judged.accepted for judged in record.verdicts.values()))
    return {**found, "seconds": record.seconds}


@contextmanager
def tensor_board(folder: Path, cell: Cell) -> Iterator[TensorBoard]:
    """Write to this folder; what is there is deleted. hparams: every varied key and the seed."""
    import tensorflow as tf
    from tensorboard.plugins.hparams import api

    shutil.rmtree(folder, ignore_errors=True)
    writer = tf.summary.create_file_writer(str(folder))
    try:
        with writer.as_default():
            api.hparams(hyperparameters(cell), trial_id=cell.key)
        yield TensorBoard(writer)
    finally:
        writer.close()


def hyperparameters(cell: Cell) -> Mapping[str, Any]:
    """Plain values; tables in words."""
    plain = {
        key: value if isinstance(value, (bool, int, float, str)) else label_of(value)
        for key, value in cell.varied.items()
    }
    return {**plain, "seed": cell.seed}
