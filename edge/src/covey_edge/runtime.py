"""The TFLite adapter: a training bundle's entry points as methods on numpy arrays.

Runs in the training child: tflite_runtime 2.14 may crash on a hostile file even after all checks. One thread, so that a
step's bits do not depend on how busy the machine is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from covey_protocol.bundle import Bundle
from covey_protocol.errors import BundleError, MachineError

Floats = npt.NDArray[np.float32]


def _interpreter_class() -> tuple[Any, str]:
    try:
        import tflite_runtime
        from tflite_runtime.interpreter import Interpreter

        return Interpreter, f"tflite_runtime {tflite_runtime.__version__}"
    except ImportError:
        pass
    try:
        import ai_edge_litert
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter, f"ai_edge_litert {getattr(ai_edge_litert, '__version__', '')}".strip()
    except ImportError as exc:
        raise MachineError(
            "no TFLite runtime is installed", "install tflite-runtime (Python 3.9-3.11) or ai-edge-litert (3.12+)"
        ) from exc


class Model:
    """A loaded bundle. All batches are padded to the bundle's fixed batch size with examples of weight 0."""

    def __init__(self, bundle: Bundle) -> None:
        interpreter_class, self.runtime = _interpreter_class()
        self.manifest = bundle.manifest
        try:
            self._interpreter = interpreter_class(model_content=bundle.model, num_threads=1)
            names = self.manifest.signatures
            self._run = {name: self._interpreter.get_signature_runner(name) for name in names}
        except (ValueError, RuntimeError, KeyError) as exc:
            raise BundleError(f"bundle {self.manifest.name!r} cannot be loaded ({exc})", "export it again") from exc

    def parameters(self) -> Floats:
        """The flat (d,) parameter vector."""
        values: Floats = self._run["get_parameters"]()["parameters"]
        return values.reshape(-1).copy()

    def set_parameters(self, values: Floats) -> None:
        if values.shape != (self.manifest.dimension,):
            raise BundleError(f"{values.size} parameters came, the model has {self.manifest.dimension}")
        self._run["set_parameters"](parameters=np.ascontiguousarray(values, dtype=np.float32))

    def train_batch(self, x: npt.NDArray[Any], y: npt.NDArray[Any], learning_rate: float) -> float:
        """One optimizer step on up to batch_size examples; their mean loss."""
        x, y, weight = self._padded(x, y)
        result = self._run["train"](x=x, y=y, example_weight=weight, learning_rate=np.float32(learning_rate))
        return float(result["loss"])

    def evaluate(self, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> tuple[float, float]:
        """(mean loss, accuracy) over all examples."""
        totals = np.zeros(3)
        size = self.manifest.batch_size
        for start in range(0, len(x), size):
            bx, by, weight = self._padded(x[start : start + size], y[start : start + size])
            result = self._run["evaluate"](x=bx, y=by, example_weight=weight)
            totals += [float(result[name]) for name in ("loss_sum", "correct", "count")]
        loss_sum, correct, count = totals.tolist()
        return loss_sum / count, correct / count

    def _padded(self, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], Floats]:
        size = self.manifest.batch_size
        weight = np.zeros(size, np.float32)
        weight[: len(x)] = 1.0
        if len(x) == size:
            return x, y, weight
        # repeated real examples, not zeros: BatchNorm's statistics see all rows, whatever their weight
        return np.resize(x, (size, *x.shape[1:])), np.resize(y, (size, *y.shape[1:])), weight
