"""Random ops, computed from the `seed` input by a counter-based generator made of integer ops TFLite has.

TensorFlow's generators hide their state, and TFLite's RANDOM_UNIFORM has its seed in the file, the same on every
device. Here every random number is a hash of (seed, which random op, index): the same seed gives the same bits in
TensorFlow and in both TFLite runtimes, and another seed gives other ones. About 14 ns per number in tflite_runtime 2.14
on x86-64.

Good enough for dropout and augmentation. It is **not** a cryptographic generator: noise for differential privacy is
added outside the model, from the operating system's entropy (`covey_protocol.privacy`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import static
from covey_models.lowering.registry import RANDOM, Node, Tensor, lowers, refuse
from covey_protocol.errors import BundleError

tf = import_tensorflow()

SEED = "seed"  # the name of the input, and where the rewriter leaves its tensor
STREAMS = "random streams"
GOLDEN_RATIO = 0x9E3779B9


def _number(value: int) -> Tensor:
    return tf.constant(value & 0xFFFFFFFF, tf.uint32)


def _folded(x: Tensor, bits: int) -> Tensor:
    """x ^ (x >> bits)"""
    amount = tf.constant(np.full([1] * x.shape.rank, bits, np.uint32))
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, amount))


def hashed(counter: Tensor, key: Tensor) -> Tensor:
    """A bijective mix of uint32 counters: two xor-shift-multiply rounds, with the key between them.

    Source of shifts and multipliers: Wellons 2018, "Prospecting for hash functions" (lowbias32, bias 0.17).
    """
    x = _folded(counter, 16) * _number(0x7FEB352D)
    x = _folded(tf.bitwise.bitwise_xor(x, key), 15) * _number(0x846CA68B)
    return _folded(x, 16)


def uniform(node: Node, shape: tuple[int, ...]) -> Tensor:
    """float32 in [0, 1), multiples of 2**-24."""
    count = math.prod(shape)
    if not count:
        return tf.zeros(shape)
    columns = next(size for size in range(math.isqrt(count), 0, -1) if count % size == 0)
    down = np.arange(count // columns, dtype=np.uint32)[:, None] * np.uint32(columns)
    across = np.arange(columns, dtype=np.uint32)[None, :]
    offset, key = _keys(node)
    bits = hashed((tf.constant(down) + offset) + tf.constant(across), key)
    fraction = tf.cast(tf.bitwise.right_shift(bits, tf.constant([[8]], tf.uint32)), tf.float32)
    return tf.reshape(fraction * np.float32(2.0**-24), shape)


def _keys(node: Node) -> tuple[Tensor, Tensor]:
    """Two (1, 1) keys that depend on the seed and on which random op this is."""
    if SEED not in node.shared:
        raise BundleError("it draws random numbers and this function has no `seed` input", "add one")
    stream = node.shared[STREAMS] = node.shared.get(STREAMS, -1) + 1
    seed = tf.reshape(tf.cast(node.shared[SEED], tf.uint32), [1, 1])
    counters = tf.concat([seed * _number(2), seed * _number(2) + _number(1)], 1)
    keys = hashed(counters, tf.constant([[(stream + 1) * GOLDEN_RATIO & 0xFFFFFFFF]], tf.uint32))
    return keys[:, :1], keys[:, 1:]


def normal(node: Node, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers by Box and Muller (1958): sqrt(-2 ln u) cos(2 pi v)."""
    u, v = uniform(node, shape), uniform(node, shape)
    return tf.sqrt(-2.0 * tf.math.log(u + np.float32(2.0**-25))) * tf.cos(np.float32(2.0 * math.pi) * v)


def _in_dtype(node: Node, numbers: Tensor) -> Tensor:
    if node.op.outputs[0].dtype != tf.float32:
        raise BundleError(f"it draws {node.op.outputs[0].dtype.name} numbers", "draw float32")
    return numbers


@lowers("RandomUniform", "StatelessRandomUniform", "StatelessRandomUniformV2", table=RANDOM)
def random_uniform(node: Node, shape: Tensor, *_state: Any) -> Tensor:
    """u in [0, 1), from the seed; the op's own seeds are not used."""
    return _in_dtype(node, uniform(node, static(shape)))


@lowers("RandomStandardNormal", "StatelessRandomNormal", "StatelessRandomNormalV2", table=RANDOM)
def random_normal(node: Node, shape: Tensor, *_state: Any) -> Tensor:
    """Standard normal, from the seed; the op's own seeds are not used."""
    return _in_dtype(node, normal(node, static(shape)))


@lowers("RandomUniformInt", table=RANDOM)
def random_integers(node: Node, shape: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """low + floor(u (high - low)), for ranges below 2**24."""
    low, high = tf.cast(low, tf.float32), tf.cast(high, tf.float32)
    drawn = tf.floor(uniform(node, static(shape)) * (high - low)) + low
    return tf.cast(drawn, node.op.outputs[0].dtype)


@lowers("RngReadAndSkip", "StatelessRandomGetKeyCounter", "StatelessRandomGetKey", "StatelessRandomGetCounter",
        "StatelessRandomGetAlg", table=RANDOM)  # fmt: skip
def unused_state(node: Node, *_inputs: Any) -> list[Tensor]:
    """TensorFlow's own generator state: nobody reads it any more."""
    return [tf.zeros(output.shape, output.dtype) for output in node.op.outputs]


refuse(
    "RandomUniform", "RandomStandardNormal", "RandomUniformInt", "StatelessRandomUniform", "StatelessRandomUniformV2",
    "StatelessRandomNormal", "StatelessRandomNormalV2",
    why="it draws random numbers where no seed reaches it",
    remedy="draw only while training",
)  # fmt: skip
refuse(
    "TruncatedNormal", "Multinomial", "RandomShuffle", "RandomGamma", "RandomPoissonV2", "RandomGammaGrad",
    "ParameterizedTruncatedNormal", "StatelessTruncatedNormal", "StatelessTruncatedNormalV2", "StatelessMultinomial",
    "StatelessRandomUniformFullInt", "StatelessRandomUniformFullIntV2", "StatelessRandomUniformInt",
    "StatelessRandomUniformIntV2", "StatefulUniform", "StatefulStandardNormalV2", "StatefulUniformInt",
    "StatelessShuffle",
    why="only uniform and normal numbers can be drawn on a device",
    remedy="compute it from tf.random.uniform or tf.random.normal",
)  # fmt: skip
