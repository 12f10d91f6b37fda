"""What `covey serve` reads of machine teaching: [teaching], and who holds what is trusted. docs/machine-teaching.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from covey_coordinator.algorithms.comt import Teaching
from covey_coordinator.teaching.settings import Penalties
from covey_coordinator.trusted_training import TrustedSettings
from covey_edge.config import NotNegative, Positive
from covey_edge.data_sources import check_examples, load_examples
from covey_edge.runtime import Model
from covey_edge.teaching import instances, problem_of, settings_of
from covey_protocol.bundle import Bundle
from covey_protocol.errors import ConfigError
from covey_protocol.messages import TeachingPlan
from covey_protocol.teaching import Teacher


class TeachingSettings(Penalties, frozen=True, forbid_unknown_fields=True):
    """rho, curvature: as in covey_protocol.teaching.Settings. holders: the devices that hold trusted instances.
    max_share: longest share for each example of its device, times lambda_w; 0 for no bound.
    """

    rho: Positive = 1.0
    curvature: Positive = 1.0
    holders: tuple[str, ...] = ()
    max_share: NotNegative = 0.0


def teaching_plan(settings: TeachingSettings, teachers: Sequence[str], trusted: bool) -> TeachingPlan:
    """teachers: the devices that may take part. trusted: whether the coordinator holds trusted instances.

    Raises ConfigError.
    """
    if not trusted and not settings.holders:
        raise ConfigError(
            "machine teaching without trusted instances",
            "give the coordinator some in [trusted], or name the devices that have them in teaching.holders",
        )
    strangers = [name for name in settings.holders if name not in teachers]
    if strangers or len(set(settings.holders)) < len(settings.holders):
        wrong = f"{strangers[0]}, which is no device that may take part" if strangers else "a device twice"
        raise ConfigError(f"teaching.holders names {wrong}", "correct the names")
    return TeachingPlan(
        settings.lambda_w,
        settings.lambda_t,
        settings.rho,
        settings.curvature,
        max(1, len(teachers)),
        settings.lambda_a,
        settings.lambda_z,
        settings.lambda_y,
    )


def teaching_of(
    settings: TeachingSettings, plan: TeachingPlan, trusted: TrustedSettings | None, bundle: Bundle, folder: Path
) -> Teaching:
    """What the engine needs, with the coordinator's trusted instances read. Raises DataError."""
    own = None if trusted is None else own_teacher(bundle, plan, trusted, folder)
    return Teaching(plan, len(settings.holders), settings.max_share, own)


def own_teacher(bundle: Bundle, plan: TeachingPlan, trusted: TrustedSettings, folder: Path) -> Teacher:
    """Of the coordinator's trusted instances alone. Raises DataError for such as the bundle cannot take."""
    model, path = Model(bundle), folder / trusted.path
    held = instances(model, check_examples(*load_examples(trusted.source, path), model.manifest, path))
    return Teacher(problem_of(model), settings_of(plan), held[0][:0], held[1][:0], held, plan.teachers)
