"""The route table, /openapi.json and /docs agree with the application; keys in either header; what needs no key."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import jsonschema
import pytest
from fastapi.routing import APIRoute

from max_ray.scheduler import SchedulerStats
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.operations import OPERATIONS
from max_ray.serve.api.route_table import ROUTES, counted_label
from max_ray.serve.api.routes import build_api
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of
from tests.source_tree import ROOT


def test_the_table_has_the_routes_of_the_application(engine: FakeEngine) -> None:
    api = build_api(engine)
    served: dict[str, set[str]] = {}
    for route in api.routes:
        if isinstance(route, APIRoute):
            served.setdefault(route.path, set()).update(route.methods)
    assert served == {route.path: set(route.methods) for route in ROUTES}


async def test_the_document_names_all_routes_and_bodies(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert {path: set(methods) for path, methods in document["paths"].items()} == {
        route.label: {method.lower() for method in route.methods} for route in ROUTES
    }
    for path, methods in document["paths"].items():
        if set(methods) == {"post"} and not path.endswith("/cancel"):
            assert "requestBody" in methods["post"], path
    operations = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
    assert len(operations) == len(set(operations))
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])


async def test_every_operation_says_what_it_answers(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    served = {(method, route.path) for route in ROUTES for method in route.methods if method != "HEAD"}
    assert {" ".join(one) for one in served} == set(OPERATIONS)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            answers = operation["responses"]
            assert {"200", "4XX", "5XX"} <= set(answers), path
            assert ("content" in answers["200"]) == ("content" in answers["4XX"]) == (method != "head"), path
            for content in operation.get("requestBody", {}).get("content", {}).values():
                assert "example" in content or path == "/v1/files", path
    streams = {path for path, methods in document["paths"].items() if "text/event-stream" in json.dumps(methods)}
    assert streams == {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"}


async def test_keys_are_required_where_the_server_has_some(
    client: httpx.AsyncClient, guarded: httpx.AsyncClient
) -> None:
    for caller, ways in ((client, 3), (guarded, 2)):
        paths = (await caller.get("/openapi.json")).json()["paths"]
        assert len(paths["/v1/models"]["get"]["security"]) == ways
        assert paths["/health"]["get"]["security"] == []


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches/", "/v1/files/x", "/v1/models/a/b", "/ping", "/tokenize"])
async def test_405_names_the_methods_of_all_routes_of_a_path(client: httpx.AsyncClient, path: str) -> None:
    reply = await client.request("OPTIONS", path)
    error_of(reply, 405)
    (route,) = (route for route in ROUTES if route.pattern.fullmatch(path.removesuffix("/")))
    assert reply.headers["allow"].split(", ") == list(route.methods)


def test_the_readme_has_the_table() -> None:
    text = (ROOT / "deployments" / "README.md").read_text(encoding="utf-8")
    rows = [
        tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in text.splitlines() if line.startswith("| `/")
    ]
    assert rows == [
        (
            f"`{route.label}`",
            " ".join(method for method in route.methods if method != "HEAD"),
            route.summary + (" No key." if route.is_open else ""),
        )
        for route in ROUTES
    ]


@pytest.mark.parametrize(
    ("path", "body", "is_valid"),
    [
        ("/v1/completions", {"prompt": "a"}, True),
        ("/v1/completions", {"prompt": "a", "temperature": None, "guided_json": None, "stop": ["a"]}, True),
        ("/v1/completions", {"prompt": "a", "temprature": 1}, False),
        ("/v1/completions", {"prompt": "a", "temperature": "1"}, False),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", "refusal": None}]}, True),
        ("/v1/chat/completions", {"messages": []}, False),
        (
            "/tokenize",
            {"prompt": None, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            True,
        ),
        ("/detokenize", {"tokens": [1, 2]}, True),
        ("/detokenize", {"tokens": "a"}, False),
    ],
)
async def test_the_schemas_say_what_is_taken(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], is_valid: bool
) -> None:
    document = (await client.get("/openapi.json")).json()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    checker = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
    assert checker.is_valid(body) == is_valid
    assert ((await client.post(path, json=body)).status_code == 200) == is_valid


async def test_the_page_names_no_other_host(client: httpx.AsyncClient) -> None:
    reply = await client.get("/docs")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    for route in ROUTES:
        assert f"<code>{route.label}</code>" in reply.text
    assert not re.search(r"<script|<link|src=|@import|url\(", reply.text)
    links = re.findall(r'href="([^"]*)"', reply.text)
    assert set(re.findall(r'href="#(\w+)"', reply.text)) <= set(re.findall(r'id="(\w+)"', reply.text))
    assert all(link == "openapi.json" or link.startswith("#") for link in links)


async def test_ping_is_health(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for method in ("GET", "POST"):
        assert (await client.request(method, "/ping")).status_code == 200
    engine.is_healthy = False
    assert (await client.get("/ping")).status_code == 503


async def test_keys_in_either_header(guarded: httpx.AsyncClient) -> None:
    for headers in ({"Authorization": "Bearer key-two"}, {"x-api-key": "key-one"}):
        assert (await guarded.get("/v1/models", headers=headers)).status_code == 200
        assert (await guarded.post("/tokenize", json={"prompt": "a"}, headers=headers)).status_code == 200
    for wrong in ({}, {"x-api-key": "key-thre"}, {"x-api-key": ""}, {"Authorization": "Basic key-one"}):
        error_of(await guarded.get("/v1/models", headers=wrong), 401)
        error_of(await guarded.post("/tokenize", json={"prompt": "a"}, headers=wrong), 401)


async def test_what_needs_no_key(engine: FakeEngine) -> None:
    transport = httpx.ASGITransport(build_api(engine, ApiOptions(api_keys=("key",))))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for route in ROUTES:
            path = re.sub(r"\{.*?\}", "x", route.path)
            status = (await client.request(route.methods[0], path)).status_code
            assert (status != 401) == route.is_open, path
            assert (await client.request(route.methods[0], f"{path}/")).status_code == status, path


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/v1/completions", "/v1/completions"),
        ("/v1/models/a/b", "/v1/models/{model}"),
        ("/v1/models/{model}", "/v1/models/{model}"),
        ("/v1/models/a\nb", "/v1/models/{model}"),
        ("/v1/nothing", "other"),
        ("/api/nothing", "other"),
        ("/tokenize", "/tokenize"),
        ("/health", None),
        ("/docs", None),
        ("/nothing", None),
        ("/", None),
    ],
)
def test_labels_of_the_counters(path: str, label: str | None) -> None:
    assert counted_label(path) == label


async def test_new_routes_are_counted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/tokenize", json={"prompt": "a"})
    await client.post("/detokenize", json={"tokens": "a"})
    await client.get("/tokenizer_info/")
    await client.get("/ping")
    assert engine.metrics.snapshot(SchedulerStats()).requests == {
        ("/tokenize", 200): 1,
        ("/detokenize", 400): 1,
        ("/tokenizer_info", 200): 1,
    }
