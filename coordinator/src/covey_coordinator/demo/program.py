"""The demo: one fleet, three training runs, one inversion check, one report.

    clean reference         plain mean, nobody corrupted
    plain mean              the same fleet after some devices' labels went wrong
    robust rule             the same corrupted fleet

Everything is real: agents are operating-system processes that train with a TFLite runtime on files of their own,
updates travel sealed over MQTT, aggregation runs in TFF (or directly, with the same bits). Only the test set that
measures accuracy is the demo's own; no device has it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from covey_coordinator import records
from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.coordinator import Coordinator, RoundResult, Timing, shuffle_seed
from covey_coordinator.demo.devices import DeviceFiles, Shard, make_device
from covey_coordinator.demo.display import Display, RunDisplay, why_rejected
from covey_coordinator.demo.logs import logged_to
from covey_coordinator.demo.processes import AgentProcesses, BrokerProcess
from covey_coordinator.demo.settings import DemoSettings
from covey_coordinator.fleet import Fleet
from covey_coordinator.machine import check_machine
from covey_coordinator.store import RunStore
from covey_edge.config import BrokerSettings, read_broker
from covey_edge.files import write_atomic
from covey_edge.mqtt import Broker
from covey_edge.processes import interrupted_by_signals
from covey_edge.runtime import Model
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import RunError
from covey_protocol.messages import TrainingPlan
from covey_protocol.round import Progress
from covey_protocol.seals import PublicKey, SealingKey

Floats = npt.NDArray[np.float32]

TEST_FRACTION = 0.2
MIN_EXAMPLES = 8  # fewest a shard may hold: half a batch
BATCH = 16
EPOCHS = 3
LEARNING_RATE = {"small-cnn": 0.1, "mlp": 0.1}  # chosen once on the bundled data; not tuned per run
START_TIMEOUT_S = 90.0
MOST_ABANDONED = 3  # in a row; then the run cannot be saved by waiting
TIMING = Timing(duration_s=120.0, answer_s=20.0, grace_s=2.0)
AUDIT_LEARNING_RATE = 0.1
NOISE_MULTIPLIERS = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class _Data:
    """What is in the demo before it is handed out."""

    name: str
    class_names: Sequence[str]
    feature_names: Sequence[str]
    input_range: tuple[float, float]
    shards: list[Shard]
    test: Shard


@dataclass(frozen=True)
class _Model:
    keras: object
    name: str
    bundle: bytes
    runtime: Model

    @property
    def initial(self) -> Floats:
        return self.runtime.parameters()


def run_demo(settings: DemoSettings, display: Display) -> records.DemoRecord:
    """Run the whole demo and write ``RUNS_DIR/NAME/report.html``. Whatever happens, no process is left behind."""
    started = time.monotonic()
    check_machine()
    settings.check()
    check_interrupted = interrupted_by_signals()
    name = settings.name or f"{settings.data_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = settings.runs_dir / name
    with contextlib.ExitStack() as stack:
        return Demo(settings, display, name, folder, stack, check_interrupted).run(started)


class Demo:
    """One demo in progress. What must be ended is on `stack`."""

    def __init__(
        self,
        settings: DemoSettings,
        display: Display,
        name: str,
        folder: Path,
        stack: contextlib.ExitStack,
        check_interrupted: Callable[[], None],
    ) -> None:
        self._check_interrupted = check_interrupted
        self._settings, self._display, self._name, self._folder = settings, display, name, folder
        self._stack = stack
        self._broker: BrokerProcess | None = None
        self._agents: AgentProcesses | None = None
        self._running: RunDisplay | None = None
        self._tff_worker: Worker | None = None
        self._key = SealingKey.generate()
        stack.enter_context(logged_to(folder / "logs" / "coordinator.log"))

    def run(self, started: float) -> records.DemoRecord:
        settings, display = self._settings, self._display
        rows = f"{settings.devices} devices, {settings.corrupted} of them will be corrupted"
        display.line(f"covey demo: {settings.data_name}, {rows}, seed {settings.seed}")
        data = self._load_data()
        settings.check_rule()  # imports TensorFlow, so after what is cheap to know
        devices = self._start_fleet(data)
        model = self._export(data)
        fleet = self._connect(devices)
        coordinator = Coordinator(fleet, RunStore(self._folder), on_progress=self._on_progress)
        self._wait_for_devices(coordinator)
        corrupted = self._corrupted()
        count = f"{len(corrupted)} corrupted"
        runs = [self._train(coordinator, model, data, "clean reference (mean)", "mean", ())]
        self._corrupt(devices, data, corrupted)
        runs.append(self._train(coordinator, model, data, f"mean, {count}", "mean", corrupted))
        runs.append(self._train(coordinator, model, data, f"{settings.rule}, {count}", settings.rule, corrupted))
        inversion = self._inversion_check(coordinator, model, data, corrupted)
        record = records.DemoRecord(
            name=self._name,
            dataset=data.name,
            class_names=data.class_names,
            seed=settings.seed,
            num_devices=settings.devices,
            settings=self._settings_table(model),
            runs=runs,
            inversion=inversion,
            shard_counts=_shard_counts(data),
            seconds=time.monotonic() - started,
        )
        self._finish(record)
        return record

    # --- the parts

    def _load_data(self) -> _Data:
        from covey_models import datasets, partitions

        settings = self._settings
        dataset = datasets.load(settings.data)
        train, test = datasets.split(dataset, test_fraction=TEST_FRACTION, seed=settings.seed)
        parts = partitions.dirichlet(
            train.y, settings.devices, alpha=settings.alpha, seed=settings.seed, min_examples=MIN_EXAMPLES
        )
        shards = [Shard(train.x[rows], train.y[rows]) for rows in parts]
        sizes = [len(shard.y) for shard in shards]
        self._display.fact(
            "data",
            f"{dataset.name}: {sum(sizes)} examples in shards of {min(sizes)} to {max(sizes)}, {len(test.y)} to test",
        )
        return _Data(
            dataset.name,
            dataset.class_names,
            dataset.feature_names,
            dataset.input_range,
            shards,
            Shard(test.x, test.y),
        )

    def _start_fleet(self, data: _Data) -> list[DeviceFiles]:
        """Broker and agents first: they start while this process imports TensorFlow."""
        settings = self._settings
        table = {"url": settings.broker or ""}
        if settings.broker is None:
            self._broker = BrokerProcess(self._folder / "logs" / "broker.log")
            self._stack.callback(self._broker.stop)
            table = {"url": self._broker.url, "protocol": "3.1.1"}
        for name in ("ca_file", "cert_file", "key_file"):
            if (path := getattr(settings, name)) is not None:
                table[name] = str(path.resolve())
        self._table = table
        self._display.fact("broker", f"{'embedded ' if self._broker else ''}{self._parsed_broker()}")
        if self._broker is None:
            self._try_broker()
        devices = [
            make_device(device_id, self._folder / "devices" / device_id, settings.fleet, table, self._key.public, shard)
            for device_id, shard in zip(settings.device_ids(), data.shards)
        ]
        configs = {device.device_id: device.config for device in devices}
        self._agents = AgentProcesses(configs, self._folder / "logs")
        self._stack.callback(self._agents.stop)
        return devices

    def _parsed_broker(self) -> Broker:
        return read_broker(msgspec.convert(self._table, BrokerSettings), self._folder)

    def _try_broker(self) -> None:
        """A broker of the user's that cannot be reached is better known before ten agents say so."""
        fleet = self._make_fleet({})
        fleet.connect()
        fleet.close()

    def _export(self, data: _Data) -> _Model:
        import covey_models
        from covey_models import zoo

        started = time.monotonic()
        shape = data.test.x.shape[1:]
        classes = len(data.class_names)
        name = zoo.default_for(shape)
        keras = zoo.build(name, shape, classes, seed=self._settings.seed)
        bundle = covey_models.export(
            keras,
            name=name,
            batch_size=BATCH,
            input_range=data.input_range,
            num_classes=classes,
            class_names=tuple(data.class_names),
            key=self._key,
            seed=self._settings.seed,
        )
        write_atomic(self._folder / f"{name}.covey", bundle)
        opened = read_bundle(bundle, self._key.public)
        proof = opened.manifest.proof
        error = f", TFLite equals TensorFlow within {proof.max_abs_error:.0e}" if proof else ""
        seconds = time.monotonic() - started
        self._display.fact(
            "model", f"{name}: {opened.manifest.dimension:,} parameters, exported in {seconds:.1f} s{error}"
        )
        return _Model(keras, name, bundle, Model(opened))

    def _make_fleet(self, roster: dict[str, PublicKey]) -> Fleet:
        return Fleet(self._parsed_broker(), self._settings.fleet, self._key, roster, check=self._check)

    def _connect(self, devices: list[DeviceFiles]) -> Fleet:
        fleet = self._make_fleet({device.device_id: device.public for device in devices})
        fleet.connect()
        self._stack.callback(fleet.close)
        return fleet

    def _wait_for_devices(self, coordinator: Coordinator) -> None:
        assert self._agents is not None
        agents = self._agents
        coordinator.wait_for(self._settings.devices, START_TIMEOUT_S, lambda online: agents.check_start())
        self._display.fact("devices", f"{len(coordinator.fleet.online())} online")

    def _corrupted(self) -> tuple[str, ...]:
        rng = np.random.default_rng([self._settings.seed, 1])
        ids = self._settings.device_ids()
        return tuple(ids[i] for i in sorted(rng.choice(len(ids), self._settings.corrupted, replace=False)))

    def _corrupt(self, devices: list[DeviceFiles], data: _Data, corrupted: Sequence[str]) -> None:
        """From now on these devices' labels are shifted by one class: each trains with conviction on wrong labels."""
        from covey_models.corruption import shift_labels

        for device, shard in zip(devices, data.shards):
            if device.device_id in corrupted:
                device.write_data(Shard(shard.x, shift_labels(shard.y, len(data.class_names))))
        if corrupted:
            self._display.fact("corrupted", f"{', '.join(corrupted)}: every label is now shifted by one class")

    def _train(
        self, coordinator: Coordinator, model: _Model, data: _Data, title: str, rule: str, corrupted: Sequence[str]
    ) -> records.RunRecord:
        from covey_coordinator.aggregation.engines import make_engine
        from covey_coordinator.aggregation.registry import make_rule

        settings = self._settings
        num_byzantine = 0 if rule == "mean" else settings.num_byzantine
        engine = make_engine(
            settings.engine,
            make_rule(rule, num_byzantine),
            model.runtime.manifest.parameters,
            worker=self._worker(),
        )
        run_id = f"{rule}-{'corrupted' if corrupted else 'clean'}"
        parameters = _initial(model)
        rounds: list[records.RoundRecord] = []
        with contextlib.closing(engine), self._display.run(title, settings.rounds) as display:
            self._running = display
            for number in range(1, settings.rounds + 1):
                result = coordinator.run_round(
                    run_id=run_id,
                    number=number,
                    bundle=model.bundle,
                    parameters=parameters,
                    plan=TrainingPlan(
                        epochs=EPOCHS,
                        learning_rate=LEARNING_RATE[model.name],
                        shuffle_seed=shuffle_seed(settings.seed, number),
                    ),
                    device_ids=coordinator.fleet.online() or settings.device_ids(),
                    quorum=max(1, len(coordinator.fleet.online()) // 2),
                    engine=engine,
                    timing=TIMING,
                )
                parameters = result.parameters
                rounds.append(self._round_record(model, data, number, result))
                display.round(rounds[-1])
                _give_up_if_hopeless(rounds)
            self._running = None
        for line in why_rejected(rounds) if rule != "mean" else ():
            self._display.line(f"    {line}")
        return records.RunRecord(title, rule, settings.engine, corrupted, rounds)

    def _round_record(self, model: _Model, data: _Data, number: int, result: RoundResult) -> records.RoundRecord:
        model.runtime.set_parameters(result.parameters)
        loss, accuracy = model.runtime.evaluate(data.test.x, data.test.y)
        return records.RoundRecord(
            number, accuracy, loss, result.verdicts, result.seconds, result.outcome, result.reason
        )

    def _worker(self) -> Worker | None:
        """The TFF worker, started once for all runs. None for the direct engine, which needs none."""
        if self._settings.engine == "tff" and self._tff_worker is None:
            self._tff_worker = self._stack.enter_context(Worker())
        return self._tff_worker

    def _inversion_check(
        self, coordinator: Coordinator, model: _Model, data: _Data, corrupted: Sequence[str]
    ) -> records.InversionRecord | None:
        """One more real round with one honest device and one example: what can whoever sees the update make of it?"""
        from covey_coordinator.inversion.check import first_inversion_check

        honest = [name for name in coordinator.fleet.online() if name not in corrupted]
        if not honest:
            return None
        device_id = honest[0]
        shard = data.shards[self._settings.device_ids().index(device_id)]
        parameters = _initial(model)
        result = coordinator.run_round(
            run_id="inversion-check",
            number=1,
            bundle=model.bundle,
            parameters=parameters,
            plan=TrainingPlan(epochs=1, learning_rate=AUDIT_LEARNING_RATE, max_examples=1),
            device_ids=[device_id],
            quorum=1,
            engine=None,
            timing=TIMING,
        )
        if result.outcome != "published":
            raise RunError(
                f"the inversion check got no update from {device_id} ({result.reason})", "run the demo again"
            )
        round_id = result.offers[device_id].round_id
        update = coordinator.store.read_update(round_id, device_id)
        record = first_inversion_check(
            keras_model=model.keras,
            parameters=parameters,
            parameter_specs=model.runtime.manifest.parameters,
            update=update,
            learning_rate=AUDIT_LEARNING_RATE,
            truth=shard.x[0],
            true_label=int(shard.y[0]),
            input_range=data.input_range,
            device_id=device_id,
            clip_norm=float(f"{np.linalg.norm(update) / 2:.2g}"),  # half its length, in a number people can read
            noise_multipliers=NOISE_MULTIPLIERS,
            seed=self._settings.seed,
            feature_names=data.feature_names,
        )
        self._display.fact("inversion", f"one update of {device_id} (one step on one example), inverted:")
        for attempt in record.reconstructions:
            self._display.line(f"    {attempt.title:<44} PSNR {attempt.psnr_db:6.1f} dB")
        return record

    def _finish(self, record: records.DemoRecord) -> None:
        from covey_coordinator.report.html import write_report
        from covey_coordinator.report.summary import table_lines

        path = self._folder / "report.html"
        write_report(path, record)
        self._display.line()
        for line in table_lines(record):
            self._display.line(line)
        self._display.line()
        self._display.line(f"report: {path}")

    def _settings_table(self, model: _Model) -> dict[str, str]:
        settings = self._settings
        return {
            "rounds": str(settings.rounds),
            "local training": f"{EPOCHS} epochs, batch {BATCH}, SGD at learning rate {LEARNING_RATE[model.name]}",
            "partition": f"Dirichlet, alpha {settings.alpha:g}",
            "corruption": "every label shifted by one class",
            "server optimizer": "sgd, learning rate 1 (FedAvg)",
            "engine": settings.engine,
            "model": f"{model.name}, {model.runtime.manifest.dimension:,} parameters",
            "runtime on devices": model.runtime.runtime,
            "broker": str(self._parsed_broker()),
        }

    # --- while rounds run

    def _on_progress(self, progress: dict[str, Progress]) -> None:
        if self._running is not None:
            self._running.devices(progress)

    def _check(self) -> None:
        """Called all the time: were we asked to stop, has a process of ours ended?"""
        self._check_interrupted()
        if self._broker is not None:
            self._broker.check()
        if self._agents is not None and self._running is not None:
            for device_id, how in self._agents.newly_lost().items():
                self._running.note(f"the agent of {device_id} ended ({how}); the round goes on without it")


def _initial(model: _Model) -> Floats:
    """The parameters in the bundle: a fresh copy of the model has them."""
    return Model(read_bundle(model.bundle)).parameters()


def _shard_counts(data: _Data) -> dict[str, Sequence[int]]:
    classes = len(data.class_names)
    return {
        f"device-{number:02d}": [int(count) for count in np.bincount(shard.y, minlength=classes)]
        for number, shard in enumerate(data.shards)
    }


def _give_up_if_hopeless(rounds: Sequence[records.RoundRecord]) -> None:
    last = rounds[-MOST_ABANDONED:]
    if len(last) == MOST_ABANDONED and all(record.outcome != "published" for record in last):
        raise RunError(
            f"{MOST_ABANDONED} rounds in a row were abandoned ({last[-1].note})",
            "look at the agents' logs and run again",
        )
