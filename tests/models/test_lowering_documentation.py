"""docs/lowering.md is what the registry says, and every lowering says what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from covey_models.lowering import LOOPS, LOWERINGS, RANDOM, REFUSALS
from covey_models.lowering.documentation import renewed

PAGE = Path(__file__).parents[2] / "docs" / "lowering.md"


def test_the_page_is_what_the_registry_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert renewed(page) == page, "run: python -m covey_models.lowering.documentation docs/lowering.md"
    for op_type in (*LOWERINGS, *LOOPS, *RANDOM, *REFUSALS):
        assert f"`{op_type}`" in page


@pytest.mark.parametrize("table", [LOWERINGS, LOOPS, RANDOM], ids=["lowerings", "loops", "random"])
def test_every_lowering_says_what_it_computes(table: dict[str, object]) -> None:
    silent = [op_type for op_type, lowering in table.items() if not lowering.__doc__]
    assert not silent


def test_no_op_is_both_lowered_and_refused() -> None:
    assert not set(REFUSALS) & {*LOWERINGS, *LOOPS}
