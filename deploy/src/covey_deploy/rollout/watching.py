"""What devices say of themselves on `presence`: who said it is checked, and which is the newest."""

from __future__ import annotations

from collections.abc import Mapping

from covey_deploy.rollout.state import Saw
from covey_protocol import codec
from covey_protocol.errors import PeerError
from covey_protocol.keys import KeyRing, Keys
from covey_protocol.messages import Presence
from covey_protocol.seals import PublicKey
from covey_protocol.topics import Topics


def seen_as(device_id: str, presence: Presence, at: float) -> Saw:
    """What a rollout keeps of it. Who says that he is away says nothing else that counts."""
    if not presence.online:
        return Saw(at, device_id, False, presence.session)
    return Saw(
        at,
        device_id,
        True,
        presence.session,
        presence.agent_version,
        presence.on_trial is True,
        presence.bad or (),
        presence.trouble or "",
    )


class Watch:
    """The devices of a roster. newest: of those that were heard. refused: topic -> why, of what was not theirs.

    Nothing is durable here: a broker that keeps back or brings back what a device has said can deceive somebody who has
    just begun to listen (docs/protocol.md, section 10: a presence is a hint).
    """

    def __init__(self, fleet: str, roster: Mapping[str, Keys]) -> None:
        self.topics = Topics(fleet)
        self._rings = {device_id: KeyRing(keys) for device_id, keys in roster.items()}
        self._sealed_by: dict[str, PublicKey] = {}
        self.newest: dict[str, Presence] = {}
        self.refused: dict[str, str] = {}

    @property
    def roster(self) -> tuple[str, ...]:
        return tuple(sorted(self._rings))

    def take(self, topic: str, payload: bytes) -> str:
        """The device of which more is known now; "" where that is nobody."""
        place = self.topics.parse_device(topic)
        if place is None or place.channel != "presence" or not payload:
            return ""
        ring = self._rings.get(place.device_id)
        if ring is None:
            self._refuse(topic, f"{place.device_id} is not in the roster")
            return ""
        try:
            taken = ring.take(
                lambda key: codec.decode_from_device(payload, topic=topic, sender=place.device_id, key=key)
            )
        except PeerError as exc:
            self._refuse(topic, str(exc))
            return ""
        if not isinstance(taken.message, Presence):
            self._refuse(topic, f"a {type(taken.message).__name__} on {topic}")
            return ""
        return self._newer(place.device_id, taken.message, taken.key)

    def _newer(self, device_id: str, presence: Presence, key: PublicKey) -> str:
        known = self.newest.get(device_id)
        if known is not None and self._sealed_by[device_id] == key and presence.session < known.session:
            return ""  # an older start's last will, or a replay
        self.newest[device_id], self._sealed_by[device_id] = presence, key
        return device_id

    def _refuse(self, topic: str, why: str) -> None:
        if len(self.refused) < 1000 or topic in self.refused:  # strangers have as many names as they like
            self.refused[topic] = why
