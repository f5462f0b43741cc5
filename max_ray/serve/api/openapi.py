"""The API as an OpenAPI 3.1 document and as a page, made from the route table and from the models of the bodies."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from max_ray import __version__
from max_ray.serve.api.error_shapes import ANTHROPIC, OLLAMA, OPENAI, ErrorShape, error_shape_of
from max_ray.serve.api.files.routes import LONGEST_S, SHORTEST_S
from max_ray.serve.api.objects.errors import AnthropicErrorObject, ErrorObject, OllamaErrorObject
from max_ray.serve.api.operations import JSON, OPERATIONS, Operation
from max_ray.serve.api.request_fields import ApiRequest, StrictModel
from max_ray.serve.api.route_table import ROUTES, Route

_SCHEMAS = "#/components/schemas/"
_ERRORS: Mapping[ErrorShape, Any] = {OPENAI: ErrorObject, ANTHROPIC: AnthropicErrorObject, OLLAMA: OllamaErrorObject}
_REFUSED = (
    "The request is at fault. A body that its schema allows is refused too where fields contradict each other, a text "
    "is too long for the model, a grammar cannot be compiled, or the model is for another task."
)
_FAILED = "The server cannot answer now, or failed."
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "dependentRequired": {
        "expires_after[anchor]": ["expires_after[seconds]"],
        "expires_after[seconds]": ["expires_after[anchor]"],
    },
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "const": "batch"},
        "expires_after[anchor]": {"type": "string", "const": "created_at"},
        "expires_after[seconds]": {"type": "integer", "minimum": SHORTEST_S, "maximum": LONGEST_S},
    },
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>max_ray API</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
:root {{ color-scheme: light dark }}
code, pre {{ font-family: ui-monospace, monospace; font-size: 0.9em }} table {{ border-collapse: collapse }}
td, th {{ text-align: left; vertical-align: top; padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid #8884 }}
</style></head><body><h1>max_ray {version}</h1>
<p>The same as a document for programs: <a href="openapi.json">openapi.json</a>.</p>
<table><tr><th>route</th><th>methods</th><th>what it does</th></tr>{rows}</table>{bodies}</body></html>
"""


@dataclass(frozen=True)
class Description:
    """What the document depends on.

    Args:
        bodies: The model of the JSON body of a route, by the route's path.
        model: The name of a served model, for examples.
        needs_key: Whether the server has API keys.
    """

    bodies: tuple[tuple[str, type[ApiRequest]], ...]
    model: str
    needs_key: bool


def add_documentation(
    api: FastAPI, bodies: Mapping[str, type[ApiRequest]], model: Callable[[], str], *, needs_key: bool
) -> None:
    """Adds `/openapi.json` and `/docs`, which need no other host.

    Args:
        api: The application.
        bodies: The model of the JSON body of a route, by the route's path.
        model: Gives the name of a served model, for examples; called by the first request.
        needs_key: Whether the server has API keys.
    """
    get = partial(api.api_route, methods=["GET", "HEAD"])

    def rendered() -> tuple[dict[str, Any], str]:
        return _rendered(Description(tuple(bodies.items()), model(), needs_key))

    @get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(rendered()[0])

    @get("/docs")
    async def docs() -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
        return HTMLResponse(rendered()[1], headers={"Content-Security-Policy": policy})


@lru_cache
def _rendered(described: Description) -> tuple[dict[str, Any], str]:
    """The document and the page, made once for all applications of a process."""
    document = openapi_document(described)
    return document, _page(document)


