"""The messages of the conversation between devices and the coordinator, as frozen, bounded values.

docs/protocol.md, section 4, is the specification; tests/golden/ holds their bytes. A new field must have a default, a
new message a new tag; nothing here is ever renamed. Unknown fields are ignored, so that an old device can read a newer
invitation and decline it by its `requires`. Every bound exists so that a peer cannot make us hold or loop over
more than a round needs. This file does not encode, seal or send anything (see `codec`).
"""

from __future__ import annotations

import math
from typing import Annotated, Union

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

MAX_REASON_CHARS = 500  # a sentence or two for an operator; longer text is cut by the sender
MAX_METRICS = 32
MAX_DEVICES = 10_000  # devices one invitation can name: 64 bytes each keeps it under 1 MB
MAX_CHUNKS = 16_384  # at 64 KiB a blob of 1 GiB
MAX_CHUNK_BYTES = 1024 * 1024
DEFAULT_CHUNK_BYTES = 64 * 1024  # AWS IoT Core refuses messages above 128 KB; half of it leaves room for the envelope
MAX_EPOCHS = 1000
MAX_LEARNING_RATE = 1000.0
MAX_GRADIENT_NORM = 1e9  # far above the norm of any gradient worth a step; keeps the product with it finite in float32
MAX_PROXIMAL_WEIGHT = 1000.0  # FedProx's mu; with learning_rate * mu above 1 a step already overshoots its centre
MAX_DURATION_MS = 30 * 24 * 3600 * 1000  # a month
MAX_STALENESS = 100  # rounds; and as many earlier rounds an invitation can name
MAX_STEPS = 1_000_000  # on one device in one round
MAX_VECTORS = 4  # beside the parameters
MAX_CODED = 255  # devices of a code, and shards: decoding is a search, and each is named in every plan
MAX_TEACHING = 1e12  # of a constant of machine teaching: its square, times a number of instances, stays finite
MAX_BAD = 16  # versions of the agent that a device names as bad; it remembers no more
TRAIN = "train"  # the work of a plan that asks for no other

DeviceId = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z")]
RoundId = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,94}\Z")]
Name = Annotated[str, Meta(max_length=64)]
Reason = Annotated[str, Meta(max_length=MAX_REASON_CHARS)]
TaskName = Annotated[str, Meta(pattern=r"\A(?:[A-Za-z0-9][A-Za-z0-9_-]{0,62})?\Z")]  # safe in a file's name
ShardName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Index = Annotated[int, Meta(ge=0, lt=MAX_CHUNKS)]
Sha256 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Capabilities = Annotated[tuple[Name, ...], Meta(max_length=64)]
EncryptionKey = Annotated[bytes, Meta(min_length=32, max_length=32)]  # X25519


