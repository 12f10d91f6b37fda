"""What a federated model tells of who it was trained on: overfit, stopped early, shrunk, with noise; round by round.

    .venv/bin/python benchmarks/membership.py [--data DIR] [--quick] [--picture FILE.png]

A pool of 2,000 MNIST pictures (quick: scikit-learn's digits); every model trains on a drawn half of it, on ten devices.
The attacker of `likelihood_ratio` trains models of its own on other halves. Numpy's training and the engine of live
rounds; no TFF process. docs/model-inversion.md has the results.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from covey_coordinator.aggregation.accounting import epsilon_spent
from covey_coordinator.grid.simulation import flat, stream
from covey_coordinator.grid.training import Network
from covey_coordinator.inversion.membership import Membership, likelihood_ratio, threshold
from covey_coordinator.reproduce.descent import dense_layers
from covey_coordinator.reproduce.pictures import STYLES, new_figure, plain, png
from covey_models import datasets
from covey_protocol.privacy import clip

DEVICES, STEPS, BATCH, RATE, HIDDEN = 10, 10, 10, 0.1, 32
HALF, BATCHES, NOISE = 81, 82, 83  # streams of random numbers
DELTA = 1e-5


class Training(NamedTuple):
    """shrunk: share of every parameter that is taken off after a round. noise: multiplier of clip_norm, 0 for off.

    clip_norm: of each device's update, None for off. The noise is added to the sum of the updates.
    """

    rounds: int
    shrunk: float = 0.0
    clip_norm: float | None = None
    noise: float = 0.0


TRAININGS = {
    "trained long": Training(60),
    "stopped early": Training(6),
    "shrunk by 2% a round": Training(60, shrunk=0.02),
    "clipped, noise 0.1": Training(60, clip_norm=1.0, noise=0.1),
    "clipped, noise 1": Training(60, clip_norm=1.0, noise=1.0),
}


class World:
    def __init__(self, quick: bool, folder: Path | None) -> None:
        if quick:
            train, test = datasets.load_split("digits", seed=0)
            x, y, self.test_x, self.test_y = flat(train.x), train.y, flat(test.x), test.y
        else:
            train, test = datasets.load_split("mnist", folder)
            rows = stream(0, HALF).permutation(len(train))[:2000]
            x, y, self.test_x, self.test_y = flat(train.x[rows]), train.y[rows], flat(test.x), test.y
        self.x, self.y = x, y
        self.specs, self.initial = dense_layers((x.shape[1], HIDDEN, 10), 0)
        self.network = Network(self.specs)

    def half(self, number: int) -> Any:
        """(pool,) bool: whom model `number` trains on."""
        inside = np.zeros(len(self.y), bool)
        inside[stream(0, HALF, number + 1).permutation(len(self.y))[: len(self.y) // 2]] = True
        return inside

    def models(self, told: Training, number: int) -> Iterator[Any]:
        """The global model after each round of training on half `number`."""
        shards = np.array_split(stream(0, HALF, number + 1).permutation(len(self.y))[: len(self.y) // 2], DEVICES)
        parameters = self.initial
        for round_number in range(told.rounds):
            draw = stream(0, BATCHES, number, round_number)
            batches = np.stack([[draw.choice(one, BATCH) for one in shards] for _ in range(STEPS)])
            sent = self.network.trained(parameters, self.x, self.y, batches, RATE) - parameters
            parameters = (1 - np.float32(told.shrunk)) * (parameters + self.average(told, sent, number, round_number))
            yield parameters

    def average(self, told: Training, sent: Any, number: int, round_number: int) -> Any:
        if told.clip_norm is not None:
            sent = np.stack([clip(one, told.clip_norm) for one in sent])
        total = sent.sum(axis=0)
        if told.noise and told.clip_norm is not None:
            draw = stream(0, NOISE, number, round_number)
            total = total + told.noise * told.clip_norm * draw.standard_normal(len(total)).astype(np.float32)
        return total / np.float32(DEVICES)

    def scores(self, parameters: Any) -> Any:
        """(pool,): log(p / (1 - p)) of each example's class, from logits in float64."""
        kernel, bias, last_kernel, last_bias = self.network.tensors(parameters.astype(np.float64))
        wide = np.maximum(self.x @ kernel + bias, 0) @ last_kernel + last_bias
        own = np.take_along_axis(wide, self.y[:, None].astype(np.int64), 1)
        others = np.where(np.arange(wide.shape[1]) == self.y[:, None], -np.inf, wide)
        highest = others.max(axis=1, keepdims=True)
        return (own - highest)[:, 0] - np.log(np.exp(others - highest).sum(axis=1))

    def accuracy(self, parameters: Any) -> float:
        return float((self.network.predicted(parameters, self.test_x) == self.test_y).mean())


