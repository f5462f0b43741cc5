"""JSON schemas: which keywords are enforced, which are annotations, and what is refused.

The grammar library enforces a part of JSON Schema 2020-12, ignores keywords that it does not know, and is looser than
the standard in a few places. A schema passes here only where the grammar accepts nothing that the schema forbids:

- each keyword is enforced, or an annotation, or refused by name with its path (a misspelt one, too);
- `format` date, time and date-time are replaced by exact patterns (the library allows 30 February and second 60);
- `minProperties` needs as many required names: keys that no name lists may repeat, and a repeated key counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from max_ray.errors import InputError, nearest, quoted

MAX_DEPTH = 64
MAX_SUBSCHEMAS = 4096
MAX_ENUM_VALUES = 10_000

_ONE = frozenset({"items", "additionalItems", "additionalProperties"})
_LISTS = frozenset({"prefixItems", "anyOf", "oneOf", "allOf"})
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_VALUES = frozenset(
    {
        *("$ref", "const", "enum", "type", "minItems", "maxItems", "required", "minProperties", "maxProperties"),
        *("minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
)
ENFORCED = _ONE | _LISTS | _MAPS | _VALUES
"""Keywords that the grammar holds to ($defs and definitions: through the references to them)."""

ANNOTATIONS = frozenset(
    {
        *("$anchor", "$schema", "$id", "id", "$comment", "title", "description", "default", "examples", "example"),
        *("readOnly", "writeOnly", "deprecated", "contentMediaType", "contentEncoding", "contentSchema"),
        "discriminator",
    }
)
"""Keywords that allow and forbid nothing."""

KNOWN_NOT_ENFORCED = frozenset(
    {
        *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies", "propertyNames"),
        *("contains", "minContains", "maxContains", "uniqueItems", "unevaluatedItems", "unevaluatedProperties"),
        *("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary"),
        *("nullable", "divisibleBy", "disallow", "extends", "x-guidance"),
    }
)
"""Keywords of JSON Schema, of its drafts and of OpenAPI that no grammar of ours holds to."""

_NEUTRAL: Mapping[str, Any] = {"uniqueItems": False, "nullable": False, "minContains": 0}
"""Values that ask for nothing; the keyword is left out."""

_LEAP_YEAR = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"  # 0000 is no year
_YEAR = r"(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_PATTERN_OF_FORMAT = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
FORMATS = frozenset({*_PATTERN_OF_FORMAT, "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
"""Values of `format` that are enforced."""


def checked_schema(schema: Any, path: str = "$") -> Any:
    """The schema as the grammar library takes it: the same set of texts, without what asks for nothing.

    Args:
        schema: Parsed JSON: an object or a boolean.
        path: Where it stands, for messages.

    Raises:
        InputError: It names the keyword that cannot be enforced and its path.
    """
    return _Walk().checked(schema, path, 0)


class _Walk:
    """One pass over a schema."""

    def __init__(self) -> None:
        self._num_subschemas = 0

    def checked(self, schema: Any, path: str, depth: int) -> Any:
        """One subschema and all below it."""
        self._num_subschemas += 1
        if depth > MAX_DEPTH:
            raise InputError(f"The JSON schema is nested more than {MAX_DEPTH} levels deep, at {_short(path)}.")
        if self._num_subschemas > MAX_SUBSCHEMAS:
            raise InputError(f"The JSON schema has more than {MAX_SUBSCHEMAS} subschemas.")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise InputError(f"The JSON schema at {_short(path)} must be an object or a boolean.")
        result: dict[str, Any] = {}
        for keyword, value in schema.items():
            place = f"{path}.{keyword}"
            if keyword in ANNOTATIONS or (keyword in _NEUTRAL and value is _NEUTRAL[keyword]):
                result |= {keyword: value} if keyword in ("$anchor", "$id", "id", "$schema") else {}
                continue
            _check_known(keyword, path)
            result[keyword] = self._applied(keyword, value, place, depth)
        _check_values(schema, path)
        _check_min_properties(schema, path)
        return _with_exact_format(result)

    def _applied(self, keyword: str, value: Any, place: str, depth: int) -> Any:
        """A keyword's value with the subschemas in it checked."""
        if keyword in _MAPS:
            return {name: self.checked(part, f"{place}.{name}", depth + 1) for name, part in _items(value, place)}
        if keyword in _LISTS or (keyword == "items" and isinstance(value, list)):
            if not isinstance(value, list):
                raise InputError(f"The keyword {keyword!r} at {_short(place)} must be a list of schemas.")
            return [self.checked(part, f"{place}[{i}]", depth + 1) for i, part in enumerate(value)]
        return self.checked(value, place, depth + 1) if keyword in _ONE else value


