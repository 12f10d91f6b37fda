"""Simulations on several `covey worker`s: the results of one worker, whatever becomes of the others. Real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from patience import PATIENCE_S
from proxy import Proxy

from covey_coordinator.simulation import gate
from covey_coordinator.simulation.addresses import split_address
from covey_coordinator.simulation.remote import RemoteWorkers, connect
from covey_coordinator.simulation.worker_command import who, worker_command
from covey_protocol.errors import ConfigError, MachineError, RunError, TransportError

pytestmark = pytest.mark.fleet


class RunningWorker:
    """A `covey worker`; its gate and TFF's worker are its child and grandchild."""

    def __init__(self, *options: str, listen: str = "127.0.0.1:0") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "covey_edge", "worker", "--listen", listen, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        assert "listening on" in ready, ready
        self.address = ready.split()[4].rstrip(",")
        (self.gate,) = psutil.Process(self.process.pid).children()

    @property
    def binary(self) -> psutil.Process:
        """TFF's worker; the gate starts a new one whenever all guests have left."""
        return eventually(lambda: next((p for p in self.gate.children() if p.name() == "worker_binary"), None))

    def freeze(self) -> None:
        self.binary.suspend()

    def thaw(self) -> None:
        self.binary.resume()

    def kill(self) -> None:
        """kill -9 of TFF's worker, from which nothing can protect us."""
        self.binary.kill()
        self.process.wait(PATIENCE_S)

    def stop(self) -> None:
        """As a test's end must, whatever has been killed or frozen."""
        self.process.kill()  # which takes the other two along
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., RunningWorker]]:
    started: list[RunningWorker] = []

    def one(*options: str, listen: str = "127.0.0.1:0") -> RunningWorker:
        started.append(RunningWorker(*options, listen=listen))
        return started[-1]

    yield one
    for worker in started:
        worker.stop()


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[RunningWorker, RunningWorker]]:
    """Two workers that no test harms."""
    both = RunningWorker(), RunningWorker()
    yield both
    for worker in both:
        worker.stop()


def addresses(*workers: RunningWorker) -> list[str]:
    return [worker.address for worker in workers]


