"""The training bundle: one file that carries a model to every device.

A `.covey` file is a zip without compression (so that it can be checked and mapped as it lies) with exactly
``model.tflite``, ``manifest.json`` and, when sealed, ``seal``: an Ed25519 seal over the manifest's bytes. The manifest
holds the sha256 of the model, so a valid seal vouches for the whole file. docs/bundle.md is the specification.

Reading never loads the model into a runtime: tflite_runtime 2.14 crashes on damaged files, so everything is
checked here first. This file works on bytes; reading and writing files is the callers' part.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from typing import Optional, Union

import msgspec

from covey_protocol.errors import BundleError, TrainingError
from covey_protocol.forms import FLOAT64, NONE, compression_of
from covey_protocol.messages import TrainingPlan
from covey_protocol.parameters import ParameterSpec, total_size
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.works import BundleFacts, check_work

FORMAT_VERSION = 1
MODEL_NAME = "model.tflite"
MANIFEST_NAME = "manifest.json"
SEAL_NAME = "seal"
MAX_BUNDLE_BYTES = 512 * 1024 * 1024  # far above any model that trains on a phone; bounds what a peer can make us hold
MAX_MANIFEST_BYTES = 4 * 1024 * 1024  # a ResNet50's parameter list is under 100 KB
REQUIRED_SIGNATURES = ("train", "evaluate", "infer", "get_parameters", "set_parameters")
RESET_OPTIMIZER = "reset_optimizer"  # the entry point of bundles whose optimizer has state
DTYPES = ("float32", "int32", "uint8")  # of inputs and labels
METRICS = ("loss", "accuracy")  # what an evaluation may ask for, from the sums that `evaluate` gives
TRAIN_INPUTS = ("seed", "clip_norm", "proximal", "correction")  # what `train` may take beside the inputs all have
SEAL_CONTEXT = b"covey bundle 1\x00"
KEEPS = "keeps"  # in the metadata of a model that keeps more between rounds than parameters and optimizer


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or label: shape of one example (without the batch axis) and what values it may hold.

    minimum, maximum: inclusive bounds a device checks before training; None means unbounded.
    """

    shape: tuple[int, ...]
    dtype: str
    minimum: Optional[float] = None
    maximum: Optional[float] = None


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the export measured before it wrote the bundle: TFLite against TensorFlow on the same data.

    max_abs_error: largest difference of any weight after `steps` steps. tolerance: what it was held against.
    judgement: "float32", held against TensorFlow's own float32; "float64", against TensorFlow in float64, because
    rounding can flip a kink of the model (a ReLU) and then no two float32 programs agree.
    """

    steps: int
    max_abs_error: float
    tolerance: float
    runtime: str
    judgement: str = "float32"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a bundle holds; `manifest.json` is exactly this.

    optimizer: the name of the optimizer that `train` steps with. train_inputs: which of TRAIN_INPUTS `train` takes
    beside x, y, example_weight and learning_rate (docs/bundle.md).
    """

    format: int
    name: str
    model_sha256: str
    model_bytes: int
    batch_size: int
    input: TensorSpec
    label: TensorSpec
    parameters: tuple[ParameterSpec, ...]
    signatures: tuple[str, ...]
    loss: str
    optimizer: str
    num_classes: Optional[int] = None
    class_names: tuple[str, ...] = ()
    tensorflow: str = ""
    proof: Optional[Proof] = None
    metadata: dict[str, str] = {}  # msgspec copies empty defaults
    train_inputs: tuple[str, ...] = ()

    @property
    def dimension(self) -> int:
        """d, the length of the flat parameter vector."""
        return total_size(self.parameters)

    @property
    def keeps_state(self) -> bool:
        """Whether a loaded model holds what is neither sent nor reset: moving statistics that stay on the device."""
        return KEEPS in self.metadata

    @property
    def facts(self) -> BundleFacts:
        """What the works of a plan depend on."""
        size = math.prod(self.input.shape)
        return BundleFacts(
            self.name, self.parameters, self.signatures, self.train_inputs, self.optimizer, size, self.loss
        )


class Bundle(msgspec.Struct, frozen=True):
    """A checked bundle in memory. sealed: whether a seal is present (see `read_bundle` for whose)."""

    manifest: Manifest
    model: bytes
    sealed: bool


def write_bundle(manifest: Manifest, model: bytes, key: Optional[SealingKey] = None) -> bytes:
    """The bytes of a `.covey` file. The same inputs give the same bytes (fixed timestamps, stored entries)."""
    manifest = msgspec.structs.replace(
        manifest,
        format=FORMAT_VERSION,
        model_sha256=hashlib.sha256(model).hexdigest(),
        model_bytes=len(model),
    )
    manifest_bytes = _encoded(manifest)
    entries = {MODEL_NAME: model, MANIFEST_NAME: manifest_bytes}
    if key is not None:
        entries[SEAL_NAME] = key.seal(SEAL_CONTEXT + manifest_bytes)
    return _zip(entries)