def subschemas(schema: Any, path: str = "$") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, subschema) of a well-formed schema and of all below it, the outer ones first."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    for keyword, value in schema.items():
        parts: Iterable[tuple[str, Any]] = ()
        if keyword in _MAPS and isinstance(value, dict):
            parts = ((f".{name}", part) for name, part in value.items())
        elif keyword in _LISTS | {"items"} and isinstance(value, list):
            parts = ((f"[{i}]", part) for i, part in enumerate(value))
        elif keyword in _ONE:
            parts = (("", value),)
        for name, part in parts:
            yield from subschemas(part, f"{path}.{keyword}{name}")


def _items(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise InputError(f"The keyword at {_short(place)} must be an object whose values are schemas.")
    yield from value.items()


def _check_known(keyword: str, path: str) -> None:
    if keyword in ENFORCED:
        return
    if keyword in KNOWN_NOT_ENFORCED:
        raise InputError(
            f"The JSON schema keyword {quoted(keyword)} at {_short(path)} cannot be enforced. Write the schema "
            f"without it."
        )
    hint = nearest(keyword, ENFORCED | ANNOTATIONS)
    raise InputError(f"Unknown JSON schema keyword {quoted(keyword)} at {_short(path)}.{hint}")


def _check_values(schema: Mapping[str, Any], path: str) -> None:
    """What the grammar library would accept and not hold to, or refuse without a place."""
    reference, form, values = schema.get("$ref"), schema.get("format"), schema.get("enum")
    if "$ref" in schema and not (isinstance(reference, str) and reference.startswith("#")):
        raise InputError(
            f"The JSON schema keyword '$ref' at {_short(path)} must point into the same schema ('#/$defs/...'), not to "
            f"{quoted(str(reference))}."
        )
    if "format" in schema and form not in FORMATS:
        raise InputError(
            f"The JSON schema keyword 'format' at {_short(path)} cannot be enforced with the value "
            f"{quoted(str(form))}. Known formats: {', '.join(sorted(FORMATS))}."
        )
    if "enum" in schema and (not isinstance(values, list) or not 0 < len(values) <= MAX_ENUM_VALUES):
        raise InputError(
            f"The JSON schema keyword 'enum' at {_short(path)} must be a list of 1 to {MAX_ENUM_VALUES} values."
        )


def _check_min_properties(schema: Mapping[str, Any], path: str) -> None:
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise InputError(f"The JSON schema keyword 'required' at {_short(path)} must be a list of texts.")
    if isinstance(least, int | float) and least > max(1, len(set(required))):
        raise InputError(
            f"The JSON schema keyword 'minProperties' at {_short(path)} cannot be enforced with the value {least}: "
            f"only up to 1, or up to the number of 'required' names."
        )


def _with_exact_format(schema: dict[str, Any]) -> dict[str, Any]:
    """Puts our pattern in the place of a format that the library takes more loosely than the standard."""
    pattern = _PATTERN_OF_FORMAT.get(schema.get("format", ""))
    if pattern is None:
        return schema
    rest = {keyword: value for keyword, value in schema.items() if keyword != "format"}
    if "pattern" not in rest:
        return rest | {"pattern": pattern}
    return rest | {"allOf": [*rest.get("allOf", []), {"pattern": pattern}]}


def _short(path: str) -> str:
    """A path for a message: in ASCII, its beginning and its end."""
    path = path if len(path) <= 160 else f"{path[:80]}...{path[-76:]}"
    return ascii(path)[1:-1]
