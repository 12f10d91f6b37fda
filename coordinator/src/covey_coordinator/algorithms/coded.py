"""The engine of the cyclic code (DRACO): rows of devices in, the exact mean over all shards to the server optimizer.

No rule judges: decoding finds who lied (coding.cyclic), and what is left has the sum in it. A device that did not come,
or whose row screening refused, is a missing row. The directions on which the decoder looks come from a hash of the
rows, so that a round that is computed again finds the same; whoever lies would have to choose a row by its hash.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from covey_coordinator.aggregation.engines import Engine, StepResult
from covey_coordinator.aggregation.screening import Screened
from covey_coordinator.algorithms.engines import AlgorithmEngine
from covey_coordinator.coding.cyclic import TOLERANCE, Decoded, decode
from covey_coordinator.records import ACCEPTED, REJECTED, Array, DeviceVerdict
from covey_protocol.coding import CyclicCode, as_rows
from covey_protocol.errors import RuleError, UsageError
from covey_protocol.messages import CodingPlan
from covey_protocol.works import CYCLIC

LOCATED = "its row is not what the rows of the others allow: it lies, or computes otherwise than they do"


@dataclasses.dataclass(frozen=True)
class Coded:
    """plan: as the devices get it. liars, absent: what a round bears at once, 2 liars + absent <= 2 plan.s.

    tolerance: see coding.cyclic.decode.
    """

    plan: CodingPlan
    liars: int
    absent: int = 0
    tolerance: float = TOLERANCE


class CodedEngine(AlgorithmEngine):
    """Every exchange is `cyclic-code`. plain: an engine with the rule `mean`, which gets the one mean of a round."""

    def __init__(self, plain: Engine, coded: Coded) -> None:
        super().__init__(f"cyclic code, {coded}", [plain])
        self._plain, self._coded = plain, coded
        self._code = CyclicCode(coded.plan.n, coded.plan.s)

    work = CYCLIC
    vectors: tuple[Array, ...] = ()

    @property
    def num_byzantine(self) -> int:
        return self._coded.liars

    def aggregate(self, parameters: Array, screened: Screened) -> StepResult:
        self._require_enough(screened)
        found = self.decoded(screened)
        mean = mean_of(found.total)
        one = Screened(mean.astype(np.float32)[None], np.ones(1, np.float32), ("shards",), {}, {"shards": _norm(mean)})
        result = self._plain.aggregate(parameters, one)
        measurements = {
            **result.measurements,
            "num_byzantine": float(self._coded.liars),
            "num_byzantine_left": float(self._coded.liars - screened.num_faulty),
            "liars": float(len(found.liars)),
            "misfit": found.misfit,
        }
        verdicts = _verdicts(screened, {self._coded.plan.devices[place] for place in found.liars})
        return dataclasses.replace(result, verdicts=verdicts, measurements=measurements)

    def decoded(self, screened: Screened) -> Decoded:
        """The sum over the shards and who lied. Raises RuleError."""
        places = {device_id: place for place, device_id in enumerate(self._coded.plan.devices)}
        strangers = [one for one in screened.device_ids if one not in places]
        if strangers:
            raise UsageError(f"a row of {strangers[0]}, which has no place in the code")
        here = [places[one] for one in screened.device_ids]
        numbers = np.zeros((self._code.n, screened.updates.shape[1]))
        numbers[here] = screened.updates
        missing = set(range(self._code.n)) - set(here)
        digest = hashlib.sha256(numbers.data).digest()
        random = np.random.default_rng(int.from_bytes(digest, "big"))
        rows = as_rows(self._code, numbers)
        return decode(self._code, rows, random, missing=missing, tolerance=self._coded.tolerance)

    def _require_enough(self, screened: Screened) -> None:
        """Below this a lie could pass unseen, which no decoder would notice."""
        coded, faulty = self._coded, screened.num_faulty
        absent = self._code.n - len(screened.device_ids) - faulty
        if faulty > coded.liars or absent > coded.absent:
            told = ", ".join(f"{device_id}: {reason}" for device_id, reason in sorted(screened.reasons.items()))
            raise RuleError(
                f"{absent} devices of the code are absent and {faulty} sent no row that can be used"
                + (f" ({told})" if told else ""),
                f"it bears {coded.absent} and {coded.liars}: set coding.absent or coding.liars higher",
            )


def mean_of(total: Array) -> Array:
    """(d + 1,) the sum over the shards, with the number of examples behind it -> (d,) float64, their mean."""
    count = float(total[-1])
    if not (np.isfinite(total).all() and count > 0.5):
        raise RuleError(f"the shards have {count:g} examples together", "look at the devices: too many lie alike")
    return np.asarray(total[:-1] / count)


def _norm(vector: Array) -> float:
    return float(np.linalg.norm(vector))


def _verdicts(screened: Screened, liars: set[str]) -> list[DeviceVerdict]:
    used = [
        DeviceVerdict(
            one,
            REJECTED if one in liars else ACCEPTED,
            LOCATED if one in liars else "",
            None,
            int(count),
            screened.norms[one],
        )
        for one, count in zip(screened.device_ids, screened.num_examples)
    ]
    refused = [DeviceVerdict(one, REJECTED, reason) for one, reason in screened.reasons.items()]
    return sorted([*used, *refused], key=lambda verdict: verdict.device_id)
