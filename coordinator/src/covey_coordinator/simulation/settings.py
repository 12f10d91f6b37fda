"""An experiment's TOML as strict values, checked before anything starts. docs/simulation.md lists every key.

No TensorFlow here. What needs the data (partitions, corruptions, how many devices a rule must bear) is checked in
`world`, also before anything starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, field, structs

from covey_coordinator.aggregation.engines import SERVER_OPTIMIZERS
from covey_coordinator.aggregation.registry import suggest
from covey_coordinator.algorithms.making import check_algorithm
from covey_coordinator.algorithms.settings import COMT, Algorithm
from covey_coordinator.grid.settings import NO_ATTACK, AttackSpec, RuleSpec, attack_spec, rule_spec
from covey_coordinator.simulation.learning import ALGORITHMS
from covey_coordinator.simulation.remote import RemoteWorkers
from covey_coordinator.simulation.trusted_data import TrustedSettings, check_trusted
from covey_coordinator.teaching.settings import SimulatedTeaching
from covey_edge.config import NotNegative, Positive
from covey_models.names import LOSSES, OPTIMIZERS, no_such
from covey_protocol.errors import ConfigError
from covey_protocol.messages import MAX_EPOCHS, MAX_GRADIENT_NORM, MAX_LEARNING_RATE, MAX_PROXIMAL_WEIGHT, MAX_STEPS
from covey_protocol.topics import check_name

FEDSGD = "fedsgd"
TAUGHT_LOSSES = ("sparse_categorical_crossentropy", "mean_squared_error")  # of comt: logistic, ridge
TRUSTED_ALGORITHMS = ("fedavg", FEDSGD)  # in which the coordinator can make an update of its own
MAX_DEVICES = 100_000
MAX_SEED = 2**31  # as of `covey serve`: times a million and the round's number, a shuffle_seed stays within 2^53
MOVING_STATISTICS = ("average", "local")
PRIVACY_BY = ("device", "coordinator")
CODE_KEYS = ("name", "loss", "optimizer")  # of [model]: where a function of the user's may be named

AtLeastOne = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=0, le=MAX_SEED)]
Table = dict[str, Any]


class DataSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """set: a data set by name, also one of the data folder. path: a file or folder of the user's own instead of it.

    test_fraction: kept for the central evaluation, where the source has no test part. The rest says how a file is
    read: as in `covey_models.datasets.Reading`. writers: of EMNIST, see `emnist`.
    """

    set: str = ""
    path: str = ""
    test_fraction: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    label: str | None = None
    users: str | None = None
    nominal: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    standardise: bool = False
    size: tuple[int, int] | None = None
    writers: AtLeastOne | None = None

    def reading(self) -> Table:
        """What is said of how the file is read."""
        own = ("set", "path", "test_fraction")
        told = {info.name: (getattr(self, info.name), info.default) for info in structs.fields(self)}
        return {name: value for name, (value, usual) in told.items() if name not in own and value != usual}


class ModelSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """name: of the zoo, "" for its default, or FILE.py:FUNCTION that returns a built Keras model.

    loss, optimizer: names, or FILE.py:FUNCTION as for `covey export`.
    """

    name: str = ""
    loss: str = "sparse_categorical_crossentropy"
    optimizer: str = "sgd"
    batch: AtLeastOne = 16
    moving_statistics: str = "average"


class TrainingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """As [training] of `covey serve`, without its seed, which is the experiment's; and fedsgd beside its algorithms."""

    algorithm: str = "fedavg"
    epochs: Annotated[int, Meta(ge=1, le=MAX_EPOCHS)] = 1
    learning_rate: Annotated[float, Meta(gt=0, le=MAX_LEARNING_RATE)] = 0.1
    gradient_clip_norm: Annotated[float, Meta(ge=0, le=MAX_GRADIENT_NORM)] = 0.0
    proximal_weight: Annotated[float, Meta(ge=0, le=MAX_PROXIMAL_WEIGHT)] = 0.0
    local_steps: Annotated[int, Meta(ge=0, le=MAX_STEPS)] = 0
    feature_scaling: bool = True


class ServerSettings(Struct, frozen=True, forbid_unknown_fields=True):
    optimizer: str = "sgd"
    learning_rate: Positive = 1.0


class PrivacySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """clip_norm: largest L2 norm of an update, 0 for no privacy. noise_multiplier: standard deviation in clip_norms.

    by: "device" for noise on every update, "coordinator" for noise on their sum, with an epsilon for this delta.
    """

    clip_norm: NotNegative = 0.0
    noise_multiplier: NotNegative = 0.0
    by: str = "device"
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5


class ExperimentSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """One point of an experiment: `sweep` is empty in what a cell is given.

    sample: devices per round, 0 for all. seeds: how many (0, 1, ...) or which. evaluate_every, save_every: in rounds.
    evaluate_devices: the model on every healthy device's own data, too. workers: addresses of `covey worker`s.
    """

    name: str
    rounds: AtLeastOne
    devices: Annotated[int, Meta(ge=2, le=MAX_DEVICES)] = 10
    sample: Annotated[int, Meta(ge=0)] = 0
    seeds: AtLeastOne | tuple[Seed, ...] = 1
    evaluate_every: AtLeastOne = 1
    evaluate_devices: bool = False
    save_every: AtLeastOne = 10
    data: DataSettings = DataSettings()
    partition: Table = field(default_factory=lambda: {"kind": "iid"})
    corruption: tuple[Table, ...] = ()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    aggregation: Table = field(default_factory=lambda: {"rule": "mean"})
    attack: Table = field(default_factory=lambda: {"attack": NO_ATTACK})
    server: ServerSettings = ServerSettings()
    privacy: PrivacySettings = PrivacySettings()
    trusted: TrustedSettings = TrustedSettings()
    teaching: SimulatedTeaching | None = None
    workers: tuple[str, ...] = ()
    sweep: Table = field(default_factory=dict)

    @property
    def seed_list(self) -> tuple[int, ...]:
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @property
    def cohort_size(self) -> int:
        return min(self.sample, self.devices) if self.sample else self.devices

    @property
    def num_hostile(self) -> int:
        """How many devices attack."""
        if self.attack.get("attack") == NO_ATTACK:
            return 0
        return round(float(self.attack["fraction"]) * self.devices)

    def rule_spec(self) -> RuleSpec:
        return rule_spec(self.aggregation)

    def attack_spec(self) -> AttackSpec:
        return attack_spec({key: value for key, value in self.attack.items() if key != "fraction"})


def check_settings(settings: ExperimentSettings) -> None:
    """ConfigError, naming the key, for whatever can be seen to be wrong without the data."""
    check_name(settings.name, "experiment")
    _check_seeds(settings)
    _check_data(settings.data)
    _check_model(settings.model)
    _check_training(settings)
    _known("server.optimizer", settings.server.optimizer, SERVER_OPTIMIZERS)
    _within("aggregation", settings.rule_spec)
    _within("attack", settings.attack_spec)
    _check_attackers(settings)
    if settings.workers:
        RemoteWorkers(settings.workers)  # raises ConfigError for what is no address; connects to none
    _check_privacy(settings)
    _check_trusted(settings)


def _check_seeds(settings: ExperimentSettings) -> None:
    seeds = settings.seed_list
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds = {list(seeds)}", "name at least one, and each once")
    if settings.sample > settings.devices:
        raise ConfigError(f"sample = {settings.sample} of {settings.devices} devices", "lower sample, or raise devices")


def _check_data(data: DataSettings) -> None:
    if data.set and data.path:
        raise ConfigError("[data] has both a set and a path", "leave one of them out")


def _check_model(model: ModelSettings) -> None:
    if model.name.endswith(".covey"):
        raise ConfigError(
            f"model.name = {model.name!r}: a bundle is TFLite and carries no Keras model",
            "name the file and the function it was exported from, FILE.py:FUNCTION",
        )
    for kind, name, known in (("loss", model.loss, LOSSES), ("optimizer", model.optimizer, OPTIMIZERS)):
        if not is_user_code(name) and name not in known:
            raise no_such(kind, name, known)
    _known("model.moving_statistics", model.moving_statistics, MOVING_STATISTICS)


def _check_training(settings: ExperimentSettings) -> None:
    training, model = settings.training, settings.model
    _known("training.algorithm", training.algorithm, tuple(ALGORITHMS))
    if (training.algorithm == COMT) != (settings.teaching is not None):
        raise ConfigError(
            f"the algorithm {training.algorithm!r} {'without' if settings.teaching is None else 'with'} [teaching]",
            f"give {COMT!r} the table [teaching], which may be empty, and others none",
        )
    if training.algorithm == COMT:
        _check_teaching(settings)
    elif training.algorithm != FEDSGD:
        algorithm = Algorithm(training.algorithm, training.local_steps, training.feature_scaling)
        check_algorithm(algorithm, settings.server.optimizer)
    elif not _is_plain(training) or model.optimizer != "sgd":
        raise ConfigError(
            "fedsgd is one step of plain gradient descent with all of a device's examples",
            "of [training] set only the learning_rate, and leave model.optimizer out, or take fedavg",
        )


