"""ByzFL's heat maps: trimmed mean and geometric median behind clipping and NNM, ours beside theirs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.registry import rule_from_table
from covey_coordinator.aggregation.rules import Batch, Rule
from covey_coordinator.grid.training import Floats
from covey_coordinator.reproduce import byzfl_worker, descent
from covey_coordinator.reproduce.contract import Case, Claim, Measured, Outcome, Reproduction, Values
from covey_coordinator.reproduce.pictures import new_figure, png
from covey_protocol.errors import MachineError

VARIABLE = "COVEY_PEERS_PYTHON"
HONEST = 10
SIMILARITIES = (0.0, 0.33, 0.66, 1.0)
PUBLISHED = {  # rows: similarity; columns: f = 1 to 4
    "trimmed-mean": ((0.87, 0.61, 0.26, 0.21), (0.98, 0.97, 0.94, 0.91), (0.98, 0.97, 0.97, 0.97), (0.98,) * 4),
    "geometric-median": (
        (0.87, 0.56, 0.26, 0.27),
        (0.98, 0.96, 0.94, 0.94),
        (0.98, 0.97, 0.97, 0.96),
        (0.98, 0.98, 0.98, 0.97),
    ),
}
ATTACKS: tuple[dict[str, Any], ...] = (
    {"attack": "sign-flip"},
    {"attack": "adaptive", "direction": "mean", "doublings": 8, "refinements": 1},
    {"attack": "adaptive", "direction": "std", "doublings": 8, "refinements": 1},
)
QUICK_CELLS = tuple(("trimmed-mean", similarity, f) for similarity in (0.0, 1.0) for f in (1, 4))
BEFORE = [{"step": "clipping", "clip_norm": byzfl_worker.CLIP_NORM}, "nnm"]
DARK_BELOW = 0.55  # of the colour scale: numbers are white there


def label_of(rule: str, similarity: float, f: int) -> str:
    return f"{rule}, similarity {similarity:g}, f = {f}"


def cases(quick: bool) -> Sequence[Case]:
    """peer: whether ByzFL's Python is named; a run with it is another run."""
    cells = (
        QUICK_CELLS if quick else [(rule, one, f) for rule in PUBLISHED for one in SIMILARITIES for f in range(1, 5)]
    )
    found = []
    for rule, similarity, f in cells:
        shape = descent.settings_of(
            data="mnist",
            hidden=(100,),
            devices=HONEST + f,
            hostile=f,
            rule={"rule": rule, "num_byzantine": f, "before": BEFORE},
            attack={"attack": "none"},
            batch=25,
            rounds=200 if quick else 800,
            learning_rate=0.1,
            momentum=0.9,
            partition="similar",
            bias=similarity,
            measured=50,
        )
        attacks = ATTACKS[:1] if quick else ATTACKS
        settings = {"descent": shape, "attacks": list(attacks), "peer": VARIABLE in os.environ}
        published = PUBLISHED[rule][SIMILARITIES.index(similarity)][f - 1]
        found.append(Case(label_of(rule, similarity, f), settings, published))
    return found