def eventually(happened: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (seen := happened()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return seen


def in_background(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def numbered_rows(n: int) -> tuple[Any, list[np.ndarray]]:
    """A TFF computation that gathers a row of each client, and n clients' rows, no two alike."""
    import tensorflow_federated as tff

    from covey_coordinator.simulation.composition import gathering

    row = tff.FederatedType(tff.TensorType(np.float32, [2]), tff.CLIENTS)
    return tff.federated_computation(gathering(2, np.float32), row), [
        np.array([number, number**2], np.float32) for number in range(n)
    ]


# --- several workers give what one gives


def learned(worker: Any, rule: Any, rounds: int = 2, **options: Any) -> list[Any]:
    """Parameters, evaluation and the rounds' outcomes of five devices, two of them hostile."""
    simulation = simulation_of(rule, worker, **options)
    with simulation:
        state, outcomes = simulation.initial_state(), []
        for number in range(rounds):
            state, outcome = simulation.next(state, range(5), shuffle_seed=number)
            outcomes.append(outcome)
        return [simulation.parameters(state), simulation.evaluate_devices(state, [0, 4]), outcomes]


def simulation_of(rule: Any, worker: Any, algorithm: str = "fedavg", **options: Any) -> Any:
    import tensorflow as tf
    from sklearn.datasets import load_digits

    from covey_coordinator.attacks.registry import ATTACKS
    from covey_coordinator.simulation.learning import DeviceData, Learning
    from covey_coordinator.simulation.process import Simulation
    from covey_protocol.messages import TrainingPlan

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    starts = [0, 60, 130, 170, 250, 300]  # devices of different sizes
    devices = [DeviceData(f"device-{n}", x[a:b], y[a:b]) for n, (a, b) in enumerate(zip(starts, starts[1:]))]
    tf.keras.utils.set_random_seed(3)
    model = tf.keras.Sequential([tf.keras.Input((64,)), tf.keras.layers.Dense(10)])
    steps = 4 if algorithm == "scaffold" else 0
    learning = Learning(
        model,
        TrainingPlan(epochs=1, learning_rate=0.1, steps=steps),
        rule,
        attack=ATTACKS["sign-flip"](),
        hostile=(1, 4),
        algorithm=algorithm,
    )
    return Simulation(learning, devices, worker=worker, **options)


def test_two_workers_judge_devices_exactly_as_one_and_by_their_names(pair: tuple[RunningWorker, RunningWorker]) -> None:
    from covey_coordinator.aggregation.krum import MultiKrum

    rule = MultiKrum(num_byzantine=1, num_selected=3)
    tunnel = Proxy(split_address(pair[1].address)[1])
    with connect(addresses(pair[0])) as one, connect([pair[0].address, f"127.0.0.1:{tunnel.port}"]) as two:
        assert two.read_our_files
        alone, together = learned(one, rule), learned(two, rule, send_data=True)
        assert tunnel.up > 100_000  # of devices' examples
    tunnel.close()
    np.testing.assert_array_equal(together[0], alone[0])
    assert together[1:] == alone[1:]
    rejected = {device_id for device_id, judged in together[2][0].verdicts.items() if not judged.accepted}
    assert rejected == {"device-1", "device-4"}


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "is_split"), {"scaffold": True, "fsvrg": False}.items())
def test_algorithms_of_several_exchanges_are_the_same_on_two_workers(
    pair: tuple[RunningWorker, RunningWorker], algorithm: str, is_split: bool
) -> None:
    from covey_coordinator.aggregation.krum import MultiKrum

    rule = MultiKrum(num_byzantine=1, num_selected=3)
    with connect(addresses(pair[0])) as one, connect(addresses(*pair)) as two:
        alone = learned(one, rule, algorithm=algorithm)
        together = learned(two, rule, algorithm=algorithm)
    np.testing.assert_allclose(together[0], alone[0], rtol=0, atol=1e-6)
    told = [outcome.notes for outcome in together[2]]
    assert told[1] == ()
    assert len(told[0]) == (0 if is_split else 1)  # said once
    assert all("TFF cannot split it" in note for note in told[0])


def test_tffs_own_federated_averaging_is_the_same_on_two_workers(pair: tuple[RunningWorker, RunningWorker]) -> None:
    import tensorflow as tf
    import tensorflow_federated as tff

    def loss(output: Any, label: Any, sample_weight: Any = None) -> Any:
        return tf.reduce_mean((output[:, 0] - label) ** 2)

    model = tff.learning.models.functional_model_from_keras(
        tf.keras.Sequential([tf.keras.layers.Dense(1, kernel_initializer="zeros", input_shape=(3,))]),
        tf.keras.losses.MeanSquaredError(),
        input_spec=(tf.TensorSpec([None, 3], tf.float32), tf.TensorSpec([None, 1], tf.float32)),
    )
    process = tff.learning.algorithms.build_weighted_fed_avg(
        model, client_optimizer_fn=tff.learning.optimizers.build_sgdm(0.1)
    )
    random = np.random.default_rng(5)
    clients = [[tuple(random.normal(size=(n, k)).astype(np.float32) for k in (3, 1))] * 2 for n in (3, 9, 5)]

    def two_rounds() -> Any:
        state = process.initialize()
        for _ in range(2):
            state = process.next(state, clients).state
        return [*state.global_model_weights.trainable]

    with connect(addresses(pair[0])) as one, connect(addresses(*pair)) as two:
        alone, together = one.call(two_rounds), two.call(two_rounds)
        assert two.take_notes() == ()
    for mine, theirs in zip(together, alone):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)


def test_rows_keep_the_order_of_clients_when_the_first_worker_is_the_last_to_answer(
    pair: tuple[RunningWorker, RunningWorker],
) -> None:
    gathered, rows = numbered_rows(7)
    with connect(addresses(*pair)) as workers:
        pair[0].freeze()
        try:
            answer = in_background(workers.call, gathered, rows)
            time.sleep(1.0)
            assert not answer.done()
        finally:
            pair[0].thaw()
        np.testing.assert_array_equal(answer.result(PATIENCE_S), rows)
        assert workers.take_notes() == ()


def test_fewer_clients_than_workers_and_none_are_computed_too(pair: tuple[RunningWorker, RunningWorker]) -> None:
    gathered, rows = numbered_rows(1)
    with connect(addresses(*pair)) as workers:
        np.testing.assert_array_equal(workers.call(gathered, rows), rows)
        assert workers.call(gathered, []).shape == (0, 2)


def test_values_of_clients_come_back_in_their_order(pair: tuple[RunningWorker, RunningWorker]) -> None:
    import tensorflow_federated as tff

    double = tff.tensorflow.computation(lambda number: 2 * number, np.int32)
    of_all = tff.federated_computation(
        lambda numbers: tff.federated_map(double, numbers), tff.FederatedType(np.int32, tff.CLIENTS)
    )
    with connect(addresses(*pair)) as workers:
        assert workers.call(of_all, list(range(5))) == [0, 2, 4, 6, 8]


