"""plan.toml as strict values: what devices are asked, what they do against it, and how many there are.

The tables are those of a coordinator.toml and of an experiment; docs/audit.md lists every key. No TensorFlow here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, field, structs

from covey_coordinator.algorithms.settings import FEDAVG
from covey_coordinator.serve import TrainingSettings, WireSettings, training_plan
from covey_coordinator.simulation.settings import PRIVACY_BY, DataSettings, PrivacySettings
from covey_edge.config import read_toml
from covey_protocol.bundle import Manifest, check_plan
from covey_protocol.errors import ConfigError, TrainingError
from covey_protocol.forms import WITHHOLDING
from covey_protocol.messages import MAX_EPOCHS, TrainingPlan

AtLeastOne = Annotated[int, Meta(ge=1)]
Epochs = Annotated[int, Meta(ge=1, le=MAX_EPOCHS)]
NotNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
MOST_DEVICES = 200  # each trains for real, in every round


class FleetSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How the data lie on devices. examples: on each, 0 for what the partition gives. rounds: that are trained to see
    who can be recognised again, what the finished model knows, and what accuracy is left.
    """

    devices: Annotated[int, Meta(ge=2, le=MOST_DEVICES)] = 10
    examples: Annotated[int, Meta(ge=0)] = 0
    rounds: Annotated[int, Meta(ge=2, le=1000)] = 10
    partition: dict[str, Any] = field(default_factory=lambda: {"kind": "dirichlet", "alpha": 1.0})


class CurveSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """At which values the trade-offs are drawn, beside the plan's own; an empty list draws none.

    clip_norm: as shares of the length of the plan's own update before clipping. examples: in one step. epochs: passes
    over the device's examples. rounds: that an attacker joins, at most the fleet's.
    """

    noise_multiplier: tuple[NotNegative, ...] = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
    clip_norm: tuple[Positive, ...] = (0.1, 0.3, 1.0)
    examples: tuple[AtLeastOne, ...] = (1, 2, 4, 8, 16)
    epochs: tuple[Epochs, ...] = (1, 2, 5)
    rounds: tuple[AtLeastOne, ...] = (1, 3, 10)


class PropertySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What an attacker wants to know of a device's data beside the task: whether they are high in one thing.

    of: a feature by its name, or the number of one of an example's numbers; "" for the direction in which examples of
    one class differ most. share: of the examples that have it, on a device that has it.
    """

    of: str | Annotated[int, Meta(ge=0)] = ""
    share: Annotated[float, Meta(gt=0, le=1)] = 1.0


class PlanSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """training, wire: as in coordinator.toml. privacy, data: as in an experiment."""

    training: TrainingSettings = TrainingSettings()
    wire: WireSettings = WireSettings()
    privacy: PrivacySettings = PrivacySettings()
    fleet: FleetSettings = FleetSettings()
    data: DataSettings = DataSettings()
    curves: CurveSettings = CurveSettings()
    property: PropertySettings = PropertySettings()

    def plan(self, number: int) -> TrainingPlan:
        """What devices are asked in round `number`."""
        return training_plan(self.training, self.wire, number)


def read_plan(path: Path | None, data: str | None, holdout: float | None = None) -> PlanSettings:
    """The file, or the defaults. data, holdout: instead of the file's. Raises ConfigError naming the key."""
    settings = PlanSettings() if path is None else read_toml(path, PlanSettings)
    if data is not None:
        settings = structs.replace(settings, data=structs.replace(settings.data, set="", path=data))
    elif settings.data.path and path is not None:
        beside = str(path.resolve().parent / settings.data.path)
        settings = structs.replace(settings, data=structs.replace(settings.data, path=beside))
    if holdout is not None:
        settings = structs.replace(settings, data=structs.replace(settings.data, test_fraction=holdout))
    _check(settings, "the plan" if path is None else str(path))
    return settings


def _check(settings: PlanSettings, where: str) -> None:
    training, privacy, data = settings.training, settings.privacy, settings.data
    if not (data.set or data.path):
        raise ConfigError("there is no data to audit with", "give --data, or [data] in the plan")
    if data.set and data.path:
        raise ConfigError(f"{where}: [data] has both a set and a path", "leave one of them out")
    if data.writers is not None:
        raise ConfigError(f"{where}: data.writers is of EMNIST in an experiment", "leave it out")
    if training.algorithm != FEDAVG or training.local_steps:
        raise ConfigError(
            f"{where}: training.algorithm = {training.algorithm!r}: only updates of plain training are attacked",
            f"audit it as {FEDAVG!r}, without local_steps",
        )
    if settings.wire.compression in WITHHOLDING:
        raise ConfigError(
            f"{where}: wire.compression = {settings.wire.compression!r} is not audited",
            "what it leaves out of one update comes in a later one: audit the plan without it",
        )
    if privacy.by not in PRIVACY_BY:
        raise ConfigError(f"{where}: privacy.by = {privacy.by!r}", f"choose {' or '.join(PRIVACY_BY)}")
    if privacy.noise_multiplier and not privacy.clip_norm:
        raise ConfigError(f"{where}: privacy.noise_multiplier needs privacy.clip_norm", "noise is measured in it")


def check_bundle_fits(settings: PlanSettings, manifest: Manifest) -> None:
    """ConfigError where the bundle cannot do what the plan asks, its noise would break it, or it has no classes."""
    if manifest.num_classes is None:
        raise ConfigError(
            f"{manifest.name} has no classes (its loss is {manifest.loss}): labels that are numbers are not audited",
            "audit a classifier of the same inputs, or state the classes of a loss of your own (export --classes)",
        )
    try:
        check_plan(manifest, settings.plan(1))
    except TrainingError as exc:
        raise ConfigError(exc.what, exc.remedy) from exc
    moving = [spec.name for spec in manifest.parameters if not spec.trainable]
    if moving and settings.privacy.noise_multiplier and settings.privacy.by == "device":
        raise ConfigError(
            f"the plan adds noise, and {len(moving)} tensors of the model are moving statistics ({moving[0]}, ...)",
            "export the model with `--moving-statistics local`, or use GroupNormalization",
        )
