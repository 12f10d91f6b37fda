"""A demo record as a real demo fills it: three runs of ten devices, three of them corrupted in two runs."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np

from covey_coordinator.records import (
    ACCEPTED,
    MISSING,
    REJECTED,
    DemoRecord,
    DeviceVerdict,
    InversionRecord,
    Reconstruction,
    RoundRecord,
    RunRecord,
)

DEVICES = [f"pi-{number}" for number in range(1, 11)]
CORRUPTED = ["pi-3", "pi-7", "pi-10"]
DIGITS = [str(digit) for digit in range(10)]


VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b]0;x\x07{{ 7*7 }}$\\frac{\ud800"


class Page(HTMLParser):
    """Elements and their attributes; complains about tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.text = text
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def loads_and_runs_nothing(self) -> None:
        names = {name for name, _ in self.elements}
        assert not names & {"script", "link", "iframe", "object", "embed", "a", "base", "form", "foreignobject"}
        for _, attributes in self.elements:
            assert not any(name.startswith("on") for name in attributes)
            assert "href" not in attributes
            assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
        assert not re.search(r"@import|url\(|https?://", self.text)
        policy = next(m["content"] for m in self.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None
        assert policy.startswith("default-src 'none'")


def run(title: str, rule: str, corrupted: list[str], final: float, rejects: bool, rounds: int = 12) -> RunRecord:
    rng = np.random.default_rng(len(title))
    finished = []
    for number in range(1, rounds + 1):
        verdicts = []
        for device in DEVICES:
            bad = device in corrupted
            if rng.random() < 0.04:
                verdicts.append(DeviceVerdict(device, MISSING, "no update before the deadline of 20 s"))
            elif rejects and ((bad and rng.random() < 0.95) or (not bad and rng.random() < 0.02)):
                verdicts.append(DeviceVerdict(device, REJECTED, "3.4 times the median distance to its nearest devices"))
            else:
                verdicts.append(DeviceVerdict(device, ACCEPTED, num_examples=120, update_norm=0.4))
        accuracy = 0.1 + (final - 0.1) * (1 - math.exp(-number / 2.5)) + 0.01 * rng.normal()
        finished.append(RoundRecord(number, accuracy, 1.0, verdicts, 2.0))
    finished[-1] = RoundRecord(rounds, final, 0.2, finished[-1].verdicts, 2.0)
    return RunRecord(title, rule, "tff", corrupted, finished)


def inversion_of_a_picture() -> InversionRecord:
    rng = np.random.default_rng(0)
    truth = np.clip(np.outer(np.hanning(8), np.hanning(8)) * 1.2, 0, 1).astype(np.float32)[:, :, None]

    def attempt(title: str, noise: float, **more: Any) -> Reconstruction:
        image = np.clip(truth + noise * rng.normal(size=truth.shape), 0, 1).astype(np.float32)
        error = float(np.mean((image - truth) ** 2))
        return Reconstruction(title, image, error, 10 * math.log10(1 / error) if error else math.inf, **more)

    return InversionRecord(
        device_id="pi-4",
        attacker_sees="The update of one SGD step on one example.",
        method="Dense layer, then Gauss-Newton steps.",
        truth=truth,
        true_label=3,
        input_range=(0.0, 1.0),
        reconstructions=[
            attempt("as sent", 1e-6, label=3, resolved=64.0),
            attempt("clipped to 0.5", 1e-6, label=3, clip_norm=0.5, resolved=64.0),
            attempt(
                "clipped to 0.5, noise multiplier 0.01",
                0.15,
                label=3,
                clip_norm=0.5,
                noise_multiplier=0.01,
                resolved=53.9,
            ),
            attempt(
                "clipped to 0.5, noise multiplier 1", 0.9, label=8, clip_norm=0.5, noise_multiplier=1.0, resolved=2.6
            ),
        ],
        notes=["Clipping shortened the update from norm 1.1 to 0.5; its direction is the same."],
    )


def inversion_of_a_table() -> InversionRecord:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=30).astype(np.float32)
    names = [f"mean measurement {index}" for index in range(30)]
    attempts = []
    for title, noise in (("as sent", 1e-4), ("clipped to 1", 1e-4), ("clipped to 1, noise multiplier 1", 2.0)):
        image = (truth + noise * rng.normal(size=30)).astype(np.float32)
        error = float(np.mean((image - truth) ** 2))
        attempts.append(Reconstruction(title, image, error, 10 * math.log10(144 / error), label=1, resolved=29.0))
    return InversionRecord("clinic-2", "One update.", "Dense.", truth, 1, (-6.0, 6.0), attempts, names)


def demo(**changes: Any) -> DemoRecord:
    rng = np.random.default_rng(5)
    values: dict[str, Any] = {
        "name": "Digits on ten devices",
        "dataset": "handwritten digits, 8x8",
        "class_names": DIGITS,
        "seed": 7,
        "num_devices": 10,
        "settings": {"rounds": "12", "local epochs": "2", "learning rate": "0.1", "partition": "Dirichlet, alpha 0.5"},
        "runs": [
            run("mean, clean", "mean", [], 0.961, rejects=False),
            run("mean, 3 corrupted", "mean", CORRUPTED, 0.412, rejects=False),
            run("multi-krum, 3 corrupted", "multi-krum", CORRUPTED, 0.949, rejects=True),
        ],
        "inversion": inversion_of_a_picture(),
        "shard_counts": {d: [int(c) for c in rng.dirichlet([0.5] * 10) * rng.integers(80, 160)] for d in DEVICES},
        "seconds": 71.3,
    }
    return DemoRecord(**{**values, **changes})
