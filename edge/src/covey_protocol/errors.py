"""The errors of covey, sorted by whose fault they are, each with the exit code a program ends with.

Every error says two things: what is wrong (naming the thing) and what to do about it. Foreign exceptions are
translated into these at the adapters. The codes are listed in docs/exit-codes.md; this file is their only source.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_BUG = 1
EXIT_CONFIG = 2
EXIT_MACHINE = 3
EXIT_DATA = 4
EXIT_TRANSPORT = 5
EXIT_BUNDLE = 6
EXIT_RULE = 7
EXIT_RUN = 8
EXIT_LEAK = 9
EXIT_STORAGE = 10
EXIT_INTERRUPTED = 130

DATA = "this device's data source"  # what others hear in place of a path


class CoveyError(Exception):
    """Base of all errors covey raises on purpose.

    what: one sentence naming the thing that is wrong.
    remedy: one sentence saying what the reader can do; empty where only `what` helps.
    """

    exit_code = EXIT_BUG

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


class UsageError(CoveyError):
    """Our own code was called wrongly: a bug, not something an operator can mend."""

    exit_code = EXIT_BUG


class ConfigError(CoveyError):
    """A setting, option or configuration file is wrong."""

    exit_code = EXIT_CONFIG


class MachineError(CoveyError):
    """This machine lacks something the command needs (platform, Python version, program)."""

    exit_code = EXIT_MACHINE


class DataError(CoveyError):
    """A data file cannot be read or its content breaks the model's input specification.

    told: what others may hear of it: no path, no name of a file or column, nothing of the content. "" for not even why.
    """

    exit_code = EXIT_DATA

    def __init__(self, what: str, remedy: str = "", *, told: str = "") -> None:
        super().__init__(what, remedy)
        self.told = told

    @classmethod
    def at(cls, place: object, what: str, remedy: str = "") -> DataError:
        """what: goes on from the name of the place. Others hear it too, with no name before it."""
        return cls(f"{place}{what}", remedy, told=f"{DATA}{what}")


class TransportError(CoveyError):
    """The broker cannot be reached, refused us, or went away.

    transient: True where trying again may help (a lost connection), False where it cannot (wrong password).
    """

    exit_code = EXIT_TRANSPORT

    def __init__(self, what: str, remedy: str = "", *, transient: bool = True) -> None:
        super().__init__(what, remedy)
        self.transient = transient


class BundleError(CoveyError):
    """A training bundle is damaged, not sealed by whom it should be, or cannot be made from this model."""

    exit_code = EXIT_BUNDLE


class ReleaseError(CoveyError):
    """A release of the agent is damaged, not sealed by its maker, or not for this device."""

    exit_code = EXIT_BUNDLE


class RuleError(CoveyError):
    """An aggregation rule's precondition does not hold (for example Krum with n <= 2f + 2): the round is refused."""

    exit_code = EXIT_RULE


class RunError(CoveyError):
    """A run of rounds could not be finished (quorum never met, devices never came)."""

    exit_code = EXIT_RUN


class LeakError(CoveyError):
    """An audit's verdict: more leaks than its policy allows, or not all of it was measured."""

    exit_code = EXIT_LEAK


class StorageError(CoveyError):
    """A file could not be written durably (disk full, read-only file system)."""

    exit_code = EXIT_STORAGE


class TrainingError(CoveyError):
    """Training on the device failed: the round is lost for this device, the agent lives on."""

    exit_code = EXIT_RUN


class PeerError(CoveyError):
    """The other side broke the protocol: count it, drop the message, end that conversation. Never fatal.

    section: of docs/protocol.md, where one rule was broken that a reader can look up.
    """

    exit_code = EXIT_RUN

    def __init__(self, what: str, remedy: str = "", *, section: int = 0) -> None:
        super().__init__(what, remedy)
        self.section = section


class NotSealed(PeerError):
    """Not sealed by the key that it was held against; perhaps by another one of the same peer."""
