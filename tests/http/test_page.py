"""The page at `/`: its routes, headers, caching, and what its files may not hold."""

from __future__ import annotations

import re
import tomllib

import httpx
import pytest

from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.page.assets import FOLDER, assets
from max_ray.serve.api.routes import build_api
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of
from tests.source_tree import ROOT

FILES = sorted(path.name for path in FOLDER.iterdir())
BROWSER = {
    "accept": "text/html,application/xhtml+xml,*/*;q=0.8",
    "sec-fetch-site": "none",
    "sec-fetch-mode": "navigate",
}


def client_of(engine: FakeEngine, root_path: str = "", **options: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_api(engine, ApiOptions(**options)), root_path=root_path)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def test_the_page_and_its_files(client: httpx.AsyncClient) -> None:
    page = await client.get("/", headers=BROWSER)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    linked = set(re.findall(r'(?:src|href)="(page/[^"]+)"', page.text))
    assert {"page/app.js", "page/style.css", "page/icon.svg"} <= linked
    modules = {f"page/{name}" for name in FILES if name.endswith(".js")}
    for path in linked | modules:
        reply = await client.get(f"/{path}")
        assert reply.status_code == 200
        assert reply.content == (FOLDER / path.removeprefix("page/")).read_bytes()
    assert (await client.get("/page/app.js")).headers["content-type"] == "text/javascript; charset=utf-8"
    assert (await client.get("/page/style.css")).headers["content-type"] == "text/css; charset=utf-8"
    assert (await client.get("/page/icon.svg")).headers["content-type"] == "image/svg+xml"


async def test_head(client: httpx.AsyncClient) -> None:
    assert (await client.head("/")).status_code == 200
    assert (await client.head("/page/app.js")).status_code == 200


@pytest.mark.parametrize(
    "path", ["/page/nothing.js", "/page/..%2froutes.py", "/page/%2e%2e/routes.py", "/page/__init__.py"]
)
async def test_other_files_are_not_there(client: httpx.AsyncClient, path: str) -> None:
    error_of(await client.get(path), 404)


@pytest.mark.parametrize("path", ["/", "/page/app.js"])
async def test_headers(client: httpx.AsyncClient, path: str) -> None:
    headers = (await client.get(path)).headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/", "/page/app.js"])
async def test_a_browser_that_has_a_file_gets_304(client: httpx.AsyncClient, path: str) -> None:
    tag = (await client.get(path)).headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        reply = await client.get(path, headers={"if-none-match": known})
        assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", tag)
    assert (await client.get(path, headers={"if-none-match": '"other"'})).status_code == 200


def test_every_file_has_a_tag_of_its_own() -> None:
    assert sorted(assets()) == FILES
    assert len({asset.etag for asset in assets().values()}) == len(FILES)


async def test_with_keys_the_page_is_open_and_the_api_is_not(engine: FakeEngine) -> None:
    async with client_of(engine, api_keys=("secret",)) as client:
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/page/app.js")).status_code == 200
        for path in ("/v1/server", "/v1/models", "/page", "/page/a/b"):
            error_of(await client.get(path), 401)


async def test_foreign_names_and_sites_get_no_page(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    error_of(await client.get("/", headers={"host": "evil.example"}), 403)
    error_of(await client.get("/", headers={"sec-fetch-site": "cross-site"}), 403)
    error_of(await client.get("/page/app.js", headers={"origin": "http://evil.example"}), 403)


@pytest.mark.parametrize("root", ["/llm", "/a/b"])
async def test_below_a_prefix(engine: FakeEngine, root: str) -> None:
    async with client_of(engine, root_path=root) as client:
        assert (await client.get(f"{root}/")).text == (FOLDER / "index.html").read_text()
        assert (await client.get(f"{root}/page/app.js")).status_code == 200
        moved = await client.get(root)
        assert moved.status_code == 307
        assert httpx.URL(f"http://test{root}").join(moved.headers["location"]) == f"http://test{root}/"
        assert moved.headers["location"] == root.rpartition("/")[2] + "/", "no host of the client's in it"


async def test_other_paths_keep_their_hint(client: httpx.AsyncClient) -> None:
    assert "/v1/models" in error_of(await client.get("/v1"), 404)["message"]
    error_of(await client.post("/", json={}), 405)


def test_the_files_are_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["package-data"]["max_ray.serve.api.page"] == ["files/*"]


def test_no_other_host_is_named() -> None:
    known = {"http://www.w3.org/2000/svg"}  # the namespace of SVG, which is never loaded
    for name in FILES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert set(re.findall(r"""["'(](https?://[\w.][^"')\s]*|//[\w.][^"')\s]*)""", text)) <= known, name


def test_text_never_becomes_markup() -> None:
    """In the page's own scripts; the policy's trusted types hold the browser to it, too."""
    ways = (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "DOMParser",
        "srcdoc",
    )
    for name in FILES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert [way for way in ways if way in text] == [], name
        assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|javascript:", text), name


def test_the_page_is_small() -> None:
    sizes = {name: len((FOLDER / name).read_text(encoding="utf-8").splitlines()) for name in FILES}
    assert sum(sizes.values()) < 2000, sizes
    assert max(sizes.values()) <= 400, sizes
