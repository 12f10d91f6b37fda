"""Whether this machine can run the coordinator at all, said in one line before anything heavy is imported."""

from __future__ import annotations

import platform
import sys

from covey_protocol.errors import MachineError

NO_WHEEL = "TensorFlow Federated and covey's coordinator need Linux on x86-64 with Python 3.10 or 3.11"
ELSEWHERE = "run the coordinator on such a machine; `covey agent` works here"


def check_machine(
    system: str = platform.system(),
    machine: str = platform.machine(),
    version: tuple[int, int] = sys.version_info[:2],
) -> None:
    """Raises MachineError on machines for which TFF does not exist."""
    if system != "Linux" or machine not in ("x86_64", "AMD64"):
        raise MachineError(f"this machine is {system} on {machine}: {NO_WHEEL}", ELSEWHERE)
    if not (3, 10) <= version <= (3, 11):
        raise MachineError(
            f"this is Python {version[0]}.{version[1]}: {NO_WHEEL}", "use Python 3.11 (`make demo` does)"
        )
