"""TensorFlow, imported once and quietly.

Every file of this package that needs TensorFlow asks here, so that the log levels are set before the import (later is
too late) and a missing TensorFlow is an error that says what to install. Importing this file imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from covey_protocol.errors import MachineError


def import_tensorflow() -> Any:
    """The `tensorflow` module. An operator who set TF_CPP_MIN_LOG_LEVEL keeps that level."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return importlib.import_module("tensorflow")
    except ImportError as exc:
        raise MachineError(
            "TensorFlow is not installed", "install covey-models on a desktop (x86-64 or arm64)"
        ) from exc


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing on stderr and no log records below ERROR while TensorFlow converts or a TFLite interpreter starts.

    The converter and the TFLite delegates write to file descriptor 2 from C++, past Python's logging, so the
    descriptor itself is replaced. Other threads are silenced for that time too: use it in command-line work.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "tensorflow")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with _stderr_replaced(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextlib.contextmanager
def _stderr_replaced() -> Iterator[None]:
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
    finally:
        os.close(kept)


# --- what has no public name in TensorFlow 2.14; nothing else in this package uses a private one


def graph_of(op: Any, attribute: str) -> Any:
    """The FuncGraph of the function that an op calls (`f` of a call, `cond` and `body` of a loop), None if lost."""
    return getattr(op.graph._get_function(op.get_attr(attribute).name), "graph", None)


@functools.cache
def flatbuffer_schema() -> Any:
    """TFLite's flatbuffer schema as Python classes, without the seconds that importing TensorFlow takes."""
    name = "tensorflow.lite.python.schema_py_generated"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.find_spec("tensorflow")
    if found is None or not found.submodule_search_locations:
        raise MachineError("TensorFlow is not installed", "install covey-models on a desktop (x86-64 or arm64)")
    path = Path(found.submodule_search_locations[0]) / "lite" / "python" / "schema_py_generated.py"
    spec = importlib.util.spec_from_file_location("covey_models._tflite_schema", path)
    if spec is None or spec.loader is None:
        raise MachineError(f"{path} cannot be read", "install TensorFlow 2.14")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variable_shape(handle: Any) -> tuple[int, ...]:
    """The shape of the variable behind a resource tensor."""
    return tuple(size.size for size in handle._handle_data.shape_and_type[0].shape.dim)


def variable_dtype(handle: Any) -> Any:
    """The dtype of the variable behind a resource tensor; None if it is no variable (a lookup table)."""
    data = getattr(handle, "_handle_data", None)
    return data.shape_and_type[0].dtype if data is not None and data.is_set and data.shape_and_type else None


@functools.cache
def has_double_kernel(op_type: str) -> bool:
    """Whether TensorFlow can compute this op in float64 on a processor."""
    kernels = importlib.import_module("tensorflow.python.framework.kernels")
    double = import_tensorflow().float64.as_datatype_enum
    found = [kernel for kernel in kernels.get_registered_kernels_for_op(op_type).kernel if kernel.device_type == "CPU"]
    typed = [constraint for kernel in found for constraint in kernel.constraint if constraint.name == "T"]
    return not typed or any(double in constraint.allowed_values.list.type for constraint in typed)


def layers_of(model: Any) -> list[Any]:
    """All layers of a Keras model, also those inside layers and nested models."""
    return list(model._flatten_layers(include_self=False))


def leave_file_alone(converter: Any) -> Any:
    """A TFLite converter without its own sharing of constants, which unpacks and packs the whole file once more."""
    converter._optimize_tflite_model = lambda model, *_options, **_more: model
    return converter
