"""Groups of commands that name the nearest one where a name is mistyped."""

from __future__ import annotations

import difflib
from typing import Any

import click


class NearestGroup(click.Group):
    """Suggests by `list_commands`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as exc:
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if close:
                raise click.UsageError(f"{exc.message} Did you mean '{close[0]}'?", ctx) from exc
            raise