class Peer:
    """A process of ByzFL's Python with one aggregator; it ends with us."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def aggregate(self, updates: Floats) -> Floats:
        """(n, d) -> (d,)."""
        if self._process.stdin is None or self._process.stdout is None:
            raise MachineError("ByzFL's process has no pipes")
        matrix = np.ascontiguousarray(updates, np.float32)
        try:
            self._process.stdin.write(np.array(matrix.shape, np.int64).tobytes() + matrix.tobytes())
            self._process.stdin.flush()
            answer = self._process.stdout.read(4 * matrix.shape[1])
        except BrokenPipeError:
            answer = b""
        if len(answer) < 4 * matrix.shape[1]:
            raise MachineError(
                f"{os.environ[VARIABLE]} ran no ByzFL", f"install byzfl in that Python, or unset {VARIABLE}"
            )
        return np.frombuffer(answer, np.float32)


@contextmanager
def peer_of(rule: str, f: int) -> Iterator[Peer]:
    command = [os.environ[VARIABLE], str(Path(byzfl_worker.__file__)), rule, str(f)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
    except OSError as exc:
        raise MachineError(
            f"{VARIABLE} = {command[0]!r} cannot be run", "name a Python with byzfl, or unset it"
        ) from exc
    try:
        yield Peer(process)
    finally:
        process.kill()
        process.communicate()


def run(settings: dict[str, Any], seed: int, folder: Path | None) -> Outcome:
    """accuracy, byzfl: the worst over the attacks at the last round, ours and theirs (None without their Python).

    apart: largest relative difference of the two aggregates on the same updates, over the rounds of our runs.
    """
    started = time.process_time()
    ours, theirs, apart = [], [], 0.0
    for attack in settings["attacks"]:
        shape = {**settings["descent"], "attack": attack}
        if not settings["peer"]:
            ours.append(descent.run(shape, seed, folder))
            continue
        with peer_of(shape["rule"]["rule"], shape["hostile"]) as peer:
            watched = Watched(peer, rule_from_table(shape["rule"]))
            ours.append(descent.run(shape, seed, folder, watch=watched))
            apart = max(apart, watched.apart)
            theirs.append(descent.run(shape, seed, folder, aggregate=peer.aggregate))
    worst = min(ours, key=lambda one: one["last"])
    return {
        "curve": worst["curve"],
        "accuracy": worst["last"],
        "byzfl": min(one["last"] for one in theirs) if theirs else None,
        "apart": apart if theirs else None,
        "by_attack": [[attack["attack"], one["last"]] for attack, one in zip(settings["attacks"], ours)],
        "seconds": round(time.process_time() - started, 2),
    }


class Watched:
    """Every so many rounds, how far ByzFL's aggregate of our updates is from ours, relative to its length."""

    EVERY = 25

    def __init__(self, peer: Peer, rule: Rule) -> None:
        self._peer, self._rule, self._kernels, self.apart = peer, rule, NumpyKernels(), 0.0

    def __call__(self, number: int, updates: Floats) -> None:
        if number % self.EVERY:
            return
        count = len(updates)
        batch = Batch(Updates(updates), np.ones(count, np.float32), np.arange(count))
        ours = self._rule.step(self._kernels, batch).aggregate
        distance = float(np.linalg.norm(self._peer.aggregate(updates) - ours))
        self.apart = max(self.apart, distance / (float(np.linalg.norm(ours)) or 1.0))


def with_byzfl(values: Measured, label: str) -> list[tuple[float, float]]:
    """(ours, ByzFL's) per seed, where ByzFL ran."""
    return [(one["accuracy"], one["byzfl"]) for one in values.outcomes[label] if one["byzfl"] is not None]


def figure(cases: Sequence[Case], measured: Measured) -> bytes:
    """A heat map of ours per rule, every cell with published / ours / ByzFL's here."""
    rules = list(dict.fromkeys(case.label.partition(",")[0] for case in cases))
    shown, axes = new_figure(len(rules), size=(6.0, 4.0))
    for one, rule in zip(axes[0], rules):
        for row, similarity in enumerate(SIMILARITIES):
            for f in range(1, 5):
                label = label_of(rule, similarity, f)
                if label in measured.outcomes:
                    _cell(one, row, f, label, PUBLISHED[rule][row][f - 1], measured)
        one.set_xlim(0.5, 4.5)
        one.set_ylim(len(SIMILARITIES), 0)
        one.set_xticks(range(1, 5), [f"f = {f}" for f in range(1, 5)])
        one.set_yticks([row + 0.5 for row in range(len(SIMILARITIES))], [f"{value:g}" for value in SIMILARITIES])
        one.set_ylabel("similarity of the devices' data")
        one.set_title(f"{rule}: published / ours / ByzFL's rule here", fontsize=9, loc="left")
        one.tick_params(length=0)
    return png(shown)


