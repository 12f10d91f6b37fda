"""From rewritten functions to the bytes of a TFLite model that holds builtin ops only.

TFLite's converter knows one way to several signatures with variables: a SavedModel on disk. It goes through a
temporary directory. Errors of the converter, which run over many screens, become one sentence.
"""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from covey_models._tensorflow import import_tensorflow, leave_file_alone, quiet
from covey_models.compact import compacted
from covey_models.lowering import Lowered, describe
from covey_models.tflite_file import operators
from covey_protocol.errors import BundleError

tf = import_tensorflow()


def convert(functions: Mapping[str, Lowered], variables: list[Any], layers: Collection[str] = ()) -> bytes:
    """One TFLite model with one entry point per function.

    variables: all that the functions read and write, with the values the file starts from. layers: names for errors.
    """
    holder = tf.Module()
    holder.held = list(variables)
    try:
        with tempfile.TemporaryDirectory() as folder, quiet(), _no_garbage_collection():
            tf.saved_model.save(holder, folder, {name: lowered.function for name, lowered in functions.items()})
            converter = _converter(folder)
            model = compacted(bytes(converter.convert()))
    except (
        Exception
    ) as exc:  # the converter raises whatever its C++ half reports: ConverterError, ValueError, RuntimeError
        raise _explained(exc, functions, layers) from exc
    foreign = [name for name in operators(model) if name.startswith("custom ")]
    if foreign:
        raise BundleError(f"the converted model needs ops that are no TFLite builtins ({', '.join(foreign)})", _REMEDY)
    return model


_REMEDY = "replace the layer, or add a lowering for the op (docs: how to add a lowering)"


def _converter(folder: str) -> Any:
    """TFLite's converter for builtin ops and variables."""
    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    converter.experimental_enable_resource_variables = True
    converter.exclude_conversion_metadata = True
    return leave_file_alone(converter)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The collector would walk the converter's million small objects again and again: half of its Python time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _explained(exc: Exception, functions: Mapping[str, Lowered], layers: Collection[str]) -> BundleError:
    """The converter's complaint as one sentence that names the op and, where we left it in place, its layer."""
    message = str(exc)
    listed = re.search(r"(?:Flex|Custom) ops: ([\w, ]+)", message)
    types = [name.strip() for name in listed.group(1).split(",")] if listed else re.findall(r"'tf\.(\w+)' op", message)
    for op_type in types:
        for lowered in functions.values():
            for op_name in lowered.kept.get(op_type, []):
                what = f"{describe(op_type, op_name, layers)} is neither a TFLite builtin nor has it a lowering"
                return BundleError(what, _REMEDY)
    if types:
        return BundleError(f"the op {types[0]} is neither a TFLite builtin nor has it a lowering", _REMEDY)
    complaint = re.search(r"error: .*?('[\w.]+' op .*)", message) or re.search(r"(\S.*)", message)
    said = complaint.group(1)[:300] if complaint else type(exc).__name__
    return BundleError(f"TFLite's converter refuses the model ({said})", "simplify the model step by step")
