"""Damaged and hostile bundles, counted: what gets past the seal (nothing may), and what sealed garbage does to a child.

Part 1 damages whole bundle files and opens them with the coordinator's key: each must be refused, or be exactly what
was sealed (some bytes of a zip mean nothing). Part 2 damages the model and seals it with the right key, as a hostile
coordinator could, and gives it to a real training child: it may refuse, die, hang or even train, but the process that
started it lives, says why, and trains the good bundle to the same bits afterwards.

Run: python benchmarks/hostile_bundles.py [--files N] [--models N] [--seed S]
In an environment with the agent alone (another runtime): the same with --bundle FILE --key PEM, both made by
python benchmarks/hostile_bundles.py --write FOLDER
"""

from __future__ import annotations

import argparse
import io
import queue
import struct
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from covey_edge.frames import Done, Frame, Open, Problem, Run
from covey_edge.runtime import installed
from covey_edge.training_process import TrainingProcess
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import Bundle, read_bundle, write_bundle
from covey_protocol.errors import BundleError
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

TIMEOUT_S = 20.0
MEMORY_MB = 2048
Generator = np.random.Generator


# --- ways to damage bytes


def flip_bits(data: bytes, random: Generator) -> bytes:
    damaged = bytearray(data)
    for _ in range(int(random.integers(1, 9))):
        damaged[int(random.integers(len(damaged)))] ^= 1 << int(random.integers(8))
    return bytes(damaged)


def cut_off(data: bytes, random: Generator) -> bytes:
    return data[: int(random.integers(len(data)))]


def cut_out(data: bytes, random: Generator) -> bytes:
    start = int(random.integers(len(data)))
    return data[:start] + data[start + int(random.integers(1, 64)) :]


