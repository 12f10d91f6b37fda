"""`make test` runs every test once, in two processes, and fails when either fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run_tests() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_tests", ROOT / "scripts" / "run_tests.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_of_tests_is_in_one_half(run_tests: ModuleType) -> None:
    named = [ROOT / part for half in run_tests.halves(ROOT) for part in half]
    files = [file for part in named for file in ([part] if part.is_file() else part.rglob("test_*.py"))]
    assert sorted(files) == sorted((ROOT / "tests").rglob("test_*.py"))
    assert {Path(part).name for part in run_tests.halves(ROOT)[0]} == set(run_tests.FIRST)


@pytest.mark.parametrize("failing", ["edge", "coordinator", None])
def test_a_failure_in_either_half_is_a_failure_and_is_shown(
    failing: str,
    run_tests: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    for name in ("edge", "coordinator"):
        (tmp_path / "tests" / name).mkdir(parents=True)
        (tmp_path / "tests" / name / f"test_{name}.py").write_text(f"def test_it():\n    assert {name != failing}\n")
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    monkeypatch.setattr(run_tests.os, "sched_getaffinity", lambda pid: {0, 1})
    assert run_tests.main([]) == (1 if failing else 0)
    said = capfdbinary.readouterr().out.decode()
    assert said.count("1 passed") == (1 if failing else 2)
    assert (f"test_{failing}.py::test_it" in said) == (failing is not None)
