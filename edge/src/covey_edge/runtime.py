"""The TFLite adapter: a training bundle's entry points as methods on numpy arrays.

Runs in the training child: tflite_runtime 2.14 may crash on a hostile file even after all checks. One thread unless the
owner wants more; docs/conditions.md has what that does to bits and time.
"""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from covey_protocol.bundle import RESET_OPTIMIZER, Bundle, check_plan
from covey_protocol.errors import BundleError, MachineError, TrainingError
from covey_protocol.messages import TrainingPlan

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[Any]

NO_CLIPPING = 3e38  # a norm no finite float32 gradient is scaled down to
EVALUATION = ("loss_sum", "correct", "count")
_REFUSALS = (ValueError, RuntimeError, KeyError, TypeError, IndexError)  # what the runtimes raise over a model


def installed() -> tuple[Any, str]:
    """The interpreter class of the runtime that is installed, and its name and version.

    tflite_runtime where both are: it is what the edge distribution asks for on the Pythons it exists for (to 3.11).
    """
    try:
        from tflite_runtime import __version__ as version
        from tflite_runtime.interpreter import Interpreter

        return Interpreter, f"tflite_runtime {version}"
    except ImportError:
        pass
    try:
        from importlib.metadata import version  # 3 MB, which the package's own number saves above

        from ai_edge_litert.interpreter import Interpreter

        return Interpreter, f"ai_edge_litert {version('ai-edge-litert')}"
    except ImportError as exc:
        raise MachineError(
            "no TFLite runtime is installed", "install tflite-runtime (Python 3.9-3.11) or ai-edge-litert (3.12+)"
        ) from exc


