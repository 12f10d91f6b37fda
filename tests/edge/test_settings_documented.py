"""Every setting of agent.toml is described in docs/agent.md, and a mistyped one names the nearest, in every section."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from covey_edge.config import AgentConfig
from covey_edge.strict import as_struct, every_setting
from covey_protocol.errors import ConfigError

PAGE = (Path(__file__).parent.parent.parent / "docs" / "agent.md").read_text()
SECTIONS = every_setting(AgentConfig)


def described(section: str) -> str:
    """What the page says after the section's heading in bold, up to the next one."""
    heading = f"**`[{section}]`**" if section else "Only `device_id`"
    assert heading in PAGE, f"docs/agent.md has no {heading}"
    return re.split(r"^\*\*`\[", PAGE[PAGE.index(heading) + len(heading) :], maxsplit=1, flags=re.MULTILINE)[0]


def test_the_walk_finds_sections_and_those_that_an_owner_names() -> None:
    assert {"", "broker", "privacy", "data", "data.tasks.NAME"} <= SECTIONS.keys()
    assert "epsilon_limit" in SECTIONS["privacy"]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_described(section: str) -> None:
    text = described(section.replace(".tasks.NAME", ""))  # a task's settings are those of the section
    tables = {path.rpartition(".")[2] for path in SECTIONS} | {"tasks"}
    missing = [name for name in SECTIONS[section] if name not in tables and f"`{name}`" not in text]
    missing = [name for name in missing if f"`[{section}.{name}]`" not in text]
    assert not missing, f"[{section}]: {missing}"


def nested(section: str, settings: dict[str, object]) -> dict[str, object]:
    for name in reversed(section.split(".") if section else []):
        settings = {"kitchen" if name == "NAME" else name: settings}
    return settings


@pytest.mark.parametrize("section", SECTIONS)
def test_a_mistyped_setting_names_the_nearest_in_its_section(section: str) -> None:
    for name in SECTIONS[section]:
        with pytest.raises(ConfigError) as refused:
            as_struct(nested(section, {f"{name}x": 1}), AgentConfig, "agent.toml")
        assert f"`{name}x`" in str(refused.value)
        assert f"did you mean `{name}`?" in str(refused.value)


def test_a_setting_in_a_wrong_section_is_told_where_it_belongs() -> None:
    with pytest.raises(ConfigError, match=r"`epsilon_limit` - at `\$\.training`; it belongs in \[privacy\]"):
        as_struct({"training": {"epsilon_limit": 1}}, AgentConfig, "agent.toml")
    with pytest.raises(ConfigError, match="it belongs in the file's top"):
        as_struct({"broker": {"fleet": "home"}}, AgentConfig, "agent.toml")