def read_bundle(data: bytes, sealed_by: Union[PublicKey, Sequence[PublicKey], None] = None) -> Bundle:
    """Check and open a bundle.

    sealed_by: the key whose seal is required, or several of which one must have sealed it; None accepts an unsealed
    bundle (and ignores any seal).
    Raises BundleError naming what is wrong; never loads the model.
    """
    entries = _unzip(data)
    if sealed_by is not None:  # first, so that nobody else's manifest is even parsed
        if SEAL_NAME not in entries:
            raise BundleError("the bundle carries no seal", "export it with the coordinator's key")
        keys = (sealed_by,) if isinstance(sealed_by, PublicKey) else sealed_by
        if not any(key.verifies(entries[SEAL_NAME], SEAL_CONTEXT + entries[MANIFEST_NAME]) for key in keys):
            raise BundleError("the bundle's seal is not the expected coordinator's", "fetch it again or pin its key")
    manifest, model = _manifest(entries[MANIFEST_NAME]), entries[MODEL_NAME]
    if len(model) != manifest.model_bytes or hashlib.sha256(model).hexdigest() != manifest.model_sha256:
        raise BundleError("the model in the bundle does not match its manifest", "fetch or export the bundle again")
    return Bundle(manifest, model, SEAL_NAME in entries)


def check_plan(manifest: Manifest, plan: TrainingPlan) -> None:
    """TrainingError where a plan asks for what the bundle's entry points cannot give, or cannot bear."""
    asked = (
        (plan.gradient_clip_norm, "clip_norm", "gradient clipping (gradient_clip_norm", "--clip"),
        (plan.proximal_weight, "proximal", "FedProx (proximal_weight", "--proximal"),
    )
    for value, name, what, option in asked:
        if value and name not in manifest.train_inputs:
            raise TrainingError(
                f"the plan asks for {what} = {value:g}), and bundle {manifest.name!r} cannot do it",
                f"export the model with `covey export {option}`",
            )
    unknown = [name for name in plan.evaluate if name not in METRICS]
    if unknown or len(set(plan.evaluate)) < len(plan.evaluate):
        raise TrainingError(
            f"the plan asks for the metrics {', '.join(plan.evaluate)}", f"ask for some of {', '.join(METRICS)}, once"
        )
    check_work(manifest.facts, plan)
    _check_compression(manifest, plan)


def _check_compression(manifest: Manifest, plan: TrainingPlan) -> None:
    """A rounded or delayed update of a moving variance can make it negative, and its root NaN on every device."""
    if compression_of(plan).name in (NONE, FLOAT64):
        return
    moving = [spec.name for spec in manifest.parameters if not spec.trainable]
    if moving:
        raise TrainingError(
            f"the plan asks for compression, and {len(moving)} tensors of bundle {manifest.name!r} are moving "
            f"statistics ({moving[0]}, ...), which do not bear it",
            "export the model with `--moving-statistics local`, or use GroupNormalization",
        )


def _encoded(manifest: Manifest) -> bytes:
    """Indented JSON. A field younger than format 1's first bundles is left out where it is empty, so that a device
    that does not know it reads every bundle that does not use it."""
    content = msgspec.to_builtins(manifest)
    if not manifest.train_inputs:
        del content["train_inputs"]
    return msgspec.json.format(msgspec.json.encode(content), indent=1)


def _manifest(data: bytes) -> Manifest:
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise BundleError(f"the bundle's manifest cannot be read ({exc})", "export it again") from exc
    if manifest.format != FORMAT_VERSION:
        raise BundleError(
            f"the bundle has format {manifest.format}, this covey reads {FORMAT_VERSION}",
            "update covey or export again",
        )
    missing = [name for name in REQUIRED_SIGNATURES if name not in manifest.signatures]
    if missing:
        raise BundleError(f"the bundle lacks the entry points {', '.join(missing)}", "export it again")
    unknown = [name for name in manifest.train_inputs if name not in TRAIN_INPUTS]
    if unknown:
        raise BundleError(
            f"the bundle's training step takes inputs unknown here ({', '.join(unknown)})", "update covey"
        )
    if any(size < 0 for spec in manifest.parameters for size in spec.shape) or manifest.dimension < 1:
        raise BundleError("the bundle's parameter list is not usable", "export it again")
    foreign = [spec.dtype for spec in (manifest.input, manifest.label) if spec.dtype not in DTYPES]
    if foreign:
        raise BundleError(f"the bundle takes {' and '.join(foreign)}, unknown here", "update covey")
    if manifest.batch_size < 1:
        raise BundleError(f"the bundle's batch size is {manifest.batch_size}", "export it again")
    return manifest


def _zip(entries: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def _unzip(data: bytes) -> dict[str, bytes]:
    if len(data) > MAX_BUNDLE_BYTES:
        raise BundleError(f"the bundle has {len(data)} bytes, the limit is {MAX_BUNDLE_BYTES}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [info.filename for info in archive.infolist()]
            if sorted(names) not in (
                sorted([MODEL_NAME, MANIFEST_NAME]),
                sorted([MODEL_NAME, MANIFEST_NAME, SEAL_NAME]),
            ):
                raise BundleError(f"the bundle holds unexpected files ({', '.join(names)[:200]})", "export it again")
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise BundleError("the bundle is compressed; entries must be stored", "export it again")
            if archive.getinfo(MANIFEST_NAME).file_size > MAX_MANIFEST_BYTES:
                raise BundleError("the bundle's manifest is too large", "export it again")
            return {name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError, RuntimeError) as exc:
        raise BundleError(f"not a covey bundle ({exc})", "check that the file is a complete .covey file") from exc
