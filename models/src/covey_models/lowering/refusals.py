"""Ops that are refused by name, whatever the converter would make of them: why, and what to do instead."""

from __future__ import annotations

from covey_models.lowering.registry import refuse

refuse(
    "CTCLoss", "CTCLossV2", "CTCGreedyDecoder", "CTCBeamSearchDecoder",
    why="connectionist temporal classification walks over paths whose number depends on the data",
    remedy="train such a model on a desktop; on devices use a loss per time step",
)  # fmt: skip
refuse(
    "Dilation2D", "Dilation2DBackpropInput", "Dilation2DBackpropFilter",
    why="greyscale morphology has no builtin",
    remedy="use a max pool, which is a dilation with a flat element",
)  # fmt: skip
refuse(
    "UniqueV2", "UniqueWithCounts", "UniqueWithCountsV2",
    "ResourceSparseApplyAdagrad", "ResourceSparseApplyAdagradV2", "ResourceSparseApplyAdadelta",
    "ResourceSparseApplyCenteredRMSProp", "ResourceSparseApplyFtrl", "ResourceSparseApplyFtrlV2",
    "ResourceSparseApplyKerasMomentum", "ResourceSparseApplyMomentum", "ResourceSparseApplyProximalAdagrad",
    "ResourceSparseApplyProximalGradientDescent", "ResourceSparseApplyRMSProp",
    why="the shape of its result, or which rows it changes, depends on the data",
    remedy="use a mask (tf.where(condition, a, b)) for a selection; for the gradient of an embedding, "
    "tf.convert_to_tensor(gradient) before the optimizer",
)  # fmt: skip
refuse(
    "MatrixInverse", "MatrixDeterminant", "LogMatrixDeterminant", "Cholesky", "CholeskyGrad", "MatrixSolve",
    "MatrixSolveLs", "MatrixTriangularSolve", "Qr", "Svd", "SelfAdjointEigV2", "Eig", "Lu", "MatrixExponential",
    "MatrixLogarithm", "MatrixSquareRoot", "BandedTriangularSolve", "TridiagonalSolve",
    why="TFLite has no linear algebra beyond products, and unrolled elimination without pivoting is not safe",
    remedy="compute it on the desktop and make it a constant, or parametrise the layer without it",
)  # fmt: skip
refuse(
    "Complex", "Conj", "Angle", "FFT", "FFT2D", "FFT3D", "IFFT", "IFFT2D", "IFFT3D", "RFFT3D", "IRFFT", "IRFFT2D",
    "IRFFT3D",
    why="complex numbers cannot be trained in TFLite",
    remedy="a spectrum (rfft, stft) of the input works, before anything that is trained; "
    "behind that use real matrices of sines and cosines",
)  # fmt: skip
refuse(
    "PyFunc", "EagerPyFunc", "PyFuncStateless", "NumpyFunction",
    why="it calls Python, and there is no Python inside a TFLite model",
    remedy="write it in TensorFlow ops",
)  # fmt: skip
refuse(
    "HashTableV2", "MutableHashTableV2", "LookupTableFindV2", "LookupTableImportV2",
    why="tables of words belong before the model",
    remedy="look words up on the host and feed the model integers",
)  # fmt: skip
refuse(
    "FractionalMaxPool", "FractionalAvgPool", "FractionalMaxPoolGrad", "FractionalAvgPoolGrad",
    why="its pooling regions are drawn at random",
    remedy="use a max or average pool",
)  # fmt: skip