def test_what_cannot_be_split_is_computed_whole_and_said(pair: tuple[RunningWorker, RunningWorker]) -> None:
    import tensorflow_federated as tff

    subtract = tff.tensorflow.computation(lambda number, mean: number - mean, np.float32, np.float32)

    @tff.federated_computation(tff.FederatedType(np.float32, tff.CLIENTS))
    def of_centred(numbers: Any) -> Any:
        mean = tff.federated_broadcast(tff.federated_mean(numbers))
        return tff.federated_sum(tff.federated_map(subtract, (numbers, mean)))

    with connect(addresses(*pair)) as workers:
        assert workers.call(of_centred, [np.float32(n) for n in (1, 2, 6)]) == pytest.approx(0, abs=1e-6)
        assert "runs on one worker, because TFF cannot split it" in workers.take_notes()[0]


def test_an_error_of_the_computation_is_told_and_costs_no_worker(pair: tuple[RunningWorker, RunningWorker]) -> None:
    import tensorflow as tf
    import tensorflow_federated as tff

    @tff.tensorflow.computation(np.int32)
    def refused(number: Any) -> Any:
        with tf.control_dependencies([tf.debugging.assert_less(number, 3, message="three is too many")]):
            return tf.identity(number)

    of_all = tff.federated_computation(
        lambda numbers: tff.federated_sum(tff.federated_map(refused, numbers)), tff.FederatedType(np.int32, tff.CLIENTS)
    )
    with connect(addresses(*pair)) as workers:
        with pytest.raises(Exception, match="three is too many"):
            workers.call(of_all, [0, 1, 2, 3])
        assert workers.call(of_all, [0, 1, 2, 2]) == 5
        assert workers.take_notes() == ()


# --- workers die, hang, come back


def test_a_mean_is_that_of_one_worker_also_when_workers_are_killed_and_the_run_is_taken_up_again(
    start: Callable[..., RunningWorker], pair: tuple[RunningWorker, RunningWorker]
) -> None:
    from covey_coordinator.aggregation.mean import Mean

    with connect(addresses(pair[0])) as unharmed:
        expected = learned(unharmed, Mean(), rounds=4)[0]
    first, second = start(), start()
    with connect(addresses(first, second), patience_s=5) as workers, simulation_of(Mean(), workers) as simulation:
        state, _ = simulation.next(simulation.initial_state(), range(5), 0)
        first.freeze()  # so that it is surely in the middle of the round when it dies
        second_round = in_background(simulation.next, state, range(5), 1)
        time.sleep(0.5)
        killed_at = time.monotonic()
        first.kill()
        state, outcome = second_round.result(PATIENCE_S)
        assert time.monotonic() - killed_at < 20
        assert outcome.notes == (
            f"worker {first.address} was lost: its connection broke",
            f"part 1 of 2 is computed again, after the loss of {first.address}",
        )
        state, _ = simulation.next(state, range(5), 2)
        saved = simulation.saved(state)
        second.kill()
        with pytest.raises(RunError, match=f"no worker is left.*{second.address}.*covey worker.*resume"):
            simulation.next(state, range(5), 3)
    third = start()
    with connect(addresses(third)) as workers, simulation_of(Mean(), workers) as simulation:
        state, _ = simulation.next(simulation.loaded(saved), range(5), 3)
        np.testing.assert_allclose(simulation.parameters(state), expected, rtol=0, atol=1e-6)


def test_a_round_after_a_loss_is_the_same_to_the_bit(start: Callable[..., RunningWorker]) -> None:
    import tensorflow_federated as tff

    of_clients = tff.FederatedType((np.float32, [1000]), tff.CLIENTS)
    mean = tff.federated_computation(lambda values: tff.federated_mean(values), of_clients)
    values = list(np.random.default_rng(8).normal(size=(9, 1000)).astype(np.float32))
    first, second, third = start(), start(), start()
    with connect(addresses(first, second, third)) as workers:
        before = workers.call(mean, values)
        second.kill()
        eventually(lambda: workers.living == addresses(first, third))
        assert eventually(workers.take_notes) == (f"worker {second.address} was lost: its connection broke",)
        np.testing.assert_array_equal(workers.call(mean, values), before)
    with connect(addresses(first)) as alone:
        assert not np.array_equal(alone.call(mean, values), before)  # a sum in another order, so the test can fail


