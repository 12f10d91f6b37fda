"""A fleet in memory that says what a test tells it to, and a bundle of some numbers for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from covey_coordinator.fleet import FromFleet
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import REQUIRED_SIGNATURES, Manifest, TensorSpec
from covey_protocol.messages import Answer, Chunk, Invitation, Need, Offer, Receipt
from covey_protocol.parameters import ParameterSpec

D = 300


def manifest(trainable: bool = True) -> Manifest:
    return Manifest(
        format=1,
        name="wide",
        model_sha256="",
        model_bytes=0,
        batch_size=1,
        input=TensorSpec((1,), "float32"),
        label=TensorSpec((1,), "float32"),
        parameters=(ParameterSpec("w", (D - 1,)), ParameterSpec("norm/moving_variance", (1,), trainable=trainable)),
        signatures=REQUIRED_SIGNATURES,
        loss="mean_squared_error",
        optimizer="sgd",
    )


class Scripted:
    """A fleet in memory: every device answers its invitation with an update of its own making."""

    def __init__(self, make: dict[str, Any]) -> None:
        self._make = make
        self._updates: dict[str, bytes] = {}
        self._inbox: list[FromFleet] = []
        self.receipts: dict[str, Receipt] = {}
        self.invitation: Invitation | None = None

    def online(self) -> list[str]:
        return sorted(self._make)

    def publish_blob(self, data: bytes) -> Any:
        return blob_ref(data)

    def clear_blob(self, sha256: bytes) -> None:
        pass

    def publish_round(self, message: Any) -> None:
        if isinstance(message, Invitation):
            self.invitation = message
            for device_id, make in self._make.items():
                self._updates[device_id] = make(message)
                offer = Offer(message.round_id, blob_ref(self._updates[device_id]), 10)
                self._inbox += [FromFleet(device_id, Answer(message.round_id, True)), FromFleet(device_id, offer)]

    def send(self, device_id: str, message: Any) -> None:
        if isinstance(message, Need):
            chunk = Chunk(message.round_id, message.sha256, 0, self._updates[device_id])
            self._inbox.append(FromFleet(device_id, chunk))
        elif isinstance(message, Receipt):
            self.receipts[device_id] = message

    def next(self, timeout_s: float) -> FromFleet | None:
        return self._inbox.pop(0) if self._inbox else None


def numbers(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(D).astype(np.float32)
