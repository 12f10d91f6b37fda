"""`make test` runs every test once, in processes side by side, and fails when any of them fails."""

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


def test_every_file_of_tests_is_in_one_part(run_tests: ModuleType) -> None:
    named = [ROOT / path for part in run_tests.parts(ROOT) for path in part]
    files = [file for path in named for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
    assert sorted(files) == sorted((ROOT / "tests").rglob("test_*.py"))
    assert len({file.name for file in files}) == len(files)  # pytest imports them by their names
    assert [{Path(path).name for path in part} for part in run_tests.parts(ROOT)[:-1]] == list(
        map(set, run_tests.PARTS)
    )


@pytest.mark.parametrize("failing", ["models", "edge", "coordinator", None])
def test_a_failure_in_any_part_is_a_failure_and_is_shown(
    failing: str,
    run_tests: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    for name in ("models", "edge", "coordinator"):
        (tmp_path / "tests" / name).mkdir(parents=True)
        fault = "__import__('os').kill(__import__('os').getpid(), 11)" if name == "models" else "assert False"
        text = f"def test_it():\n    {fault if name == failing else 'pass'}\n"
        (tmp_path / "tests" / name / f"test_{name}.py").write_text(text)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # none is used, and they take longer than the tests
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    monkeypatch.setattr(run_tests.os, "sched_getaffinity", lambda pid: {0, 1})
    assert run_tests.main([]) == {"models": 128 + 11, None: 0}.get(failing, 1)
    said = b"".join(capfdbinary.readouterr()).decode()
    assert said.count("1 passed") == (2 if failing else 3)
    shown = {name: f"test_{name}.py::test_it" in said for name in ("edge", "coordinator")}
    shown["models"] = "Segmentation fault" in said and 'test_models.py", line 2 in test_it' in said
    assert [name for name, seen in shown.items() if seen] == ([failing] if failing else [])
