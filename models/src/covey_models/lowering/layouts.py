"""Channels-first models: the lowerings for channels-last layout between two transposes.

TensorFlow runs NCHW on processors for which it was built with oneDNN. Every TFLite kernel wants NHWC. The transpose
of a tensor is made once, however many ops read it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering import convolution, normalisation, pooling, volumes
from covey_models.lowering.formulations import static
from covey_models.lowering.registry import LOWERINGS, Lowering, Node, Tensor, lowers

tf = import_tensorflow()


@lowers("MaxPool")
def max_pool(node: Node, images: Tensor) -> Tensor:
    """The builtin MAX_POOL_2D; explicit padding is filled with -3e38 first."""
    padding = node.attribute("padding")
    if padding == "EXPLICIT":
        sides = np.array(node.attribute("explicit_paddings"), np.int32).reshape(4, 2)
        images = tf.raw_ops.PadV2(input=images, paddings=sides, constant_values=np.float32(pooling.BELOW_ALL))
        padding = "VALID"
    return tf.raw_ops.MaxPool(
        input=images, ksize=node.attribute("ksize"), strides=node.attribute("strides"), padding=padding
    )


@lowers("AvgPool")
def average_pool(node: Node, images: Tensor) -> Tensor:
    """The builtin AVERAGE_POOL_2D."""
    sizes = {name: node.attribute(name) for name in ("ksize", "strides", "padding")}
    return tf.raw_ops.AvgPool(value=images, **sizes)


@lowers("DepthwiseConv2dNative")
def depthwise_convolution(node: Node, images: Tensor, kernel: Tensor) -> Tensor:
    """The builtin DEPTHWISE_CONV_2D."""
    attributes = {name: node.attribute(name) for name in ("strides", "padding", "explicit_paddings", "dilations")}
    return tf.raw_ops.DepthwiseConv2dNative(input=images, filter=kernel, **attributes)


@dataclass(frozen=True)
class _ChannelsLast(Node):
    """The same op as if its layout were channels last."""

    def attribute(self, name: str) -> Any:
        value = super().attribute(name)
        if name in ("strides", "ksize", "dilations"):
            return [value[0], *value[2:], value[1]]
        if name == "explicit_paddings" and value:
            return [*value[:2], *value[4:], *value[2:4]]
        return {"NCHW": "NHWC", "NCDHW": "NDHWC"}.get(value, value) if name == "data_format" else value


def _channels_last(node: Node, x: Tensor) -> Tensor:
    key = ("channels last", x.ref())
    if key not in node.shared:
        node.shared[key] = tf.transpose(x, [0, *range(2, x.shape.rank), 1])
    return node.shared[key]


def _channels_first(x: Tensor) -> Tensor:
    return tf.transpose(x, [0, x.shape.rank - 1, *range(1, x.shape.rank - 1)])


@dataclass(frozen=True)
class Roles:
    """Which inputs of an op are images and which are shapes of images, and whether its (first) output is an image."""

    images: tuple[int, ...] = ()
    shapes: tuple[int, ...] = ()
    gives_image: bool = True


FORWARD = Roles(images=(0,))
FILTER_GRADIENT = Roles(images=(0, 2), gives_image=False)
INPUT_GRADIENT = Roles(images=(2,), shapes=(0,))
ROLES = {
    "Conv2D": FORWARD,
    "Conv2DBackpropFilter": FILTER_GRADIENT,
    "Conv2DBackpropInput": INPUT_GRADIENT,
    "DepthwiseConv2dNative": FORWARD,
    "DepthwiseConv2dNativeBackpropFilter": FILTER_GRADIENT,
    "DepthwiseConv2dNativeBackpropInput": INPUT_GRADIENT,
    "MaxPool": FORWARD,
    "MaxPoolGrad": Roles(images=(0, 1, 2)),
    "AvgPool": FORWARD,
    "AvgPoolGrad": Roles(images=(1,), shapes=(0,)),
    "Conv3D": FORWARD,
    "Conv3DBackpropFilterV2": FILTER_GRADIENT,
    "Conv3DBackpropInputV2": INPUT_GRADIENT,
    "MaxPool3D": FORWARD,
    "MaxPool3DGrad": Roles(images=(0, 1, 2)),
    "AvgPool3D": FORWARD,
    "AvgPool3DGrad": Roles(images=(1,), shapes=(0,)),
    "FusedBatchNormV3": FORWARD,
    "FusedBatchNormGradV3": Roles(images=(0, 1)),
}


def _in_either_layout(lowering: Lowering, roles: Roles) -> Lowering:
    @functools.wraps(lowering)
    def lowered(node: Node, *inputs: Tensor) -> Any:
        if not node.attribute("data_format").startswith("NC"):
            return lowering(node, *inputs)
        turned = list(inputs)
        for index in roles.images:
            turned[index] = _channels_last(node, inputs[index])
        for index in roles.shapes:
            batch, channels, *size = static(inputs[index])
            turned[index] = tf.constant([batch, *size, channels])
        output = lowering(_ChannelsLast(**vars(node)), *turned)
        if isinstance(output, tuple):
            return (_channels_first(output[0]), *output[1:])
        return _channels_first(output) if roles.gives_image else output

    return lowered


THEMES = (convolution, normalisation, pooling, volumes)  # importing registers what is wrapped here
for _op_type, _roles in ROLES.items():
    LOWERINGS[_op_type] = _in_either_layout(LOWERINGS[_op_type], _roles)