def test_a_worker_that_hangs_is_lost_after_the_patience_and_taken_back(start: Callable[..., RunningWorker]) -> None:
    gathered, rows = numbered_rows(4)
    first, second = start(), start()
    with connect(addresses(first, second), patience_s=4) as workers:
        np.testing.assert_array_equal(workers.call(gathered, rows), rows)
        first.freeze()
        begun = time.monotonic()
        np.testing.assert_array_equal(workers.call(gathered, rows), rows)
        assert time.monotonic() - begun < 20
        assert workers.take_notes() == (
            f"worker {first.address} was lost: it has not answered for 4 s",
            f"part 1 of 2 is computed again, after the loss of {first.address}",
        )
        time.sleep(1.5)  # its gate answers all the time
        assert workers.living == [second.address]
        first.thaw()
        eventually(lambda: workers.living == addresses(first, second))
        assert workers.take_notes() == (f"worker {first.address} is back",)
        second.kill()  # so that the returned one has to compute
        np.testing.assert_array_equal(workers.call(gathered, rows), rows)


def test_a_worker_started_anew_on_its_port_is_used_again(start: Callable[..., RunningWorker]) -> None:
    gathered, rows = numbered_rows(4)
    first = start()
    with connect([first.address]) as workers:
        np.testing.assert_array_equal(workers.call(gathered, rows), rows)
        first.kill()
        eventually(lambda: workers.living == [])
        answer = in_background(workers.call, gathered, rows)
        start(listen=first.address)
        np.testing.assert_array_equal(answer.result(PATIENCE_S), rows)


def test_a_tunnel_that_breaks_in_a_round_and_comes_back_loses_nothing(
    pair: tuple[RunningWorker, RunningWorker],
) -> None:
    gathered, rows = numbered_rows(4)
    tunnel = Proxy(split_address(pair[0].address)[1])
    try:
        with connect([f"127.0.0.1:{tunnel.port}"]) as workers:
            np.testing.assert_array_equal(workers.call(gathered, rows), rows)
            passed = tunnel.up
            assert passed > 0
            pair[0].freeze()
            try:
                answer = in_background(workers.call, gathered, rows)
                eventually(lambda: tunnel.up > passed + 100)  # the call, and not only a ping of 17 bytes
                tunnel.cut()
            finally:
                pair[0].thaw()
            np.testing.assert_array_equal(answer.result(PATIENCE_S), rows)
            assert "its connection broke" in workers.take_notes()[0]
    finally:
        tunnel.close()


