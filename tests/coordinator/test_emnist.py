"""EMNIST through TFF's loader: what is converted, and what is said where it cannot be had. No network is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow_federated as tff

from covey_coordinator.simulation import emnist
from covey_coordinator.simulation.sweep import cells_of
from covey_coordinator.simulation.world import world_of
from covey_models import load
from covey_models.population import populate
from covey_protocol.errors import ConfigError, DataError, MachineError


def test_writers_become_users_and_ink_becomes_1() -> None:
    clients = tff.simulation.datasets.emnist.get_synthetic()
    data = emnist._dataset("emnist", clients, sorted(clients.client_ids))
    assert data.users is not None
    assert set(data.users) == set(clients.client_ids)
    assert (data.input_shape, data.num_classes, data.x.dtype) == ((28, 28, 1), 10, np.float32)
    first = next(iter(clients.create_tf_dataset_for_client(data.users[0])))
    np.testing.assert_allclose(data.x[0, ..., 0], 1.0 - first["pixels"].numpy())
    assert data.y[0] == first["label"].numpy()
    assert (data.x.min(), data.x.max()) == (0.0, 1.0)
    population = populate(data, devices=2, partition="by-user")
    assert [len(set(data.users[part])) for part in population.parts] == [1, 1]


def without_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there, so that no download begins
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("COVEY_DATA", raising=False)


def test_without_a_network_the_message_says_where_it_was_sought_and_what_to_use_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_network(tmp_path, monkeypatch)
    with pytest.raises(MachineError, match=r"storage\.googleapis\.com/tff-datasets-public") as caught:
        emnist.load_split("emnist")
    assert str(tmp_path / ".tff") in caught.value.remedy
    assert "writer-like" in caught.value.remedy
    assert not (tmp_path / ".tff" / emnist.FILE).exists()


def test_an_experiment_can_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_network(tmp_path, monkeypatch)
    data = {"set": "emnist", "writers": 30}
    (cell,) = cells_of({"name": "writers", "rounds": 1, "data": data, "partition": {"kind": "by-user"}})
    assert cell.settings.data.reading() == {"writers": 30}
    with pytest.raises(MachineError, match="EMNIST is not here"):
        world_of(cell)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / emnist.FILE).write_bytes(b"half a download" * 100)
    with pytest.raises(DataError, match=r"emnist_all\.sqlite cannot be read"):
        emnist.load_split("emnist-62", tmp_path)


def test_fewer_writers_are_among_more_and_drawn_with_the_seed() -> None:
    ids = [f"f{number:04d}" for number in range(50)]
    assert set(emnist._chosen(ids, 5, 1)) < set(emnist._chosen(ids, 20, 1))
    assert emnist._chosen(ids, 20, 1) != emnist._chosen(ids, 20, 2)
    assert emnist._chosen(ids, None, 1) == ids
    for wrong in (0, 51, True, 2.0):
        with pytest.raises(ConfigError, match="from 1 to 50"):
            emnist._chosen(ids, wrong, 1)  # type: ignore[arg-type]


def test_other_names_are_those_of_covey_models() -> None:
    train, test = emnist.load_split("wine")
    assert len(train) + len(test) == len(load("wine"))
    with pytest.raises(ConfigError, match="emnist does not take label; it takes writers"):
        emnist.load_split("emnist", label="x")
