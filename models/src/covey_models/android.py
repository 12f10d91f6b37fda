"""What a bundle asks of Android's TFLite runtimes, beyond what every runtime that covey names has.

An app can run a bundle with org.tensorflow:tensorflow-lite (without select-tf-ops, which no bundle needs), with LiteRT
(com.google.ai.edge.litert:litert, which is younger than TFLite 2.14) or with Google Play services, whose runtime Google
renews. For the first the release is what counts: `RELEASES` says since when each operator is there. What is older than
FLOOR is not listed; of releases after 2.14, whose news covey refuses, what a converter is likely to make. The model is
never run here, and no phone has seen any of this.

Sources: operators from TensorFlow's tensorflow/compiler/mlir/lite/tools/versioning/runtime_version.cc (as of 2.23); a
test holds them against what was measured of 2.14 (`runtime_operators`). Training and several signatures in Java since
2.7: TensorFlow's blog of 9 November 2021, "On-device training in TensorFlow Lite". Signatures without inputs:
NativeInterpreterWrapper.runSignature ("Inputs should not be null or empty").
"""

from __future__ import annotations

from typing import Optional

from covey_models.tflite_file import Operator, TfliteModel

FLOOR = "2.7"  # signatures that train
SCHEMA = 3
MAX_MODEL_BYTES = 2**31 - 1  # of a flatbuffer, and of a ByteBuffer
# org.tensorflow.lite.DataType's numbers
TYPES = ("FLOAT32", "INT32", "UINT8", "INT64", "INT16", "INT8", "BOOL")
# release -> operators that came with it, by name and version
_RELEASES = {
    "2.8": "CAST:3 TILE:3 RANDOM_STANDARD_NORMAL:1 BUCKETIZE:1 WHERE:2 RANDOM_UNIFORM:1 MULTINOMIAL:1",
    "2.9": "CONV_2D:6 CAST:4 ARG_MAX:3 ARG_MIN:3 GELU:1 GELU:2 DYNAMIC_UPDATE_SLICE:1",
    "2.10": "RELU_0_TO_1:1 UNSORTED_SEGMENT_PROD:1 UNSORTED_SEGMENT_MAX:1 UNSORTED_SEGMENT_SUM:1 ATAN2:1",
    "2.11": "CONV_2D:7 DEPTHWISE_CONV_2D:7 FULLY_CONNECTED:10 MUL:6 UNSORTED_SEGMENT_MIN:1 SIGN:1",
    "2.12": (
        "SPACE_TO_BATCH_ND:4 BATCH_TO_SPACE_ND:4 CAST:5 TRANSPOSE:6 UNIDIRECTIONAL_SEQUENCE_LSTM:4 MIRROR_PAD:3 "
        "SELECT:3 SELECT:4 SELECT_V2:2 EXP:2 ABS:5 FILL:4 SIGN:2"
    ),
    "2.13": (
        "ADD:5 GATHER:6 GATHER_ND:4 MUL:7 TOPK_V2:3 TRANSPOSE_CONV:4 PACK:4 EQUAL:4 GREATER_EQUAL:3 LESS:3 FLOOR_DIV:3 "
        "FLOOR_MOD:2 BITCAST:1 BITWISE_XOR:1 RIGHT_SHIFT:1"
    ),
    "2.14": "CONCATENATION:4 STRIDED_SLICE:7 STRIDED_SLICE:8 SLICE:6 RANGE:2",
    "2.15": (
        "CONV_2D:8 CAST:6 FULLY_CONNECTED:11 GATHER:7 TRANSPOSE:7 TRANSPOSE_CONV:5 LOG:2 RSQRT:3 STABLEHLO_SCATTER:1 "
        "DILATE:1 STABLEHLO_RNG_BIT_GENERATOR:1 REDUCE_WINDOW:1"
    ),
    "2.16": "GATHER_ND:5 STABLEHLO_GATHER:1 STABLEHLO_ADD:1 STABLEHLO_MULTIPLY:1 STABLEHLO_MAXIMUM:1",
    "2.17": "CAST:7 FULLY_CONNECTED:12 DYNAMIC_UPDATE_SLICE:2 STABLEHLO_COMPOSITE:1",
    "2.18": "EMBEDDING_LOOKUP:4 FULLY_CONNECTED:13 DEQUANTIZE:6",
    "2.19": "DYNAMIC_UPDATE_SLICE:3",
    "2.20": "PAD:5 PADV2:5 DYNAMIC_UPDATE_SLICE:4",
}
RELEASES = {
    (name, int(version)): release
    for release, entries in _RELEASES.items()
    for name, version in (entry.split(":") for entry in entries.split())
}


def numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def first_release(operator: Operator) -> str:
    """Of org.tensorflow:tensorflow-lite; FLOOR also for what no release has, which is a problem of its own."""
    return RELEASES.get((operator.name, operator.version), FLOOR)


def needed_release(model: TfliteModel) -> tuple[str, Optional[Operator]]:
    """The oldest that runs the model, and an operator that asks for it; none where all are as old as FLOOR."""
    release: str = FLOOR
    reason: Optional[Operator] = None
    for graph in model.subgraphs:
        for operator in graph.operators:
            first = first_release(operator)
            if numbers(first) > numbers(release):
                release, reason = first, operator
    return release, reason


def without_inputs(model: TfliteModel) -> list[str]:
    return sorted(name for name, point in model.entry_points.items() if not point.inputs)
