"""Makes `.venv` in this checkout: Python 3.11, everything from locks/dev.txt, and the four packages.

Needs Python 3.9+ and a package index, nothing else. Uses uv (found, or installed into .bootstrap from locks/uv.txt),
which also finds or fetches Python 3.11; without uv, a Python 3.11 on this machine and pip do. Standard library only.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn, Optional

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BOOTSTRAP = ROOT / ".bootstrap"
LOCK = ROOT / "locks" / "dev.txt"
UV_LOCK = ROOT / "locks" / "uv.txt"
PACKAGES = ["edge", "models", "deploy", "coordinator"]
HEAVY = (
    "tensorflow_federated",
    "tensorflow_privacy",
    "tensorflow_model_optimization.python.core.internal.tensor_encoding",
    "sklearn.datasets",
    "scipy.stats",
    "numba",
    "matplotlib.backends.backend_agg",
    "amqtt.broker",
    "pytest",
    "hypothesis",
    "covey_coordinator.cli",
    "covey_coordinator.serve",
    "covey_edge.cli",
    "covey_edge.agent",
)
EXIT_MACHINE, EXIT_TRANSPORT = 3, 5
WANTED = (3, 11)


def main() -> None:
    check_machine()
    uv = find_uv()
    if uv is not None:
        install_with_uv(uv)
    else:
        install_with_pip()
    compile_bytecode()
    (VENV / ".ready").touch()


def check_machine() -> None:
    if sys.version_info < (3, 9):  # noqa: UP036 (any Python may run this script)
        fail(f"this is Python {platform.python_version()}; covey needs 3.9 or newer to set itself up")
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        fail(
            f"this machine is {platform.system()} on {platform.machine()}: TensorFlow Federated has wheels for Linux on"
            " x86-64 only, so the coordinator and the demo cannot be installed here; the edge agent can"
            " (docs/install.md, 'Only the agent'), and so can the models package wherever TensorFlow 2.14 exists"
        )


def find_uv() -> Optional[str]:
    """uv from PATH or .bootstrap, else installed there with pip; None where that does not work."""
    if os.environ.get("COVEY_BOOTSTRAP") == "pip":
        return None
    own = BOOTSTRAP / "bin" / "uv"
    if own.exists():
        return str(own)
    if (found := shutil.which("uv")) is not None:
        return found
    say("installing uv into .bootstrap")
    if quiet([sys.executable, "-m", "venv", str(BOOTSTRAP)]):
        pip = [str(BOOTSTRAP / "bin" / "python"), "-m", "pip"]
        if quiet([*pip, "install", "--quiet", "--require-hashes", "-r", str(UV_LOCK)]) and own.exists():
            return str(own)
    say("uv cannot be installed here; going on with pip")
    shutil.rmtree(BOOTSTRAP, ignore_errors=True)
    return None


def install_with_uv(uv: str) -> None:
    version = ".".join(map(str, WANTED))
    # the interpreter that runs this, where it is a right one, or whatever 3.11 uv finds or fetches
    python = sys.executable if sys.version_info[:2] == WANTED else version
    if not run([uv, "venv", "--quiet", "--allow-existing", "--python", python, str(VENV)]):
        fail(
            f"no Python {version} was found and uv could not fetch one",
            "install it (Debian: apt install python3.11 python3.11-venv) and run make again",
        )
    environment = {**os.environ, "VIRTUAL_ENV": str(VENV)}
    say("installing from locks/dev.txt with uv (about 2.8 GB on disk)")
    steps = (
        ["--require-hashes", "-r", str(LOCK)],
        ["--no-build-isolation", *editable()],
    )
    for arguments in steps:
        if not run([uv, "pip", "install", "--quiet", "--no-deps", *arguments], environment):
            fail_install()


def install_with_pip() -> None:
    python = find_python()
    say("installing from locks/dev.txt with pip (about 2.8 GB on disk)")
    if not run([python, "-m", "venv", str(VENV)]):
        fail(
            "Python's venv module does not work here",
            "install it (Debian: apt install python3-venv) and run make again",
        )
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if not run([*pip, "--require-hashes", "-r", str(LOCK)]):
        fail_install()
    if not run([*pip, "--no-build-isolation", *editable()]):
        fail_install()


def compile_bytecode() -> None:
    """Import the heavy libraries once, which writes their bytecode, also where PYTHONDONTWRITEBYTECODE is set.

    uv leaves none. Without it every process that imports TensorFlow Federated compiles 4,500 files anew: 18 s of
    processor time instead of 7. Compiling all 12,700 files of the environment would take three times as long as this.
    Our own packages are compiled whole, which takes a second: an agent then starts in half the time.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["TF_CPP_MIN_LOG_LEVEL"] = "3"
    say("compiling the libraries' bytecode")
    python = str(VENV / "bin" / "python")
    run([python, "-m", "compileall", "-q", *(str(ROOT / name / "src") for name in PACKAGES)])
    if not run([python, "-W", "ignore", "-c", f"import {', '.join(HEAVY)}"], environment):
        fail(
            "the packages are installed and cannot be imported (see above)",
            "TensorFlow needs a processor with AVX and glibc 2.31 or newer",
        )


def find_python() -> str:
    version = ".".join(map(str, WANTED))
    candidates = [sys.executable] if sys.version_info[:2] == WANTED else []
    candidates += [path for path in [shutil.which(f"python{version}")] if path]
    right = [c for c in candidates if quiet([c, "-c", f"import sys; sys.exit(sys.version_info[:2] != {WANTED})"])]
    if not right:
        remedy = "install it (Debian: apt install python3.11 python3.11-venv) and run make again"
        fail(f"no Python {version} was found", remedy)
    return right[0]


def editable() -> list[str]:
    return [argument for name in PACKAGES for argument in ("--editable", str(ROOT / name))]


def run(command: list[str], environment: Optional[dict[str, str]] = None) -> bool:
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode == 0


def quiet(command: list[str]) -> bool:
    try:
        return subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def say(text: str) -> None:
    print(f"covey: {text}", flush=True)


def fail(what: str, remedy: str = "", code: int = EXIT_MACHINE) -> NoReturn:
    print(f"covey: error: {what}; {remedy}" if remedy else f"covey: error: {what}", file=sys.stderr)
    sys.exit(code)


def fail_install() -> NoReturn:
    fail(
        "the packages could not be installed (see above)", "check the package index and run make again", EXIT_TRANSPORT
    )


if __name__ == "__main__":
    main()
