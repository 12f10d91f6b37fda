"""The container images and the manifests around them.

The slow test builds the images with buildah and has them train: `COVEY_IMAGES=COORDINATOR,AGENT` takes built ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from brokers import free_port
from patience import PATIENCE_S

from covey_coordinator.demo.devices import Shard
from covey_deploy import provisioning
from covey_deploy.fleet_folder import FleetFolder
from covey_deploy.wheelhouse import pip
from covey_protocol.bundle import read_bundle, write_bundle
from covey_protocol.seals import SealingKey

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS, KUBERNETES = ROOT / "deploy" / "containers", ROOT / "deploy" / "kubernetes"
BASE = "docker.io/library/debian:bookworm-slim"
USER = 10001
DEVICES = ("kitchen-pi", "porch-pi")
ROUNDS = 2


def documents() -> Iterator[dict[str, Any]]:
    for path in sorted(KUBERNETES.glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


def pod() -> dict[str, Any]:
    (deployment,) = [one for one in documents() if one["kind"] == "Deployment"]
    return deployment["spec"]["template"]["spec"]


# --- what can be seen without running anything


@pytest.mark.parametrize("name", ["coordinator", "agent"])
def test_an_image_installs_from_hashed_locks_and_runs_as_nobody(name: str) -> None:
    text = (CONTAINERS / f"Dockerfile.{name}").read_text()
    for line in re.findall(r"pip install [^&\n]*", text):
        assert "--require-hashes -r /locks/" in line or "--no-index /wheels/" in line, line
    assert set(re.findall(r"^FROM (\S+)", text, re.M)) == {BASE}
    assert re.findall(r"^USER (.*)", text, re.M) == [f"{USER}:{USER}"]
    assert "HEALTHCHECK" in text
    for lock in re.findall(r"locks/\S+\.txt", text):
        assert (ROOT / lock.removeprefix("/")).exists()


def test_the_manifests_never_run_two_coordinators_and_give_them_no_rights() -> None:
    (deployment,) = [one for one in documents() if one["kind"] == "Deployment"]
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    outer, (container,) = pod()["securityContext"], pod()["containers"]
    inner = container["securityContext"]
    assert outer["runAsNonRoot"] is True
    assert outer["runAsUser"] == USER
    assert outer["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod()["automountServiceAccountToken"] is False
    assert inner["allowPrivilegeEscalation"] is False
    assert inner["readOnlyRootFilesystem"] is True
    assert inner["capabilities"] == {"drop": ["ALL"]}
    assert {one["kind"] for one in documents()} == {
        *("Namespace", "Deployment", "Service", "NetworkPolicy", "PersistentVolumeClaim", "Kustomization")
    }  # no Secret: keys come from files that are not here
    (policy,) = [one["spec"] for one in documents() if one["kind"] == "NetworkPolicy"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert all("to" in rule and "ports" in rule for rule in policy["egress"])


def test_the_clusters_settings_are_settings_of_a_coordinator_and_write_where_the_volume_is(tmp_path: Path) -> None:
    from covey_coordinator.serve import CoordinatorConfig
    from covey_edge.config import read_toml

    roster = "\n".join(f'{name} = "{"00" * 32}"' for name in DEVICES)
    text = (KUBERNETES / "coordinator.toml").read_text().replace("# kitchen-pi", f"{roster}\n# kitchen-pi")
    (tmp_path / "coordinator.toml").write_text(text)
    config = read_toml(tmp_path / "coordinator.toml", CoordinatorConfig)
    (container,) = pod()["containers"]
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert config.runs_dir.startswith(mounts["runs"] + "/")
    assert f"{mounts['settings']}/coordinator.toml" in container["args"]
    assert config.metrics is not None
    assert config.metrics.listen == f"0.0.0.0:{container['ports'][0]['containerPort']}"


def test_both_agents_of_the_compose_file_are_sandboxed_as_the_coordinator_is() -> None:
    services = yaml.safe_load((CONTAINERS / "compose.yaml").read_text())["services"]
    assert set(services) == {"coordinator", *DEVICES}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "user" in service, name
        assert (CONTAINERS / service["build"]["context"] / service["build"]["dockerfile"]).exists()


@pytest.mark.slow
def test_a_cluster_would_take_the_manifests() -> None:
    """By the schemas of kubernetes-validate, in a Python of its own: COVEY_KUBERNETES_VALIDATE=PYTHON."""
    python = os.environ.get("COVEY_KUBERNETES_VALIDATE")
    if shutil.which("kubectl") is None or not python:
        pytest.skip("needs kubectl, and a Python with kubernetes-validate and PyYAML in COVEY_KUBERNETES_VALIDATE")
    built = subprocess.run(["kubectl", "kustomize", str(KUBERNETES)], check=True, capture_output=True).stdout
    check = (
        "import sys, yaml, kubernetes_validate as k\n"
        "for one in yaml.safe_load_all(sys.stdin): print(one['kind'], k.validate(one, '1.31', strict=True))"
    )
    said = subprocess.run([python, "-c", check], input=built, check=True, capture_output=True).stdout.decode()
    assert len(said.splitlines()) == 6


# --- images that are built and run


def buildah(*arguments: str, **options: Any) -> str:
    environment = {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot", **os.environ}
    done = subprocess.run(["buildah", *arguments], env=environment, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def base_image(folder: Path) -> None:
    """A Debian under the name of the Dockerfiles' base, where none is there: registries may be out of reach."""
    if BASE in buildah("images", "--format", "{{.Name}}:{{.Tag}}").splitlines():
        return
    if shutil.which("mmdebstrap") is None:
        pytest.skip(f"needs {BASE}, or mmdebstrap to make one")
    tar = folder / "base.tar"
    subprocess.run(["mmdebstrap", "--variant=minbase", "bookworm", str(tar)], check=True, capture_output=True)
    container = buildah("from", "scratch")
    buildah("add", container, str(tar), "/")
    buildah("commit", "--rm", container, BASE)


