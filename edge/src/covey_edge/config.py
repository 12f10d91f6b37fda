"""The agent's configuration: one TOML file, decoded strictly. docs/agent.md lists every setting."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, TypeVar, Union

from msgspec import Meta, Struct

from covey_edge.hours import window_of
from covey_edge.mqtt import Broker, parse_broker
from covey_edge.source_options import OPTIONS, check_together
from covey_edge.strict import as_struct
from covey_protocol.errors import ConfigError
from covey_protocol.forms import COMPRESSIONS
from covey_protocol.keys import keys_from
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.topics import check_device_id, check_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T", bound=Struct)
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]
NotNegative = Annotated[float, Meta(ge=0)]
Roster = dict[str, Union[str, tuple[str, ...]]]  # device -> hex digits of its key, or of the current and the next


class BrokerSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """protocol: which MQTT to speak. max_message_bytes: of the largest packet the broker takes, 0 for what it says."""

    url: str
    username: Optional[str] = None
    password_file: Optional[str] = None
    ca_file: Optional[str] = None
    cert_file: Optional[str] = None
    key_file: Optional[str] = None
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    max_message_bytes: Annotated[int, Meta(ge=0)] = 0


class IdentitySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """key_file: this device's private key. coordinator_key: the coordinator's public key, 64 hex digits, pinned; or two
    of them, the current and the next."""

    key_file: str
    coordinator_key: Union[str, tuple[str, ...]]


Debug = Literal["", "report", "drop", "mend"]


class TaskData(Struct, frozen=True, forbid_unknown_fields=True):
    """One task's, as in DataSettings."""

    path: str = ""
    source: str = "npz"
    evaluation_path: str = ""
    trusted_path: str = ""
    replica: str = ""
    shards: dict[str, str] = {}
    debug: Debug = ""
    options: dict[str, Any] = {}
    holdout: Share = 0.0
    normalise: Literal["", "standard", "range"] = ""
    bad_rows: Literal["refuse", "drop"] = "refuse"


class DataSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """source: the adapter that reads the data. path: what it reads. evaluation_path: what it reads for evaluations, ""
    for the same. trusted_path: instances whose labels the owner vouches for, "" for none (machine teaching). tasks: the
    data of tasks by name; with any of them, other tasks find no data here.
    replica: the name of the shard that other devices hold, too, whose updates are to be equal; "" for data of its own.
    debug: what becomes of examples whose labels the trusted ones speak against: "" for not looking, "report", "drop"
    or "mend".
    shards: name -> path of the shards of a cyclic code that this device holds; others hold each of them, too.
    options: the source's own (source_options). holdout: the share of the examples that are never trained on. normalise:
    how inputs are scaled by this device's statistics, "" for not. bad_rows: what becomes of rows that are no examples.
    """

    path: str = ""
    source: str = "npz"
    evaluation_path: str = ""
    trusted_path: str = ""
    replica: str = ""
    shards: dict[str, str] = {}
    debug: Debug = ""
    tasks: dict[str, TaskData] = {}  # msgspec copies empty defaults
    options: dict[str, Any] = {}
    holdout: Share = 0.0
    normalise: Literal["", "standard", "range"] = ""
    bad_rows: Literal["refuse", "drop"] = "refuse"


class TrainingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """timeout_s: a training that takes longer is killed. memory_mb: the child's address space, 0 for no limit.
    nice: how far the child steps back for other programs. threads: of the TFLite runtime."""

    timeout_s: Positive = 3600.0
    memory_mb: Annotated[int, Meta(ge=0)] = 0
    max_epochs: Annotated[int, Meta(ge=1)] = 100
    nice: Annotated[int, Meta(ge=0, le=19)] = 10
    threads: Annotated[int, Meta(ge=1, le=64)] = 1


class PrivacySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The owner's own policy, applied before anything leaves the device. 0 switches each off.

    clip_norm: largest L2 norm of an update. noise_multiplier: Gaussian noise of this many clip_norms per coordinate.
    noise_moving_statistics: train models whose moving statistics (BatchNorm) would be noised too; without it such a
    round is refused. require_encryption: rounds whose updates are not encrypted to the coordinator are declined.
    exact_evaluation: answer evaluation rounds also with noise_multiplier above 0; what they send is never noised.
    max_psnr_db: an update that states a true example more closely is stopped (leak_gate). max_label_recovery: likewise
    for the share of the labels that it tells. epsilon_limit: rounds after which this device's updates would have spent
    more are declined (ledger); delta: of epsilon.
    screen_models: what becomes of a round whose model looks made to read the data (model_screening).
    """

    clip_norm: NotNegative = 0.0
    noise_multiplier: NotNegative = 0.0
    min_examples: Annotated[int, Meta(ge=1)] = 1
    noise_moving_statistics: bool = False
    require_encryption: bool = False
    exact_evaluation: bool = False
    max_psnr_db: NotNegative = 0.0
    max_label_recovery: Annotated[float, Meta(ge=0, le=1)] = 0.0
    epsilon_limit: NotNegative = 0.0
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    screen_models: Literal["refuse", "warn", "off"] = "refuse"


class WireSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """compression: the forms in which this device lets its updates be sent, beside plain float32."""

    compression: tuple[str, ...] = COMPRESSIONS


class PolicySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """tasks: the names of those that this device works for, None for all. refuse_tasks: those it never works for.
    bundles: the sha256 of the bundle files it trains, 64 hex digits each, None for all that its coordinator seals."""

    tasks: Optional[tuple[str, ...]] = None
    refuse_tasks: tuple[str, ...] = ()
    bundles: Optional[tuple[Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")], ...]] = None


class CaptureSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """allow: whether the coordinator may keep this device's updates in captures, to study what they give away.
    keep_records: of how many rounds this device keeps what it did, examples and all, for its owner; nothing of it is
    ever sent."""

    allow: bool = False
    keep_records: Annotated[int, Meta(ge=0, le=1000)] = 0


class ConditionSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """When this device works (covey_edge.conditions, docs/conditions.md). 0, false and empty switch each off.

    quiet_hours: windows in which it does not; hours: those in which it does, empty for all day. max_load: of other
    programs, per core. when_lost: what becomes of work under way. unknown: what a condition is taken for that cannot be
    read. tell: whether the coordinator hears which condition it was.
    """

    charging: bool = False
    min_battery: Annotated[int, Meta(ge=0, le=100)] = 0
    max_temperature_c: Annotated[float, Meta(ge=0, le=120)] = 0.0
    unthrottled: bool = False
    unmetered: bool = False
    quiet_hours: tuple[str, ...] = ()
    hours: tuple[str, ...] = ()
    min_free_disk_mb: Annotated[int, Meta(ge=0)] = 16
    min_free_memory_mb: Annotated[int, Meta(ge=0)] = 0
    max_load: NotNegative = 0.0
    when_lost: Literal["pause", "abort"] = "pause"
    unknown: Literal["allow", "decline"] = "allow"
    check_every_s: Annotated[float, Meta(ge=1, le=3600)] = 10.0
    tell: bool = True


class UpdateSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """release_key: whose releases this device installs, 64 hex digits; "" for nobody's. from_fleet: also those that
    come over the broker, else only those that its owner gives it."""

    release_key: str = ""
    from_fleet: bool = True


class TaskPersonal(Struct, frozen=True, forbid_unknown_fields=True):
    """The models that the owner uses, see docs/personal-models.md.

    keep: the newest model is kept for `covey infer`. finetune_epochs: passes over this device's data that make a
    personal copy of it, 0 for none. finetune_learning_rate: 0 for the round's. finetune_layers: names of the layers in
    which alone the copy differs, () for all. use: which one applications get. measure, min_gain: by what, and by how
    much beside one standard error, a model must be better to be taken for better.
    """

    keep: bool = False
    finetune_epochs: Annotated[int, Meta(ge=0, le=1000)] = 0
    finetune_learning_rate: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    finetune_layers: tuple[str, ...] = ()
    use: Literal["better", "federated", "personal"] = "better"
    measure: Literal["loss", "accuracy"] = "loss"
    min_gain: NotNegative = 0.0


class PersonalSettings(TaskPersonal, frozen=True, forbid_unknown_fields=True):
    """tasks: of tasks by name; one that is named takes nothing from the rest."""

    tasks: dict[str, TaskPersonal] = {}

    def of(self, task: str) -> TaskPersonal:
        return self.tasks.get(task, self)


class AgentConfig(Struct, frozen=True, forbid_unknown_fields=True):
    device_id: str
    fleet: str
    broker: BrokerSettings
    identity: IdentitySettings
    data: DataSettings
    training: TrainingSettings = TrainingSettings()
    privacy: PrivacySettings = PrivacySettings()
    wire: WireSettings = WireSettings()
    policy: PolicySettings = PolicySettings()
    capture: CaptureSettings = CaptureSettings()
    state_dir: str = "state"
    conditions: ConditionSettings = ConditionSettings()
    update: UpdateSettings = UpdateSettings()
    personal: PersonalSettings = PersonalSettings()


class Agent(Struct, frozen=True):
    """A configuration with its files read and its paths resolved (relative ones lie beside the TOML file)."""

    config: AgentConfig
    folder: Path
    broker: Broker
    key: SealingKey
    coordinators: tuple[PublicKey, ...]  # the newest last

    @property
    def state_dir(self) -> Path:
        return self.folder / self.config.state_dir


def load_agent(path: Path) -> Agent:
    """Read agent.toml and the keys it names. ConfigError names the file, the setting and the nearest right name."""
    config = read_toml(path, AgentConfig)
    check_device_id(config.device_id)
    check_name(config.fleet, "fleet")
    if config.privacy.noise_multiplier and not config.privacy.clip_norm:
        raise ConfigError(f"{path}: noise_multiplier needs clip_norm", "set privacy.clip_norm; noise is measured in it")
    _check_epsilon(path, config.privacy)
    _check_replicas(path, config)
    _check_personal(path, config)
    _check_reading(path, config.data)
    _check_hours(path, config.conditions)
    for name in (*config.data.tasks, *(config.policy.tasks or ()), *config.policy.refuse_tasks):
        check_name(name, "task")
    if not (config.data.path or config.data.shards or config.data.tasks):
        raise ConfigError(f"{path}: [data] has no path", "say where this device's data are")
    for name, task in config.data.tasks.items():
        if not (task.path or task.shards):
            raise ConfigError(f"{path}: [data.tasks.{name}] has no path", "say where this task's data are")
    _check_release_key(path, config)
    for name in config.wire.compression:
        if name not in COMPRESSIONS:
            raise ConfigError(f"{path}: there is no compression {name!r}", f"use {', '.join(COMPRESSIONS)}")
    return Agent(
        config,
        path.parent.resolve(),
        read_broker(config.broker, path.parent),
        SealingKey.from_pem(read_file(path.parent / config.identity.key_file), config.identity.key_file),
        keys_from(config.identity.coordinator_key, "the coordinator"),
    )


def _check_epsilon(path: Path, privacy: PrivacySettings) -> None:
    if privacy.epsilon_limit and not privacy.noise_multiplier:
        raise ConfigError(
            f"{path}: epsilon_limit without noise_multiplier: what has no noise has no epsilon",
            "set privacy.clip_norm and privacy.noise_multiplier, or leave epsilon_limit out",
        )
    if privacy.epsilon_limit and privacy.exact_evaluation:
        raise ConfigError(
            f"{path}: epsilon_limit with exact_evaluation: exact numbers have no epsilon", "leave one of them out"
        )


def _check_personal(path: Path, config: AgentConfig) -> None:
    tables = {"personal": config.personal, **{f"personal.tasks.{k}": v for k, v in config.personal.tasks.items()}}
    for name in config.personal.tasks:
        check_name(name, "task")
    for where, personal in tables.items():
        if personal.finetune_epochs and not personal.keep:
            raise ConfigError(f"{path}: [{where}] finetune_epochs without keep", "set keep = true in the same table")
        tuned = bool(personal.finetune_epochs)
        if not tuned and (personal.use == "personal" or personal.finetune_layers or personal.finetune_learning_rate):
            raise ConfigError(f"{path}: [{where}] is for a personal model that nothing makes", "set finetune_epochs")


def _check_reading(path: Path, data: DataSettings) -> None:
    """Of sources that other distributions add, the options are checked where the data are first read."""
    named: list[tuple[str, DataSettings | TaskData]] = [
        ("[data", data),
        *((f"[data.tasks.{name}", task) for name, task in data.tasks.items()),
    ]
    for name, own in named:
        if own.source in OPTIONS:
            where = f"{path}: {name}.options]"
            check_together(as_struct(own.options, OPTIONS[own.source], where), where)
        if own.holdout and own.evaluation_path:
            raise ConfigError(
                f"{path}: holdout with evaluation_path: the data for evaluations are named already",
                "leave one of them out",
            )
        equal = "replica" if own.replica else "shards" if own.shards else ""
        for setting in ("holdout", "normalise"):
            if equal and getattr(own, setting):
                raise ConfigError(
                    f"{path}: {setting} with {equal}: it is this device's own, and the data are to be everybody's",
                    "leave one of them out",
                )


def _check_release_key(path: Path, config: AgentConfig) -> None:
    """Who coordinates must not be able to replace the agent."""
    if not config.update.release_key:
        return
    key = PublicKey.from_hex(config.update.release_key)
    if key in keys_from(config.identity.coordinator_key, "the coordinator"):
        raise ConfigError(f"{path}: update.release_key is the coordinator's key", "pin the key of the releases' maker")


def _check_replicas(path: Path, config: AgentConfig) -> None:
    every: list[DataSettings | TaskData] = [config.data, *config.data.tasks.values()]
    for data in every:
        if data.debug and not data.trusted_path:
            raise ConfigError(
                f"{path}: debug = {data.debug!r} without trusted_path", "say where the instances are that you vouch for"
            )
        for what, name in (("replica", data.replica), *(("shard", name) for name in data.shards)):
            if (name or what == "shard") and config.privacy.noise_multiplier:
                raise ConfigError(
                    f"{path}: {what} = {name!r} with noise_multiplier: a noised update equals nobody's",
                    "leave one of them out",
                )
            if (name or what == "shard") and config.training.threads > 1:
                raise ConfigError(
                    f"{path}: {what} = {name!r} with training.threads above 1, which may change an update's last bits",
                    "leave one of them out",
                )
            if name or what == "shard":
                check_name(name, what)


def _check_hours(path: Path, conditions: ConditionSettings) -> None:
    for setting in ("quiet_hours", "hours"):
        for text in getattr(conditions, setting):
            window_of(text, f"{path}: conditions.{setting}")


def read_broker(settings: BrokerSettings, folder: Path) -> Broker:
    """The broker with its files resolved against `folder` and its password read."""
    files = {
        name: folder / value if (value := getattr(settings, name)) else None
        for name in ("ca_file", "cert_file", "key_file")
    }
    broker = dataclasses.replace(
        parse_broker(settings.url, **files),
        protocol=settings.protocol,
        max_message_bytes=settings.max_message_bytes,
    )
    if settings.username is None:
        if settings.password_file is not None:
            raise ConfigError("broker.password_file needs broker.username", "set both or none")
        return broker
    if broker.password is not None:
        raise ConfigError("broker.username and a password in broker.url", "give the password in one place")
    password = read_file(folder / settings.password_file).decode().strip() if settings.password_file else None
    return dataclasses.replace(broker, username=settings.username, password=password)


class _Roster(Struct, frozen=True):
    devices: Roster


def read_roster(path: Path) -> dict[str, tuple[PublicKey, ...]]:
    """The devices' public keys in a coordinator.toml; its other settings are not looked at."""
    return roster_from(read_toml(path, _Roster).devices)


def roster_from(keys: Roster) -> dict[str, tuple[PublicKey, ...]]:
    """Device ids to public keys, the newest last, from hex digits."""
    return {check_device_id(device_id): keys_from(key, device_id) for device_id, key in keys.items()}


def read_toml(path: Path, kind: type[T]) -> T:
    """A TOML file as a strict struct. ConfigError for unreadable files, unknown keys (naming the nearest), values."""
    return as_struct(toml_content(path), kind, str(path))


def toml_content(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_file(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not valid TOML ({exc})", "correct that line") from exc


def read_file(path: Path) -> bytes:
    """A file an operator named. ConfigError names it where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read ({exc.strerror})", "check the path and the permissions") from exc
