"""The row of a device that holds shards of a cyclic code: docs/protocol.md, section 8.4. Runs in the training child.

One shard is read, trained and added to the row at a time, so that a device needs memory for one of them. The arithmetic
is covey_protocol.coding's; what a shard's update is, the trainer says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from msgspec import UNSET

from covey_edge.data_sources import Examples
from covey_edge.examples import other_examples
from covey_edge.frames import Done, Run
from covey_edge.runtime import Floats, Model
from covey_protocol.bundle import check_plan
from covey_protocol.coding import Array, CyclicCode, as_numbers, weighed
from covey_protocol.compression import encode
from covey_protocol.errors import TrainingError
from covey_protocol.forms import compression_of

# (model, the shard's examples, request, the shard's name, received parameters) -> its update and its training loss
Trained = Callable[[Model, Examples, Run, str, Floats], tuple[Floats, float]]


def coded(model: Model, request: Run, trained: Trained) -> Done:
    """One update of each shard that this device holds, combined in float64.

    Clipping befalls each shard's update, equal on all its holders where their owners agree on clip_norm. TrainingError
    on a device that adds noise, and where a shard is not here.
    """
    plan = request.plan
    check_plan(model.manifest, plan)
    assert plan.coding is not UNSET  # check_plan
    if request.noise_multiplier:
        raise TrainingError("this device adds noise, and the rows of a code have to be exact", "invite others")
    code, held = CyclicCode(plan.coding.n, plan.coding.s), plan.coding.held_by(request.device_id)
    received = np.frombuffer(request.parameters, "<f4")
    started, counts, losses = time.monotonic(), [], []

    def parts() -> Iterator[Array]:
        for name in held:
            examples = _shard(model, request, name)
            update, loss = trained(model, examples, request, name, received.astype(np.float32))
            counts.append(len(examples[0]))
            losses.append(loss)
            yield weighed(update, counts[-1])

    row = code.encode(parts())
    metrics = {"training_loss": float(np.average(losses, weights=counts)), "seconds": time.monotonic() - started}
    finite = {name: value for name, value in metrics.items() if np.isfinite(value)}
    return Done(encode(as_numbers(row), compression_of(plan), b""), sum(counts), finite, model.runtime)


def _shard(model: Model, request: Run, name: str) -> Examples:
    if name not in request.shards:
        raise TrainingError(f"this device holds no shard {name!r}", "name it in [data.shards] of its agent.toml")
    path = Path(request.shards[name])
    x, y = other_examples(request.data_source, path, request.reading, model.manifest, "shard")
    most = request.plan.max_examples or len(x)
    if min(most, len(x)) < request.min_examples:
        raise TrainingError(f"the examples of shard {name!r} are fewer than this device's policy asks")
    return x[:most], y[:most]
