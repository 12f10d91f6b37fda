"""The keys that one peer may seal with while it moves to another: docs/protocol.md, section 3.1.

Two public keys at most are pinned for a peer, the one it has and the next. Both are taken until the next was heard;
from then on the older one is retired. This file decodes nothing and keeps nothing on disk: both are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, Union

from covey_protocol.codec import ReplayGuard
from covey_protocol.errors import ConfigError, NotSealed
from covey_protocol.seals import PublicKey

M = TypeVar("M")
MOST_KEYS = 2
Keys = Union[PublicKey, Sequence[PublicKey]]


def as_keys(keys: Keys) -> tuple[PublicKey, ...]:
    """From the oldest to the newest."""
    return (keys,) if isinstance(keys, PublicKey) else tuple(keys)


def keys_from(text: Union[str, Sequence[str]], whose: str) -> tuple[PublicKey, ...]:
    """One key or two, from hex digits, the current one first. ConfigError names whose they are."""
    texts = (text,) if isinstance(text, str) else tuple(text)
    keys = tuple(PublicKey.from_hex(one) for one in texts)
    if not 1 <= len(keys) <= MOST_KEYS or len(set(keys)) < len(keys):
        raise ConfigError(f"{len(keys)} keys for {whose}", "give its key, or two in a list: the current and the next")
    return keys


@dataclass(frozen=True)
class Taken(Generic[M]):
    """key: which of the ring's sealed it."""

    message: M
    sequence: int
    key: PublicKey


class KeyRing:
    """One peer's keys, from the oldest to the newest, and its message numbers under each.

    retired: of these keys nothing is taken. retire: called with the keys that shall be so for good, and must make that
    durable before it returns: only then is the first message under the newer key taken.
    """

    def __init__(
        self,
        keys: Keys,
        retired: Collection[PublicKey] = (),
        retire: Callable[[Sequence[PublicKey]], None] = lambda keys: None,
    ) -> None:
        self.keys = as_keys(keys)
        self._trusted = [key for key in self.keys if key not in retired]
        self._retire = retire
        self._guards: dict[PublicKey, ReplayGuard] = {}

    @property
    def trusted(self) -> tuple[PublicKey, ...]:
        """Those that are not retired."""
        return tuple(self._trusted)

    def take(self, decode: Callable[[PublicKey], tuple[M, int]]) -> Taken[M]:
        """What `decode` gives for the key that sealed it; older keys are retired before this returns.

        decode: raises NotSealed for a key that did not; so does this where none did.
        """
        refused = NotSealed("a message of a peer whose keys are all retired", section=3)
        for key in reversed(self._trusted):
            try:
                message, sequence = decode(key)
            except NotSealed as exc:
                refused = exc
                continue
            self._heard(key)
            return Taken(message, sequence, key)
        raise refused

    def is_new(self, taken: Taken[M]) -> bool:
        """True once for each number under each key: see codec.ReplayGuard. A new key begins with an empty window, so
        what a thief of the old one has said cannot keep its owner from being heard."""
        return self._guards.setdefault(taken.key, ReplayGuard()).accept(taken.sequence)

    def renewed(self, keys: Keys, retired: Collection[PublicKey]) -> KeyRing:
        """With other keys; the numbers under those that stay are not forgotten."""
        ring = KeyRing(keys, retired, self._retire)
        ring._guards = {key: guard for key, guard in self._guards.items() if key in ring.keys}
        return ring

    def _heard(self, key: PublicKey) -> None:
        older = self._trusted[: self._trusted.index(key)]
        if older:
            self._retire(older)
            self._trusted = self._trusted[len(older) :]
