"""What `covey inspect` tells about a bundle: its content, and what it costs a device. The model is never loaded.

Everything is read from the file. FLOPs and memory follow the rules of `costs`, the wire those of `traffic`.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from covey_models import android
from covey_models.costs import Flops, arena_bytes, flops, variable_bytes
from covey_models.runtime_operators import HIGHEST_VERSION, LOWEST_VERSION, RUNTIME
from covey_models.tflite_file import EntryPoint, TfliteModel, called_subgraphs, places, read_tflite
from covey_models.traffic import Traffic, traffic
from covey_protocol.bundle import Bundle, Manifest, read_bundle
from covey_protocol.errors import BundleError
from covey_protocol.forms import ROTATED_4BIT, ROTATED_8BIT, TOP_K, TOP_K_8BIT, Compression, update_sizes
from covey_protocol.seals import PublicKey

EVERY_ROUND = ("set_parameters", "evaluate", "train", "get_parameters", "reset_optimizer")  # what the agent calls
WIDTH = 120  # columns of text

WIRE_FORMS = {
    "float32": Compression(),
    ROTATED_8BIT: Compression(ROTATED_8BIT),
    ROTATED_4BIT: Compression(ROTATED_4BIT),
    f"{TOP_K} of 10%": Compression(TOP_K, 0.1),
    f"{TOP_K_8BIT} of 1%": Compression(TOP_K_8BIT, 0.01),
}


@dataclass(frozen=True)
class Port:
    """An input or output of an entry point; type as TFLite names it."""

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EntryPointFacts:
    """operators: name -> how many of them run. arena_bytes: of the entry point's computed tensors, see `costs`."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: dict[str, int]
    flops: Flops
    arena_bytes: int


