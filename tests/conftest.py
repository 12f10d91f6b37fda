"""Fixtures shared by all tests: keys, a real Mosquitto, and one real bundle."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from brokers import RunningBroker, certificates, start_mosquitto, stop_broker, tls_lines
from hypothesis import HealthCheck, settings
from proxy import Proxy

from covey_coordinator.aggregation.worker import Worker
from covey_protocol.seals import SealingKey

# few threads: two cores are shared with brokers and agents. Set before NumPy and TensorFlow are imported.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# An example that takes longer than 200 ms, or is slow to draw, is a busy machine, not an error.
settings.register_profile("covey", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("covey")

# A shell script's `pytest &` ignores Ctrl-C, and so would every program that the tests start and interrupt: they hang.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[RunningBroker]:
    """A real Mosquitto on a free loopback port."""
    broker = start_mosquitto(tmp_path)
    yield broker
    stop_broker(broker)


@pytest.fixture
def broker_with(tmp_path: Path) -> Iterator[Callable[..., RunningBroker]]:
    """Starts a Mosquitto with these lines in its configuration; without any it takes everybody."""
    started: list[RunningBroker] = []

    def start(*lines: str, port: int = 0) -> RunningBroker:
        started.append(start_mosquitto(tmp_path, lines, port))
        return started[-1]

    yield start
    for broker in started:
        stop_broker(broker)


@pytest.fixture
def proxy_to() -> Iterator[Callable[..., Proxy]]:
    """Starts a proxy in front of a broker; options as in `Proxy`."""
    made: list[Proxy] = []

    def start(broker: RunningBroker, **options: int) -> Proxy:
        made.append(Proxy(broker.port, **options))
        return made[-1]

    yield start
    for proxy in made:
        proxy.close()


@pytest.fixture
def readable(tmp_path: Path) -> Path:
    """A folder that Mosquitto can read after it has become its own user."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    return tmp_path


@pytest.fixture
def tls_broker(readable: Path, broker_with: Callable[..., RunningBroker]) -> tuple[str, dict[str, Path]]:
    files = certificates(readable)
    return f"mqtts://127.0.0.1:{broker_with(*tls_lines(files)).port}", files


@pytest.fixture(scope="session")
def coordinator_key() -> SealingKey:
    return SealingKey.from_seed(b"coordinator".ljust(32, b"."))


@pytest.fixture(scope="session")
def digits_bundle(coordinator_key: SealingKey) -> bytes:
    """A real training bundle of the demo's digits model, sealed by `coordinator_key`."""
    import covey_models
    from covey_models import zoo

    model = zoo.build("small-cnn", (8, 8, 1), 10, seed=0)
    return covey_models.export(
        model, name="digits", batch_size=16, input_range=(0.0, 1.0), num_classes=10, key=coordinator_key
    )


@pytest.fixture(scope="session")
def dense_bundle(coordinator_key: SealingKey) -> bytes:
    """A bundle for digits whose first layer, 128 ReLUs, sees the pixels: what hostile parameters like best."""
    import covey_models
    from covey_models._tensorflow import import_tensorflow

    tf = import_tensorflow()
    start = tf.keras.initializers.GlorotUniform
    layers = [
        tf.keras.layers.Flatten(input_shape=(8, 8, 1), name="flat"),
        tf.keras.layers.Dense(128, "relu", kernel_initializer=start(1), name="dense"),
        tf.keras.layers.Dense(10, kernel_initializer=start(2), name="logits"),
    ]
    return covey_models.export(
        tf.keras.Sequential(layers), name="dense", batch_size=16, input_range=(0.0, 1.0), key=coordinator_key
    )


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    """One TFF worker, for whichever tests of this process ask for it, stopped at the end."""
    with Worker() as running:
        yield running
    assert not running.is_running