def pip_settings(folder: Path) -> list[str]:
    """Options that let pip in a build find what pip finds here, wherever this machine's index is."""
    told = subprocess.run([*pip(), "config", "list"], capture_output=True, text=True, check=True)
    values: dict[str, str] = {}
    for line in told.stdout.splitlines():
        name, _, value = line.partition("=")
        words = value.strip("'\"").split()
        values[name.rpartition(".")[2]] = " ".join(word for word in words if not word.startswith("file:"))
    options = []
    for name in ("cert", "find-links"):
        if values.get(name) and Path(values[name]).exists():
            options += ["--volume", f"{values[name]}:/opt/of-this-machine/{name}:ro"]
            values[name] = f"/opt/of-this-machine/{name}"
    kept = {
        name: value
        for name, value in values.items()
        if value and name in ("cert", "find-links", "index-url", "extra-index-url")
    }
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in kept.items()))
    return [*options, "--volume", f"{folder / 'pip.conf'}:/etc/pip.conf:ro"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if shutil.which("buildah") is None or os.geteuid() != 0:
        pytest.skip("needs buildah (Debian: apt install buildah) and root")
    if given := os.environ.get("COVEY_IMAGES"):
        return dict(zip(("coordinator", "agent"), given.split(",")))
    folder = tmp_path_factory.mktemp("build")
    base_image(folder)
    settings = pip_settings(folder)
    for name in ("agent", "coordinator"):
        file = str(CONTAINERS / f"Dockerfile.{name}")
        buildah(
            *("bud", "--layers=false", "--pull-never", "--format", "docker", *settings),
            *("-f", file, "-t", f"covey-{name}:test", str(ROOT)),
        )
    return {name: f"covey-{name}:test" for name in ("coordinator", "agent")}


@pytest.fixture
def fleet(tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey, digits: dict[str, Shard]) -> FleetFolder:
    """As `covey provision` makes it, owned by the images' user, with data for both devices."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    home = tmp_path / "home"
    provisioning.init(home, "home", ["127.0.0.1"], free_port(), bundle="model.covey", num_devices=2)
    provisioning.add_devices(home, [provisioning.NewDevice(name) for name in DEVICES])
    bundle = read_bundle(digits_bundle, coordinator_key.public)
    seal = SealingKey.from_pem((home / "coordinator" / "seal.pem").read_bytes())
    (home / "coordinator" / "model.covey").write_bytes(write_bundle(bundle.manifest, bundle.model, seal))
    config = home / "coordinator" / "coordinator.toml"
    text = config.read_text().replace("rounds = 20", f"rounds = {ROUNDS}")
    config.write_text(text.replace("[aggregation]", f'[metrics]\nlisten = "127.0.0.1:{free_port()}"\n\n[aggregation]'))
    for name in DEVICES:
        (home / "data" / name).mkdir(parents=True)
        (home / "state" / name).mkdir(parents=True)
        np.savez(home / "data" / name / "data.npz", x=digits[name].x, y=digits[name].y)
    for path in (home, *home.rglob("*")):
        os.chown(path, USER, USER)
    return FleetFolder.open(home)


@pytest.fixture(scope="module")
def digits() -> dict[str, Shard]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return {name: Shard(x[place::2], y[place::2].astype(np.int32)) for place, name in enumerate(DEVICES)}


class Running:
    """A container of an image; its root is looked through for what was written there."""

    def __init__(self, image: str, log: Path, mounts: dict[Path, str], arguments: list[str]) -> None:
        self.name, self.log = buildah("from", "--pull-never", image), log
        self._since = time.time()
        said = json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]
        self.health = said["Healthcheck"]["Test"][1:]
        self._command = [*said["Entrypoint"], *(arguments or said["Cmd"])]
        self._options = [one for there, here in mounts.items() for one in ("--volume", f"{there}:{here}")]
        self.process = self._started(self._command, log)

    def _started(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        environment = {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot", **os.environ}
        with log.open("ab") as file:
            return subprocess.Popen(
                ["buildah", "run", *self._options, self.name, "--", *command], stdout=file, stderr=file, env=environment
            )

    def is_healthy(self) -> bool:
        return self._started(self.health, self.log.with_suffix(".health")).wait(PATIENCE_S) == 0

    def written(self) -> list[str]:
        """Files of the root file system that a read-only root would not have allowed."""
        root = Path(buildah("mount", self.name))
        allowed = (
            "tmp/",
            "var/lib/covey/",
            "etc/covey",
            "run/",
            "etc/hosts",
            "etc/resolv.conf",
            "proc/",
            "dev/",
            "sys/",
        )
        new = [
            str(path.relative_to(root))
            for path in root.rglob("*")
            if path.is_file() and not path.is_symlink() and path.stat().st_mtime > self._since
        ]
        return [name for name in new if not name.startswith(allowed)]

    def kill(self) -> None:
        """With what runs inside, which would outlive `buildah run`."""
        with suppress(psutil.NoSuchProcess):
            for process in (outer := psutil.Process(self.process.pid), *outer.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()

    def remove(self) -> None:
        self.kill()
        buildah("rm", self.name)


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.timeout(5400)
def test_images_train_a_model_with_the_fleets_broker(
    images: dict[str, str], fleet: FleetFolder, tmp_path: Path
) -> None:
    config = fleet.coordinator / "coordinator.toml"
    running: list[Running] = []
    with (tmp_path / "broker.log").open("wb") as log:
        command = [sys.executable, "-m", "covey_edge", "broker", "run", "--fleet-folder", str(fleet.path)]
        broker = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=log, stderr=log)
    try:
        for name in DEVICES:
            mounts = {
                fleet.device(name): "/etc/covey:ro",
                fleet.path / "state" / name: "/var/lib/covey",
                fleet.path / "data" / name: "/var/lib/covey-data:ro",
            }
            running.append(Running(images["agent"], tmp_path / f"{name}.log", mounts, []))
        coordinator = Running(
            images["coordinator"], tmp_path / "coordinator.log", {fleet.coordinator: "/etc/covey"}, []
        )
        running.append(coordinator)
        healthy: set[str] = set()
        end = time.monotonic() + 6 * PATIENCE_S
        while coordinator.process.poll() is None:
            assert time.monotonic() < end, coordinator.log.read_text()[-3000:]
            healthy |= {one.log.stem for one in running[:2] if one.log.stem not in healthy and one.is_healthy()}
            time.sleep(0.5)
        said = coordinator.log.read_text()
        assert coordinator.process.returncode == 0, said[-3000:]
        assert f"round {ROUNDS}/{ROUNDS} published: 2 of 2 updates" in said
        assert healthy == set(DEVICES)
        assert {one.log.stem: one.written() for one in running} == {one.log.stem: [] for one in running}
        owners = {path.stat().st_uid for path in (config.parent / "runs").rglob("*")}
        assert owners == {USER}
        running[0].kill()
        assert not running[0].is_healthy()
    finally:
        for one in running:
            one.remove()
        broker.terminate()
        broker.wait()