def _cell(axes: Any, row: int, f: int, label: str, published: float, measured: Measured) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    mean = measured.mean(label)
    pairs = with_byzfl(measured, label)
    theirs = f"{np.mean([pair[1] for pair in pairs]):.2f}" if pairs else "-"
    axes.add_patch(Rectangle((f - 0.49, row + 0.02), 0.98, 0.96, facecolor=colormaps["viridis"](mean), linewidth=0))
    colour = "white" if mean < DARK_BELOW else "black"
    text = f"{published:.2f} / {mean:.2f} / {theirs}"
    axes.text(f, row + 0.5, text, ha="center", va="center", fontsize=8, color=colour)


def agreement(measured: Measured) -> str:
    """What ByzFL's own rules gave on the same seeds, in a sentence."""
    pairs = [pair for label in measured.outcomes for pair in with_byzfl(measured, label)]
    if not pairs:
        return f"ByzFL itself did not run: {VARIABLE} names no Python that has it."
    apart = max(one["apart"] for found in measured.outcomes.values() for one in found if one["apart"] is not None)
    differences = [abs(ours - theirs) for ours, theirs in pairs]
    return (
        f"ByzFL's own Clipping, NNM and rules on the same seeds, {len(pairs)} cells: its aggregates of our updates are "
        f"within {apart:.0e} of ours (relative), its accuracies within {100 * max(differences):.1f} points "
        f"(mean {100 * np.mean(differences):.2f})."
    )


def _ordered(values: Values, rule: str) -> bool:
    """Least similar and most attackers is worse than most similar and fewest."""
    return values[label_of(rule, 0.0, 4)] < values[label_of(rule, 1.0, 1)] - 0.1


BYZFL = Reproduction(
    name="byzfl-heatmap",
    title="ByzFL's heat maps: what unlike data cost, with clipping and NNM before the rule",
    paper="Gonzalez et al. 2025, ByzFL (arXiv:2505.24802), the benchmark's figures on MNIST",
    source="the figures of its documentation: worst accuracy over the attacks",
    engine=f"{descent.ENGINE}; ByzFL's own aggregators from their own Python",
    measure="worst accuracy over the attacks after the last round (800; quick 200)",
    protocol=(
        "10 honest devices and f hostile ones; a share `similarity` of MNIST is dealt out at random, the rest "
        "sorted by class.",
        "Every device: one gradient of a batch of 25, momentum 0.9 over rounds. Learning rate 0.1. The rule is told f.",
        "Before the rule: clipping to 2 and nearest-neighbour mixing.",
        "Attacks: sign flip, and two that search on the rule itself, along the mean (as ByzFL's optimal IPM) and "
        "along the standard deviation "
        "(as its optimal ALIE). Quick form: sign flip alone.",
        f"Where {VARIABLE} names a Python with byzfl, each run is done again from the same seed with ByzFL's "
        "Clipping, NNM and rule in place of ours; "
        "the attackers search on our rule in both.",
    ),
    deviations=(
        "A net of 784-100-10 instead of ByzFL's small convolutional net.",
        "All devices have shares of equal size; attacks are ours, not ByzFL's.",
        "ByzFL's geometric median takes three smoothed steps, ours goes on until it is there.",
    ),
    full_time="full form: 96 runs, several hours of one core (scaled from the quick form)",
    cases=cases,
    claims=(
        Claim(
            "Unlike data with 4 attackers are far worse than like data with one (trimmed mean)",
            lambda v: _ordered(v, "trimmed-mean"),
        ),
        Claim(
            "With like data (similarity 1) four attackers cost the trimmed mean less than 5 points",
            lambda v: v[label_of("trimmed-mean", 1.0, 4)] > v[label_of("trimmed-mean", 1.0, 1)] - 0.05,
        ),
        Claim(
            "With the most unlike data four attackers cost the trimmed mean more than one does",
            lambda v: v[label_of("trimmed-mean", 0.0, 4)] < v[label_of("trimmed-mean", 0.0, 1)],
        ),
        Claim(
            "The geometric median shows the same: unlike data with 4 attackers are far worse",
            lambda v: _ordered(v, "geometric-median"),
        ),
    ),
    run=run,
    value=lambda outcome: float(outcome["accuracy"]),
    figure=figure,
    found=agreement,
    needs=("mnist.npz",),
)