class _ScalarsStay:
    """The runtime's own wrapper of an interpreter, but that inputs without dimensions are not resized to none.

    That call, which changes nothing, overwrites memory in ai-edge-litert 2.3.0 for arm64: it takes the first of a list
    of no numbers, and then sets minus four bytes to zero. Every training has such an input, the learning rate.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def ResizeInputTensor(self, index: int, shape: Numbers, *more: Any) -> None:
        if len(shape):
            self._wrapper.ResizeInputTensor(index, shape, *more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


def runner(interpreter: Any, entry_point: str) -> Any:
    """To call an entry point with, by the names of its inputs."""
    found = interpreter.get_signature_runner(entry_point)
    found._interpreter_wrapper = _ScalarsStay(found._interpreter_wrapper)
    return found


class Model:
    """A loaded bundle. All batches are padded to the bundle's fixed batch size with examples of weight 0.

    What `train` takes beside the batch (the manifest's `train_inputs`) is neutral until `start_training` sets it.
    Whatever the runtime raises over a model becomes a BundleError; what it crashes over ends the process.
    """

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        self._interpreter_class, self.runtime = installed()
        self.manifest, self._model, self._threads = bundle.manifest, bundle.model, threads
        self._run: dict[str, Any] = {}
        self._load()
        self._shared = self._shared_inputs(0.0, 0.0, None, None)

    def _load(self) -> None:
        try:
            interpreter = self._interpreter_class(model_content=self._model, num_threads=self._threads)
            self._run = {name: runner(interpreter, name) for name in self.manifest.signatures}
        except _REFUSALS as exc:
            raise BundleError(f"bundle {self.manifest.name!r} cannot be loaded ({exc})", "export it again") from exc

    def let_go(self) -> None:
        """Give the runtime's buffers back: every entry point that was called has its own (the reference CNN: 7 MB to
        evaluate, 13 to train). The next call loads the model anew, in 2 ms, with the bundle's own parameters.

        Does nothing where that would lose more than a round brings along (`Manifest.keeps_state`).
        """
        if not self.manifest.keeps_state:
            self._run = {}  # they hold the interpreter

    def parameters(self) -> Floats:
        """The flat (d,) parameter vector, the caller's own."""
        return self._output("get_parameters", "parameters", self.manifest.dimension)

    def set_parameters(self, values: Floats) -> None:
        if values.shape != (self.manifest.dimension,):
            raise BundleError(f"{values.size} parameters came, the model has {self.manifest.dimension}")
        self._call("set_parameters", parameters=np.ascontiguousarray(values, dtype=np.float32))

    def start_training(self, plan: TrainingPlan, correction: Optional[Floats] = None) -> None:
        """Begin a round: fix what all its steps share, and forget what the optimizer remembers of the last one.

        FedProx's centre is the parameters held now. correction: (d,), added to every step's gradient.
        Raises TrainingError where the bundle cannot do what is asked; it is never left out.
        """
        check_plan(self.manifest, plan)
        if correction is not None and "correction" not in self.manifest.train_inputs:
            raise TrainingError(
                f"bundle {self.manifest.name!r} cannot add a correction to its gradient",
                "export the model with `covey export --correction`",
            )
        if RESET_OPTIMIZER in self.manifest.signatures:
            self._call(RESET_OPTIMIZER)
        centre = self.parameters() if "proximal" in self.manifest.train_inputs else None
        self._shared = self._shared_inputs(plan.gradient_clip_norm, plan.proximal_weight, centre, correction)

    def train_batch(self, x: Numbers, y: Numbers, learning_rate: float, seed: int = 0) -> float:
        """One optimizer step on up to batch_size examples; their mean loss.

        seed: from 0 to 2^31 - 1, of what the model draws in this step; without effect on a model that draws nothing.
        """
        x, y, weight = self._padded(x, y)
        inputs = {"x": x, "y": y, "example_weight": weight, "learning_rate": np.float32(learning_rate)}
        return float(self._output("train", "loss", 1, **inputs, **self._shared, **self._seed(seed))[0])

    def gradient(self, x: Numbers, y: Numbers, seed: int = 0) -> Floats:
        """The gradient (d,) of the mean loss over all examples at the parameters held now; it changes nothing.

        Mean of the batches' gradients, each counted by its examples, summed in float64. A model's own regularisation,
        being in every batch's gradient, is in it once. BatchNorm sees batches of the order given.
        seed: of the first batch; each further one draws from the next number.
        """
        if "gradient" not in self.manifest.signatures:
            raise TrainingError(f"bundle {self.manifest.name!r} has no entry point `gradient`", "export it again")
        total, size = np.zeros(self.manifest.dimension), self.manifest.batch_size
        for number, start in enumerate(range(0, len(x), size)):
            bx, by, weight = self._padded(x[start : start + size], y[start : start + size])
            inputs = {"x": bx, "y": by, "example_weight": weight, **self._seed((seed + number) % 2**31)}
            total += weight.sum() * self._output("gradient", "gradient", self.manifest.dimension, **inputs)
        return (total / len(x)).astype(np.float32)

    def represented(self, x: Numbers) -> Floats:
        """What the last Dense layer sees of each example: (n, ...) -> (n, F)."""
        size = self.manifest.batch_size
        width = self.manifest.parameters[0].shape[0]
        rows = []
        for start in range(0, len(x), size):
            part = x[start : start + size]
            padded, _, _ = self._padded(part, part)
            rows.append(self._output("represent", "features", size * width, x=padded).reshape(size, width)[: len(part)])
        return np.concatenate(rows)

    def evaluate(self, x: Numbers, y: Numbers) -> tuple[float, float]:
        """(mean loss, accuracy) over all examples."""
        totals = np.zeros(3)
        size = self.manifest.batch_size
        for start in range(0, len(x), size):
            bx, by, weight = self._padded(x[start : start + size], y[start : start + size])
            result = self._call("evaluate", x=bx, y=by, example_weight=weight)
            totals += [float(self._checked("evaluate", result, name, 1)[0]) for name in EVALUATION]
        loss_sum, correct, count = totals.tolist()
        return loss_sum / count, correct / count

    def infer(self, x: Numbers) -> Floats:
        """The model's answers: (n, ...) -> (n, ...) float32; probabilities for the cross entropies (docs/bundle.md)."""
        size, rows = self.manifest.batch_size, []
        for start in range(0, len(x), size):
            part = x[start : start + size]
            padded, _, _ = self._padded(part, part)
            output = self._call("infer", x=padded).get("output")
            if output is None or output.dtype != np.float32 or output.ndim < 1 or len(output) != size:
                raise BundleError(
                    f"infer of bundle {self.manifest.name!r} does not give {size} rows of float32", "export it again"
                )
            rows.append(output[: len(part)].copy())
        return np.concatenate(rows)

    def _shared_inputs(
        self, clip_norm: float, proximal_weight: float, centre: Optional[Floats], correction: Optional[Floats]
    ) -> dict[str, Any]:
        """The inputs that stay the same over a round, of those the bundle has."""
        nothing = np.zeros(self.manifest.dimension, np.float32)
        inputs: dict[str, dict[str, Any]] = {
            "clip_norm": {"clip_norm": np.float32(clip_norm or NO_CLIPPING)},
            "proximal": {
                "proximal_weight": np.float32(proximal_weight),
                "proximal_center": nothing if centre is None else centre,
            },
            "correction": {"correction": nothing if correction is None else correction.astype(np.float32)},
            "seed": {},  # another one for every step
        }
        return {name: value for key in self.manifest.train_inputs for name, value in inputs[key].items()}

    def _seed(self, seed: int) -> dict[str, Any]:
        return {"seed": np.int32(seed)} if "seed" in self.manifest.train_inputs else {}

    def _call(self, entry_point: str, **inputs: Any) -> dict[str, Numbers]:
        if not self._run:
            self._load()
        try:
            result: dict[str, Numbers] = self._run[entry_point](**inputs)
        except _REFUSALS as exc:
            said = " ".join(str(exc).split())[:200] or type(exc).__name__
            raise BundleError(
                f"{entry_point} of bundle {self.manifest.name!r} fails in {self.runtime} ({said})", "export it again"
            ) from exc
        return result

    def _output(self, entry_point: str, name: str, size: int, **inputs: Any) -> Floats:
        return self._checked(entry_point, self._call(entry_point, **inputs), name, size)

    def _checked(self, entry_point: str, result: dict[str, Numbers], name: str, size: int) -> Floats:
        """One output, flat. A model of a sealed bundle can still be another than its manifest says."""
        value = result.get(name)
        if value is None or value.size != size or value.dtype != np.float32:
            got = "nothing" if value is None else f"{value.dtype} of {value.size}"
            raise BundleError(
                f"{entry_point} of bundle {self.manifest.name!r} gives {got} for {name!r}, not float32 of {size}",
                "export it again",
            )
        return value.reshape(-1)

    def _padded(self, x: Numbers, y: Numbers) -> tuple[Numbers, Numbers, Floats]:
        size = self.manifest.batch_size
        weight = np.zeros(size, np.float32)
        weight[: len(x)] = 1.0
        if len(x) == size:
            return x, y, weight
        # repeated real examples, not zeros: BatchNorm's statistics see all rows, whatever their weight
        return np.resize(x, (size, *x.shape[1:])), np.resize(y, (size, *y.shape[1:])), weight
