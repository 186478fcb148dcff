"""The value of ``--entity-type``."""

from __future__ import annotations

import click

from encoders.tables.schemas import ENTITY_TYPES, is_entity_type, plain_entity_type


class EntityTypeName(click.ParamType):
    """A value of ``--entity-type``: one of the usual types, or any other name of that form."""

    name = "type"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name, or end with what was expected."""
        if is_entity_type(value):
            return value
        plain = plain_entity_type(value)
        self.fail(
            f"expected one of {', '.join(ENTITY_TYPES)}, or another name of lower-case letters,"
            f" digits and '_', got {value!r}" + (f"; say {plain}" if plain else ""),
            param,
            ctx,
        )


entity_types_option = click.option(
    "--entity-type",
    "entity_types",
    multiple=True,
    type=EntityTypeName(),
    help="Only these types; may be repeated.",
)
