"""Who may write and read which topics of a fleet: docs/protocol.md, section 2, as data.

Every broker's rules are made of this one table (`mosquitto`, `other_brokers`), and the doctor's expectations too.
docs/broker.md shows it, and a test holds a real Mosquitto against that page, not against this file.
"""

from __future__ import annotations

from typing import NamedTuple

from covey_protocol.topics import Topics

WRITE, READ, BOTH = "write", "read", "readwrite"
SELF = "{self}"  # the id of whoever connects, in a topic
DEVICE, COORDINATOR, OPERATOR = "device", "coordinator", "operator"
CHANNELS = ("presence", "up", "down")  # of a device


NOBODY = "covey-nobody"  # no device's id


class Right(NamedTuple):
    """topic: a full topic, with + for one level of any name and SELF for the own id."""

    verb: str
    topic: str


class Access:
    """The rights in one fleet. Whoever holds a certificate of the fleet has those of `everyone`; roles have `more`."""

    def __init__(self, fleet: str) -> None:
        topics = Topics(fleet)
        self.root = topics.root
        self.round, self.release = topics.round, topics.release
        self.blob = f"{topics.root}/blob/+/+"
        self.all_presence, self.all_up, self.all_down = (
            topics.all_presence,
            topics.all_up,
            f"{topics.root}/device/+/down",
        )
        # on these nobody but a coordinator has a right, and no program of covey looks at them
        self.nobodys = (f"{topics.root}/fleet/{NOBODY}", f"{topics.root}/device/{NOBODY}/down")

    def own(self, channel: str, device_id: str = SELF) -> str:
        return f"{self.root}/device/{device_id}/{channel}"

    def everyone(self) -> tuple[Right, ...]:
        """Of a device, and so of every client: brokers have no list of the devices."""
        return (
            Right(WRITE, self.own("presence")),
            Right(WRITE, self.own("up")),
            Right(READ, self.own("down")),
            Right(BOTH, self.own("probe")),
            Right(READ, self.round),
            Right(READ, self.release),
            Right(READ, self.blob),
        )

    def more(self) -> dict[str, tuple[Right, ...]]:
        """Of each role: role, which is its MQTT user -> its rights, whole. Where the broker gives it those of
        `everyone`, too, it reads what is shared besides."""
        return {
            COORDINATOR: (
                Right(WRITE, self.round),
                Right(WRITE, self.all_down),
                Right(BOTH, self.blob),
                Right(READ, self.all_presence),
                Right(READ, self.all_up),
                Right(BOTH, self.own("probe", COORDINATOR)),
            ),
            OPERATOR: (
                Right(BOTH, self.release),
                Right(BOTH, self.blob),
                Right(READ, self.round),
                Right(READ, self.all_presence),
                Right(BOTH, self.own("probe", OPERATOR)),
            ),
        }