def _check_teaching(settings: ExperimentSettings) -> None:
    """Sums of all teachers, and nothing else, are what it works with."""
    told, loss = settings.teaching, settings.model.loss
    if loss not in TAUGHT_LOSSES:
        raise ConfigError(f"comt with the loss {loss!r}", f"choose {' or '.join(TAUGHT_LOSSES)}")
    if told is not None and told.representation_steps and loss != TAUGHT_LOSSES[0]:
        raise ConfigError(f"representation_steps with the loss {loss!r}", f"choose {TAUGHT_LOSSES[0]}")
    if not settings.trusted.is_there:
        raise ConfigError("comt without trusted data", "write [trusted] with a size or a path")
    for beside, is_usual in (
        ("a sample of the devices", not settings.sample),
        ("an [aggregation] other than the mean", settings.aggregation == {"rule": "mean"}),
        ("an [attack]; corrupted data are a [[corruption]]", settings.attack.get("attack") == NO_ATTACK),
        ("[privacy]", not settings.privacy.clip_norm),
        ("a [server]", settings.server == ServerSettings()),
        ("settings of [training]", settings.training == TrainingSettings(COMT)),
    ):
        if not is_usual:
            raise ConfigError(
                f"comt with {beside}", "leave it out: every device teaches in every round, and sums add up"
            )


def _is_plain(training: TrainingSettings) -> bool:
    return training == TrainingSettings(FEDSGD, learning_rate=training.learning_rate)


def _check_attackers(settings: ExperimentSettings) -> None:
    if settings.attack.get("attack") == NO_ATTACK:
        return
    fraction = settings.attack.get("fraction")
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0.0 <= fraction <= 1.0:
        told = "has no fraction" if fraction is None else f"says fraction = {fraction!r}"
        raise ConfigError(f"[attack] {told}", "say which share of the devices attacks, such as fraction = 0.2")
    if not settings.attack_spec().attack.sends_finite:
        raise ConfigError(
            f"the attack {settings.attack['attack']!r} sends numbers that are not finite, which no rule is given",
            "run it where updates are screened: covey grid",
        )
    if settings.num_hostile >= settings.devices:
        raise ConfigError(
            f"attack.fraction = {fraction}: {settings.num_hostile} of {settings.devices} devices would attack, and no"
            " attack here does without an honest one",
            "lower attack.fraction",
        )


def _check_privacy(settings: ExperimentSettings) -> None:
    privacy = settings.privacy
    _known("privacy.by", privacy.by, PRIVACY_BY)
    if privacy.noise_multiplier and not privacy.clip_norm:
        raise ConfigError("privacy.noise_multiplier needs privacy.clip_norm", "set it; noise is measured in it")
    if privacy.by == "device" or not privacy.clip_norm:
        return
    rule, algorithm = settings.aggregation.get("rule"), settings.training.algorithm
    for told, works in (
        (f"the rule {rule!r}", rule == "mean"),
        (f"the attack {settings.attack.get('attack')!r}", not settings.num_hostile),
        (f"the algorithm {algorithm!r}", algorithm in ("fedavg", FEDSGD)),
    ):
        if not works:
            raise ConfigError(
                f'{told} with privacy.by = "coordinator"',
                'take the mean, no [attack] ([[corruption]] works) and fedavg or fedsgd, or by = "device"',
            )


def _check_trusted(settings: ExperimentSettings) -> None:
    told = settings.trusted
    check_trusted(told)
    if told.path and settings.data.standardise:
        raise ConfigError(
            "trusted.path with data.standardise", "draw trusted data with a size, or standardise the file"
        )
    rule = settings.rule_spec().made(0)
    if not rule.needs_trusted:
        return
    if not told.is_there:
        raise ConfigError(f"the rule {rule.name!r} needs trusted data", "write [trusted] with a size or a path")
    if settings.training.algorithm not in TRUSTED_ALGORITHMS:
        raise ConfigError(
            f"the rule {rule.name!r} with the algorithm {settings.training.algorithm!r}: the coordinator makes no such"
            " exchange of its own",
            f"choose {' or '.join(TRUSTED_ALGORITHMS)}, or another rule",
        )


def _within(section: str, made: Any) -> None:
    try:
        made()
    except ConfigError as exc:
        raise ConfigError(f"[{section}]: {exc.what}", exc.remedy) from exc


def _known(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{key} = {value!r}", suggest(value, known))


def is_user_code(name: str) -> bool:
    """Whether this names a function of the user's own: FILE.py:FUNCTION."""
    return ".py:" in name


def with_absolute_paths(settings: ExperimentSettings, beside: Path) -> ExperimentSettings:
    """Relative paths of data and of the user's code start from this folder."""
    data, model, trusted = settings.data, settings.model, settings.trusted
    if data.path:
        data = structs.replace(data, path=str(beside.resolve() / data.path))
    if trusted.path:
        trusted = structs.replace(trusted, path=str(beside.resolve() / trusted.path))
    code = {key: getattr(model, key) for key in CODE_KEYS if is_user_code(getattr(model, key))}
    absolute = {key: str(beside.resolve() / name) for key, name in code.items()}
    return structs.replace(settings, data=data, trusted=trusted, model=structs.replace(model, **absolute))


def code_files(settings: ExperimentSettings) -> set[str]:
    """The user's Python files that a cell runs."""
    named = {getattr(settings.model, key) for key in CODE_KEYS}
    return {name.rpartition(":")[0] for name in named if is_user_code(name)}
