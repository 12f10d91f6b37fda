"""Taking a certificate back, on a real Mosquitto: what a reload does, what it does not, and what ends a session."""

from __future__ import annotations

import socket
import ssl
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from fleet_broker import (
    Client,
    Identity,
    answer,
    fleet_broker,
    make_fleet,
    now,
    own_authority,
    wait_for,
)

from covey_deploy import authority, provisioning
from covey_deploy.disconnecting import disconnect
from covey_protocol.errors import ConfigError

pytestmark = pytest.mark.broker


def write_crl(folder: Path, made: authority.Authority, number: int, valid_s: float) -> datetime:
    """When it ends."""
    dates = authority.Dates(now(), now() + timedelta(seconds=valid_s))
    (folder / "crl.pem").write_bytes(authority.make_crl(made, [], number, dates))
    return dates.end


def test_a_revoked_device_is_kept_out_at_the_next_reload_and_its_session_ended_by_disconnect(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "home")
    kitchen, porch = Identity.of(fleet.device("kitchen-pi")), Identity.of(fleet.device("porch-pi"))
    with fleet_broker(fleet) as broker:
        provisioning.revoke(fleet.path, "porch-pi", "key-compromise")
        assert answer(broker, porch) == "taken"  # Mosquitto has not read the new list yet
        live, other = Client(broker, porch), Client(broker, kitchen)
        broker.reload()
        assert "certificate_revoked" in answer(broker, porch)
        assert live.publish("covey/1/home/device/porch-pi/up") == "Success"  # its session goes on ...
        disconnect(fleet, "porch-pi", f"127.0.0.1:{broker.port}")
        wait_for(lambda: live.ended)  # ... until it is taken from it
        with pytest.raises(ConfigError, match="has no porch-p; see who there is"):
            disconnect(fleet, "porch-p", f"127.0.0.1:{broker.port}")
        assert "certificate_revoked" in answer(broker, porch)
        assert other.publish("covey/1/home/device/kitchen-pi/up") == "Success"
        assert not other.ended
        other.close()


@pytest.mark.slow
def test_a_resumed_tls_session_does_not_get_round_the_list(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "home", devices=("porch-pi",))
    context = Identity.of(fleet.device("porch-pi")).context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def connect(session: ssl.SSLSession | None) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", broker.port))
        return context.wrap_socket(raw, server_hostname="127.0.0.1", session=session)

    with fleet_broker(fleet) as broker:
        with connect(None) as first:
            session = first.session
        with connect(session) as again:
            assert again.session_reused  # what is tried below works while nothing is revoked
        provisioning.revoke(fleet.path, "porch-pi", "key-compromise")
        broker.reload()
        with pytest.raises(ssl.SSLError, match="REVOKED"):
            connect(session)


@pytest.mark.slow
def test_an_old_list_keeps_everybody_out_and_a_torn_one_changes_nothing(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "home", devices=("porch-pi",))
    porch, made = Identity.of(fleet.device("porch-pi")), own_authority(fleet)
    with fleet_broker(fleet) as broker:
        (fleet.broker / "crl.pem").write_text("torn")
        broker.reload()
        assert answer(broker, porch) == "taken"
        for number, valid_s in enumerate((2, 20, 200), 7):  # longer where the machine is so busy that it has ended
            end = write_crl(fleet.broker, made, number, valid_s)
            broker.reload()
            said = answer(broker, porch)
            if now() < end:
                break
        assert said == "taken"
        time.sleep((end - now()).total_seconds() + 1.1)  # a list's times are whole seconds
        assert "certificate_expired" in answer(broker, porch)  # the list has, not the certificate
        write_crl(fleet.broker, made, 10, valid_s=600)
        broker.reload()
        assert answer(broker, porch) == "taken"


@pytest.mark.slow
def test_what_is_retained_outlives_the_broker(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "home", devices=())
    topic = f"covey/1/home/blob/{'00' * 32}/0"
    with fleet_broker(fleet) as broker:
        coordinator = Client(broker, Identity.of(fleet.coordinator))
        coordinator.publish(topic, bytes(65536), retain=True)
        coordinator.close()
    with fleet_broker(fleet) as broker:
        operator = Client(broker, Identity.of(fleet.operator))
        operator.subscribe(topic)
        wait_for(lambda: operator.heard == [(topic, bytes(65536))])
        operator.close()