def openapi_document(described: Description) -> dict[str, Any]:
    """The document of all routes.

    Args:
        described: What it depends on.
    """
    bodies = dict(described.bodies)
    references, schemas = _schemas(bodies)
    paths: dict[str, Any] = {}
    for route in ROUTES:
        for method in route.methods:
            one = OPERATIONS[f"{'GET' if method == 'HEAD' else method} {route.path}"]
            body = references.get(bodies[route.path]) if method == "POST" and route.path in bodies else None
            operation = _operation(route, method, described) | _content_of(route, method, one, body, described.model)
            operation["responses"] = _responses(route, method, one, references)
            paths.setdefault(route.label, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "max_ray", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _schemas(bodies: Mapping[str, type[ApiRequest]]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """(references by type, components) of all bodies and answers."""
    kinds: list[Any] = list(dict.fromkeys(bodies.values()))
    answers = list({id(one.answer): one.answer for one in OPERATIONS.values() if one.answer is not None}.values())
    inputs: list[tuple[Any, JsonSchemaMode, TypeAdapter[Any]]] = [
        *((kind, "validation", TypeAdapter(kind)) for kind in kinds),
        *((kind, "serialization", TypeAdapter(kind)) for kind in (*answers, *_ERRORS.values())),
    ]
    found, shared = TypeAdapter.json_schemas(inputs, ref_template=_SCHEMAS + "{model}")
    schemas = _without_refusing_branches(shared.get("$defs", {}))
    _add_null_and_neutral_fields(schemas)
    for schema in schemas.values():  # an answer has the fields that are told, and no other
        if schema.get("type") == "object" and "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return {key: schema for (key, _), schema in found.items()}, schemas


def _operation(route: Route, method: str, described: Description) -> dict[str, Any]:
    words = re.findall(r"\w+", route.label)
    keys: list[dict[str, Any]] = [{"bearer": []}, {"x-api-key": []}]
    return {
        "operationId": "_".join([method.lower(), *words]),
        "summary": route.summary,
        "security": [] if route.is_open else keys if described.needs_key else [*keys, {}],
    }


def _content_of(route: Route, method: str, one: Operation, body: Any, model: str) -> dict[str, Any]:
    """The parameters and the body of an operation."""
    content: dict[str, Any] = {}
    names = re.findall(r"\{(\w+)\}", route.label)
    text = {"type": "string"}
    parameters = [{"name": name, "in": "path", "required": True, "schema": text} for name in names]
    if names == ["model"]:
        parameters[0]["example"] = model
    parameters += [{"name": name, "in": "query", "schema": dict(schema)} for name, schema in one.query.items()]
    if parameters:
        content["parameters"] = parameters
    if body is not None:
        example = {**({"model": model} if one.needs_model else {}), **(one.example or {})}
        content["requestBody"] = {"required": True, "content": {JSON: {"schema": body, "example": example}}}
    elif (route.path, method) == ("/v1/files", "POST"):
        content["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}
    return content


def _responses(route: Route, method: str, one: Operation, references: Mapping[Any, Any]) -> dict[str, Any]:
    """What an operation answers, by status. HEAD answers without content."""
    error = _ERRORS[error_shape_of(route.path)]
    whole: dict[str, Any] = {} if one.answer is None else {"schema": references[one.answer]}
    stream = {} if one.stream is None else {one.stream: {"schema": {"type": "string"}}}
    told = {} if method == "HEAD" else {"content": {one.media_type: whole, **stream}}
    failed = {} if method == "HEAD" else {"content": {JSON: {"schema": references[error]}}}
    return {
        "200": {"description": "The answer.", **told},
        **{str(status): {"description": meaning} for status, meaning in one.others.items()},
        "4XX": {"description": _REFUSED, **failed},
        "5XX": {"description": _FAILED, **failed},
    }


def _add_null_and_neutral_fields(schemas: dict[str, Any]) -> None:
    """Adds what `StrictModel` lets pass: null for optional fields, and the fields that ask for nothing."""
    kinds = {name: kind for kind in _all_models(StrictModel) for name in _names_of(kind)}
    for name, schema in schemas.items():
        fields = schema.get("properties")
        if fields is None or name not in kinds:
            continue
        for field in set(fields) - set(schema.get("required", ())):
            fields[field] = _or_null(fields[field])
        for field, neutral in kinds[name].NEUTRAL.items():
            values = f"null, or {neutral.values}" if neutral.values else "null"
            fields.setdefault(field, {"description": f"Not honoured. Passes only as {values}.", **neutral.schema})
        for field, alias in kinds[name].ALIASES.items():
            text = f"Another server's name of a field: {alias.values}, or null."
            fields[field] = {"description": text, **alias.schema}


def _without_refusing_branches(schema: Any) -> Any:
    """A schema without the branches of unions that only refuse: pydantic shows them as `{}`, which takes anything."""
    if isinstance(schema, list):
        return [_without_refusing_branches(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "oneOf" in schema:
        branches = [branch for branch in schema["oneOf"] if branch]
        schema = {key: value for key, value in schema.items() if key not in ("oneOf", "discriminator")}
        schema["anyOf"] = branches
    return {key: _without_refusing_branches(value) for key, value in schema.items()}


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    if {"type": "null"} in schema.get("anyOf", ()) or not schema.keys() & {"type", "$ref", "anyOf", "oneOf", "enum"}:
        return dict(schema)
    outside = {key: schema[key] for key in ("title", "description", "default") if key in schema}
    inside = {key: value for key, value in schema.items() if key not in outside}
    return {**outside, "anyOf": [inside, {"type": "null"}]}


def _names_of(kind: type[StrictModel]) -> tuple[str, str]:
    """The name of a model in the document: its own, or the long one where two models have the same."""
    return kind.__name__, f"{kind.__module__}.{kind.__qualname__}".replace(".", "__")


def _all_models(kind: type[StrictModel]) -> list[type[StrictModel]]:
    return [kind, *(model for child in kind.__subclasses__() for model in _all_models(child))]


def _page(document: Mapping[str, Any]) -> str:
    """The document for people. Plain HTML: it loads nothing and runs nothing."""
    rows, bodies = [], []
    for path, methods in document["paths"].items():
        operation = methods.get("post") or next(iter(methods.values()))
        cells = (
            f"<code>{html.escape(path)}</code>",
            " ".join(m.upper() for m in methods),
            html.escape(operation["summary"]),
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        if "application/json" in operation.get("requestBody", {}).get("content", ()):
            bodies.append(_body_section(path, operation["requestBody"]))
    schemas = document["components"]["schemas"]
    bodies += [_schema_section(name, schemas[name]) for name in sorted(schemas)]
    return _PAGE.format(version=html.escape(document["info"]["version"]), rows="".join(rows), bodies="".join(bodies))


def _body_section(path: str, body: Mapping[str, Any]) -> str:
    name = body["content"]["application/json"]["schema"]["$ref"].removeprefix(_SCHEMAS)
    return f'<p><code>{html.escape(path)}</code> takes <a href="#{name}">{name}</a>.</p>'


def _schema_section(name: str, schema: Mapping[str, Any]) -> str:
    text = html.escape(json.dumps(schema, indent=1, ensure_ascii=False))
    linked = re.sub(rf"{re.escape(_SCHEMAS)}(\w+)", r'<a href="#\1">\1</a>', text)
    return f'<h2 id="{html.escape(name)}">{html.escape(name)}</h2><pre>{linked}</pre>'
