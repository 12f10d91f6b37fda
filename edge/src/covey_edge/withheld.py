"""What this device's updates have left out so far (top-k), kept for its next update of the same task; in the same way
the control c_i of SCAFFOLD and the state of a teacher, each in a file of its own.

Each of a fleet's tasks has a file. In it, a run and a bundle belong together: another run, or another bundle (so
another model's shape), starts with nothing. The file is written before the update that it belongs to is kept. After a
crash between the two the round can be trained again, from what was withheld before it; if it is not, or where the
update is rejected, what it held is lost. Nothing is sent twice.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from covey_edge.files import DISK, Disk
from covey_protocol.forms import WITHHOLDING
from covey_protocol.messages import Invitation, TrainingPlan, run_of
from covey_protocol.works import CORRECT, SCAFFOLD, TEACH

NO_WITHHELD_NOISE = (
    "this device adds noise, and a form that sends the largest numbers only would send mostly noise",
    'use "rotated-8bit" or "rotated-4bit" in the coordinator\'s [wire]',
)


NAME_OF = {SCAFFOLD: "control", TEACH: "teacher", CORRECT: "teacher"}  # work -> file; "withheld" of all others


def withholds(plan: TrainingPlan) -> bool:
    """Whether a round of this plan needs what the one before has left."""
    return plan.compression in WITHHOLDING or plan.work in NAME_OF


class Withheld(msgspec.Struct, frozen=True):
    """round_id: of the update that left these numbers out. bundle: its sha256. before: what there was before it.

    numbers, before: 4 d bytes, float32 little-endian, or a teacher's state; before is empty for the first update of a
    task.
    """

    round_id: str
    bundle: bytes
    numbers: bytes
    before: bytes = b""


class WithheldFile:
    """One task's numbers, mode 600: they tell as much about the data as an update does."""

    def __init__(self, path: Path, disk: Disk = DISK) -> None:
        self._path, self._disk = path, disk

    @classmethod
    def of(cls, folder: Path, invitation: Invitation) -> WithheldFile:
        """That of the invitation's task: tasks take turns, and one's numbers wait for its next round."""
        task, name = invitation.plan.task, NAME_OF.get(invitation.plan.work, "withheld")
        return cls(folder / (f"{name}-{task}.msgpack" if task else f"{name}.msgpack"))

    def load(self, invitation: Invitation) -> bytes:
        """b"" where nothing readable is there for this round's task and size."""
        data = self._disk.read(self._path)
        try:
            kept = msgspec.msgpack.decode(data or b"", type=Withheld)
        except msgspec.MsgspecError:
            return b""
        same = (run_of(kept.round_id), kept.bundle) == (run_of(invitation.round_id), invitation.bundle.sha256)
        teaches = NAME_OF.get(invitation.plan.work) == "teacher"
        # of a round that was abandoned and is asked for again the fleet has taken nothing
        again = _exchange(kept.round_id) == _exchange(invitation.round_id) if teaches else False
        numbers = kept.before if again or kept.round_id == invitation.round_id else kept.numbers
        return numbers if same and (teaches or len(numbers) == invitation.parameters.size) else b""

    def store(self, invitation: Invitation, numbers: bytes) -> None:
        """Durable when this returns, in place of what was there. StorageError if it cannot be."""
        kept = Withheld(invitation.round_id, invitation.bundle.sha256, numbers, self.load(invitation))
        self._disk.write(self._path, msgspec.msgpack.encode(kept), mode=0o600)


def _exchange(round_id: str) -> str:
    """Of RUN.NUMBER.TIME what stays when the round is repeated."""
    return round_id.rsplit(".", 1)[0]