class BlobRef(Struct, frozen=True):
    """A content-addressed piece of data: its sha256, its size in bytes, and the size of all chunks but the last.

    At most MAX_CHUNKS chunks: a peer cannot make us count to millions.
    """

    sha256: Sha256
    size: Annotated[int, Meta(ge=1, le=MAX_CHUNKS * MAX_CHUNK_BYTES)]
    chunk_bytes: Annotated[int, Meta(ge=1, le=MAX_CHUNK_BYTES)] = DEFAULT_CHUNK_BYTES

    def __post_init__(self) -> None:
        if self.num_chunks > MAX_CHUNKS:
            raise ValueError(f"a blob of {self.num_chunks} chunks, the limit is {MAX_CHUNKS}")

    @property
    def num_chunks(self) -> int:
        return -(-self.size // self.chunk_bytes)

    def chunk_size(self, index: int) -> int:
        """Bytes of chunk `index`: chunk_bytes, less for the last one."""
        return min(self.chunk_bytes, self.size - index * self.chunk_bytes)


class TeachingPlan(Struct, frozen=True, omit_defaults=True):
    """The constants of machine teaching, as in `teaching.Settings`; infinity turns crafting off.

    teachers: how many devices teach, whether they take part in this round or not.
    """

    lambda_w: Annotated[float, Meta(gt=0, le=MAX_TEACHING)]
    lambda_t: Annotated[float, Meta(ge=0, le=MAX_TEACHING)]
    rho: Annotated[float, Meta(gt=0, le=MAX_TEACHING)]
    curvature: Annotated[float, Meta(gt=0, le=MAX_TEACHING)]
    teachers: Annotated[int, Meta(ge=1, le=MAX_DEVICES)]
    lambda_a: Annotated[float, Meta(ge=0, le=MAX_TEACHING)] = 0.0
    lambda_z: Annotated[float, Meta(gt=0)] = math.inf
    lambda_y: Annotated[float, Meta(gt=0.5)] = math.inf


class CodingPlan(Struct, frozen=True, omit_defaults=True):
    """Who holds which shards in the cyclic code: docs/protocol.md, section 8.4; the arithmetic is in `coding`.

    devices[j] holds 2 s + 1 shards: shards[j], shards[j + 1], ... around the end. As many devices as shards, each named
    once, more than 2 s of them.
    """

    devices: Annotated[tuple[DeviceId, ...], Meta(min_length=1, max_length=MAX_CODED)]
    shards: Annotated[tuple[ShardName, ...], Meta(min_length=1, max_length=MAX_CODED)]
    s: Annotated[int, Meta(ge=0, le=MAX_CODED)]

    def __post_init__(self) -> None:
        for what, names in (("devices", self.devices), ("shards", self.shards)):
            if len(set(names)) < len(names):
                raise ValueError(f"a code that names one of its {what} twice")
        if len(self.devices) != len(self.shards) or not 2 * self.s < len(self.devices):
            raise ValueError(f"a code of {len(self.devices)} devices, {len(self.shards)} shards and s = {self.s}")

    @property
    def n(self) -> int:
        return len(self.devices)

    def held_by(self, device_id: str) -> tuple[str, ...]:
        """The names of this device's shards, in the order of its coefficients; none where it has no place."""
        if device_id not in self.devices:
            return ()
        place = self.devices.index(device_id)
        return tuple(self.shards[(place + step) % self.n] for step in range(2 * self.s + 1))

    def row_numbers(self, d: int) -> int:
        """How many float64 numbers a row is: d and the number of examples; twice that where it is complex."""
        return (d + 1) * (1 if self.n % 2 else 2)


class TrainingPlan(Struct, frozen=True, omit_defaults=True):
    """What a device is asked to do with its data. The device's own policy may do less, never more.

    epochs: passes over the local data. max_examples: use at most the first this many examples, 0 for all.
    learning_rate: of the local optimizer. shuffle_seed: with the device id it fixes the order of examples, and with the
    step's number what the model itself draws (Dropout). gradient_clip_norm: largest Euclidean norm of a batch's
    gradient over all variables together, 0 for off. proximal_weight: mu of FedProx (Li et al. 2020, arXiv:1812.06127,
    eq. 2): every step's loss gains mu / 2 |w - w_received|^2, 0 for off. compression, kept_fraction: the form in which
    the update travels, see `compression`; no Literal, so that a device declines one it does not know.
    evaluate: names of metrics. Where there are any, nothing is trained: the update is these numbers of the received
    model on the device's data, in this order. task: which of the fleet's tasks this is, "" where it has only one.
    work: what the device makes of its data, see `works`; no Literal, as for compression. steps: so many local steps
    in place of epochs, 0 for epochs. teaching: of the works of machine teaching, which need it. coding: of the cyclic
    code, which needs it.
    """

    epochs: Annotated[int, Meta(ge=1, le=MAX_EPOCHS)]
    learning_rate: Annotated[float, Meta(gt=0, le=MAX_LEARNING_RATE)]
    max_examples: Count = 0
    shuffle_seed: Count = 0
    gradient_clip_norm: Annotated[float, Meta(ge=0, le=MAX_GRADIENT_NORM)] = 0.0
    proximal_weight: Annotated[float, Meta(ge=0, le=MAX_PROXIMAL_WEIGHT)] = 0.0
    compression: Name = "none"
    kept_fraction: Annotated[float, Meta(ge=0, le=1)] = 0.0
    evaluate: Annotated[tuple[Name, ...], Meta(max_length=MAX_METRICS)] = ()
    task: TaskName = ""
    work: Name = TRAIN
    steps: Annotated[int, Meta(ge=0, le=MAX_STEPS)] = 0
    teaching: Union[TeachingPlan, UnsetType] = UNSET
    coding: Union[CodingPlan, UnsetType] = UNSET

    def __post_init__(self) -> None:
        # omit_defaults leaves out what *is* the default; a 0.0 from a configuration is another 0.0
        for name, default in zip(self.__struct_fields__[-len(self.__struct_defaults__) :], self.__struct_defaults__):
            if getattr(self, name) == default:
                msgspec.structs.force_setattr(self, name, default)


# --- coordinator to devices


class Invitation(Struct, frozen=True, tag="invitation", omit_defaults=True):
    """The current round, retained on `fleet/round`.

    duration_ms: how long the round accepts updates; each side counts it from when it sent or got this, by its own
    clock. issued_at_ms: Unix time, for logs only; devices' clocks are not trusted.
    devices: who is invited, empty for everyone. requires: capabilities a device must have to take part, so that later
    kinds of rounds are declined by old devices.
    max_staleness: this round's updates may also be taken by rounds whose number is at most so much larger, 0 for none:
    a device goes on with its work when the round is closed. earlier: ended rounds whose updates are still taken, by
    this round or a later one; of each run the newest first.
    encryption_key: of the round, where updates are to be encrypted to it (see `encryption`).
    vectors: what the plan's work needs beside the parameters, each as large as they are.
    """

    round_id: RoundId
    number: Count
    issued_at_ms: Count
    duration_ms: Annotated[int, Meta(ge=1, le=MAX_DURATION_MS)]
    bundle: BlobRef
    parameters: BlobRef
    plan: TrainingPlan
    # a factory's value is never left out; the first devices' invitations held both
    devices: Annotated[tuple[DeviceId, ...], Meta(max_length=MAX_DEVICES)] = msgspec.field(default_factory=lambda: ())
    requires: Capabilities = msgspec.field(default_factory=lambda: ())
    max_staleness: Annotated[int, Meta(ge=0, le=MAX_STALENESS)] = 0
    earlier: Annotated[tuple[RoundId, ...], Meta(max_length=MAX_STALENESS)] = ()
    encryption_key: Union[EncryptionKey, UnsetType] = UNSET
    vectors: Annotated[tuple[BlobRef, ...], Meta(max_length=MAX_VECTORS)] = ()

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """All that a device fetches."""
        return (self.bundle, self.parameters, *self.vectors)

    @property
    def dimension(self) -> int:
        """d: the parameters are 4 d bytes."""
        return self.parameters.size // 4

    @property
    def update_dimension(self) -> int:
        """How many numbers an update is: d, in an evaluation round one for each metric, of a code those of a row."""
        if self.plan.coding is not UNSET:
            return self.plan.coding.row_numbers(self.dimension)
        return len(self.plan.evaluate) or self.dimension


class RoundClosed(Struct, frozen=True, tag="closed"):
    """The round is over: nothing more is accepted for it. Replaces the invitation on `fleet/round`."""

    round_id: RoundId
    outcome: Name  # "published" or "abandoned"
    reason: Reason = ""


class Need(Struct, frozen=True, tag="need"):
    """Answer to an Offer: the chunks the coordinator does not have yet."""

    round_id: RoundId
    sha256: Sha256
    indices: Annotated[tuple[Index, ...], Meta(min_length=1, max_length=MAX_CHUNKS)]


class Receipt(Struct, frozen=True, tag="receipt"):
    """The update is durable at the coordinator (kept=True), or will never be taken (kept=False, with the reason)."""

    round_id: RoundId
    sha256: Sha256
    kept: bool
    reason: Reason = ""


class Verdict(Struct, frozen=True, tag="verdict"):
    """What became of a kept update: aggregated, or rejected with the reason: by screening or the rule, or because the
    round was abandoned."""

    round_id: RoundId
    status: Name  # "accepted" or "rejected"
    reason: Reason = ""


# --- devices to coordinator


class Presence(Struct, frozen=True, tag="presence"):
    """Retained on `device/ID/presence`; the offline form is also the last will.

    session: grows with every start of the agent, so that an old presence cannot be replayed over a newer one.
    trouble: what the operator should hear of this agent's own software: a release that failed. on_trial: whether this
    agent is a release that has not shown itself healthy yet. bad: versions that this device has tried or looked at and
    does not take, the newest last.
    """

    online: bool
    session: Count
    agent_version: Name = ""
    runtime: Name = ""
    capabilities: Capabilities = ()
    trouble: Union[Reason, UnsetType] = UNSET
    on_trial: Union[bool, UnsetType] = UNSET
    bad: Union[Annotated[tuple[Name, ...], Meta(max_length=MAX_BAD)], UnsetType] = UNSET


class Answer(Struct, frozen=True, tag="answer"):
    """Whether the device takes part in the round; the reason when it does not. for_now: it may still, later in the
    round."""

    round_id: RoundId
    accept: bool
    reason: Reason = ""
    for_now: Union[bool, UnsetType] = UNSET


class Offer(Struct, frozen=True, tag="offer"):
    """The device has an update (trained minus received, in the form the plan's compression names) ready to send."""

    round_id: RoundId
    update: BlobRef
    num_examples: Annotated[int, Meta(ge=1, le=2**53)]
    metrics: Annotated[dict[Name, float], Meta(max_length=MAX_METRICS)] = {}


class Chunk(Struct, frozen=True, tag="chunk"):
    """One asked-for piece of an offered update."""

    round_id: RoundId
    sha256: Sha256
    index: Index
    data: Annotated[bytes, Meta(min_length=1, max_length=MAX_CHUNK_BYTES)]


class Failure(Struct, frozen=True, tag="failure"):
    """The device accepted but will not deliver."""

    round_id: RoundId
    reason: Reason


class Seen(Struct, frozen=True, tag="seen"):
    """The device has read the verdict on its update of this round; nothing more need be said about it."""

    round_id: RoundId


FromCoordinator = Union[Invitation, RoundClosed, Need, Receipt, Verdict]
FromDevice = Union[Presence, Answer, Offer, Chunk, Failure, Seen]
Message = Union[FromCoordinator, FromDevice]


def run_of(round_id: str) -> str:
    """Of a round id RUN.NUMBER.TIME; one that is made otherwise is taken for the name of a run of its own."""
    parts = round_id.rsplit(".", 2)
    return parts[0] if len(parts) == 3 else round_id


def reason_text(text: object) -> str:
    """Any text cut to what a Reason may hold, on one line."""
    flat = " ".join(str(text).split())
    return flat if len(flat) <= MAX_REASON_CHARS else flat[: MAX_REASON_CHARS - 3] + "..."


class Envelope(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What travels: protocol version, who says it, its sequence number, the encoded message, the sender's seal."""

    version: int
    sender: Name
    sequence: Count
    body: bytes
    seal: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
