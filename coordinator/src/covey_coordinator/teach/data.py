"""The data of `covey teach`: what is not trusted, split among teachers, and what is, in the same features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from covey_edge.data_sources import check_examples
from covey_edge.runtime import Model
from covey_edge.teaching import seen
from covey_models.csv_tables import Table, label_column, read_table, user_column
from covey_models.datasets import STANDARD_DEVIATIONS, Dataset, Reading, load
from covey_protocol.errors import ConfigError, DataError
from covey_protocol.teaching import LOGISTIC, RIDGE, Array
from covey_protocol.works import LEARNERS, taught_layer

Labels = npt.NDArray[Any]
NO_USERS = "save one text or number for each example, or leave --users out"


@dataclass(frozen=True)
class Examples:
    """x: (n, ...) as they were read, for pictures. features: (n, F + 1), the last one 1. y: (n,) classes or numbers."""

    x: npt.NDArray[Any]
    features: Array
    y: Labels

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Any) -> Examples:
        return Examples(self.x[rows], self.features[rows], self.y[rows])


@dataclass(frozen=True)
class Work:
    """kind: of the learner. class_names: empty for numbers. parts: the rows of `data` that each teacher has."""

    name: str
    kind: str
    class_names: tuple[str, ...]
    data: Examples
    trusted: Examples
    parts: tuple[npt.NDArray[np.int64], ...]

    @property
    def columns(self) -> int:
        """Learners: one, or of more than two classes one for each against the rest."""
        return len(self.class_names) if len(self.class_names) > 2 else 1

    def targets(self, y: Labels) -> Array:
        """(n, C): numbers, or 1 in the column of the class and -1 elsewhere; one column for two classes."""
        if self.kind == RIDGE:
            return y.astype(np.float64)[:, None]
        wanted = np.arange(self.columns) if self.columns > 1 else np.array([1])
        return np.where(y[:, None] == wanted, 1.0, -1.0)


def read_work(
    path: str,
    trusted: str,
    *,
    numbers: bool,
    label: str | None,
    users: str | None,
    teachers: int,
    seed: int,
    model: Model | None = None,
) -> Work:
    """Two files or folders of the same form. numbers: the labels are numbers, not classes. model: a bundle's, whose
    last layer is taught. Raises DataError.
    """
    names, data, held = (_of_numbers if numbers else _of_classes)(path, trusted, label, users)
    if data.x.shape[1:] != held.x.shape[1:]:
        raise DataError(
            f"{trusted} has examples of shape {held.x.shape[1:]}, {path} of {data.x.shape[1:]}",
            "give both the same columns, or sizes of images",
        )
    first, second = _features(data.x, held.x) if model is None else _seen(model, numbers, names, data, held)
    parts = _parts(data.users if users is not None else None, len(data.y), teachers, seed)
    return Work(
        Path(path).stem,
        RIDGE if numbers else LOGISTIC,
        names,
        Examples(data.x, first, data.y),
        Examples(held.x, second, held.y),
        parts,
    )


class _Read(NamedTuple):
    x: npt.NDArray[Any]
    y: Labels
    users: Any = None


def _of_numbers(path: str, trusted: str, label: str | None, users: str | None) -> tuple[tuple[()], _Read, _Read]:
    return (), _numbers(Path(path), label, users), _numbers(Path(trusted), label, _also_in(trusted, users))


def _of_classes(path: str, trusted: str, label: str | None, users: str | None) -> tuple[tuple[str, ...], _Read, _Read]:
    """The trusted part has its classes numbered as in the other."""
    data = _loaded(path, label, users)
    held = _loaded(trusted, label, _also_in(trusted, users))
    strangers = [name for name in held.class_names if name not in data.class_names]
    if strangers:
        raise DataError(f"{held.name} has the class {strangers[0]!r}, which {data.name} has not", "check the labels")
    numbers = np.array([data.class_names.index(name) for name in held.class_names], np.int32)
    return data.class_names, _Read(data.x, data.y, data.users), _Read(held.x, numbers[held.y])


def _loaded(path: str, label: str | None, users: str | None) -> Dataset:
    """An .npz file says by itself whose its examples are."""
    if path.endswith(".npz"):
        data = load(path)
        if users is not None and data.users is None:
            raise DataError(f"{path} has no array users", NO_USERS)
        return data
    return load(path, **{name: value for name, value in (("label", label), ("users", users)) if value is not None})


def _also_in(path: str, users: str | None) -> str | None:
    """The column of users where this table has it, too: it is no feature."""
    has_it = users is not None and path.endswith(".csv") and users in read_table(Path(path)).columns
    return users if has_it else None


def _features(x: npt.NDArray[Any], other: npt.NDArray[Any]) -> tuple[Array, Array]:
    """Tables in standard deviations of both together, clipped to 5; images as they are. A 1 at the end."""
    both = [part.reshape(len(part), -1).astype(np.float64) for part in (x, other)]
    if x.ndim == 2:
        every = np.concatenate(both)
        middle, deviation = every.mean(axis=0), every.std(axis=0)
        deviation[deviation == 0] = 1.0
        limit = STANDARD_DEVIATIONS
        both = [np.clip((part - middle) / deviation, -limit, limit) for part in both]
    first, second = (np.hstack([part, np.ones((len(part), 1))]) for part in both)
    return first, second


def _seen(model: Model, numbers: bool, names: tuple[str, ...], data: _Read, held: _Read) -> tuple[Array, Array]:
    """What the bundle's last layer sees, of examples as a device would read them."""
    check_teachable(model, RIDGE if numbers else LOGISTIC, len(names))
    checked = (check_examples(one.x, one.y, model.manifest, Path("the data")) for one in (data, held))
    first, second = (seen(model, x) for x, _ in checked)
    return first, second


