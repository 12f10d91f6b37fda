"""The set-up script refuses what cannot work in one line, before it downloads anything."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from types import ModuleType

import pytest

from covey_protocol import errors

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")])
def test_a_machine_without_tff_is_refused_and_told_what_works(
    system: str,
    machine: str,
    bootstrap: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(SystemExit) as ended:
        bootstrap.check_machine()
    assert ended.value.code == errors.EXIT_MACHINE
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{system} on {machine}" in said
    assert "the edge agent can" in said


def test_this_machine_is_accepted(bootstrap: ModuleType) -> None:
    bootstrap.check_machine()


def test_the_exit_codes_are_the_documented_ones(bootstrap: ModuleType) -> None:
    assert (bootstrap.EXIT_MACHINE, bootstrap.EXIT_TRANSPORT) == (errors.EXIT_MACHINE, errors.EXIT_TRANSPORT)


def test_no_lock_file_holds_an_address_and_every_requirement_has_a_hash() -> None:
    for path in (ROOT / "locks").glob("*.txt"):
        text = path.read_text()
        assert "://" not in text, path
        requirements = [line for line in text.splitlines() if "==" in line]
        assert requirements
        assert all(line.endswith("\\") for line in requirements), path
        assert text.count("--hash=sha256:") >= len(requirements)
