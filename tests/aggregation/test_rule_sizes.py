"""Rules from one device to a thousand and from one number to ten million, and the memory they take."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from aggregation_references import judge, noisy

from covey_coordinator.aggregation.registry import make_rule
from covey_protocol.errors import RuleError


@pytest.mark.parametrize("name", ["mean", "median", "trimmed-mean", "meamed", "caf", "mda", "dnc"])
def test_one_device_alone_gives_its_own_update(name: str) -> None:
    for d in (1, 5000):
        update = noisy(0, n=1, d=d)
        found = judge(make_rule(name, 0), update)
        np.testing.assert_allclose(found.aggregate, update[0], rtol=1e-6)
        assert found.accepted.all()


def test_krum_refuses_rounds_too_small_for_its_guarantee() -> None:
    for name, least in {"krum": 3, "multi-krum": 3, "bulyan": 3}.items():
        make_rule(name, 0).check(least)
        with pytest.raises(RuleError, match=f"needs n.*{least - 1} updates"):
            make_rule(name, 0).check(least - 1)


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "meamed", "multi-krum", "dnc"])
def test_a_thousand_devices(name: str) -> None:
    updates = noisy(1, n=1000, d=700, hostile=200, size=30.0)
    found = judge(make_rule(name, 200), updates)
    honest = updates[200:].astype(np.float64)
    assert np.abs(found.aggregate - honest.mean(axis=0)).max() < 1.0
    assert not found.accepted[:200].any()


# Fills a matrix row by row, so that nothing but the matrix and the rule takes memory, and reports the peak.
LARGE = """
import resource, sys
import numpy as np
from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import Batch

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

n, d, names = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
generator = np.random.Generator(np.random.SFC64(0))
warm = Batch(Updates(generator.standard_normal((n, 5000), np.float32)), np.ones(n, np.float32), np.arange(n))
def run(name, batch):
    rule = make_rule(name, 0 if name == "mean" else n // 10)
    return rule.advance(NumpyKernels(), rule.initial_state(batch.updates.matrix.shape[1]), batch)[1]
for name in names:
    run(name, warm)
before = peak()
matrix = np.empty((n, d), np.float32)
for row in matrix:
    generator.standard_normal(out=row, dtype=np.float32)
batch = Batch(Updates(matrix), np.ones(n, np.float32), np.arange(n))
for name in names:
    judged = run(name, batch)
    assert np.isfinite(judged.aggregate).all() and np.abs(judged.aggregate).max() < 3
    print(name, (peak() - before) / matrix.nbytes, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("n", "d", "names"),
    [
        (100, 10_000_000, ["mean", "median", "trimmed-mean", "meamed", "multi-krum"]),
        (1000, 1_000_000, ["mean", "median", "multi-krum"]),
    ],
    ids=["ten million numbers", "a thousand devices"],
)
def test_four_gigabytes_of_updates_take_less_than_one_third_more(n: int, d: int, names: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LARGE, str(n), str(d), *names], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shares = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert list(shares) == names
    assert max(shares.values()) < 1.3, shares
