"""The API as an OpenAPI 3.1 document and as a page, made from the route table and from the models of the bodies."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic.json_schema import models_json_schema

from max_ray import __version__
from max_ray.serve.api.files.routes import LONGEST_S, SHORTEST_S
from max_ray.serve.api.request_fields import ApiRequest, StrictModel
from max_ray.serve.api.route_table import ROUTES, Route

_SCHEMAS = "#/components/schemas/"
_ERROR = {"description": "An error, in the shape of the route's dialect.", "content": {"application/json": {}}}
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
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


def add_documentation(api: FastAPI, bodies: Mapping[str, type[ApiRequest]]) -> None:
    """Adds `/openapi.json` and `/docs`, which need no other host.

    Args:
        api: The application.
        bodies: The model of the JSON body of a route, by the route's path.
    """
    document, page = _rendered(tuple(bodies.items()))
    get = partial(api.api_route, methods=["GET", "HEAD"])

    @get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(document)

    @get("/docs")
    async def docs() -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})


@lru_cache
def _rendered(bodies: tuple[tuple[str, type[ApiRequest]], ...]) -> tuple[dict[str, Any], str]:
    """The document and the page, made once for all applications of a process."""
    document = openapi_document(dict(bodies))
    return document, _page(document)


def openapi_document(bodies: Mapping[str, type[ApiRequest]]) -> dict[str, Any]:
    """The document of all routes.

    Args:
        bodies: The model of the JSON body of a route, by the route's path.
    """
    kinds = list(dict.fromkeys(bodies.values()))
    references, shared = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_SCHEMAS + "{model}")
    schemas = _without_refusing_branches(shared.get("$defs", {}))
    _add_null_and_neutral_fields(schemas)
    paths: dict[str, Any] = {}
    for route in ROUTES:
        body = references[bodies[route.path], "validation"] if route.path in bodies else None
        paths[route.label] = {method.lower(): _operation(route, method, body) for method in route.methods}
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


def _operation(route: Route, method: str, body: Any) -> dict[str, Any]:
    words = re.findall(r"\w+", route.label)
    operation: dict[str, Any] = {
        "operationId": "_".join([method.lower(), *words]),
        "summary": route.summary,
        "responses": {"200": {"description": "The answer."}, "default": _ERROR},
        "security": [] if route.is_open else [{"bearer": []}, {"x-api-key": []}, {}],
    }
    names = re.findall(r"\{(\w+)\}", route.label)
    if names:
        schema = {"type": "string"}
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema} for name in names]
    if body is not None and method == "POST":
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    elif (route.path, method) == ("/v1/files", "POST"):
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}
    return operation


def _add_null_and_neutral_fields(schemas: dict[str, Any]) -> None:
    """Adds what `StrictModel` lets pass: null for optional fields, and the fields that ask for nothing."""
    kinds = {kind.__name__: kind for kind in _all_models(StrictModel)}
    for name, schema in schemas.items():
        fields = schema.get("properties")
        if fields is None or name not in kinds:
            continue
        for field in set(fields) - set(schema.get("required", ())):
            fields[field] = _or_null(fields[field])
        for field, neutral in kinds[name].NEUTRAL.items():
            values = f"null, or {neutral.values}" if neutral.values else "null"
            fields.setdefault(field, {"description": f"Not honoured. Passes only as {values}."})
        for field, alias in kinds[name].ALIASES.items():
            fields[field] = {"description": f"Another server's name of a field: {alias.values}, or null."}


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
