"""What the pages on kits and phones name is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from covey_deploy.kit import LEFT_OUT
from covey_deploy.targets import TARGETS

ROOT = Path(__file__).parent.parent.parent
PAGES = ("kits.md", "android.md", "native-app.md", "adr/0042-kits.md")


def test_the_golden_vectors_that_an_apps_maker_is_sent_to_are_there() -> None:
    text = (ROOT / "docs" / "native-app.md").read_text()
    known = set(json.loads((ROOT / "tests" / "golden" / "v1.json").read_text())["vectors"])
    rows = [line for line in text.splitlines() if re.match(r"\| [237]\. ", line)]
    named = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)} & known
    assert len(rows) == 3
    assert {"invitation", "verdict", "answer", "seen", "bundle"} <= named
    of_a_device = {
        name
        for name in known
        if not name.startswith(("invitation-", "presence-trouble", "presence-on-trial", "receipt-"))
    }
    assert named == of_a_device


@pytest.mark.parametrize("page", PAGES)
def test_links_and_targets_of_the_pages_are_there(page: str) -> None:
    path = ROOT / "docs" / page
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target
    for name in re.findall(r"--target ([a-z0-9.-]+)", text):
        assert name in TARGETS or name in ("android", "edge"), name


def test_what_is_left_out_is_never_a_licence_or_a_record() -> None:
    from covey_deploy.installer import is_left_out

    for name in ("numpy-1.26.4.dist-info/LICENSE.txt", "numpy-1.26.4.dist-info/RECORD", "numpy/core/__init__.py"):
        assert not is_left_out(name, LEFT_OUT)
    assert is_left_out("numpy/core/tests/test_umath.py", LEFT_OUT)
