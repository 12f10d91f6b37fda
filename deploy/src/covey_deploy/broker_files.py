"""What `covey broker config` writes beside Mosquitto's configuration: compose.yaml, a systemd drop-in, a README.

Texts only. All files of one folder work together: copied to INSTALL_FOLDER they are found by Mosquitto as Debian's
service or in a container.
"""

from __future__ import annotations

from covey_deploy import mosquitto
from covey_deploy.other_brokers import others

INSTALL_FOLDER, DATA_FOLDER = "/etc/mosquitto/covey", "/var/lib/mosquitto"
DROP_IN = "systemd/covey.conf"
SPARE_FILES = 1000  # file descriptors beside those of connections


def broker_files(fleet: str, port: int, max_connections: int, owner: tuple[int, int]) -> dict[str, str]:
    """Relative name -> text. owner: user and group id that a container's Mosquitto has, those who may read the key."""
    settings = mosquitto.Settings(fleet, INSTALL_FOLDER, DATA_FOLDER, port, max_connections=max_connections)
    return {
        mosquitto.CONFIG_NAME: mosquitto.config(settings),
        mosquitto.ACL_NAME: mosquitto.acl(fleet),
        "compose.yaml": compose(fleet, port, max_connections, owner),
        DROP_IN: drop_in(fleet, max_connections),
        "README.md": readme(fleet, port),
        **{f"others/{name}": text for name, text in others(fleet).items()},
    }


def compose(fleet: str, port: int, max_connections: int, owner: tuple[int, int]) -> str:
    return f"""\
# The broker of the fleet {fleet} in a container. Made by `covey broker config`: docs/broker.md.
services:
  broker:
    image: docker.io/library/eclipse-mosquitto:2
    command: ["mosquitto", "-c", "{INSTALL_FOLDER}/{mosquitto.CONFIG_NAME}"]
    user: "{owner[0]}:{owner[1]}"  # who may read key.pem and write data/
    ports:
      - "{port}:{port}"
    volumes:
      - ./:{INSTALL_FOLDER}:ro
      - ./data:{DATA_FOLDER}
    ulimits:
      nofile: {max_connections + SPARE_FILES}
    restart: unless-stopped
    read_only: true
    cap_drop: ["ALL"]
    security_opt: ["no-new-privileges:true"]
"""


def drop_in(fleet: str, max_connections: int) -> str:
    return f"""\
# Debian's mosquitto.service for the fleet {fleet}. Made by `covey broker config`: docs/broker.md.
# Goes to /etc/systemd/system/mosquitto.service.d/covey.conf
[Service]
User=mosquitto
Group=mosquitto
ExecStartPre=
ExecStart=
ExecStart=/usr/sbin/mosquitto -c {INSTALL_FOLDER}/{mosquitto.CONFIG_NAME}
# no reload, which Debian's logrotate asks for, too: 2.0.11 may crash of one while a client is away
ExecReload=
Restart=always
RestartSec=2
StateDirectory=mosquitto
LimitNOFILE={max_connections + SPARE_FILES}
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallFilter=@system-service
"""


def readme(fleet: str, port: int) -> str:
    return f"""\
# The broker of the fleet {fleet}

Made by `covey broker config`, which overwrites these files. What they mean, what was measured, and other brokers
(`others/`): docs/broker.md of covey.

## As Debian's service

```sh
sudo apt install mosquitto
sudo install -d -m 750 -g mosquitto {INSTALL_FOLDER}
sudo install -m 640 -g mosquitto mosquitto.conf acl ca.pem cert.pem crl.pem key.pem {INSTALL_FOLDER}
sudo install -D -m 644 {DROP_IN} /etc/systemd/system/mosquitto.service.d/covey.conf
sudo systemctl daemon-reload
sudo systemctl restart mosquitto
```

Mosquitto's own user must be able to read key.pem.

## In a container

`docker compose up -d` in this folder. The container's user is who made the folder. Where root did, it is 1883, the
image's own, to whom key.pem, acl and data/ belong then: copy the folder with its owners (`cp -a`).

## When a certificate is revoked or renewed

Copy crl.pem (or cert.pem and key.pem) to {INSTALL_FOLDER} and restart: `sudo systemctl restart mosquitto`, or
`docker compose restart broker`. What is retained stays, clients come back within seconds, and whoever is on the list
does not. Do not reload (SIGHUP) a Mosquitto 2.0.11: while a client is away it may crash of that, minutes later.

For a container nothing is copied in the fleet's own folder; elsewhere `covey broker config --out` does it.

## Is it right?

`covey doctor --fleet-folder DIR` looks, from any machine that reaches port {port}.
"""
