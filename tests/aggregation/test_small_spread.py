"""Rules that choose devices choose whom float64 chooses, also when updates differ by a ten-thousandth of their size.

Plain float32 fails here (`test_uncentred_float32_inner_products_would_choose_others`). One device of n is hostile, the
rule is told of three, so that it has to leave out honest ones by small differences.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from aggregation_references import batch_of, judge, krum_selection, noisy
from aggregation_references_more import minimum_diameter_subset
from aggregation_references_presteps import nnm
from aggregation_references_similarity import cosine_distances, hdbscan_majority
from test_bulyan_and_mda import bulyan_choice
from test_spectral_rules import dnc_reference

from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.presteps import Before
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import Rule

N, D, F = 15, 2000, 3


def buckets(rule: Rule) -> np.ndarray:
    """(m, n): what share each device has in each row that this rule's first step makes of the first round."""
    assert isinstance(rule, Before)
    k, batch = NumpyKernels(), batch_of(np.eye(N))
    prepared = rule.first.prepare(k, rule.first.initial_state(N), batch, rule.num_byzantine)[1]
    return k.columns(prepared.batch.updates, np.arange(N)).astype(np.float64)


def multi_krum_of_buckets(updates: np.ndarray, rule: Rule) -> list[int]:
    shares = buckets(rule)
    kept = krum_selection(shares @ updates.astype(np.float64), rule.num_byzantine, len(shares) - rule.num_byzantine)
    return [device for device in range(N) if shares[kept, device].any()]


SELECTING: dict[str, tuple[Rule, Callable[[np.ndarray, Rule], list[int]]]] = {
    "krum": (make_rule("krum", F), lambda updates, rule: krum_selection(updates, F, 1)),
    "multi-krum": (make_rule("multi-krum", F), lambda updates, rule: krum_selection(updates, F, N - F)),
    "bulyan": (make_rule("bulyan", F), lambda updates, rule: bulyan_choice(updates, F)),
    "mda": (make_rule("mda", F), lambda updates, rule: minimum_diameter_subset(updates, F)),
    "dnc": (make_rule("dnc", F), lambda updates, rule: list(np.flatnonzero(dnc_reference(updates, F)[0]))),
    "flame": (
        make_rule("flame", F),
        lambda updates, rule: list(np.flatnonzero(hdbscan_majority(cosine_distances(updates)))),
    ),
    "nnm + multi-krum": (
        make_rule("multi-krum", F, before=["nnm"]),
        lambda updates, rule: krum_selection(nnm(updates, F), F, N - F),
    ),
    "bucketing + multi-krum": (make_rule("multi-krum", 2, before=["bucketing"]), multi_krum_of_buckets),
}


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("label", SELECTING)
def test_the_same_devices_are_chosen_as_in_float64(label: str, spread: float) -> None:
    rule, expected = SELECTING[label]
    for seed in range(10):
        updates = noisy(seed, N, D, spread=spread, hostile=1, size=0.5 * spread)
        assert list(np.flatnonzero(judge(rule, updates).accepted)) == expected(updates, rule), f"seed {seed}"
