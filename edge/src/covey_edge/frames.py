"""Length-prefixed msgpack frames over a pipe: how the agent and its training child talk."""

from __future__ import annotations

import struct
from typing import IO, Annotated, Any, Optional, Union

import msgspec

from covey_edge.data_report import DataReport
from covey_edge.model_rules import Score
from covey_edge.reading import Reading
from covey_protocol.messages import TrainingPlan

MAX_FRAME_BYTES = 2 * 1024 * 1024 * 1024
_LENGTH = struct.Struct("<I")
# a child that ran a hostile model must not choose where its files go
FileName = Annotated[str, msgspec.Meta(pattern=r"\A[a-z]{1,32}\.[a-z]{1,8}\Z")]


# the kind of the Problem of a model that looks made to read the data; and all that the coordinator hears of it: the
# reasons would tell a hostile one how near it came, and something of the data
SUSPECTED = "Suspected"
SUSPECTED_TOLD = "this device takes the model for one made to read its data; the reasons are in its log alone"


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Load this bundle (already in the cache) and these data, or none where data_path is "". sealed_by: the
    coordinator's public key, hex; or by one of or_by, while it has two. reading: how the data are read. threads: of
    the runtime."""

    bundle_path: str
    bundle_sha256: bytes
    sealed_by: str
    data_source: str
    data_path: str
    or_by: tuple[str, ...] = ()
    reading: Reading = Reading()
    threads: int = 1


class Run(msgspec.Struct, frozen=True, tag="run"):
    """Train from these parameters and answer with the update; or evaluate them, where the plan asks for metrics.

    withheld: what earlier updates left out, float32, to be sent now, or the control that SCAFFOLD keeps, or a teacher's
    state; b"" for nothing. held_out: the data that were opened are kept for evaluations. vectors: the invitation's,
    float32.
    max_epochs: the owner's, which bounds a plan's steps by the batches of so many passes; 0 for no bound.
    data_source, trusted_path: of the instances that the owner vouches for, "" for none.
    replica: the owner's name for data that other devices hold, too; "" for none.
    record: whether to answer with what was done, for the owner.
    debug: what becomes of examples with doubted labels, as in agent.toml.
    shards: name -> path of those that this device holds of a code.
    max_psnr_db, max_label_recovery: the owner's, of `leak_gate`; 0 for no limit.
    screen_models: the owner's, of `model_screening`.
    reading: of the data that were opened; instances and shards beside them are read likewise.
    """

    round_id: str
    device_id: str
    parameters: bytes
    plan: TrainingPlan
    clip_norm: float
    noise_multiplier: float
    min_examples: int
    noise_moving_statistics: bool = False
    withheld: bytes = b""
    held_out: bool = False
    vectors: tuple[bytes, ...] = ()
    max_epochs: int = 0
    data_source: str = "npz"
    trusted_path: str = ""
    replica: str = ""
    record: bool = False
    shards: dict[str, str] = {}
    max_psnr_db: float = 0.0
    max_label_recovery: float = 0.0
    screen_models: str = "refuse"
    debug: str = ""
    reading: Reading = Reading()

    @property
    def order_name(self) -> str:
        """Whose order of examples, and of what the model draws, this is."""
        return self.replica or self.device_id


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """Only look whether the data can be read, and which runtime there is.

    bundle_path: of a bundle that the data are to fit; "" for none. Nobody's seal is asked for: it is not loaded.
    """

    data_source: str
    data_path: str
    reading: Reading = Reading()
    bundle_path: str = ""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A request went well. update and metrics are set for Run only, num_examples for Probe as well.

    withheld: what is to be kept for later rounds: what this update leaves out or SCAFFOLD's control, float32, or a
    teacher's state. found: files for the device's owner, by name; they are never sent. record: an encoded
    `captures.Work`, never sent either. warnings: for the owner's log. report: on the data, where they were read;
    for the owner, too.
    """

    update: bytes = b""
    num_examples: int = 0
    metrics: dict[str, float] = {}
    runtime: str = ""
    withheld: bytes = b""
    found: dict[FileName, bytes] = {}
    record: bytes = b""
    warnings: tuple[str, ...] = ()
    report: Optional[DataReport] = None


class Problem(msgspec.Struct, frozen=True, tag="problem"):
    """A request failed. kind: the error's class name in covey_protocol.errors, or `leak_gate.STOPPED`. found: as in
    Done. told: what a DataError lets others hear."""

    kind: str
    what: str
    remedy: str = ""
    found: dict[FileName, bytes] = {}
    told: str = ""


class Tune(msgspec.Struct, frozen=True):
    """Fine-tune the first of the parameters on these data by this plan. layers: whose parameters may move, () for all;
    name: as Run.order_name."""

    data_source: str
    data_path: str
    plan: TrainingPlan
    layers: tuple[str, ...]
    name: str
    reading: Reading = Reading()


class Personalise(msgspec.Struct, frozen=True, tag="personalise"):
    """Score these parameters, all on the same held-out data ("" for none), and with `tune` also a fine-tuned first one.

    parameters: (path, sha256 in hex). sealed_by: keys of which one sealed the bundle.
    """

    bundle_path: str
    bundle_sha256: str
    sealed_by: tuple[str, ...]
    parameters: tuple[tuple[str, str], ...]
    data_source: str
    data_path: str
    tune: Optional[Tune] = None
    reading: Reading = Reading()
    threads: int = 1


class Personalised(msgspec.Struct, frozen=True, tag="personalised"):
    """counts: examples of each group of the held-out data. scores: in the order of the parameters, the fine-tuned ones'
    last. Both empty without held-out data. parameters: the fine-tuned ones, float32 little-endian. has_classes: whether
    accuracy means anything."""

    counts: tuple[int, ...]
    scores: tuple[Score, ...]
    has_classes: bool
    parameters: bytes = b""


Frame = Union[Open, Run, Probe, Done, Problem, Personalise, Personalised]
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Frame)


def write_frame(stream: IO[bytes], frame: Frame) -> None:
    data = msgspec.msgpack.encode(frame)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Optional[Any]:
    """The next frame, or None at the end of the stream (also in the middle of a frame: the writer died)."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    return _decoder.decode(data) if len(data) == length else None