def put_number(data: bytes, random: Generator) -> bytes:
    """An offset, a count or a size that is wild: at the edges of its type, or anything."""
    damaged = bytearray(data)
    edges = (0, 1, -1, 2**31 - 1, -(2**31), 0x7FFF, 0x10000, len(data))
    value = int(random.choice(edges)) if random.random() < 0.5 else int(random.integers(-(2**31), 2**31))
    struct.pack_into("<i", damaged, 4 * int(random.integers(len(damaged) // 4 - 1)), value)
    return bytes(damaged)


def overwrite(data: bytes, random: Generator) -> bytes:
    damaged = bytearray(data)
    start, length = int(random.integers(len(damaged))), int(random.integers(1, 256))
    damaged[start : start + length] = random.bytes(len(damaged[start : start + length]))
    return bytes(damaged)


def copy_within(data: bytes, random: Generator) -> bytes:
    """A piece of the file over another: values that are right elsewhere."""
    damaged, length = bytearray(data), int(random.integers(4, min(128, len(data) // 2)))
    source, place = (4 * int(random.integers((len(data) - length) // 4)) for _ in range(2))
    damaged[place : place + length] = data[source : source + length]
    return bytes(damaged)


DAMAGE = (flip_bits, cut_off, cut_out, put_number, overwrite, copy_within)


# --- zip tricks


def _entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def zip_tricks(data: bytes) -> dict[str, bytes]:
    """Whole files that are zips and are not what was sealed, each with its trick."""
    entries = _entries(data)
    model, manifest, seal = (entries[name] for name in ("model.tflite", "manifest.json", "seal"))
    items = list(entries.items())
    directory = data.rindex(b"PK\x01\x02")
    inflated = bytearray(data)
    for start in (data.index(b"PK\x01\x02") + 20, data.index(b"PK\x01\x02") + 24):
        struct.pack_into("<I", inflated, start, 0xFFFFFFF0)
    return {
        "compressed": _zipped(items, zipfile.ZIP_DEFLATED),
        "a bomb of zeros for a model": _zipped([("model.tflite", bytes(50_000_000)), *items[1:]], zipfile.ZIP_DEFLATED),
        "model and manifest swapped": _zipped([("model.tflite", manifest), ("manifest.json", model), ("seal", seal)]),
        "manifest and seal swapped": _zipped([("model.tflite", model), ("manifest.json", seal), ("seal", manifest)]),
        "a path for a name": _zipped([*items, ("../../model.tflite", model)]),
        "an absolute path": _zipped([("/model.tflite", model), *items[1:]]),
        "no seal": _zipped(items[:2]),
        "an empty seal": _zipped([*items[:2], ("seal", b"")]),
        "a seal of zeros": _zipped([*items[:2], ("seal", bytes(64))]),
        "a seal that is too long": _zipped([*items[:2], ("seal", seal + b"x")]),
        "another model": _zipped([("model.tflite", model[:-1] + bytes([model[-1] ^ 1])), *items[1:]]),
        "a longer model": _zipped([("model.tflite", model + b"x"), *items[1:]]),
        "4 GiB declared": bytes(inflated),
        "the directory cut off": data[:directory],
        "a huge manifest": _zipped([items[0], ("manifest.json", b" " * 5_000_000), items[2]]),
        "a manifest of brackets": _zipped([items[0], ("manifest.json", b"[" * 1_000_000), items[2]]),
        "empty": _zipped([]),
    }


def doubled(data: bytes, model: bytes) -> bytes:
    """A second entry of the model's name, behind or before the sealed one."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns the writer
        return _zipped([*_entries(data).items(), ("model.tflite", model)])


def opened(data: bytes, key: SealingKey, good: Bundle) -> str:
    """ "refused", "as sealed", or what went wrong."""
    try:
        bundle = read_bundle(data, key.public)
    except BundleError:
        return "refused"
    except Exception as exc:  # whatever it is, it would end the training child
        return f"WRONG: {type(exc).__name__}"
    return "as sealed" if bundle == good else "WRONG: other content under the seal"


def part_1(bundle: bytes, key: SealingKey, files: int, random: Generator) -> Counter[str]:
    good = read_bundle(bundle, key.public)
    tricks = [*zip_tricks(bundle).values(), doubled(bundle, b"other"), doubled(bundle, good.model)]
    outcomes = Counter(opened(data, key, good) for data in tricks)
    entries = list(_entries(bundle).items())
    around = len(bundle) - len(good.model)  # half of the damage goes to what is not the model
    for _ in range(files - len(tricks)):
        damage = DAMAGE[int(random.integers(len(DAMAGE)))]
        if random.random() < 0.5:
            data = damage(bundle, random)
        elif random.random() < 0.5:
            data = bundle[:-around] + damage(bundle[-around:], random)
        else:
            name, content = entries[int(random.integers(3))]
            data = _zipped([(one, damage(content, random) if one == name else other) for one, other in entries])
        outcomes[opened(data, key, good)] += 1
    return outcomes


# --- sealed garbage in a real child


class Child:
    """The training child as the agent has it, asked one thing at a time."""

    def __init__(self, folder: Path, key: SealingKey, timeout_s: float = TIMEOUT_S) -> None:
        self._answers: queue.Queue[tuple[object, Any]] = queue.Queue()
        self.process = TrainingProcess(lambda token, frame: self._answers.put((token, frame)), MEMORY_MB)
        self._folder, self._key, self._timeout_s = folder, key, timeout_s

    def ask(self, frame: Frame) -> Any:
        self.process.request("", frame, self._timeout_s)
        return self._answers.get(timeout=self._timeout_s + 30)[1]

    def train(self, bundle: bytes, parameters: np.ndarray[Any, Any]) -> Any:
        path, data = self._folder / "bundle", self._folder / "data.npz"
        path.write_bytes(bundle)
        answer = self.ask(Open(str(path), blob_ref(bundle).sha256, self._key.public.hex(), "npz", str(data)))
        if isinstance(answer, Problem):
            return answer
        plan = TrainingPlan(epochs=1, learning_rate=0.1, shuffle_seed=1)
        return self.ask(Run("r", "pi", parameters.astype("<f4").tobytes(), plan, 0.0, 0.0, 1))


def outcome(answer: Any, good_update: bytes) -> str:
    if isinstance(answer, Done):
        return "trained, same update" if answer.update == good_update else "trained, another update"
    died = "the training process died ("
    if answer.what.startswith(died):
        return "died: " + answer.what[len(died) : -1]
    if answer.what.startswith("training took longer"):
        return "ended at the timeout"
    return f"refused: {answer.kind}"


def write_data(path: Path, bundle: Bundle, random: Generator) -> None:
    spec = bundle.manifest
    x = random.random((40, *spec.input.shape))
    y = random.integers(0, spec.num_classes or 2, (40, *spec.label.shape))
    np.savez(path, x=x, y=y)


def part_2(bundle: bytes, key: SealingKey, models: int, random: Generator) -> Counter[str]:
    good = read_bundle(bundle, key.public)
    start = random.standard_normal(good.manifest.dimension).astype(np.float32) * np.float32(0.1)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data.npz", good, random)
        child = Child(folder, key)
        try:
            update = child.train(bundle, start).update
            for number in range(models):
                damage = DAMAGE[number % len(DAMAGE)]
                model = damage(good.model, random)
                answer = child.train(write_bundle(good.manifest, model, key), start)
                outcomes[outcome(answer, update)] += 1
                if number % 25 == 24 or number == models - 1:
                    after = child.train(bundle, start)
                    if not isinstance(after, Done) or after.update != update:
                        outcomes["WRONG: the good bundle trains otherwise afterwards"] += 1
        finally:
            child.process.stop()
    return outcomes


def made_here() -> tuple[bytes, SealingKey]:
    """The digits model, exported and sealed; needs TensorFlow."""
    import covey_models
    from covey_models import zoo

    key = SealingKey.from_seed(bytes([7]) * 32)
    model = zoo.build("small-cnn", (8, 8, 1), 10, seed=0)
    return covey_models.export(model, name="digits", input_range=(0.0, 1.0), num_classes=10, key=key), key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--models", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if options.bundle is None:
        bundle, key = made_here()
    else:
        bundle, key = options.bundle.read_bytes(), SealingKey.from_pem(options.key.read_bytes(), str(options.key))
    if options.write is not None:
        (options.write / "digits.covey").write_bytes(bundle)
        (options.write / "key.pem").write_bytes(key.pem())
        return
    wrong = 0
    for title, part, count in (
        ("damaged files, opened with the key", part_1, options.files),
        (f"damaged models, sealed, in a child with {installed()[1]}", part_2, options.models),
    ):
        started = time.monotonic()
        outcomes = part(bundle, key, count, np.random.default_rng(options.seed))
        print(f"{sum(outcomes.values())} {title} ({time.monotonic() - started:.0f} s)")
        for name, number in outcomes.most_common():
            print(f"  {number:6d}  {name}")
            wrong += number if name.startswith("WRONG") else 0
    if wrong:
        raise SystemExit(f"{wrong} outcomes that must not be")


if __name__ == "__main__":
    main()
