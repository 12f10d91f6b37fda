"""Compiles the lock files: hashed requirements without any download address. Run by `make lock`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN = ["covey-edge", "covey-models", "covey-coordinator", "covey-deploy"]
COMMON = ["--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--quiet"]
UV_VERSION = "uv==0.13.9"


def main() -> None:
    uv = shutil.which("uv", path=f"{ROOT / '.bootstrap' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        sys.exit("covey: error: make lock needs uv; `make test` with a working package index installs it")
    members = [f"{name}/pyproject.toml" for name in ("edge", "models", "coordinator", "deploy")]
    own = [argument for name in OWN for argument in ("--no-emit-package", name)]
    desktop = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_31"]
    anywhere = ["--universal", "--python-version", "3.9"]
    compile_lock(uv, ["pyproject.toml", *members, "--group", "dev", *own, *desktop], "dev.txt")
    # what the image of a coordinator holds (deploy/containers): the same versions without the tools of developers
    compile_lock(uv, ["pyproject.toml", *members, "--constraint", "locks/dev.txt", *own, *desktop], "coordinator.txt")
    images = ["--universal", "--python-version", "3.11"]
    compile_lock(uv, ["-", "--constraint", "locks/dev.txt", *images], "build.txt", "hatchling")
    compile_lock(uv, ["edge/pyproject.toml", "--constraint", "locks/constraints.in", *anywhere], "edge.txt")
    compile_lock(uv, ["-", *anywhere], "uv.txt", UV_VERSION)


def compile_lock(uv: str, arguments: list[str], name: str, stdin: str = "") -> None:
    path = ROOT / "locks" / name
    command = [uv, "pip", "compile", *arguments, *COMMON, "--output-file", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, input=stdin, text=True)
    addresses = re.findall(r"\w+://\S+", path.read_text())
    if addresses:
        sys.exit(f"covey: error: {path} holds an address ({addresses[0]}); remove it before committing")
    print(f"{path.relative_to(ROOT)}: {path.read_text().count('==')} requirements")


if __name__ == "__main__":
    main()
