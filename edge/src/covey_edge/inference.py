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
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt

from covey_edge.data_sources import check_inputs
from covey_edge.model_store import Kept, ModelStore, Version
from covey_edge.runtime import Floats, Model
from covey_protocol.bundle import Manifest, read_bundle
from covey_protocol.errors import CoveyError, StorageError
from covey_protocol.seals import PublicKey

log = logging.getLogger("covey.inference")

TRIES = 5  # a reader starts anew where a writer was faster; a writer takes seconds from change to change
_State = tuple[int, int, int]


class Predictor:
    """One task's model. Any number of threads may share it: they take turns.

    Every call looks whether the model was changed (one `stat`), and loads the new one. Where that cannot be read, the
    one that is loaded answers on, and a line is logged once. After a fork make a new one.
    """

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._lock = threading.RLock()
        self._state = self._looked()
        self._model, self._kept = self._loaded()

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

        x: as the data of training, any numeric dtype. DataError names the first row that does not fit.
        """
        return self.answered(x)[0]

    def answered(self, x: npt.ArrayLike) -> tuple[Floats, Version, Manifest]:
        """`predict`, and which model it was."""
        with self._lock:
            self._follow()
            manifest = self._model.manifest
            return self._model.infer(check_inputs(np.asarray(x), manifest)), self._kept.used, manifest

    def _follow(self) -> None:
        state = self._looked()
        if state == self._state:
            return
        self._state = state  # also where it fails: once per change
        try:
            self._model, self._kept = self._loaded(self._kept, self._model)
        except (CoveyError, OSError) as exc:
            log.warning("the newest model cannot be loaded, %s answers on: %s", self._kept.used, exc)

    def _looked(self) -> Optional[_State]:
        try:
            found = os.stat(self._store.pointer)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _loaded(self, before: Optional[Kept] = None, model: Optional[Model] = None) -> tuple[Model, Kept]:
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
            if model is None or before is None or before.used.bundle != used.bundle:
                model = Model(read_bundle(bundle, [PublicKey.from_hex(key) for key in used.sealed_by]))
            model.set_parameters(np.frombuffer(parameters, "<f4").astype(np.float32))
            return model, kept
        raise StorageError(f"files that {self._store.pointer} names are missing", "wait for the next round")


def labels(output: Floats, manifest: Manifest) -> Optional[list[Any]]:
    """The most probable class of each example, by name where the bundle has names; None where answers are no
    classes."""
    if manifest.num_classes is None or output.ndim != 2 or output.shape[1] < 2:
        return None
    places = output.argmax(axis=1).tolist()
    names = manifest.class_names
    return [names[place] if place < len(names) else place for place in places]
