"""A fleet in memory whose devices say what a test tells them to, and a bundle for it. For the coordinator alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from covey_coordinator.fleet import FromFleet
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import REQUIRED_SIGNATURES, Manifest, TensorSpec
from covey_protocol.device import CAPABILITIES
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Chunk,
    FromCoordinator,
    Invitation,
    Need,
    Offer,
    Receipt,
    RoundClosed,
    Seen,
    Verdict,
)
from covey_protocol.parameters import ParameterSpec

D = 300


def manifest_of(*parameters: ParameterSpec) -> Manifest:
    """Of a model that nobody runs."""
    return Manifest(
        format=1,
        name="scripted",
        model_sha256="",
        model_bytes=0,
        batch_size=1,
        input=TensorSpec((1,), "float32"),
        label=TensorSpec((1,), "float32"),
        parameters=parameters,
        signatures=REQUIRED_SIGNATURES,
        loss="mean_squared_error",
        optimizer="sgd",
    )


def manifest(trainable: bool = True) -> Manifest:
    return manifest_of(ParameterSpec("w", (D - 1,)), ParameterSpec("norm/moving_variance", (1,), trainable=trainable))


class Scripted:
    """Every invited device answers with an update of its own making, of one chunk.

    make: device -> a function of the invitation. capabilities: of those that have not all. metrics: of every offer.
    """

    def __init__(
        self,
        make: Mapping[str, Callable[[Invitation], bytes]],
        capabilities: Mapping[str, Sequence[str]] | None = None,
        metrics: Mapping[str, dict[str, float]] | None = None,
    ) -> None:
        self.make = dict(make)
        self._capabilities, self._metrics = capabilities or {}, metrics or {}
        self._updates: dict[str, bytes] = {}
        self._inbox: list[FromFleet] = []
        self.receipts: dict[str, Receipt] = {}
        self.verdicts: list[tuple[str, Verdict]] = []
        self.invitations: list[Invitation] = []

    @property
    def invitation(self) -> Invitation | None:
        return self.invitations[-1] if self.invitations else None

    def online(self) -> list[str]:
        return sorted(self.make)

    def known(self) -> list[str]:
        return sorted(self.make)

    def capabilities(self, device_id: str) -> Sequence[str]:
        return self._capabilities.get(device_id, CAPABILITIES)

    def publish_blob(self, data: bytes) -> BlobRef:
        return blob_ref(data)

    def clear_blob(self, sha256: bytes) -> None:
        pass

    def publish_round(self, message: Invitation | RoundClosed, in_use: Collection[bytes] = ()) -> None:
        if not isinstance(message, Invitation):
            return
        self.invitations.append(message)
        for device_id in message.devices:
            self._updates[device_id] = self.make[device_id](message)
            ref = blob_ref(self._updates[device_id])
            offer = Offer(message.round_id, ref, 10, self._metrics.get(device_id, {}))
            self._inbox += [FromFleet(device_id, Answer(message.round_id, True)), FromFleet(device_id, offer)]

    def send(self, device_id: str, message: FromCoordinator) -> None:
        if isinstance(message, Need):
            chunk = Chunk(message.round_id, message.sha256, 0, self._updates[device_id])
            self._inbox.append(FromFleet(device_id, chunk))
        elif isinstance(message, Receipt):
            self.receipts[device_id] = message
        elif isinstance(message, Verdict):
            self.verdicts.append((device_id, message))
            self._inbox.append(FromFleet(device_id, Seen(message.round_id)))  # a run lingers for those who have not

    def next(self, timeout_s: float) -> FromFleet | None:
        if not self._inbox:
            time.sleep(min(timeout_s, 0.01))
            return None
        return self._inbox.pop(0)


def numbers(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(D).astype(np.float32)
