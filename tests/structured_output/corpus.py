"""JSON schemas of the kinds in the JSON Schema test suite: those that are enforced, and those that are refused."""

from __future__ import annotations

from typing import Any

_POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x", "y"]}
_CLOSED = {"additionalProperties": False}


def _object(required: bool = True, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required else []
    return {"type": "object", "properties": properties, "required": names, **_CLOSED}


_STRING, _INTEGER, _NUMBER, _BOOLEAN, _NULL = ({"type": t} for t in ("string", "integer", "number", "boolean", "null"))

ENFORCED: dict[str, Any] = {
    # types
    "true": True,
    "empty": {},
    "string": _STRING,
    "integer": _INTEGER,
    "number": _NUMBER,
    "boolean": _BOOLEAN,
    "null": _NULL,
    "array": {"type": "array"},
    "object": {"type": "object"},
    "two types": {"type": ["string", "null"]},
    "three types": {"type": ["integer", "boolean", "null"]},
    # const and enum
    "const text": {"const": "a"},
    "const number": {"const": 3.5},
    "const object": {"const": {"a": [1, None]}},
    "const null": {"const": None},
    "const quotes": {"const": 'say "hi"\\\n'},
    "enum texts": {"enum": ["red", "green", "blue"]},
    "enum mixed": {"enum": [1, "1", None, True, [2], {"a": 1}]},
    "enum one": {"enum": ["only"]},
    "enum unicode": {"enum": ["é", "日本", "😀"]},
    "enum with type": {"type": "string", "enum": ["a", "b"]},
    "enum that a type narrows": {"type": "integer", "enum": [1, "a", 2]},
    # strings
    "minLength": {"type": "string", "minLength": 3, "maxLength": 6},
    "maxLength": {"type": "string", "maxLength": 5},
    "length 0": {"type": "string", "maxLength": 0},
    "pattern": {"type": "string", "pattern": "^[a-z]{2,4}$"},
    "pattern in the middle": {"type": "string", "pattern": "[0-9]{3}", "maxLength": 8},
    "pattern alternatives": {"type": "string", "pattern": "^(cat|dog)s?$"},
    "pattern with digits": {"type": "string", "pattern": r"^\d{3}-\d{4}$"},
    "pattern with words": {"type": "string", "pattern": r"^\w+@\w+$", "maxLength": 12},
    "pattern and length": {"type": "string", "pattern": "^a+$", "minLength": 2, "maxLength": 4},
    "pattern with escapes": {"type": "string", "pattern": r'^"\\/\.$'},
    "format date": {"type": "string", "format": "date"},
    "format time": {"type": "string", "format": "time"},
    "format date-time": {"type": "string", "format": "date-time"},
    "format duration": {"type": "string", "format": "duration"},
    "format email": {"type": "string", "format": "email"},
    "format hostname": {"type": "string", "format": "hostname"},
    "format ipv4": {"type": "string", "format": "ipv4"},
    "format ipv6": {"type": "string", "format": "ipv6"},
    "format uuid": {"type": "string", "format": "uuid"},
    "format uri": {"type": "string", "format": "uri"},
    "format and pattern": {"type": "string", "format": "date", "pattern": "^20"},
    "format without type": {"format": "date", "type": ["string", "integer"]},
    # numbers
    "minimum": {"type": "integer", "minimum": 10, "maximum": 200},
    "negative": {"type": "integer", "minimum": -20, "maximum": -3},
    "exclusive": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
    "number range": {"type": "number", "minimum": 0, "maximum": 1},
    "number open range": {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 2.25},
    "multipleOf": {"type": "integer", "multipleOf": 7},
    "multipleOf and range": {"type": "integer", "multipleOf": 5, "minimum": 10, "maximum": 100},
    "multipleOf fraction": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 1000},
    # arrays
    "items": {"type": "array", "items": _INTEGER, "maxItems": 4},
    "minItems": {"type": "array", "items": _BOOLEAN, "minItems": 2, "maxItems": 3},
    "no items": {"type": "array", "maxItems": 0},
    "prefixItems": {"type": "array", "prefixItems": [_STRING, _INTEGER], "items": False, "minItems": 2},
    "prefixItems and items": {"type": "array", "prefixItems": [_NULL], "items": _BOOLEAN, "maxItems": 4},
    "prefixItems optional": {"type": "array", "prefixItems": [_BOOLEAN, _NULL], "items": False},
    "array of arrays": {"type": "array", "items": {"type": "array", "items": _NULL, "maxItems": 2}, "maxItems": 3},
    "array of objects": {"type": "array", "items": _object(a=_BOOLEAN), "minItems": 1, "maxItems": 2},
    # objects
    "properties": _object(a=_INTEGER, b=_BOOLEAN),
    "optional properties": _object(required=False, a=_INTEGER, b=_BOOLEAN, c=_NULL),
    "some required": {**_object(required=False, a=_NULL, b=_NULL, c=_NULL), "required": ["b"]},
    "open object": _POINT,
    "additionalProperties schema": {"type": "object", "additionalProperties": _BOOLEAN, "maxProperties": 3},
    "properties and additional": {"properties": {"a": _NULL}, "type": "object", "additionalProperties": _BOOLEAN},
    "patternProperties": {"type": "object", "patternProperties": {"^x-[a-z]{1,3}$": _INTEGER}, **_CLOSED},
    "patternProperties and properties": {
        "type": "object",
        "properties": {"id": _INTEGER},
        "required": ["id"],
        "patternProperties": {"^s_": _BOOLEAN},
        **_CLOSED,
    },
    "required without properties": {"type": "object", "required": ["k"], "additionalProperties": _INTEGER},
    "maxProperties": {"type": "object", "additionalProperties": _NULL, "maxProperties": 2},
    "minProperties 1": {"type": "object", "additionalProperties": _NULL, "minProperties": 1, "maxProperties": 2},
    "minProperties by required": {**_object(a=_NULL, b=_NULL), "minProperties": 2},
    "empty object": {"type": "object", **_CLOSED},
    "nested object": _object(a=_object(b=_object(c=_INTEGER))),
    "keys to escape": _object(**{'a"b': _NULL, "c\\d": _NULL, "é\n": _NULL}),
    "empty key": _object(**{"": _BOOLEAN}),
    "ten keys": _object(**{f"key_{i}": _BOOLEAN for i in range(10)}),
    # composition
    "anyOf": {"anyOf": [_INTEGER, _BOOLEAN]},
    "anyOf objects": {"anyOf": [_object(a=_NULL), _object(b=_NULL)]},
    "anyOf with siblings": {"type": "string", "anyOf": [{"maxLength": 2}, {"pattern": "^long"}], "maxLength": 8},
    "anyOf null": {"anyOf": [{"type": "string", "maxLength": 3}, _NULL]},
    "oneOf types": {"oneOf": [_INTEGER, {"type": "string", "maxLength": 4}]},
    "oneOf by key": {
        "oneOf": [_object(kind={"const": "a"}, x=_NULL), _object(kind={"const": "b"}, y=_NULL)],
        "discriminator": {"propertyName": "kind"},
    },
    "allOf": {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 30}]},
    "allOf objects": {
        "allOf": [{"type": "object", "properties": {"a": _NULL}}, {"required": ["a"], "maxProperties": 1}]
    },
    "allOf patterns": {"type": "string", "allOf": [{"pattern": "^a"}, {"pattern": "z$"}], "maxLength": 6},
    # references
    "$ref": {"$ref": "#/$defs/point", "$defs": {"point": _object(x=_INTEGER)}},
    "definitions": {"$ref": "#/definitions/p", "definitions": {"p": _object(x=_INTEGER)}},
    "$ref with siblings": {"$ref": "#/$defs/n", "maximum": 9, "$defs": {"n": {"type": "integer", "minimum": 5}}},
    "$ref twice": {**_object(a={"$ref": "#/$defs/b"}, c={"$ref": "#/$defs/b"}), "$defs": {"b": _BOOLEAN}},
    "tree": {
        **_object(value=_BOOLEAN, children={"type": "array", "items": {"$ref": "#"}, "maxItems": 2}),
        "title": "Node",
    },
    "list": {"$ref": "#/$defs/l", "$defs": {"l": {"anyOf": [_NULL, _object(next={"$ref": "#/$defs/l"})]}}},
    "$ref to an anchor": {"$ref": "#here", "$defs": {"x": {"$anchor": "here", "type": "boolean"}}},
    "$ref into properties": _object(a=_BOOLEAN, b={"$ref": "#/properties/a"}),
    # annotations and what asks for nothing
    "annotations": {
        **_object(a={**_INTEGER, "title": "A", "description": "d", "default": 3, "examples": [1], "deprecated": True}),
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": "not",
    },
    "uniqueItems false": {"type": "array", "items": _NULL, "maxItems": 3, "uniqueItems": False},
    "contentEncoding": {"type": "string", "maxLength": 4, "contentEncoding": "base64", "contentMediaType": "a/b"},
    "readOnly": {"type": "boolean", "readOnly": True, "writeOnly": False},
    # what pydantic and applications write
    "pydantic": {
        "$defs": {"Item": {**_object(name={"type": "string", "maxLength": 8}, price=_NUMBER), "title": "Item"}},
        **_object(
            items={"type": "array", "items": {"$ref": "#/$defs/Item"}, "maxItems": 2}, note={"anyOf": [_STRING, _NULL]}
        ),
        "title": "Order",
    },
    "tool call": {
        "anyOf": [
            _object(name={"const": "add"}, arguments=_object(a=_INTEGER, b=_INTEGER)),
            _object(name={"const": "now"}, arguments=_object()),
        ]
    },
    "person": _object(
        name={"type": "string", "minLength": 1, "maxLength": 10},
        age={"type": "integer", "minimum": 0, "maximum": 150},
        email={"type": "string", "format": "email", "maxLength": 20},
        tags={"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    ),
}

REFUSED: dict[str, tuple[str, Any]] = {
    # the keyword that the message must name, and the schema
    "not": ("not", {"not": {"type": "string"}}),
    "not empty": ("not", {"not": {}}),
    "not below": ("not", _object(a={"not": {"const": 1}})),
    "not in items": ("not", {"type": "array", "items": {"not": {}}}),
    "not in allOf": ("not", {"allOf": [{"not": {}}]}),
    "not in $defs": ("not", {"$defs": {"a": {"not": {}}}, "$ref": "#/$defs/a"}),
    "not in prefixItems": ("not", {"prefixItems": [{"type": "null"}, {"not": {}}]}),
    "not in additionalProperties": ("not", {"additionalProperties": {"not": {}}}),
    "not in patternProperties": ("not", {"patternProperties": {"^a": {"not": {}}}}),
    "if": ("if", {"if": {"type": "string"}, "then": {"maxLength": 3}}),
    "then alone": ("then", {"then": {}}),
    "else alone": ("else", {"else": {}}),
    "if else": ("if", {"type": "object", "if": {}, "else": {}}),
    "uniqueItems": ("uniqueItems", {"type": "array", "uniqueItems": True}),
    "uniqueItems below": ("uniqueItems", _object(a={"type": "array", "uniqueItems": True})),
    "contains": ("contains", {"type": "array", "contains": {"const": 1}}),
    "minContains": ("minContains", {"type": "array", "minContains": 2}),
    "maxContains": ("maxContains", {"type": "array", "maxContains": 2}),
    "propertyNames": ("propertyNames", {"type": "object", "propertyNames": {"maxLength": 3}}),
    "dependentRequired": ("dependentRequired", {"dependentRequired": {"a": ["b"]}}),
    "dependentSchemas": ("dependentSchemas", {"dependentSchemas": {"a": {}}}),
    "dependencies": ("dependencies", {"dependencies": {"a": ["b"]}}),
    "unevaluatedProperties": ("unevaluatedProperties", {"unevaluatedProperties": False}),
    "unevaluatedItems": ("unevaluatedItems", {"unevaluatedItems": False}),
    "$dynamicRef": ("$dynamicRef", {"$dynamicRef": "#a"}),
    "$dynamicAnchor": ("$dynamicAnchor", {"$dynamicAnchor": "a"}),
    "$recursiveRef": ("$recursiveRef", {"$recursiveRef": "#"}),
    "$recursiveAnchor": ("$recursiveAnchor", {"$recursiveAnchor": True}),
    "$vocabulary": ("$vocabulary", {"$vocabulary": {}}),
    "nullable": ("nullable", {"type": "string", "nullable": True}),
    "divisibleBy": ("divisibleBy", {"type": "integer", "divisibleBy": 2}),
    "disallow": ("disallow", {"disallow": "string"}),
    "extends": ("extends", {"extends": {}}),
    "x-guidance": ("x-guidance", {"x-guidance": {"lenient": True}, "not": {}}),
    "x-guidance below": ("x-guidance", _object(a={"x-guidance": {}})),
    # misspelt and foreign
    "propertis": ("propertis", {"propertis": {}}),
    "minLenght": ("minLenght", {"type": "string", "minLenght": 3}),
    "Type": ("Type", {"Type": "string"}),
    "require": ("require", {"type": "object", "require": ["a"]}),
    "requires": ("requires", {"type": "object", "requires": ["a"]}),
    "maxItem": ("maxItem", {"type": "array", "maxItem": 3}),
    "regex": ("regex", {"type": "string", "regex": "a"}),
    "oneof": ("oneof", {"oneof": []}),
    "optional": ("optional", _object(a={"type": "string", "optional": True})),
    "x-order": ("x-order", _object(a={"type": "string", "x-order": 1})),
    "strict": ("strict", {"type": "object", "strict": True}),
    "ordering": ("propertyOrdering", {"type": "object", "propertyOrdering": ["a"]}),
    # values that cannot be enforced
    "format unknown": ("format", {"type": "string", "format": "phone"}),
    "format regex": ("format", {"type": "string", "format": "regex"}),
    "format idn-email": ("format", {"type": "string", "format": "idn-email"}),
    "format anything": ("format", {"type": "string", "format": "unknown"}),
    "format uri-reference": ("format", _object(a={"type": "string", "format": "uri-reference"})),
    "remote $ref": ("$ref", {"$ref": "https://example.org/schema"}),
    "file $ref": ("$ref", {"$ref": "other.json#/a"}),
    "look-ahead": ("pattern", {"type": "string", "pattern": "^(?=a)b"}),
    "look-behind": ("pattern", _object(a={"type": "string", "pattern": "(?<=a)b"})),
    "back-reference": ("pattern", {"type": "string", "pattern": r"^(a)\1$"}),
    "oneOf that overlaps": ("oneOf", {"oneOf": [_STRING, {"minLength": 2}]}),
    "oneOf below": ("oneOf", _object(a={"oneOf": [_NUMBER, _INTEGER]})),
    "minProperties": ("minProperties", {"type": "object", "minProperties": 2}),
    "minProperties and too few required": ("minProperties", {**_object(a=_NULL), "minProperties": 3}),
    "multipleOf": ("multipleOf", {"type": "integer", "multipleOf": 9999999967}),
    "empty enum": ("enum", {"enum": []}),
}
