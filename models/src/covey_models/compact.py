"""A TFLite file without what no runtime needs: every constant once, no names of tensors, no empty tables.

The converter writes each entry point as a graph of its own, with its own copies of index tables and shapes and with
names that repeat Keras' scopes. What the file computes stays as it is, to the bit.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import flatbuffers
import numpy as np

from covey_models._tensorflow import flatbuffer_schema
from covey_models.overwriting import copy_what_would_be_overwritten

FILE_IDENTIFIER = b"TFL3"
ALIGNMENT = 16  # of constants, in bytes: the schema's force_align, which its Python classes leave out
_NOTHING = SimpleNamespace()


def compacted(model: bytes) -> bytes:
    """The same model, smaller, with `covey_models.overwriting` prevented. Names of inputs and outputs stay."""
    schema = flatbuffer_schema()
    parsed = schema.ModelT.InitFromObj(schema.Model.GetRootAs(model, 0))
    copy_what_would_be_overwritten(parsed)
    _share_buffers(parsed)
    for graph in parsed.subgraphs:
        for tensor in graph.tensors:
            tensor.name = None
            if not any(vars(tensor.quantization or _NOTHING).values()):
                tensor.quantization = None
    builder = flatbuffers.Builder(len(model))
    builder.Finish(parsed.Pack(builder), FILE_IDENTIFIER)
    return bytes(builder.Output())


def _share_buffers(model: Any) -> None:
    """One buffer per distinct content; tensors and metadata point to it. Buffer 0 stays the empty one."""
    first: dict[bytes, int] = {b"": 0}
    kept = [model.buffers[0]]
    renumbered = []
    for buffer in model.buffers:
        content = _content(buffer)
        if content not in first:
            first[content] = len(kept)
            kept.append(_Aligned(content))
        renumbered.append(first[content])
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            tensor.buffer = renumbered[tensor.buffer]
    for entry in model.metadata or []:
        entry.buffer = renumbered[entry.buffer]
    model.buffers = kept


class _Aligned:
    """A flatbuffer `Buffer` whose bytes start at a multiple of ALIGNMENT."""

    def __init__(self, content: bytes) -> None:
        self.data = content

    def Pack(self, builder: Any) -> Any:
        schema, size = flatbuffer_schema(), len(self.data)
        builder.StartVector(1, size, ALIGNMENT)
        builder.head -= size
        builder.Bytes[builder.head : builder.head + size] = self.data
        data = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, data)
        return schema.BufferEnd(builder)


def _content(buffer: Any) -> bytes:
    return b"" if buffer.data is None else np.asarray(buffer.data, np.uint8).tobytes()
