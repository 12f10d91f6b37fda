"""Opens a bundle in the training child, its seal checked by a process of its own.

The cryptography package takes 9 MB of memory, which a small device misses while it trains. So a copy of this process
(fork) checks the seal, says what it found, and ends. Where the package is loaded anyway, nothing is forked: that is so
in all programs with threads, whose copies might wait for ever.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from covey_protocol.bundle import Bundle, read_bundle
from covey_protocol.errors import BundleError, TrainingError
from covey_protocol.seals import PublicKey

SEALED = b"sealed"


def opened(data: bytes, keys: Sequence[PublicKey]) -> Bundle:
    """As `read_bundle`, with the seal of one of these keys required. Raises BundleError."""
    if "cryptography" in sys.modules or not hasattr(os, "fork"):
        return read_bundle(data, keys)
    _check_elsewhere(data, keys)
    return read_bundle(data)


def _check_elsewhere(data: bytes, keys: Sequence[PublicKey]) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _say_whether_sealed(data, keys, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    code = os.waitpid(child, 0)[1]
    if said.startswith(b"!"):
        what, remedy = said[1:].decode().split("\0")
        raise BundleError(what, remedy)
    if code or said != SEALED:  # whatever else happened, it is no seal
        raise TrainingError(f"the bundle's seal could not be checked (status {code})", "look at the agent's log")


def _say_whether_sealed(data: bytes, keys: Sequence[PublicKey], pipe: int) -> NoReturn:
    """In the copy: nothing of the training child's own may run at its end."""
    code = 1
    try:
        try:
            read_bundle(data, keys)
            said = SEALED
        except BundleError as exc:
            said = f"!{exc.what}\0{exc.remedy}".encode()
        os.write(pipe, said)
        code = 0
    finally:
        os._exit(code)
