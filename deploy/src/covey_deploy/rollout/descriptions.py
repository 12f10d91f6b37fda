"""What a rollout publishes: a release's description sealed for each ring, all at once, so that the key is read once."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from covey_deploy.rollout.rings import Ring
from covey_deploy.rollout.state import Plan
from covey_protocol.releases import Release, seal_release
from covey_protocol.seals import SealingKey


def sealed_rings(release: Release, plan: Plan, key: SealingKey) -> list[bytes]:
    """The description of each ring, and last the one that stops: nobody who has not installed it does any more."""
    rings = [*plan.rings, Ring("stop")]
    return [seal_release(_for(release, ring, plan.serial + place), key) for place, ring in enumerate(rings)]


def _for(release: Release, ring: Ring, serial: int) -> Release:
    return msgspec.structs.replace(release, serial=serial, share=ring.share, devices=ring.devices or UNSET)