def check_teachable(model: Model, kind: str, classes: int) -> None:
    """ConfigError for a bundle that is not for teaching, or of another learner than the data are for."""
    facts = model.manifest.facts
    layer, learner = taught_layer(facts), LEARNERS.get(facts.loss)
    if layer is None or learner is None:
        raise ConfigError(
            f"bundle {facts.name!r} has no last layer that can be taught", "export it with `covey export --teach`"
        )
    columns = 1 if kind == RIDGE or (classes == 2 and facts.loss == "binary_crossentropy") else classes
    if learner != kind or layer[1] != columns:
        raise ConfigError(
            f"bundle {facts.name!r} has {layer[1]} outputs and the loss {facts.loss}, the data have "
            + (f"{classes} classes" if classes else "numbers"),
            "give a bundle of the same kind (two classes: one output and binary_crossentropy), or --numbers",
        )


def _parts(users: Any, n: int, teachers: int, seed: int) -> tuple[npt.NDArray[np.int64], ...]:
    if users is not None:
        return tuple(np.flatnonzero(users == one) for one in np.unique(users))
    if not 1 <= teachers <= n:
        raise ConfigError(f"{teachers} teachers for {n} examples", "choose fewer")
    order = np.random.default_rng(seed).permutation(n)
    return tuple(np.sort(part) for part in np.array_split(order, teachers))


def _numbers(path: Path, label: str | None, users: str | None) -> _Read:
    """A table (.csv) of numbers, or x and y (and users) of an .npz file."""
    if path.suffix == ".csv":
        table, how = read_table(path), Reading(label=label, users=users)
        target, owner = label_column(table, how), user_column(table, how)
        names = [name for name in table.columns if name not in (target, owner)]
        if not names:
            raise DataError(f"{path} has no column besides {target!r}", "separate columns by commas")
        x = np.stack([_column(table, name) for name in names], axis=1)
        return _Read(x, _column(table, target), None if owner is None else np.array(table.columns[owner]))
    from covey_edge.data_sources import load_examples

    x, y = load_examples("npz", path)
    if y.ndim > 2 or y.reshape(len(y), -1).shape[1] != 1:
        raise DataError(f"{path}: y has shape {y.shape}", "give one number for each example")
    with np.load(path, allow_pickle=False) as archive:
        owners = archive["users"] if users is not None and "users" in archive else None
    if users is not None and owners is None:
        raise DataError(f"{path} has no array users", NO_USERS)
    return _Read(x, y.reshape(-1), owners)


def _column(table: Table, name: str) -> Array:
    try:
        values = np.array(table.columns[name], np.float64)
    except ValueError as exc:
        raise DataError(f"{table.path}: column {name!r} holds {exc}", "leave out columns that are no numbers") from exc
    if not np.isfinite(values).all():
        row = int(np.argmax(~np.isfinite(values)))
        raise DataError(f"{table.where(name, row)} is not finite", "repair or drop that row")
    return values
