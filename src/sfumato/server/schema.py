"""The JSON schema of a request, derived from the annotations that also validate it."""

from __future__ import annotations

import dataclasses
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from sfumato.request import GenerateRequest
from sfumato.values import Within, kinds_of

__all__ = ["REQUEST", "schema_of"]

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def schema_of(record: Any) -> dict[str, Any]:
    """Return the JSON schema of a frozen record."""
    nested = getattr(record, "nested", {})
    fields = {name: _schema(kind, nested.get(name)) for name, kind in kinds_of(record).items()}
    needed = [field.name for field in dataclasses.fields(record) if field.default is dataclasses.MISSING]
    return {"type": "object", "properties": fields, "required": needed, "additionalProperties": False}


def _schema(kind: Any, record: Any = None, within: Within | None = None) -> dict[str, Any]:
    if get_origin(kind) is Annotated:
        kind, *notes = get_args(kind)
        bounds = next((note for note in notes if isinstance(note, Within)), within)
        return _schema(kind, record, bounds)
    origin, args = get_origin(kind), get_args(kind)
    if kind in TYPES:
        low, high = ("minLength", "maxLength") if kind is str else ("minimum", "maximum")
        limits = {} if within is None else {low: within.low, high: within.high}
        return {"type": TYPES[kind], **limits}
    if origin is tuple:
        within = within if args[-1] is Ellipsis else Within(len(args), len(args))
        limits = {} if within is None else {"minItems": within.low, "maxItems": within.high}
        return {"type": "array", "items": _schema(args[0], record), **limits}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1])}
    if origin is not None:
        options = [_schema(one, record, within) for one in args if one is not NoneType]
        return options[0] if len(options) == 1 else {"anyOf": options}
    return schema_of(record or kind)


REQUEST = schema_of(GenerateRequest) | {"title": "GenerateRequest"}
