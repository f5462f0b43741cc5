"""The page of all fields and routes is what the code says, and what the routes answer."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from max_ray.serve.api.routes import build_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.http import field_table
from tests.http.fake_engine import FakeEngine
from tests.http.field_facts import CHAT, COMPLETIONS, EFFECTS, EMBEDDINGS, LABELS, MODELS, REASONS, RESPONSES
from tests.http.field_table import HONOURED, LABEL, NEUTRAL, REFUSED, Line
from tests.http.test_infill import coder
from tests.source_tree import ROOT

BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "ab"},
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    RESPONSES: {"input": "hi"},
    EMBEDDINGS: {"input": "a"},
}
STRANGE: list[Any] = [{"strange": [1]}, "strange", 12345, ["strange"]]
LINES = [(path, line) for path in MODELS for line in field_table.fields_of(path)]
GENERATING = [(path, line) for path, line in LINES if path != EMBEDDINGS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(write_byte_level(tmp_path_factory.mktemp("fields")), max_length=4000)


def named(path_and_line: tuple[str, Line]) -> str:
    return f"{path_and_line[0]} {path_and_line[1].name}"


def lines(*statuses: str) -> list[Any]:
    return [pytest.param(*pair, id=named(pair)) for pair in GENERATING if pair[1].status in statuses]


async def post(client: httpx.AsyncClient, path: str, **fields: Any) -> httpx.Response:
    return await client.post(path, json={**BODIES[path], **fields})


def test_the_page_is_what_the_code_says() -> None:
    assert field_table.FILE.read_text(encoding="utf-8") == field_table.document()


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse(Path(ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("path", list(MODELS))
def test_every_named_test_exists(path: str) -> None:
    for name, effect in EFFECTS[path].items():
        file, test = effect.test.split("::")
        assert test in names_in(file), f"{name}: {effect.test}"


@pytest.mark.parametrize("path", list(MODELS))
def test_no_effect_is_claimed_for_a_field_that_is_not_honoured(path: str) -> None:
    honoured = {line.name for line in field_table.fields_of(path) if line.status == HONOURED}
    assert EFFECTS[path].keys() == honoured


def test_every_refusal_has_a_reason() -> None:
    mute = [named((path, line)) for path, line in LINES if line.status == REFUSED and not line.words]
    assert mute + [line.name for line in field_table.routes() if not line.words] == []
    assert REASONS.keys() <= {line.name for _, line in LINES}


@pytest.mark.parametrize(("path", "line"), lines(HONOURED))
async def test_an_honoured_field_is_taken(tmp_path: Path, client: httpx.AsyncClient, path: str, line: Line) -> None:
    effect = EFFECTS[path][line.name]
    fields = {line.name: effect.value, **effect.beside}
    if line.name == "suffix":
        transport = httpx.ASGITransport(build_api(coder(tmp_path, "[SUFFIX]", "[PREFIX]")))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as own:
            assert (await post(own, path, **fields)).status_code == 200
        return
    reply = await post(client, path, **fields)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(("path", "line"), lines(LABEL))
async def test_a_label_changes_nothing(client: httpx.AsyncClient, path: str, line: Line) -> None:
    value: Any = {"a": "b"} if line.name == "metadata" else "x"
    plain, labelled = await post(client, path), await post(client, path, **{line.name: value})
    assert labelled.status_code == 200
    assert line.name in LABELS
    part = "output" if path == RESPONSES else "choices"
    texts = [str(reply.json()[part]).split("'content'")[-1] for reply in (plain, labelled)]
    assert texts[0] == texts[1]
    assert (await post(client, path, **{line.name: 5})).json()["error"]["param"] == line.name


@pytest.mark.parametrize(("path", "line"), lines(NEUTRAL, REFUSED))
async def test_a_field_that_asks_for_something_is_a_400_that_names_it(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, line: Line
) -> None:
    neutral = MODELS[path].NEUTRAL.get(line.name)
    refused = [v for v in STRANGE if neutral is None or not neutral.passes(v, BODIES[path])]
    assert refused
    for value in refused:
        reply = await post(client, path, **{line.name: value})
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == line.name
        assert line.name in reply.json()["error"]["message"]
    assert not engine.contexts
    if neutral is not None:
        assert (await post(client, path, **{line.name: None})).status_code == 200


@pytest.mark.parametrize(("path", "line"), lines(NEUTRAL))
async def test_neutral_values_pass(client: httpx.AsyncClient, path: str, line: Line) -> None:
    neutral = MODELS[path].NEUTRAL[line.name]
    candidates: list[Any] = [None, True, False, 0, 1, -1, 1.0, 0.1, "", "auto", "none", "in_memory", [], {}, ["text"]]
    passing = [v for v in candidates[1:] if neutral.passes(v, BODIES[path])]
    assert passing, neutral.values
    for value in passing:
        assert (await post(client, path, **{line.name: value})).status_code == 200, value


@pytest.mark.parametrize("line", [pytest.param(line, id=line.name) for line in field_table.routes()])
async def test_routes(client: httpx.AsyncClient, line: Line) -> None:
    method, path = line.name.split()
    path = path.replace("{name}", "app.js") if path.startswith("/page/") else re.sub(r"{\w+}", "fake", path)
    reply = await client.request(method, path, json={} if method == "POST" else None)
    is_unknown = reply.status_code in (404, 405) and reply.json().get("error") and _says_no_route(reply)
    assert bool(is_unknown) == (line.status == REFUSED), reply.text


def _says_no_route(reply: httpx.Response) -> bool:
    error = reply.json()["error"]
    return isinstance(error, dict) and (reply.status_code == 405 or error.get("code") == "route_not_found")


async def test_a_model_that_is_not_served(client: httpx.AsyncClient) -> None:
    for path in (COMPLETIONS, CHAT, RESPONSES):
        reply = await post(client, path, model="other")
        assert (reply.status_code, reply.json()["error"]["param"]) == (404, "model")
