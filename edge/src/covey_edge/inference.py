"""Answers of the model that this device keeps, for the owner's applications.

    from covey_edge.inference import Predictor

    predictor = Predictor.open("state")
    probabilities = predictor.predict(x)  # (n, ...) -> (n, k)

Works while the agent runs or not, and takes no lock of it. Never imports TensorFlow. The model is loaded into
*this* process, with the TFLite runtime: only with a coordinator's seal on its bundle, and only after the agent's child
has trained or evaluated it. What the agent keeps, and when it changes: docs/personal-models.md.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt

from covey_edge import normalising
from covey_edge.data_sources import Fault, as_the_model_takes, input_faults, not_finite
from covey_edge.model_store import Kept, ModelStore, Version
from covey_edge.runtime import Floats, Model
from covey_protocol.bundle import Manifest, read_bundle
from covey_protocol.errors import CoveyError, DataError, StorageError
from covey_protocol.seals import PublicKey

log = logging.getLogger("covey.inference")

TRIES = 5  # a reader starts anew where a writer was faster; a writer takes seconds from change to change
_State = tuple[object, ...]
_Loaded = tuple[Model, Kept, Optional[normalising.Statistics]]


class Predictor:
    """One task's model. Any number of threads may share it: they take turns.

    Every call looks whether the model was changed (one `stat`), and loads the new one. Where that cannot be read, the
    one that is loaded answers on, and a line is logged once. After a fork make a new one.
    """

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._lock = threading.RLock()
        self._state: _State = ()
        self._model, self._kept, self._statistics = self._loaded()

    @classmethod
    def open(cls, state_dir: Union[str, Path], task: str = "") -> Predictor:
        """state_dir: as in agent.toml. StorageError where nothing is kept, or it is damaged; BundleError where the
        runtime does not load it."""
        return cls(ModelStore(Path(state_dir), task))

    @property
    def version(self) -> Version:
        """Which model answers now. Str of it is for people."""
        with self._lock:
            self._follow()
            return self._kept.used

    @property
    def manifest(self) -> Manifest:
        """What goes in (`input`) and what comes out (`num_classes`, `class_names`)."""
        with self._lock:
            self._follow()
            return self._model.manifest

    def predict(self, x: npt.ArrayLike) -> Floats:
        """(n, ...) -> (n, k) float32, probabilities where the loss is a cross entropy (docs/bundle.md).

        x: as the source of training gives it, any numeric dtype; it is normalised here where training does. DataError
        names the first row that does not fit.
        """
        return self.answered(x)[0]

    def answered(self, x: npt.ArrayLike) -> tuple[Floats, Version, Manifest]:
        """`predict`, and which model it was."""
        with self._lock:
            self._follow()
            manifest = self._model.manifest
            inputs = self._inputs(np.asarray(x), manifest)
            return self._model.infer(inputs), self._kept.used, manifest

    def _inputs(self, x: npt.NDArray[Any], manifest: Manifest) -> npt.NDArray[Any]:
        spec, shape = manifest.input, tuple(manifest.input.shape)
        if x.ndim < 1 or not len(x) or x.dtype.kind not in "fiub":
            raise DataError(f"x is {x.dtype} of shape {x.shape}, no list of examples", "give numbers, one row or more")
        if x.shape[1:] != shape:
            raise DataError(f"x has examples of shape {x.shape[1:]}, the model takes {shape}", "reshape them")
        _refuse(not_finite(x, x))
        scale = self._kept.used.scale
        if scale is not None:
            assert self._statistics is not None
            x = normalising.scaled(x, self._statistics, scale.how, spec)
        _refuse(input_faults(x, manifest))
        return as_the_model_takes(x, spec)

    def _follow(self) -> None:
        state = self._looked(self._kept)
        if state == self._state:
            return
        self._state = state  # also where it fails: once per change
        try:
            self._model, self._kept, self._statistics = self._loaded(self._kept, self._model)
        except (CoveyError, OSError) as exc:
            log.warning("the newest model cannot be loaded, %s answers on: %s", self._kept.used, exc)

    def _looked(self, kept: Optional[Kept]) -> _State:
        """Changes with model.json, and with the statistics that its model's inputs are normalised by."""
        scale = kept.used.scale if kept is not None else None
        watched = [self._store.pointer, *([self._store.state_dir / scale.statistics] if scale is not None else [])]
        return tuple(map(_state_of, watched))

    def _loaded(self, before: Optional[Kept] = None, model: Optional[Model] = None) -> _Loaded:
        """Everything is read before the model that is loaded is changed."""
        for _ in range(TRIES):
            kept = self._store.load()
            if kept is None:
                raise StorageError(
                    f"no model is kept in {self._store.folder}",
                    "set [personal] keep = true in agent.toml and wait for a round",
                )
            used = kept.used
            try:
                bundle, parameters = self._store.read(used)
            except FileNotFoundError:
                continue  # replaced since, twice
            statistics = self._read_statistics(used)
            if model is None or before is None or before.used.bundle != used.bundle:
                model = Model(read_bundle(bundle, [PublicKey.from_hex(key) for key in used.sealed_by]))
            model.set_parameters(np.frombuffer(parameters, "<f4").astype(np.float32))
            return model, kept, statistics
        raise StorageError(f"files that {self._store.pointer} names are missing", "wait for the next round")

    def _read_statistics(self, used: Version) -> Optional[normalising.Statistics]:
        if used.scale is None:
            return None
        path = self._store.state_dir / used.scale.statistics
        found = normalising.kept(path)
        if found is None:
            raise StorageError(f"{path} is not there, by which inputs are normalised", "start the agent: it makes them")
        return found


def _state_of(path: Path) -> Optional[tuple[int, int, int]]:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _refuse(faults: Iterable[Fault]) -> None:
    for fault in faults:
        if fault.rows.any():
            where = f"in {int(fault.rows.sum())} of {len(fault.rows)} rows, first in row {int(np.argmax(fault.rows))}"
            raise DataError(f"{fault.what} {where}", fault.remedy)


def labels(output: Floats, manifest: Manifest) -> Optional[list[Any]]:
    """The most probable class of each example, by name where the bundle has names; None where answers are no
    classes."""
    if manifest.num_classes is None or output.ndim != 2 or output.shape[1] < 2:
        return None
    places = output.argmax(axis=1).tolist()
    names = manifest.class_names
    return [names[place] if place < len(names) else place for place in places]