class Row(NamedTuple):
    name: str
    accuracy: float
    epsilon: float
    plain: Membership
    shadow: Membership
    curve: list[tuple[int, float]]


def measured(world: World, name: str, told: Training, shadows: int) -> Row:
    inside, curve = world.half(0), []
    for number, parameters in enumerate(world.models(told, 0), 1):
        if number % 3 == 0 or number == told.rounds:
            target = world.scores(parameters)
            curve.append((number, threshold(target[inside], target[~inside]).auc))
    others = [world.scores(list(world.models(told, number))[-1]) for number in range(1, shadows + 1)]
    masks = np.stack([world.half(number) for number in range(1, shadows + 1)])
    known = masks.any(axis=0) & ~masks.all(axis=0)
    shadow = likelihood_ratio(target[known], inside[known], np.stack(others)[:, known], masks[:, known])
    epsilon = epsilon_spent(told.noise, told.rounds, 1.0, DELTA)
    return Row(name, world.accuracy(parameters), epsilon, threshold(target[inside], target[~inside]), shadow, curve)


def table(rows: list[Row]) -> list[str]:
    lines = ["| training | accuracy | epsilon of a device | AUC, threshold | AUC, LiRA | at 0.1%, threshold | LiRA |",
             "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in rows:
        epsilon = f"{row.epsilon:.3g}" if np.isfinite(row.epsilon) else "none"
        aucs = f"{row.plain.auc:.3f} | {row.shadow.auc:.3f}"
        rates = " | ".join(f"{100 * one.tpr_at_0_1_percent_fpr:.1f}%" for one in (row.plain, row.shadow))
        lines.append(f"| {row.name} | {100 * row.accuracy:.1f}% | {epsilon} | {aucs} | {rates} |")
    return lines


def picture(rows: list[Row]) -> bytes:
    image, axes = new_figure(2, size=(4.6, 3.4))
    left, right = axes[0]
    for row, (colour, dashes) in zip(rows, STYLES):
        left.plot(*zip(*row.curve), color=colour, linestyle=dashes, label=row.name)
        right.plot(100 * row.accuracy, row.shadow.auc, "o", color=colour)
        right.plot(100 * row.accuracy, row.plain.auc, "x", color=colour)
    left.set_title("the model after each round, threshold", fontsize=9, loc="left")
    left.set_xlabel("round", fontsize=8)
    left.set_ylabel("AUC", fontsize=8)
    left.legend(fontsize=7, frameon=False)
    right.set_title("the finished model: o LiRA, x threshold", fontsize=9, loc="left")
    right.set_xlabel("accuracy on the test set, %", fontsize=8)
    for one in (left, right):
        one.axhline(0.5, color="#666666", linewidth=0.8)
        plain(one)
    return png(image)


def main() -> None:
    parser = argparse.ArgumentParser(description="Membership inference on federated models.")
    parser.add_argument("--quick", action="store_true", help="digits and few models of the attacker's")
    parser.add_argument("--data", type=Path, help="folder with mnist.npz (or COVEY_DATA)")
    parser.add_argument("--shadows", type=int, help="models of the attacker's; 16, quick 8")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    given = parser.parse_args()
    started = time.process_time()
    world, rows = World(given.quick, given.data), []
    for name, told in TRAININGS.items():
        rows.append(measured(world, name, told, given.shadows or (8 if given.quick else 16)))
        print(f"{name}: {time.process_time() - started:.0f} s", file=sys.stderr, flush=True)
    first = rows[0].plain
    print(
        f"{first.members} members, {first.nonmembers} others: an AUC of 0.5 +- {2 * first.auc_error:.3f} says nothing"
    )
    print("\n".join(table(rows)))
    if given.picture:
        given.picture.write_bytes(picture(rows))


if __name__ == "__main__":
    main()