def test_a_worker_that_cannot_be_reached_is_named_at_the_start(pair: tuple[RunningWorker, RunningWorker]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nobody = f"127.0.0.1:{silent.getsockname()[1]}"
    with pytest.raises(RunError, match=f"worker {nobody}: .*refused.*start them with `covey worker`"):
        connect([pair[0].address, nobody])


def test_something_else_that_listens_there_is_named(start: Callable[..., RunningWorker]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            guest, _ = server.accept()
            with guest:
                guest.sendall(b"220 mail.example ESMTP\r\n")
                guest.recv(100)

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(RunError, match="what listens there is not a covey worker"):
            connect([f"127.0.0.1:{server.getsockname()[1]}"])


def test_a_worker_with_another_tff_is_refused_by_its_version() -> None:
    from covey_coordinator.aggregation.worker import LAUNCHER, worker_binary

    settings = {
        "binary": str(worker_binary()),
        "launcher": LAUNCHER,
        "host": "127.0.0.1",
        "port": 0,
        "parent": os.getpid(),
        "confined": True,
        "memory_limit_mb": 0,
        "who": {**who(), "tensorflow_federated": "0.86.0"},
    }
    command = [sys.executable, "-I", "-S", gate.__file__, json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as older:
        try:
            assert older.stdout is not None
            address = json.loads(older.stdout.readline())["listening"]
            with pytest.raises(MachineError, match=f"worker {address} has TensorFlow Federated 0.86.0, we have"):
                connect([address])
        finally:
            older.terminate()


def test_ctrl_c_in_a_call_disconnects(pair: tuple[RunningWorker, RunningWorker]) -> None:
    gathered, rows = numbered_rows(4)
    with connect(addresses(*pair)) as workers:
        workers.call(gathered, rows)
        pair[0].freeze()
        try:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                workers.call(gathered, rows)
            assert not workers.is_running
        finally:
            pair[0].thaw()


@pytest.mark.slow
def test_a_part_that_costs_too_many_workers_ends_the_run(start: Callable[..., RunningWorker]) -> None:
    gathered, rows = numbered_rows(1)
    five = [start() for _ in range(5)]
    with connect(addresses(*five), patience_s=PATIENCE_S) as workers:
        workers.call(gathered, rows)
        for worker in five:
            worker.freeze()
        call = in_background(workers.call, gathered, rows)
        for worker in five[:4]:
            assert not call.done()
            time.sleep(0.5)  # so that the part is there
            worker.kill()
        with pytest.raises(RunError, match=f"has cost 4 workers, the last one {five[3].address}"):
            call.result(PATIENCE_S)
        assert workers.living == [five[4].address]
        five[4].thaw()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_experiment_gives_the_same_when_one_of_its_workers_is_killed(
    start: Callable[..., RunningWorker], tmp_path: Path
) -> None:
    first, second = start(), start()
    (tmp_path / "experiment.toml").write_text(
        f"name = 'remote'\nrounds = 8\ndevices = 6\nworkers = {addresses(first, second)}\n"
        "[data]\nset = 'digits'\n[aggregation]\nrule = 'multi-krum'\nnum_byzantine = 1\n"
    )

    def experiment(folder: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "covey_edge", "simulate", "experiment.toml", "--jobs", "1", "--out", folder]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)

    def told(folder: str, name: str) -> str:
        return next((path.read_text() for path in (tmp_path / folder).glob(f"cells/*/{name}")), "")

    assert experiment("unharmed").wait(PATIENCE_S) == 0
    harmed = experiment("harmed")
    eventually(lambda: told("harmed", "rounds.jsonl").count("\n") >= 3)
    first.kill()
    assert harmed.wait(PATIENCE_S) == 0
    expected, found = (json.loads(told(folder, "result.json")) for folder in ("unharmed", "harmed"))
    assert f"worker {first.address} was lost: its connection broke" in found["notes"][0]
    for one, other in zip(expected["rounds"], found["rounds"]):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rounds_are_the_same_to_the_bit_through_kills_at_random_moments(start: Callable[..., RunningWorker]) -> None:
    import tensorflow as tf
    import tensorflow_federated as tff

    @tff.tensorflow.computation(np.float32)
    def worked_on(number: Any) -> Any:
        """Takes a while; whatever rounding does to it is the same everywhere."""
        return tf.while_loop(lambda i, _: i < 3000, lambda i, x: (i + 1, tf.sin(x) + number), (0, number))[1]

    @tff.federated_computation(tff.FederatedType(np.float32, tff.CLIENTS))
    def mean(numbers: Any) -> Any:
        return tff.federated_mean(tff.federated_map(worked_on, numbers))

    numbers = [np.float32(number / 7) for number in range(20)]
    random = np.random.default_rng(11)
    running = [start(), start(), start()]
    kills = 0
    with connect(addresses(*running)) as workers:
        expected = workers.call(mean, numbers)
        for _ in range(30):
            round_ = in_background(workers.call, mean, numbers)
            time.sleep(random.uniform(0, 0.6))
            victim = int(random.integers(3))
            running[victim].kill()
            kills += not round_.done()
            running[victim] = start(listen=running[victim].address)
            assert round_.result(PATIENCE_S) == expected
        told = [note for note in workers.take_notes() if "computed again" in note]
    assert kills > 5  # in the middle of a round, and not only between two
    assert told


MEMORY_LIMIT_MB = 3000


@pytest.mark.slow
def test_a_computation_beyond_the_memory_limit_fails_and_the_worker_lives(start: Callable[..., RunningWorker]) -> None:
    import tensorflow as tf
    import tensorflow_federated as tff

    total = tff.tensorflow.computation(lambda rows: tf.reduce_sum(tf.ones([rows, 1_000_000])), np.int32)
    worker = start("--memory-limit-mb", str(MEMORY_LIMIT_MB))
    with connect([worker.address]) as workers:
        assert workers.call(total, 10) == 10_000_000
        with pytest.raises(Exception, match="OOM when allocating"):
            workers.call(total, MEMORY_LIMIT_MB // 2)
        assert workers.call(total, 10) == 10_000_000
        assert workers.take_notes() == ()


def test_a_worker_throws_away_what_its_last_coordinator_left(start: Callable[..., RunningWorker]) -> None:
    import tensorflow as tf
    import tensorflow_federated as tff

    endless = tff.tensorflow.computation(lambda: tf.while_loop(lambda i: i >= 0, lambda i: (i * 0,), (tf.constant(0),)))
    gathered, rows = numbered_rows(4)
    worker = start()
    old = worker.binary
    with connect([worker.address]) as workers:
        np.testing.assert_array_equal(workers.call(gathered, rows), rows)
        call = in_background(workers.call, endless)
        time.sleep(0.5)
        assert not call.done()
    with pytest.raises(RunError, match="we disconnected"):
        call.result(PATIENCE_S)
    eventually(lambda: not old.is_running())
    with connect([worker.address]) as workers:
        np.testing.assert_array_equal(workers.call(gathered, rows), rows)
        assert workers.take_notes() == ()


# --- the command


def sockets_of(process: psutil.Process) -> list[str]:
    """The addresses, in this machine's network, on which a process listens."""
    inodes = {
        os.readlink(path)[8:-1]
        for path in Path(f"/proc/{process.pid}/fd").iterdir()
        if "socket:" in str(path.resolve())
    }
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1].split(":")[0])
    return found


def test_nobody_but_the_gate_can_connect_to_tffs_worker(pair: tuple[RunningWorker, RunningWorker]) -> None:
    worker = pair[0]
    assert sockets_of(worker.gate) == ["0100007F"]  # 127.0.0.1
    assert sockets_of(worker.binary) == []
    ours = os.stat("/proc/self/ns/net").st_ino
    assert os.stat(f"/proc/{worker.binary.pid}/ns/net").st_ino not in (ours, 0)


def test_what_runs_on_a_worker_reaches_no_network(pair: tuple[RunningWorker, RunningWorker]) -> None:
    interfaces = Path(f"/proc/{pair[0].binary.pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]


ENDINGS = {"SIGTERM": (signal.SIGTERM, 0), "Ctrl-C": (signal.SIGINT, 0), "SIGKILL": (signal.SIGKILL, -9)}


@pytest.mark.parametrize(("how", "code"), ENDINGS.values(), ids=ENDINGS.keys())
def test_a_worker_leaves_nothing_however_it_ends(
    start: Callable[..., RunningWorker], how: signal.Signals, code: int
) -> None:
    worker = start()
    binary = worker.binary
    worker.process.send_signal(how)
    assert worker.process.wait(PATIENCE_S) == code
    eventually(lambda: not worker.gate.is_running() and not binary.is_running())


def test_the_end_of_tffs_worker_ends_the_command_with_an_error(start: Callable[..., RunningWorker]) -> None:
    worker = start()
    worker.binary.kill()
    assert worker.process.wait(PATIENCE_S) == MachineError.exit_code


REFUSED = {
    "an address beyond loopback": ("0.0.0.0:0", "open to the network"),
    "a name": ("example.com:80", "not an address of this machine"),
    "no port": ("127.0.0.1", "not HOST:PORT"),
    "IPv6 without brackets": ("::1:80", "not HOST:PORT"),
}


@pytest.mark.parametrize(("listen", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_the_command_refuses(listen: str, said: str) -> None:
    result = CliRunner().invoke(worker_command, ["--listen", listen])
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)


def test_a_port_that_is_taken_is_named(pair: tuple[RunningWorker, RunningWorker]) -> None:
    listen = pair[0].address
    command = [sys.executable, "-m", "covey_edge", "worker", "--listen", listen]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == TransportError.exit_code
    assert f"cannot listen on {listen}" in ended.stderr


def test_workers_must_be_named_once_each() -> None:
    for wrong in ([], ["127.0.0.1:1", "127.0.0.1:1"]):
        with pytest.raises(ConfigError, match="name one worker or more, each once"):
            RemoteWorkers(wrong)


SPLITS: dict[str, tuple[int, int, Sequence[tuple[int, int]]]] = {
    "evenly": (6, 3, [(0, 2), (2, 4), (4, 6)]),
    "as evenly as can be": (7, 2, [(0, 4), (4, 7)]),
    "fewer clients than workers": (2, 5, [(0, 1), (1, 2)]),
    "nobody": (0, 4, []),
}


@pytest.mark.parametrize(("n", "num_shards", "bounds"), SPLITS.values(), ids=SPLITS.keys())
def test_clients_are_split(n: int, num_shards: int, bounds: list[tuple[int, int]]) -> None:
    from covey_coordinator.simulation.sharded import shard_bounds

    assert shard_bounds(n, num_shards) == bounds
