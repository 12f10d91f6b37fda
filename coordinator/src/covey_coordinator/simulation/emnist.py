"""EMNIST, whose writers are told, through TFF's own loader: 3,383 people's digits, or 3,400 people's 62 characters.

TFF keeps the unpacked file (emnist_all.sqlite) in ~/.tff and downloads it where it is not there. A file of that name
in the data folder is taken instead, so that a machine without a network can have it. Loading reads all images into
memory, 3 KB each: 1.2 GB for all digits, twice that while they are read; `writers` takes fewer people.

For everything that is not EMNIST `load_split` is that of `covey_models`.
"""

from __future__ import annotations

import contextlib
import lzma
import socket
import sqlite3
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covey_models import datasets
from covey_models.datasets import Dataset
from covey_protocol.errors import ConfigError, DataError, MachineError

FILE = "emnist_all.sqlite"
SOURCE = "storage.googleapis.com/tff-datasets-public/emnist_all.sqlite.lzma"
CLASS_NAMES = {
    "emnist": tuple(string.digits),
    "emnist-62": tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase),
}
SILENCE_S = 30  # of the server, after which the download is given up


def load_split(
    name: str | Path, data_dir: str | Path | None = None, *, test_fraction: float = 0.2, seed: int = 0, **reading: Any
) -> tuple[Dataset, Dataset]:
    """(train, test): `covey_models.load_split`, and "emnist" (digits) and "emnist-62", which take `writers`."""
    if str(name) not in CLASS_NAMES:
        return datasets.load_split(name, data_dir, test_fraction=test_fraction, seed=seed, **reading)
    unknown = sorted(set(reading) - {"writers"})
    if unknown:
        raise ConfigError(f"{name} does not take {unknown[0]}", "it takes writers")
    return load_emnist(str(name), data_dir, seed=seed, **reading)


def load_emnist(
    name: str = "emnist", data_dir: str | Path | None = None, *, writers: int | None = None, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """(train, test) with TFF's own split of every writer, and the writers as users.

    writers: so many, drawn with the seed; None is all. Pixels are inverted, ink is 1 as in MNIST.
    Raises MachineError where the file can be neither found nor downloaded, DataError where it is damaged.
    """
    folder = datasets.data_folder(data_dir)
    there = folder is not None and (folder / FILE).exists()
    path = folder / FILE if there and folder is not None else Path.home() / ".tff" / FILE
    train, test = _clients(name == "emnist", path)
    chosen = _chosen(train.client_ids, writers, seed)
    return _dataset(name, train, chosen), _dataset(name, test, chosen)


def _clients(only_digits: bool, path: Path) -> tuple[Any, Any]:
    import tensorflow_federated as tff

    there = path.exists()
    try:
        with _impatient():
            train, test = tff.simulation.datasets.emnist.load_data(only_digits, cache_dir=str(path.parent))
    except sqlite3.Error as exc:
        raise DataError(f"{path} cannot be read ({exc})", "remove it, so that it is downloaded again") from exc
    except (OSError, lzma.LZMAError) as exc:
        if not there:
            path.unlink(missing_ok=True)  # TFF leaves half a file and takes it for whole the next time
        raise MachineError(
            f"EMNIST is not here and cannot be downloaded from {SOURCE} ({exc})",
            f"put the unpacked {FILE} into {path.parent} or the data folder, or use MNIST with "
            'partition = { kind = "writer-like" } in its place',
        ) from exc
    return train, test


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """TFF waits for a silent server for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _chosen(client_ids: Sequence[str], writers: int | None, seed: int) -> list[str]:
    """Sorted; those of a smaller number are among those of a larger."""
    ids = sorted(client_ids)
    if writers is None:
        return ids
    if isinstance(writers, bool) or not isinstance(writers, int) or not 1 <= writers <= len(ids):
        raise ConfigError(f"writers = {writers!r}", f"give a whole number from 1 to {len(ids)}")
    return sorted(ids[place] for place in np.random.default_rng(seed).permutation(len(ids))[:writers])


def _dataset(name: str, clients: Any, chosen: Sequence[str]) -> Dataset:
    """All examples of these writers, in their order."""
    pixels, labels, users = [], [], []
    for writer in chosen:
        batch = next(iter(clients.create_tf_dataset_for_client(writer).batch(100_000)))
        pixels.append(1.0 - batch["pixels"].numpy().astype(np.float32))
        labels.append(batch["label"].numpy().astype(np.int32))
        users += [writer] * len(labels[-1])
    x, y = np.concatenate(pixels)[..., None], np.concatenate(labels)
    return Dataset(name, x, y, CLASS_NAMES[name], (), (0.0, 1.0), np.array(users))
