"""A peer's two keys: the older one is taken until the newer was heard, and then never again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from covey_protocol import codec
from covey_protocol.codec import ReplayGuard
from covey_protocol.errors import ConfigError, NotSealed, PeerError, StorageError
from covey_protocol.keys import KeyRing, Taken, keys_from
from covey_protocol.messages import Answer, FromDevice
from covey_protocol.seals import PublicKey, SealingKey

TOPIC = "covey/1/f/device/d/up"
OLD, NEW, NEWEST, FOREIGN = (SealingKey.from_seed(bytes([number]) * 32) for number in range(4))
BOTH = (OLD.public, NEW.public)


def said(key: SealingKey, number: int = 1) -> bytes:
    return codec.encode(Answer("r", True), topic=TOPIC, sender="d", sequence=number, key=key)


def take(ring: KeyRing, data: bytes) -> Taken[FromDevice]:
    return ring.take(lambda key: codec.decode_from_device(data, topic=TOPIC, sender="d", key=key))


def test_both_keys_are_taken_until_the_newer_one_was_heard() -> None:
    ring = KeyRing(BOTH)
    assert take(ring, said(OLD)).key == OLD.public
    assert take(ring, said(OLD, 2)).key == OLD.public
    assert take(ring, said(NEW, 3)).key == NEW.public
    with pytest.raises(NotSealed):
        take(ring, said(OLD, 4))
    assert ring.trusted == (NEW.public,)


def test_the_older_key_is_retired_before_the_first_message_under_the_newer_is_taken() -> None:
    told: list[Sequence[PublicKey]] = []
    ring = KeyRing(BOTH, retire=told.append)
    take(ring, said(OLD))
    assert told == []
    take(ring, said(NEW, 2))
    take(ring, said(NEW, 3))
    assert told == [[OLD.public]]


def test_where_it_cannot_be_retired_durably_nothing_is_taken_and_both_keys_stay() -> None:
    def full(keys: Sequence[PublicKey]) -> None:
        raise StorageError("the disk is full")

    ring = KeyRing(BOTH, retire=full)
    with pytest.raises(StorageError):
        take(ring, said(NEW))
    assert take(ring, said(OLD, 2)).key == OLD.public


def test_a_retired_key_is_not_taken_after_a_restart() -> None:
    ring = KeyRing(BOTH, retired={OLD.public})
    with pytest.raises(NotSealed):
        take(ring, said(OLD))
    assert take(ring, said(NEW)).key == NEW.public


def test_a_peer_whose_keys_are_all_retired_is_not_heard() -> None:
    with pytest.raises(NotSealed, match="all retired"):
        take(KeyRing(OLD.public, retired={OLD.public}), said(OLD))


def test_a_stranger_is_refused_and_retires_nothing() -> None:
    ring = KeyRing(BOTH)
    with pytest.raises(NotSealed, match="not sealed by the key known for d"):
        take(ring, said(FOREIGN))
    assert ring.trusted == BOTH


def test_what_breaks_the_protocol_otherwise_is_not_tried_with_another_key() -> None:
    tried: list[PublicKey] = []

    def decode(key: PublicKey) -> tuple[Answer, int]:
        tried.append(key)
        raise PeerError("too long")

    with pytest.raises(PeerError, match="too long"):
        KeyRing(BOTH).take(decode)
    assert tried == [NEW.public]


def test_a_number_passes_once_under_each_key() -> None:
    ring = KeyRing(BOTH)
    first = take(ring, said(OLD, 7))
    assert ring.is_new(first)
    assert not ring.is_new(take(ring, said(OLD, 7)))
    assert ring.is_new(take(ring, said(NEW, 7)))
    assert not ring.is_new(take(ring, said(NEW, 7)))


def test_a_thief_of_the_old_key_cannot_keep_the_owner_from_being_heard() -> None:
    """With a number far ahead it closes the window; the new key's is another one."""
    ring = KeyRing(BOTH)
    assert ring.is_new(take(ring, said(OLD, 2**53)))
    assert not ring.is_new(take(ring, said(OLD, 2**53 - ReplayGuard.WINDOW)))
    assert ring.is_new(take(ring, said(NEW, 8)))


def test_another_roster_forgets_no_number_under_a_key_that_stays() -> None:
    ring = KeyRing(OLD.public)
    assert ring.is_new(take(ring, said(OLD, 7)))
    both = ring.renewed(BOTH, frozenset())
    assert not both.is_new(take(both, said(OLD, 7)))
    assert both.is_new(take(both, said(NEW, 8)))
    newest = both.renewed((NEW.public, NEWEST.public), frozenset({OLD.public}))
    assert not newest.is_new(take(newest, said(NEW, 8)))
    assert newest.is_new(take(newest, said(NEWEST, 1)))


BAD = {
    "none": [],
    "three": [key.public.hex() for key in (OLD, NEW, NEWEST)],
    "the same twice": [OLD.public.hex()] * 2,
    "no key": ["abc"],
}


@pytest.mark.parametrize("what", BAD)
def test_other_than_one_or_two_keys_are_an_error(what: str) -> None:
    with pytest.raises(ConfigError, match=r"kitchen-pi|not a public key"):
        keys_from(BAD[what], "kitchen-pi")


def test_one_key_and_two_are_read_in_order() -> None:
    assert keys_from(OLD.public.hex(), "d") == (OLD.public,)
    assert keys_from([OLD.public.hex(), NEW.public.hex()], "d") == BOTH
