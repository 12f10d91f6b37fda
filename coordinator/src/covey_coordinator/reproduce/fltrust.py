"""FLTrust (Cao et al. 2021), Table III: what four attacks do to the baselines. FLTrust itself is not here yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from covey_coordinator.reproduce import descent
from covey_coordinator.reproduce.contract import Case, Claim, Measured, Outcome, Reproduction, Values
from covey_coordinator.reproduce.pictures import bars

DEVICES, HOSTILE = 25, 5
ATTACKS: dict[str, dict[str, Any]] = {
    "none": {"attack": "none"},
    "label-flip": {"attack": "label-flip"},
    "fang-krum": {"attack": "fang-krum"},
    "fang-trim": {"attack": "fang-trim"},
    "scaling": {"attack": "scaling-backdoor"},
}
PUBLISHED = {  # MNIST-0.1, test error, in the order of ATTACKS
    "mean": (0.04, 0.06, 0.10, 0.16, 0.02),
    "krum": (0.10, 0.10, 0.90, 0.10, 0.10),
    "trimmed-mean": (0.06, 0.05, 0.07, 0.13, 0.05),
    "median": (0.06, 0.05, 0.07, 0.13, 0.05),
}
TRIGGERS = {"mean": 1.0, "krum": 0.0, "trimmed-mean": 0.01, "median": 0.01}  # published success of the backdoor
UNLIKE = {("mean", "fang-trim"): 0.28, ("median", "fang-trim"): 0.43, ("mean", "none"): None, ("median", "none"): None}


def cases(quick: bool) -> Sequence[Case]:
    def case(rule: str, attack: str, bias: float, published: float | None) -> Case:
        told = 0 if rule == "mean" else HOSTILE
        settings = descent.settings_of(
            data="mnist",
            hidden=(32,) if quick else (100,),
            devices=DEVICES,
            hostile=HOSTILE if attack != "none" else 0,
            rule={"rule": rule, "num_byzantine": told},
            attack=ATTACKS[attack],
            batch=32,
            rounds=150 if quick else 1000,
            learning_rate=0.1,
            partition="biased",
            bias=bias,
            measured=50,
        )
        triggers = f"published backdoor success {TRIGGERS[rule]:.0%}" if attack == "scaling" else ""
        return Case(label_of(rule, attack, bias), settings, published, triggers)

    found = [case(rule, attack, 0.1, value) for rule in PUBLISHED for attack, value in zip(ATTACKS, PUBLISHED[rule])]
    return found if quick else [*found, *(case(*key, 0.5, value) for key, value in UNLIKE.items())]


def label_of(rule: str, attack: str, bias: float = 0.1) -> str:
    return f"{rule}, {attack}" if bias == 0.1 else f"{rule}, {attack}, MNIST-{bias:g}"


def error(outcome: Outcome) -> float:
    return 1.0 - float(outcome["last"])


def backdoors(measured: Measured) -> str:
    """How often the trigger works, per rule, published beside."""
    told = []
    for rule, published in TRIGGERS.items():
        found = [one["backdoor"] for one in measured.outcomes[label_of(rule, "scaling")]]
        told.append(f"{rule} {sum(found) / len(found):.0%} (published {published:.0%})")
    return f"How often the backdoor's trigger works under the scaling attack: {', '.join(told)}."


def lowest(values: Values, attack: str) -> str:
    return min(PUBLISHED, key=lambda rule: values[label_of(rule, attack)])


FLTRUST = Reproduction(
    name="fltrust",
    title="FLTrust's Table III: the baselines under four attacks (FLTrust itself comes with a later issue)",
    paper="Cao, Fang, Liu, Gong 2021, FLTrust (NDSS, arXiv:2012.13995)",
    source="table III, MNIST-0.1; MNIST-0.5 where the paper's text gives numbers",
    engine=descent.ENGINE,
    measure="error on the test set after the last round (1000; quick 150)",
    protocol=(
        "25 devices of which 5 attack; an example of class l goes to group l of 10 groups of devices with "
        "probability 0.1 (IID) or 0.5.",
        "A net of 784-100-10 (quick: 784-32-10); one gradient of a batch of 32 per round and device; learning "
        "rate 0.1.",
        "Attacks: label flip (l -> 9 - l), Fang's attacks on Krum and on the trimmed mean (full knowledge), the "
        "scaling backdoor (factor n / m = 5).",
        "Krum, trimmed mean and median are told f = 5.",
    ),
    deviations=(
        "FLTrust, its trusted data and the adaptive attack are not run: this is about the baselines.",
        "25 devices and a dense net instead of 100 and a convolutional net; 1000 rounds at rate 0.1 instead of "
        "2000 at 3e-4 on sums over a batch.",
        "The scaling attack's factor is n / m, so that all attackers together replace the model; the paper's is "
        "n. The trigger is a square of 2 by 2 pixels.",
    ),
    full_time="full form: 72 runs, about 1.5 hours of one core (scaled from the quick form)",
    cases=cases,
    claims=(
        Claim(
            "Fang's attack on Krum ruins Krum (error above 0.5) and no other rule",
            lambda v: (
                v[label_of("krum", "fang-krum")] > 0.5
                and max(v[label_of(rule, "fang-krum")] for rule in PUBLISHED if rule != "krum") < 0.5
            ),
        ),
        Claim(
            "Fang's trim attack harms mean, trimmed mean and median, each at least by 3 points",
            lambda v: all(
                v[label_of(rule, "fang-trim")] > v[label_of(rule, "none")] + 0.03
                for rule in ("mean", "trimmed-mean", "median")
            ),
        ),
        Claim(
            "Krum is not moved by the trim attack (within 3 points)",
            lambda v: v[label_of("krum", "fang-trim")] < v[label_of("krum", "none")] + 0.03,
        ),
        Claim(
            "Without attackers Krum is the worst",
            lambda v: max(PUBLISHED, key=lambda rule: v[label_of(rule, "none")]) == "krum",
        ),
        Claim("Without attackers the mean is the best", lambda v: lowest(v, "none") == "mean"),
        Claim(
            "Label flips by 20% cost trimmed mean and median less than 3 points",
            lambda v: all(
                v[label_of(rule, "label-flip")] < v[label_of(rule, "none")] + 0.03
                for rule in ("trimmed-mean", "median")
            ),
        ),
        Claim(
            "With unlike data (MNIST-0.5) the trim attack does more harm to the median than with like data",
            lambda v: v[label_of("median", "fang-trim", 0.5)] > v[label_of("median", "fang-trim")],
        ),
    ),
    run=descent.run,
    value=error,
    figure=lambda cases, measured: bars(cases, measured, "error on the test set, %"),
    found=backdoors,
    needs=("mnist.npz",),
)
