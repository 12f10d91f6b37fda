"""Whether a plan may be asked of devices at all: [privacy] in coordinator.toml, held against bundle, plan and audit.

By rule where bundle and plan alone settle it; else by the verdict of an audit (`verdict`), which measured it. What is
refused here is refused before the first invitation. docs/privacy-gate.md; docs/adr/0031.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from covey_coordinator.inversion.verdict import (
    Assumed,
    Decibels,
    Limits,
    Share,
    differences,
    exceeded,
    read_verdict,
)
from covey_edge.config import NotNegative
from covey_protocol.bundle import Manifest
from covey_protocol.errors import ConfigError
from covey_protocol.forms import NONE
from covey_protocol.leakage import dense_layers, label_place
from covey_protocol.messages import TRAIN, TrainingPlan
from covey_protocol.works import GRADIENT, feature_units

LINEAR = ("sgd", "momentum", "nesterov")  # optimizers whose steps are sums of gradients
EXACT_DB = 100.0  # of a reading of one float32 example; measured 135 to 141


class PrivacyPolicy(Struct, frozen=True, forbid_unknown_fields=True):
    """max_*: as in `verdict.Limits`. min_examples, clip_norm, noise_multiplier: what the operator relies on of every
    device; its owner sets it there. audit: the file of a verdict. pause: after a round that was over a limit.
    """

    max_psnr_db: Decibels | None = None
    max_label_recovery: Share | None = None
    max_linkability_auc: Share | None = None
    min_examples: Annotated[int, Meta(ge=1)] = 1
    clip_norm: NotNegative = 0.0
    noise_multiplier: NotNegative = 0.0
    audit: str = ""
    pause: bool = False

    @property
    def limits(self) -> Limits:
        return Limits(self.max_psnr_db, self.max_label_recovery, self.max_linkability_auc)

    @property
    def granted(self) -> Assumed:
        return Assumed(self.min_examples, self.clip_norm, self.noise_multiplier)


def refuse_leaks(
    path: Path, policy: PrivacyPolicy, bundle: bytes, manifest: Manifest, plans: Iterable[TrainingPlan]
) -> list[str]:
    """ConfigError where the policy forbids one of the plans. path: of the file that holds the policy, beside which the
    audit's lies. bundle: its bytes. Returns what else the operator is to be told.
    """
    if policy.noise_multiplier and not policy.clip_norm:
        raise ConfigError(f"{path}: [privacy] noise_multiplier without clip_norm", "noise is measured in it; set both")
    plans = [plan for plan in plans if not plan.evaluate]
    for plan in plans:
        for reason in certain_leaks(policy, manifest, plan):
            raise ConfigError(
                f"{path}: [privacy] refuses the plan{_of(plan)}: {reason}",
                "ask for devices with more examples (min_examples here, privacy.min_examples on each device), or allow "
                "more",
            )
    if policy.audit:
        for plan in plans:
            _hold_against(path, policy, hashlib.sha256(bundle).digest(), plan)
        return []
    unaudited = ", ".join(f"max_{name}" for name in policy.limits.given())
    return [f"warning: [privacy] {unaudited} with no audit: only what is certain is refused"] if unaudited else []


def certain_leaks(policy: PrivacyPolicy, manifest: Manifest, plan: TrainingPlan) -> list[str]:
    """What the worst device that the policy lets in tells for sure: one with min_examples examples and, where the
    policy relies on no noise, none.

    With one example every step's gradient of a dense layer that sees the examples is that example times a vector, and
    so is any sum of such steps; a layer behind others states its features in one step, which later steps move. Nothing
    is certain with optimizers that scale each number for itself, with vectors that algorithms add, or with rounding.
    """
    plain = plan.work == GRADIENT or (plan.work == TRAIN and manifest.optimizer in LINEAR)
    if policy.min_examples > 1 or policy.noise_multiplier or not plain or plan.compression != NONE:
        return []
    direct = feature_units(manifest.facts) is not None
    one_step = plan.work == GRADIENT or plan.epochs == 1  # of one example
    found = []
    layers = dense_layers(manifest.parameters)
    if policy.max_psnr_db is not None and policy.max_psnr_db < EXACT_DB and layers and (direct or one_step):
        found.append(
            f"a device with one example states what its layer {layers[0].kernel.name!r} sees to {EXACT_DB:g} dB and "
            f"more, and max_psnr_db is {policy.max_psnr_db:g}"
        )
    place = label_place(manifest.parameters, manifest.loss, manifest.num_classes)
    if policy.max_label_recovery is not None and policy.max_label_recovery < 1 and place is not None:
        found.append(
            f"a device with one example tells its label, and max_label_recovery is {policy.max_label_recovery:g}"
        )
    return found


def _hold_against(path: Path, policy: PrivacyPolicy, bundle: bytes, plan: TrainingPlan) -> None:
    file = path.parent / policy.audit
    verdict = read_verdict(file)
    differing = differences(verdict, bundle, plan, policy.granted)
    again = "run `covey audit` again for this plan and bundle"
    if differing:
        raise ConfigError(
            f"{path}: {file} audited something else than this round{_of(plan)}: {', '.join(differing)}", again
        )
    over = exceeded(verdict.measured, policy.limits)
    if not verdict.passed and not over:
        over = list(verdict.reasons) or ["the audit failed by its own limits"]
    if over:
        raise ConfigError(
            f"{path}: [privacy] refuses the plan{_of(plan)}, by {file}: {'; '.join(over)}",
            "change the plan, or what devices do against it, and audit again",
        )


def _of(plan: TrainingPlan) -> str:
    told = [f"task {plan.task}"] if plan.task else []
    told += [plan.work] if plan.work != TRAIN else []
    return f" ({', '.join(told)})" if told else ""
