"""One fleet and its Mosquitto for the tests that only look."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fleet_broker import FleetBroker, fleet_broker, make_fleet

from covey_deploy.fleet_folder import FleetFolder


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> FleetFolder:
    """The fleet "home" of kitchen-pi and porch-pi. Its files are shared: no test changes them."""
    return make_fleet(tmp_path_factory.mktemp("fleets") / "home")


@pytest.fixture(scope="session")
def home_broker(home: FleetFolder) -> Iterator[FleetBroker]:
    with fleet_broker(home) as broker:
        yield broker