@dataclass(frozen=True)
class Constants:
    """Bytes of constant data in the model: what variables start from, frozen weights and other float numbers, and
    tables of whole numbers."""

    initial_values: int
    floats: int
    tables: int


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of the training process beside Python, NumPy and the runtime's own code.

    optimizer: state that is no parameter. vectors: the received parameters, the update, and a copy of each on its way.
    arenas: of every entry point that a round calls; each keeps its own.
    """

    model: int
    parameters: int
    optimizer: int
    vectors: int
    arenas: int

    @property
    def total(self) -> int:
        return self.model + self.parameters + self.optimizer + self.vectors + self.arenas


@dataclass(frozen=True)
class Inspection:
    """update_bytes: of one update, in each form that a plan can ask for (top-k at most). problems: why the target's
    runtime does not take the model; empty where it does. notes: what an app on the target must know."""

    manifest: Manifest
    bundle_bytes: int
    sealed: bool
    sealed_by: Optional[str]
    target: str
    entry_points: tuple[EntryPointFacts, ...]
    constants: Constants
    memory: Memory
    traffic: Traffic
    update_bytes: dict[str, int]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def inspect(data: bytes, target: str = "edge", key: Optional[PublicKey] = None) -> Inspection:
    """The facts about the bundle in `data`. BundleError where it is damaged or not sealed by `key`."""
    bundle = read_bundle(data, key)
    model = read_tflite(bundle.model)
    missing = [name for name in bundle.manifest.signatures if name not in model.entry_points]
    if missing:
        raise BundleError(f"the model lacks the entry points {', '.join(missing)} of its manifest", "export it again")
    facts = tuple(_facts(model, name, model.entry_points[name]) for name in bundle.manifest.signatures)
    return Inspection(
        manifest=bundle.manifest,
        bundle_bytes=len(data),
        sealed=bundle.sealed,
        sealed_by=None if key is None else key.hex(),
        target=target,
        entry_points=facts,
        constants=_constants(model),
        memory=_memory(bundle, model, facts),
        traffic=traffic(bundle.manifest, len(data)),
        update_bytes={name: update_sizes(form, bundle.manifest.dimension)[1] for name, form in WIRE_FORMS.items()},
        problems=tuple(_problems(model, facts, target)),
        notes=tuple(_android_notes(model)) if target == "android" else (),
    )


def _facts(model: TfliteModel, name: str, entry_point: EntryPoint) -> EntryPointFacts:
    graph = entry_point.subgraph

    def ports(numbers: Iterable[tuple[str, int]]) -> tuple[Port, ...]:
        return tuple(Port(name, graph.tensors[i].type, graph.tensors[i].shape) for name, i in sorted(numbers))

    return EntryPointFacts(
        name=name,
        inputs=ports(entry_point.inputs.items()),
        outputs=ports(entry_point.outputs.items()),
        operators=dict(sorted(Counter(operator.name for operator in graph.operators).items())),
        flops=flops(model, graph),
        arena_bytes=arena_bytes(graph),
    )


def _constants(model: TfliteModel) -> Constants:
    """Each piece of data once, however many tensors share it."""
    starting = [graph for one in model.subgraphs for name, graph in called_subgraphs(model, one) if name == "CALL_ONCE"]
    initial = {tensor.buffer: tensor.constant_bytes for graph in starting for tensor in graph.tensors}
    floats: dict[int, int] = {}
    tables: dict[int, int] = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.buffer not in initial:
                (floats if tensor.type.startswith("FLOAT") else tables)[tensor.buffer] = tensor.constant_bytes
    return Constants(sum(initial.values()), sum(floats.values()), sum(tables.values()))


def _memory(bundle: Bundle, model: TfliteModel, facts: Sequence[EntryPointFacts]) -> Memory:
    parameters = 4 * bundle.manifest.dimension
    return Memory(
        model=len(bundle.model),
        parameters=parameters,
        optimizer=max(0, sum(variable_bytes(model).values()) - parameters),
        vectors=4 * parameters,
        arenas=sum(one.arena_bytes for one in facts if one.name in EVERY_ROUND),
    )


def _problems(model: TfliteModel, facts: Sequence[EntryPointFacts], target: str) -> Iterator[str]:
    for name, version in sorted(model.operator_versions.items()):
        highest, lowest = HIGHEST_VERSION.get(name), LOWEST_VERSION.get(name, 1)
        if highest is None:
            yield f"{name} is not among the operators of {RUNTIME}{_where(model, name, version)}"
        elif not lowest <= version <= highest:
            has = f"which has versions {lowest} to {highest}"
            yield f"{name} version {version} is not in {RUNTIME}, {has}{_where(model, name, version)}"
    if target == "android":
        yield from _android_problems(model, facts)


def _where(model: TfliteModel, name: str, version: int) -> str:
    found = next(places(model, name, version), "")
    return f" ({found})" if found else ""


def _android_problems(model: TfliteModel, facts: Sequence[EntryPointFacts]) -> Iterator[str]:
    for one in facts:
        for port in (*one.inputs, *one.outputs):
            if port.type not in android.TYPES:
                yield f"{one.name}: {port.name} is {port.type}, which Android's interface does not take"
    if model.schema != android.SCHEMA:
        yield f"the model's schema has version {model.schema}, Android's runtime reads {android.SCHEMA}"
    if model.size > android.MAX_MODEL_BYTES:
        yield f"the model has {_size(model.size)}, Android's interface takes {_size(android.MAX_MODEL_BYTES)}"


def _android_notes(model: TfliteModel) -> Iterator[str]:
    release, operator = android.needed_release(model)
    reason = "training by signatures" if operator is None else f"{operator.name} version {operator.version}"
    yield f"needs org.tensorflow:tensorflow-lite {release} or newer (for {reason}), or any release of LiteRT"
    silent = android.without_inputs(model)
    if silent:  # docs/native-app.md
        yield f"without an input: {', '.join(silent)}. Java's runSignature refuses them; call them by the C interface"


# --- as text and as JSON


def as_plain(inspection: Inspection) -> dict[str, Any]:
    """Everything, as values that JSON knows."""
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(inspection)
    plain["dimension"] = inspection.manifest.dimension
    for facts, one in zip(plain["entry_points"], inspection.entry_points):
        facts["flops"]["total"] = one.flops.total
    plain["memory"]["total"] = inspection.memory.total
    plain["traffic"]["down"], plain["traffic"]["up"] = inspection.traffic.down, inspection.traffic.up
    return plain


def lines(inspection: Inspection) -> Iterator[str]:
    """The report as text, in columns."""
    manifest = inspection.manifest
    yield from _columns(_head(inspection))
    yield from ("", "entry points")
    yield from _columns(_entry_point_rows(inspection.entry_points))
    yield from ("", f"parameters (d = {manifest.dimension})")
    yield from _columns([("name", "shape", "numbers", "")] + _parameter_rows(manifest), "llrl")
    yield from ("", "operators")
    for one in inspection.entry_points:
        counts = ", ".join(f"{name} {count}" for name, count in one.operators.items())
        text = f"{one.name} ({sum(one.operators.values())}): {counts}"
        yield from textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    yield from ("", "cost")
    yield from _columns(_cost_rows(inspection))
    yield ""
    yield f"target {inspection.target}: {'; '.join(inspection.problems) or f'every operator is in {RUNTIME}'}"
    for note in inspection.notes:
        yield from textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _head(inspection: Inspection) -> list[tuple[str, ...]]:
    manifest, constants = inspection.manifest, inspection.constants
    seal = "not sealed"
    if inspection.sealed:
        by = (
            f"by {inspection.sealed_by}, checked" if inspection.sealed_by else "by somebody; --key says whether by whom"
        )
        seal = f"sealed {by}"
    proof = "none"
    if manifest.proof is not None:
        proof = (
            f"within {manifest.proof.max_abs_error:.1e} of TensorFlow's {manifest.proof.judgement} after "
            f"{manifest.proof.steps} steps in {manifest.proof.runtime} (tolerance {manifest.proof.tolerance:.1e})"
        )
    return [
        ("name", manifest.name),
        ("bundle", f"format {manifest.format}, {_size(inspection.bundle_bytes)}, {seal}"),
        ("made by", f"TensorFlow {manifest.tensorflow or 'unknown'}"),
        ("proof", proof),
        ("training", f"{manifest.loss}, {manifest.optimizer}, batches of {manifest.batch_size}"),
        ("train also takes", ", ".join(manifest.train_inputs) or "nothing"),
        (
            "constants",
            f"{_size(constants.initial_values)} initial values, {_size(constants.floats)} frozen weights and other "
            f"floats, {_size(constants.tables)} tables of whole numbers",
        ),
    ]


def _entry_point_rows(facts: Iterable[EntryPointFacts]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for one in facts:
        for index, port in enumerate((*one.inputs, *one.outputs)):
            direction = "in" if index < len(one.inputs) else "out"
            rows.append(
                (one.name if index == 0 else "", direction, port.name, port.type.lower(), str(list(port.shape)))
            )
    return rows


def _parameter_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    return [
        (spec.name, str(list(spec.shape)), str(spec.size), "" if spec.trainable else "moving statistic")
        for spec in manifest.parameters
    ]


def _cost_rows(inspection: Inspection) -> list[tuple[str, ...]]:
    by_name = {one.name: one for one in inspection.entry_points}
    memory, wire = inspection.memory, inspection.traffic
    batch = f"a batch of {inspection.manifest.batch_size}"
    return [
        *(
            (title, f"{_flop(by_name[name].flops)} for {batch}")
            for title, name in (("one training step", "train"), ("one inference", "infer"))
        ),
        (
            "memory, estimated",
            f"{_size(memory.total)}: model file {_size(memory.model)}, parameters {_size(memory.parameters)}, "
            f"optimizer {_size(memory.optimizer)}, received and update {_size(memory.vectors)}, "
            f"tensors {_size(memory.arenas)}",
        ),
        ("wire, each round", f"{_size(wire.down)} down, {_size(wire.up)} up"),
        ("one update", ", ".join(f"{_size(size)} as {name}" for name, size in inspection.update_bytes.items())),
        ("wire, once", f"{_size(wire.bundle_down)} down, {_size(wire.bundle_up)} up for the bundle"),
    ]


def _flop(value: Flops) -> str:
    return f"{value.total / 1e6:.3g} MFLOP ({value.products / 1e6:.3g} in products)"


def _size(count: int) -> str:
    return (
        f"{count} B" if count < 10_000 else f"{count / 1e3:.1f} kB" if count < 10_000_000 else f"{count / 1e6:.1f} MB"
    )


def _columns(rows: list[tuple[str, ...]], align: str = "") -> Iterator[str]:
    """Rows with their columns below each other; align: l or r for each, left where it says nothing."""
    if not rows:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if align[index : index + 1] == "r" else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ]
        yield ("  " + "  ".join(cells)).rstrip()
