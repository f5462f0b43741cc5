"""What `/openapi.json` says of the fields that ask for structured output. `structured_output_fields` reads them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WithJsonSchema

from max_ray.structured_output.grammar_text import MAX_CHOICES
from max_ray.structured_output.structural_tag import MAX_STRUCTURES

Schema = dict[str, Any]


def _object(**fields: Any) -> Schema:
    """An object of these fields, all of them required."""
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def _or_null(*schemas: Schema) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [*schemas, {"type": "null"}]})


_TEXT: Schema = {"type": "string"}
_FILLED: Schema = {"type": "string", "minLength": 1}
_FLAG: Schema = {"type": "boolean"}
_CHOICES: Schema = {"type": "array", "items": _FILLED, "minItems": 1, "maxItems": MAX_CHOICES}
_JSON_SCHEMA: Schema = {"type": ["object", "boolean"], "description": "A JSON schema."}
_SCHEMA_OR_TEXT: Schema = {"type": ["object", "boolean", "string"], "description": "A JSON schema, or its text."}
_STRUCTURES: Schema = {
    "type": "array",
    "items": _object(begin=_TEXT, schema=_JSON_SCHEMA, end=_TEXT),
    "minItems": 1,
    "maxItems": MAX_STRUCTURES,
}
_TRIGGERS: Schema = {"type": "array", "items": _FILLED, "minItems": 1}
_TAGS = _object(type={"const": "structural_tag"}, structures=_STRUCTURES, triggers=_TRIGGERS)
_NAMED: Schema = {
    "type": "object",
    "properties": {"name": {}, "description": {}, "schema": _SCHEMA_OR_TEXT, "strict": {"type": ["boolean", "null"]}},
    "required": ["schema"],
    "additionalProperties": False,
}
_FORMATS = (
    _object(type={"const": "text"}),
    _object(type={"const": "json_object"}),
    _object(type={"const": "json_object"}, schema=_SCHEMA_OR_TEXT),
    _object(type={"const": "json_schema"}, schema=_SCHEMA_OR_TEXT),
    _object(type={"const": "json_schema"}, json_schema=_NAMED),
    _TAGS,
)
_OPTIONS: Schema = {
    "disable_any_whitespace": {"type": ["boolean", "null"]},
    "disable_fallback": {},
    "disable_additional_properties": {"enum": [False, None]},
    "whitespace_pattern": {"enum": ["", None]},
}
_KINDS: Schema = {
    **{"json": _SCHEMA_OR_TEXT, "regex": _FILLED, "choice": _CHOICES, "grammar": _TEXT, "json_object": _FLAG},
    "structural_tag": _FILLED,
}
_OUTPUTS = ({**_object(**{name: kind}), "properties": {name: kind, **_OPTIONS}} for name, kind in _KINDS.items())

FormatField = Annotated[Any, _or_null(*_FORMATS)]
OutputsField = Annotated[Any, _or_null(*_OUTPUTS)]
SchemaField = Annotated[Any, _or_null(_SCHEMA_OR_TEXT)]
GrammarField = Annotated[Any, _or_null(_TEXT)]
RegexField = Annotated[Any, _or_null(_FILLED)]
ChoiceField = Annotated[Any, _or_null(_CHOICES)]
FlagField = Annotated[Any, _or_null(_FLAG)]
TagsField = Annotated[Any, _or_null(_TAGS, _FILLED)]
